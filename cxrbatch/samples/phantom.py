"""Images drawn with numpy: phantom chest images, and images of other things.

A phantom is the attenuation along the beam, summed over simple shapes. It resembles a frontal image enough for trying
the tools. It shows no patient, and a model's score of it means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

__all__ = ["Chest", "colour_pattern", "draw_chest", "draw_hand", "draw_text_page"]

Floats = NDArray[np.float64]
_HALF_WIDTH = 0.9  # of the image; the shoulders reach to 1 and are cut off, as usual


@dataclass(frozen=True, slots=True)
class Chest:
    """The parameters of one phantom: what differs between people and images."""

    seed: int = 0
    rows: int = 512  # pixels
    columns: int = 464
    heart: float = 1.0  # relative width
    lung: float = 1.0  # relative width
    finding: Literal["none", "opacity", "effusion", "nodule"] = "none"


def draw_chest(chest: Chest) -> Floats:
    """A frontal chest phantom (rows, columns), 0 (air) to 1 (densest)."""
    rng = np.random.default_rng(chest.seed)
    y, x = np.mgrid[0 : 1 : chest.rows * 1j, -_HALF_WIDTH : _HALF_WIDTH : chest.columns * 1j]
    x = x + rng.uniform(-0.03, 0.03)
    body = _soft_tissue(x, y)
    lungs = _lungs(x, y, chest.lung)
    heart = _heart(x, y, chest.heart)
    lungs *= 1 - 0.9 * np.clip(heart + _blob(x - 0.13, y - 0.33, 0.08, 0.05), 0, 1) ** 0.5
    lungs *= 1 - _finding(chest.finding, x, y, rng)
    image = body * (0.52 + 0.16 * _below(0, 0.72 - y, 0.1)) - 0.36 * lungs + 0.05 * heart
    image += 0.17 * body * np.exp(-((x / 0.15) ** 2))
    image -= 0.10 * np.exp(-((x / 0.035) ** 2)) * _below(0.36, y, 0.04)  # trachea
    image += 0.03 * np.exp(-((x / 0.07) ** 4)) * np.clip(np.sin(y * 95) + 0.6, 0, 0.5)  # vertebrae
    bones = _bones(chest.rows, chest.columns, rng)
    image += (0.05 + 0.11 * lungs) * bones * (body > 0.05)
    image += 0.16 * lungs * _vessels(chest.rows, chest.columns, rng)
    image -= 0.22 * _blob(x - 0.42, y - 0.86, 0.13, 0.04) * body  # air in the stomach
    image = _blurred(image, 0.8)
    image += rng.normal(0, 0.006, image.shape) * (0.4 + image.clip(0, 1))
    image = np.where(body > 0.01, image + 0.04, 0.01 + 0.002 * rng.random(image.shape))
    image = np.clip(image / 0.95, 0, 1)
    return np.maximum(image, _label(chest.rows, chest.columns, "L", (0.93, 0.06), 0.05))


def draw_hand(seed: int = 0, rows: int = 512, columns: int = 448) -> Floats:
    """A hand-like phantom (rows, columns), 0..1: five fingers of bones on a palm."""
    image = Image.new("L", (columns, rows))
    pen = ImageDraw.Draw(image)
    bones = Image.new("L", (columns, rows))
    bone_pen = ImageDraw.Draw(bones)
    wrist = np.array([0.5 * columns, 0.92 * rows])
    for angle, reach in ((-62, 0.48), (-22, 0.76), (-4, 0.82), (13, 0.77), (30, 0.64)):
        direction = np.array([np.sin(np.radians(angle)), -np.cos(np.radians(angle))])
        joints = [wrist + direction * rows * reach * part for part in (0.06, 0.5, 0.72, 0.87, 1.0)]
        pen.line([tuple(p) for p in (joints[0], joints[-1])], fill=110, width=columns // 10, joint="curve")
        for start, end in pairwise(joints):
            gap = (end - start) * 0.06
            bone_pen.line([*tuple(start + gap), *tuple(end - gap)], fill=150, width=columns // 26)
    pen.ellipse((0.28 * columns, 0.52 * rows, 0.74 * columns, 0.97 * rows), fill=120)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(6)), np.float64) / 255
    hard = np.asarray(bones.filter(ImageFilter.GaussianBlur(2)), np.float64) / 255
    noise = np.random.default_rng(seed).normal(0, 0.01, soft.shape)
    return np.clip(0.7 * soft + 0.8 * hard + noise, 0, 1)


def draw_text_page(rows: int = 640, columns: int = 480) -> Floats:
    """A page of text (rows, columns), 0..1, like the scanned letters in image archives."""
    page = Image.new("L", (columns, rows), 245)
    pen = ImageDraw.Draw(page)
    pen.text((40, 40), "SYNTHETIC REFERRAL LETTER", fill=15, font=ImageFont.load_default(22))
    words = "this page is no image and holds no patient it was drawn by a program to be turned away".split()  # noqa: SIM905
    font = ImageFont.load_default(15)
    for line in range(24):
        text = " ".join(words[(line * 5 + i) % len(words)] for i in range(9))
        pen.text((40, 90 + line * 21), text, fill=30, font=font)
    return np.asarray(page, np.float64) / 255


def colour_pattern(seed: int = 0, rows: int = 480, columns: int = 640) -> NDArray[np.uint8]:
    """A colourful image (rows, columns, 3) uint8: sky, hills and a sun."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    image = np.stack([0.45 + 0.3 * y, 0.65 + 0.2 * y, 0.95 - 0.1 * y], axis=-1)
    image[np.hypot((x - 0.75) * columns / rows, y - 0.25) < 0.1] = (1.0, 0.85, 0.2)
    for level, colour in ((0.55, (0.35, 0.55, 0.4)), (0.7, (0.2, 0.5, 0.2)), (0.85, (0.4, 0.3, 0.1))):
        edge = level + 0.06 * np.sin(x * 9 + level * 20) + 0.02 * np.sin(x * 31)
        image[y > edge] = colour
    image += rng.normal(0, 0.02, image.shape)
    return np.asarray(np.clip(image, 0, 1) * 255, np.uint8)


