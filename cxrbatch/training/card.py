"""CARD.md of a bundle, written from what was measured: the manifest, an evaluation, and the shortcut checks.

No figure is typed by hand. The honest one, other hospitals' films, comes first.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cxrbatch.training.report import percent

__all__ = ["Target", "card_text", "write_card"]

#: (what, set, path to the figure, aim, whether higher is better)
Target = tuple[str, str, tuple[str, ...], float, bool]

_SEVERAL = 5  # films: a source of fewer says nothing by itself
_SETS = {
    "external": "other hospitals, other cameras: the number that matters",
    "cascade": "held-out films of the hospitals it was trained on",
    "alveoli_test": "the published test split of the four-class system (746 of its 771 films)",
    "covid3": "the published test set of the three-class system (66 films, 6 of them also in its training set)",
    "covid3-leak-free": "the same without the test films whose bytes are also in the training set",
    "gate": "pictures that are no chest films",
    "other_abnormal": "abnormal films whose disease is none of the classes",
    "weak_opacity": "infiltration or consolidation by report, without the word pneumonia",
}


def write_card(
    bundle: Path,
    evaluation: dict[str, Any],
    *,
    sources: Sequence[str] = (),
    targets: Sequence[Target] = (),
    checks: Sequence[str] = (),
    limits: Sequence[str] = (),
    compared: Sequence[Sequence[str]] = (),
) -> None:
    """Write `bundle`/CARD.md. `evaluation` is `evaluate`'s result; `sources` are keys of sources.toml.

    `checks`, `limits` are sentences; `compared` a table (first row: its head) of published, literal, shipped.
    """
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    text = card_text(manifest, evaluation, sources, targets, checks, limits, compared)
    part = bundle / "CARD.md.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, bundle / "CARD.md")


def card_text(
    manifest: dict[str, Any],
    evaluation: dict[str, Any],
    sources: Sequence[str] = (),
    targets: Sequence[Target] = (),
    checks: Sequence[str] = (),
    limits: Sequence[str] = (),
    compared: Sequence[Sequence[str]] = (),
) -> str:
    """The card as Markdown."""
    sets = evaluation["sets"]
    parts = [
        f"# {manifest['name']} {manifest['version']}",
        manifest["intended_use"],
        f"**Licence.** {manifest['licence']}",
        "## Figures",
        "95 % intervals in brackets are bootstrapped by patient; a share of 0 or 100 % has the exact bound for so many "
        "patients (an AUC or F1 of 1 has none). Temperature and thresholds were chosen on validation. "
        f"Engine: {evaluation['engine']}.",
        *(_set(name, sets[name]) for name in _SETS if name in sets),
    ]
    if targets:
        parts += ["## Aims, met and missed", _table([("aim", "wanted", "measured", ""), *_aims(sets, targets)])]
    if compared:
        parts += ["## Published, literal recipe, shipped", _table(compared)]
    parts += ["## How it was made", *(_stage(stage) for stage in manifest["stages"])]
    if checks:
        parts += ["## Does it look at lungs, or at where a film comes from?", _list(checks)]
    if limits:
        parts += ["## How it fails, and what it was not tested on", _list(limits)]
    if sources:
        parts += ["## Data", _data(sources)]
    return "\n\n".join(parts) + "\n"


def _set(name: str, found: dict[str, Any]) -> str:
    parts = [f"### {name}: {_SETS[name]} ({found['films']} films)"]
    if "disease" in found:
        d, e = found["disease"], found["end_to_end"]
        i = d["intervals"]
        rows = [
            ("accuracy", percent(d["accuracy"], i["accuracy"])),
            ("balanced accuracy", percent(d["balanced_accuracy"], i["balanced_accuracy"])),
            ("expected calibration error", f"{d['ece']:.3f} ({i['ece'][0]:.3f}-{i['ece'][1]:.3f})"),
        ]
        if d.get("normal_auc") is not None:
            low, high = i["normal_auc"]
            rows.append(("NORMAL against the rest, AUC", f"{d['normal_auc']:.3f} ({low:.3f}-{high:.3f})"))
        rows += [
            *(
                (f"end to end: {what}", percent(e[key], e["intervals"][key]))
                for what, key in (
                    ("sent to review", "sent_to_review"),
                    ("errors that are sent to review", "errors_sent_to_review"),
                    ("accuracy of what is reported", "accuracy_of_reported"),
                )
            ),
        ]
        parts.append(_table([("figure", "value"), *rows]))
        parts.append(_table([("class", "films", "precision", "recall", "F1"), *_classes(d)]))
        if hospitals := [r for r in found["sources"] if r["films"] >= _SEVERAL]:
            told = [(r["label"], r["source"], str(r["films"]), percent(r["recall"], r["interval"])) for r in hospitals]
            parts.append(_table([("class", "source", "films", "recall"), *told]))
    gate = found.get("gate")
    if gate and name in ("gate", "cascade", "external"):
        i = gate["intervals"]
        said = [f"chest films passed {percent(gate['chest_passed'], i['chest_passed'])}"]
        rejected = gate["not_chest_rejected"]  # of no such picture: not a number, or null from evaluation.json
        if rejected is not None and rejected == rejected:
            said.append(f"others rejected {percent(rejected, i['not_chest_rejected'])}")
        parts.append("Gate: " + ", ".join(said) + ".")
        if name == "gate":
            right = (
                f"{s['label']} {s['source']} {round(s['right'] * s['films'])}/{s['films']}" for s in gate["sources"]
            )
            parts.append(f"Right by source: {', '.join(right)}.")
    for label, called in found["called"].items():
        if name == "gate":
            continue
        said_ = ", ".join(f"{k} {n}" for k, n in called["called"].items() if n)
        parts.append(
            f"{label} is called: {said_}. Sent to review "
            f"{percent(called['sent_to_review'], called['intervals']['sent_to_review'])}; review or not called NORMAL "
            f"{percent(called['review_or_not_normal'], called['intervals']['review_or_not_normal'])}."
        )
    return "\n\n".join(parts)


def _classes(disease: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for label, row in disease["per_class"].items():
        if row["support"]:
            i = disease["intervals"]
            low, high = i[f"f1 {label}"]
            yield (
                label, str(row["support"]), percent(row["precision"], i[f"precision {label}"]),
                percent(row["recall"], i[f"recall {label}"]), f"{row['f1']:.3f} ({low:.3f}-{high:.3f})",
            )  # fmt: skip


def _aims(sets: dict[str, Any], targets: Sequence[Target]) -> Iterable[tuple[str, ...]]:
    for what, name, path, aim, higher in targets:
        value: Any = sets.get(name)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            continue
        met = value >= aim if higher else value <= aim
        sign = "at least" if higher else "at most"
        yield what, f"{sign} {aim:g}", f"{value:.3f}", "met" if met else "**missed**"


def _stage(stage: dict[str, Any]) -> str:
    plane, training = stage["plane"], stage.get("training", {})
    lines = [
        f"**{stage['role']}**: {stage['architecture']}, {plane['size']} x {plane['size']} ({plane['fit']}), "
        f"{stage['channels']} channel(s), classes {', '.join(stage['classes'])}.",
        f"Recipe {training.get('recipe', 'unknown')} (SHA-256 {training.get('recipe_sha256', '')[:12]}), data SHA-256 "
        f"{training.get('data_sha256', '')[:12]}. {training.get('note', '')}".strip(),
        f"Temperature {stage['temperature']:g}, threshold {stage['threshold']:g}, chosen on {stage['chosen_on']}.",
    ]
    return _list(lines)


def _data(keys: Sequence[str]) -> str:
    file = Path(__file__).with_name("sources.toml")
    known = tomllib.loads(file.read_text(encoding="utf-8"))["source"]
    rows = [(s["name"], s["licence"], s["role"]) for s in known if s["key"] in keys]
    return _table([("source", "licence", "used as"), *rows])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cut = ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *cut])
