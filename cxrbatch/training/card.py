"""Write the CARD.md of a bundle from measurements: the manifest, an evaluation, and the shortcut checks.

No figure is typed by hand. The most important set, images of other hospitals, comes first.
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

_SEVERAL = 5  # images: the recall of a smaller source means nothing
_SETS = {
    "external": "other hospitals, other cameras: the number that matters",
    "cascade": "held-out images of the hospitals it was trained on",
    "rsna": "radiologist-confirmed pneumonia and normals of adults, in both views",
    "siim": "adults suspected of COVID-19: three answers from the same hospitals",
    "alveoli_test": "the published test split of the four-class system (746 of its 771 images)",
    "covid3": "the published test set of the three-class system (66 images, 6 of them also in its training set)",
    "covid3-leak-free": "the same without the test images whose bytes are also in the training set",
    "gate": "images that are no chest images",
    "lateral": "lateral chest images, which the disease model must not score",
    "other_abnormal": "abnormal images whose disease is none of the classes",
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

    `checks` and `limits` are sentences; `compared` is a table (first row: header) of published, literal and shipped.
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
        parts += ["## Does it look at lungs, or at where an image comes from?", _list(checks)]
    if limits:
        parts += ["## How it fails, and what it was not tested on", _list(limits)]
    if sources:
        parts += ["## Data", _data(sources)]
    return "\n\n".join(parts) + "\n"


def _set(name: str, found: dict[str, Any]) -> str:
    parts = [f"### {name}: {_SETS[name]} ({found['images']} images)"]
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
        parts.append(_table([("class", "images", "precision", "recall", "F1"), *_classes(d)]))
        if hospitals := [r for r in found["sources"] if r["images"] >= _SEVERAL]:
            recalls = [
                (r["label"], r["source"], str(r["images"]), percent(r["recall"], r["interval"])) for r in hospitals
            ]
            parts.append(_table([("class", "source", "images", "recall"), *recalls]))
    if sets := found.get("label_sets"):
        i, by_class = sets["intervals"], ", ".join(f"{k} {percent(v)}" for k, v in sets["coverage_by_class"].items())
        parts.append(
            f"Label sets: the right class is named in {percent(sets['coverage'], i['coverage'])} ({by_class}); "
            f"{sets['mean_size']:.2f} classes are named on average."
        )
    gate = found.get("gate")
    if gate and name in ("gate", "lateral", "cascade", "external"):
        i = gate["intervals"]
        shares = {
            "chest images passed": "chest_passed",
            "others rejected": "not_chest_rejected",
            "lateral images not passed as frontal": "lateral_not_passed",
        }
        # Of no such image: not a number, or null from evaluation.json.
        said = [
            f"{what} {percent(gate[key], i[key])}"
            for what, key in shares.items()
            if gate.get(key) is not None and gate[key] == gate[key]
        ]
        parts.append("Gate: " + ", ".join(said) + ".")
        if name == "gate":
            right = (
                f"{s['label']} {s['source']} {round(s['right'] * s['images'])}/{s['images']}" for s in gate["sources"]
            )
            parts.append(f"Right by source: {', '.join(right)}.")
    for label, called in found["called"].items():
        if name in ("gate", "lateral"):
            continue
        auc = called.get("abnormal_auc")
        auc_text = "" if auc is None or auc != auc else f" Images of an abnormal class against these, AUC {auc:.3f}."
        called_text = ", ".join(f"{k} {n}" for k, n in called["called"].items() if n)
        parts.append(
            f"{label} is called: {called_text}. Sent to review "
            f"{percent(called['sent_to_review'], called['intervals']['sent_to_review'])}; review or not called NORMAL "
            f"{percent(called['review_or_not_normal'], called['intervals']['review_or_not_normal'])}.{auc_text}"
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
    model_input, training = (
        (stage["model_input"] if "model_input" in stage else stage["plane"]),
        stage.get("training", {}),
    )
    lines = [
        f"**{stage['role']}**: {stage['architecture']}, "
        f"{model_input['size']} x {model_input['size']} ({model_input['fit']}), "
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