def _soft_tissue(x: Floats, y: Floats) -> Floats:
    """Thickness of neck, shoulders and trunk, 0..1."""
    trunk = 0.80 + 0.05 * np.sin(3 * y)
    shoulders = np.interp(y, [0, 0.05, 0.14, 0.24, 0.4, 1], [0.26, 0.28, 0.75, 1.02, 1.0, 0.98])
    arms = np.interp(y, [0.2, 0.5, 1], [0.15, 0.03, 0.0])
    half = np.minimum(shoulders, trunk + arms)
    return np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1)) ** 0.7


def _lungs(x: Floats, y: Floats, width: float) -> Floats:
    """The share of the beam that passes through air, 0..1: two lungs above domed diaphragms."""
    air = np.zeros_like(x)
    for side, dome in ((-1, 0.715), (1, 0.745)):
        across = (x * side - 0.40) / (0.30 * width)
        top, bottom = 0.13, dome + 0.075 * np.clip(across, -1, 1.2) ** 2
        along = (y - top) / (bottom - top)
        profile = np.interp(along, [0, 0.15, 0.45, 0.8, 1], [0.35, 0.75, 0.97, 1.05, 1.0])
        inside = np.clip(1 - (np.abs(across) / profile) ** 3.2, 0, 1)
        inside *= _below(0, top - y, 0.012) * _below(0, y - bottom, 0.008)
        air = np.maximum(air, inside**0.6)
    return air


def _heart(x: Floats, y: Floats, width: float) -> Floats:
    turned = (x - 0.13) * 0.86 + (y - 0.60) * 1.0
    across = -(x - 0.13) * 0.5 + (y - 0.60) * 1.72
    solid = 1 - (turned / (0.29 * width)) ** 2 - (across / 0.27) ** 2
    return np.sqrt(np.clip(solid, 0, 1)) * _below(0.76, y, 0.02)


