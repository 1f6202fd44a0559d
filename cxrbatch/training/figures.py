"""The figures of one set of scored images: of the disease model, of the gate, of both together, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrbatch.inference.decision import NOT_CHEST, NOT_FRONTAL, normal_class
from cxrbatch.training import metrics
from cxrbatch.training.datasets import label_matches
from cxrbatch.training.scores import LATERAL, Scores, targets_of

__all__ = ["measure"]


def measure(scores: Scores, classes: Sequence[str], draws: int = 500) -> dict[str, Any]:
    """All figures of one set; see `evaluate` for what is measured on which labels."""
    y = targets_of(scores.images, classes)
    found: dict[str, Any] = {"images": len(scores.images), "classes": list(classes)}
    known = y >= 0
    if known.any():
        found["disease"] = _disease(scores.chosen(known), y[known], classes, draws)
        found["end_to_end"] = _end_to_end(scores.chosen(known), y[known], draws)
        found["sources"] = _sources(scores.chosen(known), y[known], classes, draws)
        if any(a.label_set for a in scores.assessments):
            found["label_sets"] = _label_sets(scores.chosen(known), y[known], classes, draws)
    if scores.gate is not None:
        found["gate"] = _gate(scores, scores.gate, draws)
    others = sorted({f.label for f, k in zip(scores.images, known, strict=True) if not k})
    chosen = {label: np.array([f.label == label for f in scores.images]) for label in others}
    found["called"] = {label: _called(scores, rows, classes, draws) for label, rows in chosen.items()}
    return found


def _disease(scores: Scores, y: NDArray[np.int64], classes: Sequence[str], draws: int) -> dict[str, Any]:
    """The figures of the disease model alone, ignoring the gate."""
    p, k = scores.probabilities, len(classes)
    guess = p.argmax(1)
    counts = metrics.confusion(y, guess, k)
    normal = normal_class(classes)

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
        "images": len(y),
        **figures(np.arange(len(y))),
        "intervals": metrics.bootstrap([f.group for f in scores.images], figures, draws, of=of),
        "per_class": dict(zip(classes, metrics.class_table(counts), strict=True)),
        "auc": {name: metrics.auc(y == c, p[:, c]) for c, name in enumerate(classes)},
        "roc": {name: _roc(y == c, p[:, c]) for c, name in enumerate(classes) if (y == c).any()},
        "confusion": counts.tolist(),
        "reliability": metrics.reliability(y, p),
        "coverage": metrics.coverage_curve(right, confidence),
    }


def _roc(positive: NDArray[np.bool_], score: NDArray[np.float64]) -> list[list[float]]:
    """(false-positive rate, true-positive rate) at up to a hundred thresholds."""
    order = np.argsort(-score, kind="stable")
    hits, misses = np.cumsum(positive[order]), np.cumsum(~positive[order])
    at = np.unique(np.linspace(0, len(score) - 1, 100).astype(int))
    n, m = max(1, int(positive.sum())), max(1, int((~positive).sum()))
    return [[0.0, 0.0], *([float(misses[i] / m), float(hits[i] / n)] for i in at)]


def _end_to_end(scores: Scores, y: NDArray[np.int64], draws: int) -> dict[str, Any]:
    """What the work list would show: the gate decides first, then the disease model, then the review rule."""
    passed, sent = scores.passed, scores.review
    guess = np.where(passed, scores.probabilities.argmax(1), -1)
    wrong, reported, everything = guess != y, passed & ~sent, np.ones(len(y), bool)

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        review, bad, shown = sent[rows], wrong[rows], reported[rows]
        return {
            "accuracy": float((~bad).mean()),
            "balanced_accuracy": metrics.balanced_accuracy(y[rows], guess[rows]),
            "rejected_by_gate": float((~passed[rows]).mean()),
            "sent_to_review": float(review.mean()),
            "errors_sent_to_review": _share(review[bad]),
            "accuracy_of_reported": _share(~bad[shown]),
        }

    of = dict.fromkeys(("accuracy", "rejected_by_gate", "sent_to_review"), everything)
    of |= {"errors_sent_to_review": wrong, "accuracy_of_reported": reported}
    groups = [f.group for f in scores.images]
    return {**figures(np.arange(len(y))), "intervals": metrics.bootstrap(groups, figures, draws, of=of)}


def _label_sets(scores: Scores, y: NDArray[np.int64], classes: Sequence[str], draws: int) -> dict[str, Any]:
    """How often the label set holds the right class, and how many classes it names, of what the gate passed."""
    asked = np.array([bool(a.label_set) for a in scores.assessments])
    sets = [a.label_set for a, is_asked in zip(scores.assessments, asked, strict=True) if is_asked]
    right = [classes[c] for c in y[asked]]
    covered = np.array([name in named for name, named in zip(right, sets, strict=True)])
    size = np.array([len(named) for named in sets])

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        return {"coverage": float(covered[rows].mean()), "mean_size": float(size[rows].mean())}

    groups = [f.group for f, is_asked in zip(scores.images, asked, strict=True) if is_asked]
    intervals = metrics.bootstrap(groups, figures, draws, of={"coverage": np.ones(len(size), bool)})
    per_class = {name: float(covered[y[asked] == c].mean()) for c, name in enumerate(classes) if (y[asked] == c).any()}
    return {
        "images": len(size),
        **figures(np.arange(len(size))),
        "intervals": intervals,
        "coverage_by_class": per_class,
    }


def _share(held: NDArray[np.bool_]) -> float:
    return float(held.mean()) if len(held) else float("nan")


def _sources(scores: Scores, y: NDArray[np.int64], classes: Sequence[str], draws: int) -> list[dict[str, Any]]:
    guess = scores.probabilities.argmax(1)
    sent = scores.review
    groups = np.array([f.group for f in scores.images])
    keys = [(classes[c], f.source) for c, f in zip(y, scores.images, strict=True)]
    rows = []
    for key in sorted(set(keys)):
        mask = np.array([k == key for k in keys])
        said = np.bincount(guess[mask], minlength=len(classes))
        rows.append(
            {
                "label": key[0],
                "source": key[1],
                "images": int(mask.sum()),
                "recall": float((guess == y)[mask].mean()),
                "interval": metrics.share_interval(groups[mask], (guess == y)[mask], draws),
                "called": {name: int(n) for name, n in zip(classes, said, strict=True) if n},
                "sent_to_review": float(sent[mask].mean()),
            }
        )
    return rows


def _gate(scores: Scores, probability: NDArray[np.float64], draws: int) -> dict[str, Any]:
    """Everything but NOT_CHEST is a chest image, and a frontal one unless it is LATERAL."""
    none, lateral = (np.array([label_matches(f.label, kind) for f in scores.images]) for kind in (NOT_CHEST, LATERAL))
    chest = ~none & ~lateral
    right = np.where(chest, scores.passed, np.where(none, scores.rejected, ~scores.passed))
    groups = [f.group for f in scores.images]

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        r = right[rows]
        return {
            "chest_passed": _share(r[chest[rows]]),
            "not_chest_rejected": _share(r[none[rows]]),
            "lateral_not_passed": _share(r[lateral[rows]]),
        }

    kinds = {"chest": chest, "not chest": none}
    sources = sorted({(f.label, f.source) for f in scores.images})
    where = {s: np.array([(f.label, f.source) == s for f in scores.images]) for s in sources}
    return {
        **figures(np.arange(len(chest))),
        "intervals": metrics.bootstrap(
            groups,
            figures,
            draws,
            of={"chest_passed": chest, "not_chest_rejected": none, "lateral_not_passed": lateral},
        ),
        "sources": [
            {"label": s[0], "source": s[1], "images": int(m.sum()), "right": float(right[m].mean())}
            for s, m in where.items()
        ],
        "histogram": {name: np.histogram(probability[is_it], 20, (0, 1))[0].tolist() for name, is_it in kinds.items()},
    }


def _called(scores: Scores, mask: NDArray[np.bool_], classes: Sequence[str], draws: int) -> dict[str, Any]:
    chosen, left = scores.chosen(mask), (~scores.passed & ~scores.rejected)[mask]
    guess = chosen.probabilities.argmax(1)
    normal = (guess == normal_class(classes)) & chosen.passed
    said = {name: int(((guess == c) & chosen.passed).sum()) for c, name in enumerate(classes)}
    kept = {"sent_to_review": chosen.review, "review_or_not_normal": chosen.review | ~normal}

    def figures(rows: NDArray[np.int64]) -> dict[str, float]:
        return {name: float(held[rows].mean()) for name, held in kept.items()}

    return {
        "images": len(guess),
        "called": said | {NOT_CHEST: int(chosen.rejected.sum()), NOT_FRONTAL: int(left.sum())},
        "abnormal_auc": _abnormal_auc(scores, mask, classes),
        **figures(np.arange(len(guess))),
        "intervals": metrics.bootstrap(
            [f.group for f in chosen.images], figures, draws, of=dict.fromkeys(kept, np.ones(len(guess), bool))
        ),
    }


def _abnormal_auc(scores: Scores, mask: NDArray[np.bool_], classes: Sequence[str]) -> float:
    """AUC of `abnormal_probability`: abnormal classes of the set against the images of `mask`; NaN without either."""
    y = targets_of(scores.images, classes)
    normal = normal_class(classes)
    if normal is None:
        return float("nan")
    abnormal = (y >= 0) & (y != normal)
    rows = abnormal | mask
    if not abnormal.any() or not mask.any():
        return float("nan")
    p_normal = scores.probabilities[:, normal] * (1 if scores.other is None else 1 - scores.other)
    return metrics.auc(abnormal[rows], 1 - p_normal[rows])
