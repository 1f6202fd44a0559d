"""What a capture looks like: bright text on black, in bands above and below the images, never over them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cxrbatch.store.reported import Reported
from cxrbatch.store.sql import utc_text

__all__ = ["draw_capture"]

_PANEL = 800  # pixels: the longer side of each image
_GAP, _MARGIN = 16, 24
_HEADER = 64
_ROW = 34
_BLACK, _WHITE, _GREY, _AMBER = (0, 0, 0), (240, 240, 240), (160, 166, 172), (255, 190, 60)
_BAR, _BAR_SHOWN, _TRACK = (110, 125, 140), (96, 176, 255), (42, 46, 50)
_DECISIONS = {
    "reported": ("reported", (140, 220, 150)),
    "needs_review": ("needs review by a reader", _AMBER),
    "not_chest": ("not a chest radiograph", _AMBER),
}
#: Black, violet, red, yellow: brightness grows all the way, so that it reads in grey as well.
_RAMP = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)


def draw_capture(reported: Reported, grey: NDArray[np.uint8], heat: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """(rows, columns, 3) uint8. `grey` (rows, columns); `heat` (h, w), 0..1, over all of the image, or None."""
    image = _fitted(grey)
    panels = [image] if heat is None else [image, _overlay(image, heat)]
    width = max(2 * _PANEL + _GAP, sum(panel.width for panel in panels) + _GAP) + 2 * _MARGIN
    rows = _rows(reported, heat is not None)
    footer = 14 + max(58 + len(reported.probabilities) * _ROW, len(rows) * _ROW) + _MARGIN
    height = _HEADER + image.height + 30 + footer
    sheet = Image.new("RGB", (width, height + height % 2), _BLACK)
    draw = ImageDraw.Draw(sheet)
    _header(draw, width, reported)
    room = width / len(panels)
    captions = ("image as read", "what moved the score (Grad-CAM), not where disease is")
    for number, panel in enumerate(panels):
        centre = int(room * (number + 0.5))
        sheet.paste(panel, (centre - panel.width // 2, _HEADER))
        draw.text((centre, _HEADER + image.height + 6), captions[number], _GREY, _font(18), anchor="ma")
    top = _HEADER + image.height + 30
    _numbers(draw, reported, _MARGIN, top + 14, width // 2 - _MARGIN)
    _facts(draw, rows, width // 2 + _MARGIN, top + 14)
    return np.asarray(sheet)


def _header(draw: ImageDraw.ImageDraw, width: int, reported: Reported) -> None:
    draw.text((_MARGIN, 20), f"cxrbatch   {reported.cascade}", _WHITE, _font(24))
    draw.text((width - _MARGIN, 20), "RESEARCH USE ONLY - NOT FOR DIAGNOSIS", _AMBER, _font(24), anchor="ra")


def _numbers(draw: ImageDraw.ImageDraw, reported: Reported, left: int, top: int, right: int) -> None:
    words, colour = _DECISIONS[reported.decision]
    shown = "NOT A CHEST IMAGE" if reported.label == "NOT_CHEST" else reported.label
    draw.text((left, top), f"{shown}  {100 * reported.confidence:.1f} %", _WHITE, _font(30))
    draw.text((right, top + 8), words, colour, _font(22), anchor="ra")
    start, end = left + 190, right - 90
    for number, (label, probability) in enumerate(reported.probabilities):
        y = top + 58 + number * _ROW
        draw.text((left, y), label, _WHITE if label == reported.label else _GREY, _font(20))
        draw.rectangle((start, y + 3, end, y + 21), _TRACK)
        fill = _BAR_SHOWN if label == reported.label else _BAR
        draw.rectangle((start, y + 3, start + round((end - start) * probability), y + 21), fill)
        if label == reported.label and reported.threshold is not None:
            x = start + round((end - start) * reported.threshold)
            draw.line((x, y - 1, x, y + 25), _AMBER, 3)
        draw.text((right, y), f"{100 * probability:.1f} %", _WHITE, _font(20), anchor="ra")


def _facts(draw: ImageDraw.ImageDraw, rows: list[tuple[str, str]], left: int, top: int) -> None:
    for number, (name, value) in enumerate(rows):
        y = top + number * _ROW
        draw.text((left, y), name, _GREY, _font(20))
        draw.text((left + 150, y), value, _WHITE, _font(20))


def _rows(reported: Reported, with_map: bool) -> list[tuple[str, str]]:
    rows = []
    if reported.reviewed_at is not None:
        rows.append(("reader", reported.final_label or "no final label"))
    if len(reported.label_set) > 1:
        rows.append(("possible", ", ".join(reported.label_set)))
    if reported.threshold is not None and reported.probabilities:
        rows.append(("threshold", f"{100 * reported.threshold:.1f} % (amber line)"))
    if reported.review_reasons:
        rows.append(("why review", ", ".join(reported.review_reasons).replace("_", " ")))
    rows.append(("quality", ", ".join(reported.quality_flags).replace("_", " ") or "nothing noted"))
    if reported.gate_probability is not None:
        rows.append(("chest image", f"{100 * reported.gate_probability:.1f} %"))
    rows.append(("scored", f"{utc_text(reported.processed_at)} UTC"))
    rows.append(("image, bundle", f"{reported.sha256[:12]}, {reported.manifest_sha256[:12]}"))
    if not with_map:
        rows.append(("Grad-CAM", "not made here"))
    return rows


def _fitted(grey: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(grey)
    scale = _PANEL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS).convert("RGB")


def _overlay(image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    big = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC))
    big = np.clip(big, 0, 1)
    steps = np.linspace(0, 1, len(_RAMP))
    colours = np.stack([np.interp(big, steps, _RAMP[:, channel]) for channel in range(3)], -1)
    share = 0.5 * big[..., None] ** 0.7
    mixed = np.asarray(image, np.float32) * (1 - share) + colours * share
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