def _finding(kind: str, x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    if kind == "opacity":
        spots = sum(
            _blob(x + 0.42 + rng.normal(0, 0.07), y - 0.55 - rng.normal(0, 0.05), 0.09, 0.055) for _ in range(6)
        )
        return np.clip(0.35 * spots, 0, 0.9)
    if kind == "effusion":
        level = 0.62 - 0.12 * np.clip(x - 0.35, 0, 1)
        return 0.9 * _below(0, level - y, 0.02) * _below(0, 0.08 - x, 0.03)
    if kind == "nodule":
        return 0.8 * _blob(x + 0.36, y - 0.36, 0.05, 0.035)
    return np.zeros_like(x)


def _bones(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    """Ribs, clavicles and shoulder blades as soft lines, 0..1."""
    sheet = Image.new("L", (columns, rows))
    tilt = rng.uniform(0.09, 0.13)

    def stroke(xs: Floats, ys: Floats, width: float, ink: int) -> None:
        nonlocal sheet
        layer = Image.new("L", (columns, rows))
        points = [(_column(px, columns), py * rows) for px, py in zip(xs, ys, strict=True)]
        ImageDraw.Draw(layer).line(points, fill=ink, width=max(2, round(width * rows)), joint="curve")
        sheet = ImageChops.lighter(sheet, layer)

    for side in (-1.0, 1.0):
        for rib in range(9):
            t = np.linspace(0, 1, 30)
            reach = min(0.70, 0.34 + 0.075 * rib)
            start = 0.10 + 0.068 * rib
            stroke(side * (0.06 + reach * t), start - 0.045 * np.sin(2.4 * t) + tilt * t**2, 0.017, 150)
            if rib < 7:  # the front part descends towards the sternum
                front = start + tilt + 0.02 + 0.11 * (1 - t) ** 1.5
                stroke(side * (0.20 + (reach - 0.14) * t), front, 0.015, 85)
        t = np.linspace(0, 1, 20)
        stroke(side * (0.05 + 0.62 * t), 0.185 - 0.05 * t + 0.018 * np.sin(6 * t), 0.022, 190)
        stroke(side * (0.60 + 0.14 * t), 0.15 + 0.28 * t, 0.02, 80)
    return np.asarray(sheet.filter(ImageFilter.GaussianBlur(max(1.0, rows / 400))), np.float64) / 255


def _vessels(rows: int, columns: int, rng: np.random.Generator) -> Floats:
    """Branches from both hila, thinning outwards, 0..1."""
    sheet = Image.new("L", (columns, rows))
    pen = ImageDraw.Draw(sheet)

    def grow(px: float, py: float, heading: float, width: float) -> None:
        while width > 0.6:
            step = rng.uniform(0.02, 0.045)
            nx, ny = px + 2 * step * np.cos(heading), py + step * np.sin(heading)
            line = (_column(px, columns), py * rows, _column(nx, columns), ny * rows)
            pen.line(line, fill=int(60 + 22 * width), width=max(1, round(width)))
            px, py = nx, ny
            heading += rng.normal(0, 0.22)
            width *= 0.86
            if rng.random() < 0.5:
                grow(px, py, heading + rng.choice([-1, 1]) * rng.uniform(0.4, 0.8), width * 0.75)

    for side in (0.0, np.pi):
        for _ in range(8):
            hilum = 0.16 if side == 0.0 else -0.16
            grow(hilum, 0.45 + rng.normal(0, 0.02), side + rng.uniform(-1.3, 1.3), rows / 512 * rng.uniform(3.2, 5.6))
    return np.asarray(sheet.filter(ImageFilter.GaussianBlur(1.1)), np.float64) / 255


def _label(rows: int, columns: int, text: str, at: tuple[float, float], height: float) -> Floats:
    """A side marker and the word that says what this is, burned into the pixels like real markers."""
    sheet = Image.new("L", (columns, rows))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(round(height * rows))
    pen.text((at[0] * columns, at[1] * rows), text, fill=235, font=font, anchor="mm")
    small = ImageFont.load_default(max(10, round(0.026 * rows)))
    pen.text((0.01 * columns, 0.985 * rows), "SYNTHETIC", fill=225, font=small, anchor="ls")
    return np.asarray(sheet, np.float64) / 255


def _column(x: float, columns: int) -> float:
    return (x / _HALF_WIDTH + 1) / 2 * columns


def _blob(dx: Floats, dy: Floats, width: float, height: float) -> Floats:
    return np.exp(-((dx / width) ** 2) - (dy / height) ** 2)


def _below(edge: float, values: Floats, softness: float) -> Floats:
    """1 where `values` are below `edge`, 0 above, with a soft step."""
    return 1 / (1 + np.exp(np.clip((values - edge) / softness * 3, -60, 60)))


def _blurred(image: Floats, radius: float) -> Floats:
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / radius) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(3, 3) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        image = sum(
            weight * np.take(padded, np.arange(i, i + image.shape[axis]), axis=axis) for i, weight in enumerate(kernel)
        )
    return image
