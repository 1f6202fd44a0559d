"""A report over reads: agreement, accuracy of the model, automation bias, time; as a page, CSV and PNG."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxrbatch.review.agreement import (
    Figure,
    cohen_kappa,
    fleiss_kappa,
    numbered,
    proportion,
    with_interval,
)
from cxrbatch.store.report_data import ReadRow, true_labels

__all__ = ["Line", "as_csv", "as_png", "lines_of"]

_SENSITIVITY = "Model against readers: sensitivity"
_SPECIFICITY = "Model against readers: specificity"
_FORMULA = frozenset("=+-@\t\r")


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a report."""

    section: str
    name: str
    figure: Figure
    unit: str = ""  # "s" for seconds; empty: a share or a kappa


def lines_of(rows: Sequence[ReadRow], everything: Sequence[ReadRow] = ()) -> list[Line]:
    """Every figure that these reads allow.

    `everything` is all reads of the store: whether a reader follows the model shows only beside the same reader's reads
    without it, which are those of other rounds or of none.
    """
    first = [row for row in rows if row.repeat == 0]
    readers = {row.reader for row in first}
    theirs = [row for row in everything or rows if row.repeat == 0 and row.reader in readers]
    return [*_agreement(first), *_intra_reader(rows), *_accuracy(first), *_bias(theirs), *_time(rows)]


def _agreement(rows: Sequence[ReadRow]) -> list[Line]:
    by_reader: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for row in rows:
        by_reader[row.reader][row.image_id] = row.label
    names = sorted({row.label for row in rows})
    lines = []
    for one, other in combinations(sorted(by_reader), 2):
        lines.append(_cohen(f"{one} and {other}", by_reader[one], by_reader[other], names, "Cohen's kappa"))
    lines = [line for line in lines if line.figure.number]
    by_image: defaultdict[int, list[str]] = defaultdict(list)
    for row in rows:
        by_image[row.image_id].append(row.label)
    most = max((len(labels) for labels in by_image.values()), default=0)
    full = [labels for labels in by_image.values() if len(labels) == most]
    if most >= 2:
        counts = np.array([[labels.count(name) for name in names] for labels in full], np.int64)
        figure = with_interval(len(full), lambda picked: fleiss_kappa(counts[picked]))
        lines.append(Line("Fleiss' kappa", f"{most} reads an image", figure))
    return lines


def _cohen(name: str, one: dict[int, str], other: dict[int, str], names: Sequence[str], section: str) -> Line:
    shared = sorted(one.keys() & other.keys())
    first, second = (numbered([each[i] for i in shared], names) for each in (one, other))
    return Line(section, name, with_interval(len(shared), lambda p: cohen_kappa(first[p], second[p], len(names))))


def _intra_reader(rows: Sequence[ReadRow]) -> list[Line]:
    names = sorted({row.label for row in rows})
    lines = []
    for reader in sorted({row.reader for row in rows}):
        once, again = (
            {row.image_id: row.label for row in rows if row.reader == reader and row.repeat == repeat}
            for repeat in (0, 1)
        )
        line = _cohen(reader, once, again, names, "Intra-reader kappa (hidden repeats)")
        if line.figure.number:
            lines.append(line)
    return lines


def _accuracy(rows: Sequence[ReadRow]) -> list[Line]:
    """The model against what these reads agree on, or what an adjudication says."""
    labels = true_labels(rows)
    known = {
        row.image_id: (labels[row.image_id], row.model_label)
        for row in rows
        if row.image_id in labels and row.model_label
    }
    names = sorted({label for pair in known.values() for label in pair})
    truth = numbered([pair[0] for pair in known.values()], names)
    said = numbered([pair[1] for pair in known.values()], names)
    lines = []
    for number, name in enumerate(names):
        there, found = truth == number, said == number
        lines.append(Line(_SENSITIVITY, name, proportion(int((there & found).sum()), int(there.sum()))))
        lines.append(Line(_SPECIFICITY, name, proportion(int((~there & ~found).sum()), int((~there).sum()))))
    return sorted(lines, key=lambda line: line.section)


def _bias(rows: Sequence[ReadRow]) -> list[Line]:
    """Automation bias: how often readers say what the model says, where they see it and where they do not."""
    lines = []
    for blinded, name in ((False, "model shown"), (True, "blinded")):
        compared = [row for row in rows if row.blinded == blinded and row.model_label]
        hits = sum(row.label == row.model_label for row in compared)
        lines.append(Line("Reader says what the model says (all reads)", name, proportion(hits, len(compared))))
    return [line for line in lines if line.figure.number]


def _time(rows: Sequence[ReadRow]) -> list[Line]:
    lines = []
    for reader in sorted({row.reader for row in rows}):
        seconds = np.array([row.active_ms / 1000 for row in rows if row.reader == reader and row.active_ms])
        if len(seconds):
            figure = with_interval(len(seconds), lambda p, s=seconds: float(np.median(s[p])))  # type: ignore[misc]
            lines.append(Line("Active time an image (median)", reader, figure, "s"))
    return lines


def as_csv(lines: Sequence[Line], note: str) -> str:
    """One row a figure; cells that a spreadsheet would run as a formula get a '."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("section", "name", "value", "low_95", "high_95", "number", "unit", "note"))
    for line in lines:
        numbers = (_text(line.figure.value), _text(line.figure.low), _text(line.figure.high), line.figure.number)
        name = "'" + line.name if line.name[:1] in _FORMULA else line.name
        writer.writerow((line.section, name, *numbers, line.unit, note))
    return out.getvalue()


def _text(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.4f}"


def as_png(lines: Sequence[Line], title: str) -> bytes:
    """Every share and kappa with its interval, one under the other, on an axis from -0.2 to 1."""
    shown = [line for line in lines if not line.unit and not np.isnan(line.figure.value)]
    sections = list(dict.fromkeys(line.section for line in shown))
    row, left, width, right = 26, 330, 460, 150
    height = 70 + row * (len(shown) + len(sections)) + 34
    image = Image.new("RGB", (left + width + right, height), "white")
    draw = ImageDraw.Draw(image)
    regular, small = ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((16, 14), title, "#17212b", ImageFont.load_default(18))

    def place(value: float) -> float:
        return left + (min(1.0, max(-0.2, value)) + 0.2) / 1.2 * width

    y = 58
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line((place(tick), y - 6, place(tick), height - 30), "#e3e8ed")
        draw.text((place(tick), height - 26), f"{tick:g}", "#5a6775", small, anchor="ma")
    for section in sections:
        draw.text((16, y), section, "#5a6775", small)
        y += row
        for line in (line for line in shown if line.section == section):
            figure = line.figure
            draw.text((30, y), line.name[:38], "#17212b", regular)
            middle = y + 9
            if not np.isnan(figure.low):
                draw.line((place(figure.low), middle, place(figure.high), middle), "#0b62a8", 3)
            x = place(figure.value)
            draw.ellipse((x - 5, middle - 5, x + 5, middle + 5), "#0b62a8")
            draw.text((left + width + 16, y), f"{figure.value:.2f}   n = {figure.number}", "#17212b", regular)
            y += row
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
