"""How good is a bundle, on whose films, and how sure is that? Gate and disease model together, from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.bundles import load_bundle
from cxrbatch.engines import open_engine
from cxrbatch.errors import Fatal
from cxrbatch.training import metrics
from cxrbatch.training.datasets import SPLITS, Film, find_folders, label_matches, leaked_films, split_films
from cxrbatch.training.scores import Scores, score_films, targets_of

__all__ = ["evaluate", "measure"]

_CHEST, _NOT_CHEST = "CHEST", "NOT_CHEST"


def evaluate(
    bundle: Path, data: Path, out: Path | None = None, *, split: str = "test", draws: int = 500
) -> dict[str, Any]:
    """Evaluate a bundle on every labelled folder in `data` that has films of `split`.

    Labels that are classes of the bundle give the full figures; CHEST and NOT_CHEST judge the gate; of any
    other label it is only said what the bundle calls it. Test films whose bytes are a training film's in `data` too
    count in their set, which stands a second time without them, as NAME-leak-free. Writes `out`/evaluation.json and
    plots; `report.print_report` shows the result.
    Raises Fatal when nothing can be read, or there is no film of that split.
    """
    if split not in SPLITS:
        raise Fatal(f"The split '{split}' is none of {', '.join(SPLITS)}.")
    loaded = load_bundle(bundle)
    engine = open_engine("auto", "auto", loaded)
    result: dict[str, Any] = {
        "bundle": loaded.name,
        "version": loaded.version,
        "manifest_sha256": loaded.manifest_sha256,
        "engine": f"{engine.name} {engine.version} on {engine.device}",
        "split": split,
        "sets": {},
    }
    kept: dict[str, Scores] = {}
    folders = find_folders(data)
    leaks = {film.path for film in leaked_films(folders)} if split == "test" else set()
    for folder in folders:
        films = split_films(folder.films, split)
        if not films:
            continue
        scores = score_films(loaded, films, engine)
        if scores.films:
            kept[folder.name] = scores
            clean = np.array([film.path not in leaks for film in scores.films])
            if clean.any() and not clean.all():
                kept[f"{folder.name}-leak-free"] = scores.chosen(clean)
        if scores.unreadable:
            result.setdefault("unreadable", []).extend([f.path.as_posix(), why] for f, why in scores.unreadable)
    if not kept:
        raise Fatal(f"{data} has no readable film in a split '{split}'.")
    for name, scores in kept.items():
        result["sets"][name] = measure(scores, loaded.disease.classes, draws)
    if out is not None:
        from cxrbatch.training.plots import plot_evaluation

        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
        for name in kept:
            plot_evaluation(name, result["sets"][name], loaded.disease.classes, out)
    return result


def measure(scores: Scores, classes: Sequence[str], draws: int = 500) -> dict[str, Any]:
    """All figures of one set; see `evaluate` for what is measured on which labels."""
    y = targets_of(scores.films, classes)
    found: dict[str, Any] = {"films": len(scores.films), "classes": list(classes)}
    known = y >= 0
    if known.any():
        found["disease"] = _disease(scores.chosen(known), y[known], classes, draws)
        found["end_to_end"] = _end_to_end(scores.chosen(known), y[known], draws)
        found["sources"] = _sources(scores.chosen(known), y[known], classes, draws)
    if scores.gate is not None:
        found["gate"] = _gate(scores, scores.gate, draws)
    others = sorted({f.label for f, k in zip(scores.films, known, strict=True) if not k})
    found["called"] = {label: _called(scores, _labelled(scores.films, label), classes, draws) for label in others}
    return found


def _disease(scores: Scores, y: NDArray[np.int64], classes: Sequence[str], draws: int) -> dict[str, Any]:
    """The disease model by itself, whatever the gate says."""
    p, k = scores.probabilities, len(classes)
    guess = p.argmax(1)
    counts = metrics.confusion(y, guess, k)
    normal = next((i for i, name in enumerate(classes) if label_matches(name, "NORMAL")), None)

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        table = metrics.class_table(metrics.confusion(y[rows], guess[rows], k))
        numbers = {
            "accuracy": float((guess[rows] == y[rows]).mean()),
            "balanced_accuracy": metrics.balanced_accuracy(y[rows], guess[rows]),
            "ece": metrics.calibration_error(y[rows], p[rows]),
        }
        if normal is not None:
            numbers["normal_auc"] = metrics.auc(y[rows] == normal, p[rows, normal])
        for name, row in zip(classes, table, strict=True):
            numbers[f"recall {name}"] = row["recall"]
            numbers[f"precision {name}"] = row["precision"]
            numbers[f"f1 {name}"] = row["f1"] if row["support"] else float("nan")
        return numbers

    right, confidence = guess == y, p.max(1)
    of = {"accuracy": np.ones(len(y), bool)}
    for c, name in enumerate(classes):
        of |= {f"recall {name}": y == c, f"precision {name}": guess == c}
    return {
        "films": len(y),
        **figures(np.arange(len(y))),
        "intervals": metrics.bootstrap([f.group for f in scores.films], figures, draws, of=of),
        "per_class": dict(zip(classes, metrics.class_table(counts), strict=True)),
        "auc": {name: metrics.auc(y == c, p[:, c]) for c, name in enumerate(classes)},
        "roc": {name: _roc(y == c, p[:, c]) for c, name in enumerate(classes) if (y == c).any()},
        "confusion": counts.tolist(),
        "reliability": metrics.reliability(y, p),
        "coverage": metrics.coverage_curve(right, confidence),
    }


def _roc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> list[list[float]]:
    """(false-positive rate, true-positive rate) at a hundred thresholds or fewer."""
    order = np.argsort(-score, kind="stable")
    hits, misses = np.cumsum(positive[order]), np.cumsum(~positive[order])
    at = np.unique(np.linspace(0, len(score) - 1, 100).astype(int))
    n, m = max(1, int(positive.sum())), max(1, int((~positive).sum()))
    return [[0.0, 0.0], *([float(misses[i] / m), float(hits[i] / n)] for i in at)]


def _end_to_end(scores: Scores, y: NDArray[np.int64], draws: int) -> dict[str, Any]:
    """What the work list would show: the gate decides first, then the disease model, then the review rule."""
    guess = np.where(scores.passed, scores.probabilities.argmax(1), -1)
    wrong, reported, everything = guess != y, scores.passed & ~scores.review, np.ones(len(y), bool)

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        review, bad, shown = scores.review[rows], wrong[rows], reported[rows]
        return {
            "accuracy": float((~bad).mean()),
            "balanced_accuracy": metrics.balanced_accuracy(y[rows], guess[rows]),
            "rejected_by_gate": float((~scores.passed[rows]).mean()),
            "sent_to_review": float(review.mean()),
            "errors_sent_to_review": _share(review[bad]),
            "accuracy_of_reported": _share(~bad[shown]),
        }

    of = dict.fromkeys(("accuracy", "rejected_by_gate", "sent_to_review"), everything)
    of |= {"errors_sent_to_review": wrong, "accuracy_of_reported": reported}
    groups = [f.group for f in scores.films]
    return {**figures(np.arange(len(y))), "intervals": metrics.bootstrap(groups, figures, draws, of=of)}


def _share(held: NDArray[np.bool_]) -> float:
    return float(held.mean()) if len(held) else float("nan")


def _sources(scores: Scores, y: NDArray[np.int64], classes: Sequence[str], draws: int) -> list[dict[str, Any]]:
    guess = scores.probabilities.argmax(1)
    groups = np.array([f.group for f in scores.films])
    keys = [(classes[c], f.source) for c, f in zip(y, scores.films, strict=True)]
    rows = []
    for key in sorted(set(keys)):
        mask = np.array([k == key for k in keys])
        said = np.bincount(guess[mask], minlength=len(classes))
        rows.append(
            {
                "label": key[0],
                "source": key[1],
                "films": int(mask.sum()),
                "recall": float((guess == y)[mask].mean()),
                "interval": metrics.share_interval(groups[mask], (guess == y)[mask], draws),
                "called": {name: int(n) for name, n in zip(classes, said, strict=True) if n},
                "sent_to_review": float(scores.review[mask].mean()),
            }
        )
    return rows


def _gate(scores: Scores, probability: NDArray[np.float64], draws: int) -> dict[str, Any]:
    """Everything but NOT_CHEST is a chest film."""
    chest = np.array([f.label != _NOT_CHEST for f in scores.films])
    right = scores.passed == chest
    groups = [f.group for f in scores.films]

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        c, r = chest[rows], right[rows]
        return {
            "chest_passed": _share(r[c]),
            "not_chest_rejected": _share(r[~c]),
        }

    kinds = {"chest": chest, "not chest": ~chest}
    sources = sorted({(f.label, f.source) for f in scores.films})
    where = {s: np.array([(f.label, f.source) == s for f in scores.films]) for s in sources}
    return {
        **figures(np.arange(len(chest))),
        "intervals": metrics.bootstrap(
            groups, figures, draws, of={"chest_passed": chest, "not_chest_rejected": ~chest}
        ),
        "sources": [
            {"label": s[0], "source": s[1], "films": int(m.sum()), "right": float(right[m].mean())}
            for s, m in where.items()
        ],
        "histogram": {name: np.histogram(probability[is_it], 20, (0, 1))[0].tolist() for name, is_it in kinds.items()},
    }


def _labelled(films: Sequence[Film], label: str) -> NDArray[np.bool_]:
    return np.array([f.label == label for f in films])


def _called(scores: Scores, mask: NDArray[np.bool_], classes: Sequence[str], draws: int) -> dict[str, Any]:
    chosen = scores.chosen(mask)
    guess = chosen.probabilities.argmax(1)
    normal = np.array([label_matches(classes[g], "NORMAL") for g in guess]) & chosen.passed
    said = {name: int(((guess == c) & chosen.passed).sum()) for c, name in enumerate(classes)}
    kept = {"sent_to_review": chosen.review, "review_or_not_normal": chosen.review | ~normal}

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        return {name: float(held[rows].mean()) for name, held in kept.items()}

    return {
        "films": len(guess),
        "called": said | {_NOT_CHEST: int((~chosen.passed).sum())},
        **figures(np.arange(len(guess))),
        "intervals": metrics.bootstrap(
            [f.group for f in chosen.films], figures, draws, of=dict.fromkeys(kept, np.ones(len(guess), bool))
        ),
    }


def _finite(value: Any) -> Any:
    """NaN becomes null: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
