"""The evaluation as tables for a terminal, on stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["percent", "print_report"]

_WITHOUT = {
    "-leak-free": "without the images whose bytes are those of a training image",
    "-new-patients": "without images of a patient (manifest.csv, group) of whom there is a training image",
}
_SOURCES = 30  # rows of a set's table: the largest sources


def percent(value: float | None, interval: list[float] | None = None) -> str:
    """A share as '93.5 %', with its 95 % interval if there is one; a dash for None or NaN."""
    if value is None or value != value:
        return "-"
    text = f"{100 * value:.1f} %"
    if interval and interval[0] == interval[0]:
        text += f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def print_report(result: dict[str, Any], console: Console) -> None:
    """Print what `evaluate` returned."""
    bundle = escape(f"{result['bundle']} {result['version']}")
    console.print(f"[bold]{bundle}[/bold], split {result['split']}, {result['engine']}")
    for name, found in result["sets"].items():
        console.rule(f"{escape(name)}: {found['images']} images")
        for ending, sentence in _WITHOUT.items():
            if name.endswith(ending):
                console.print(f"the same, {sentence}")
        if "disease" in found:
            _disease(console, found)
        if sets := found.get("label_sets"):
            console.print(
                f"label sets: right class named {percent(sets['coverage'], sets['intervals']['coverage'])}, "
                f"{sets['mean_size']:.2f} classes named"
            )
        if "gate" in found:
            _gate(console, found["gate"])
        for label, called in found["called"].items():
            said = ", ".join(f"{k} {n}" for k, n in called["called"].items() if n)
            i = called["intervals"]
            console.print(
                f"{escape(label)}: called {escape(said)}; "
                f"sent to review {percent(called['sent_to_review'], i['sent_to_review'])}, "
                f"review or not NORMAL {percent(called['review_or_not_normal'], i['review_or_not_normal'])}, "
                f"AUC of abnormal against these {_number(called['abnormal_auc'])}"
            )
    for path, why in result.get("unreadable", ())[:20]:
        console.print(f"[yellow]not read:[/yellow] {escape(path)}: {escape(why)}", highlight=False)


def _disease(console: Console, found: dict[str, Any]) -> None:
    d, e = found["disease"], found["end_to_end"]
    i = d["intervals"]
    console.print(
        f"accuracy {percent(d['accuracy'], i['accuracy'])}   balanced "
        f"{percent(d['balanced_accuracy'], i['balanced_accuracy'])}   ECE {d['ece']:.3f}   "
        f"NORMAL against the rest, AUC {_number(d.get('normal_auc'))}"
    )
    table = Table("class", "precision", "recall (95 %)", "F1", "AUC", "images", "called", box=None, pad_edge=False)
    digits = len(str(max(n for row in d["confusion"] for n in row)))  # narrow: 80 columns hold four classes
    for row, (label, c) in enumerate(d["per_class"].items()):
        said = " ".join(f"{n:>{digits}}" for n in d["confusion"][row])
        table.add_row(
            escape(label), percent(c["precision"]), percent(c["recall"], i[f"recall {label}"]),
            _number(c["f1"]), _number(d["auc"][label]), str(c["support"]), said,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"end to end: accuracy {percent(e['accuracy'])}, rejected by the gate {percent(e['rejected_by_gate'])}, "
        f"to review {percent(e['sent_to_review'], e['intervals']['sent_to_review'])}, "
        f"errors to review {percent(e['errors_sent_to_review'], e['intervals']['errors_sent_to_review'])}, "
        f"accuracy of what is reported {percent(e['accuracy_of_reported'], e['intervals']['accuracy_of_reported'])}"
    )
    table = Table("class", "source", "images", "recall (95 %)", "to review", "called", box=None, pad_edge=False)
    shown = sorted(found["sources"], key=lambda r: -r["images"])[:_SOURCES]
    for r in sorted(shown, key=lambda r: (r["label"], r["source"])):
        said = ", ".join(f"{k} {n}" for k, n in r["called"].items())
        table.add_row(
            escape(r["label"]), escape(r["source"]), str(r["images"]), percent(r["recall"], r["interval"]),
            percent(r["sent_to_review"]), escape(said),
        )  # fmt: skip
    console.print(table)
    if len(found["sources"]) > _SOURCES:
        console.print(f"... and {len(found['sources']) - _SOURCES} smaller sources: see evaluation.json (-o)")


def _gate(console: Console, gate: dict[str, Any]) -> None:
    i = gate["intervals"]
    console.print(
        f"gate: chest passed {percent(gate['chest_passed'], i['chest_passed'])}, "
        f"not-chest rejected {percent(gate['not_chest_rejected'], i['not_chest_rejected'])}, "
        f"lateral not passed {percent(gate['lateral_not_passed'], i['lateral_not_passed'])}"
    )
    for r in gate["sources"]:
        if r["right"] < 1 and r["label"] in ("CHEST", "NOT_CHEST", "LATERAL"):
            console.print(
                f"  {escape(r['label'])} {escape(r['source'])}: {r['images']} images, right {percent(r['right'])}"
            )
