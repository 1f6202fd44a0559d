"""Style augmentation: every class is trained in every image style.

A network recognises a class that comes from one hospital by that hospital's sharpness, borders, letters and grey scale
instead of by the lungs (models.md, trap 1). So each step here changes the style of an image and keeps its content; the
probabilities never depend on the class. It works on uint8 greys with Pillow and numpy and takes 2-4 ms per image of 160
pixels on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

__all__ = ["StyleAugmentation", "match_histogram", "match_spectrum", "scramble"]

Grey = NDArray[np.uint8]
_LETTERS = ("R", "L", "AP", "PA", "PORTABLE", "SUPINE", "ERECT", "H-6, I-8", "Day 3", "a", "A", "B", "(c)", "12:41")


@dataclass(frozen=True, slots=True)
class StyleAugmentation:
    """The probability (0..1) and strength of each change. `look` is the probability of each change of style."""

    size: int  # pixels a side of the model input that comes out
    look: float = 0.35
    flip: float = 0.3  # left-right
    rotation: float = 10.0  # degrees in either direction
    turn: float = 0.0  # probability of a rotation by 90, 180 or 270 degrees
    invert: float = 0.0
    crop: float = 0.18  # largest share of a side that is cut off
    aspect: float = 1.4  # largest change of the aspect ratio, in either direction
    thumbnail: float = 0.03  # probability of shrinking to 48 to 96 pixels and enlarging again
    surroundings: float = 0.0  # probability of replacing all but the middle by another image

    def __call__(self, grey: Grey, reference: Grey, rng: np.random.Generator) -> Grey:
        """One augmented model input (size, size) uint8 from `grey` (rows, columns) uint8.

        `reference` (rows, columns) uint8 is any other image: its grey scale or sharpness may be applied.
        """
        if rng.random() < self.look:
            grey = match_histogram(grey, reference, rng.uniform(0.4, 1.0))
        array = self._frame(grey, rng)
        if rng.random() < self.surroundings:
            array = _on_another(array, reference, rng)
        steps = (_tone, _sharpness, _noise, _markers, _borders, _recompress)
        for step in steps:
            if rng.random() < self.look * (1.6 if step is _tone else 1.0):
                array = step(array, rng)
        if rng.random() < self.look * 0.6:
            array = Image.fromarray(match_spectrum(np.asarray(array), reference, rng.uniform(0.4, 1.0)))
        if rng.random() < self.thumbnail:
            small = int(rng.integers(48, 97))
            array = array.resize((small, small), Image.Resampling.BILINEAR).resize(
                (self.size, self.size), Image.Resampling.BICUBIC
            )
        if rng.random() < self.invert:
            array = ImageOps.invert(array)
        return np.asarray(array)

    def _frame(self, grey: Grey, rng: np.random.Generator) -> Image.Image:
        """Flip, crop, stretch, rotate, and place on a square of one grey level."""
        rows, columns = grey.shape
        array = Image.fromarray(grey)
        if rng.random() < self.flip:
            array = ImageOps.mirror(array)
        left, right = rng.uniform(0, self.crop / 2, 2) * columns * (rng.random() < 0.7)
        top, bottom = rng.uniform(0, self.crop / 2, 2) * rows * (rng.random() < 0.7)
        ratio = columns / rows
        if rng.random() < 0.6:
            ratio *= np.exp(rng.uniform(-1, 1) * np.log(self.aspect))
        longer = self.size * (1.0 if rng.random() < 0.7 else rng.uniform(0.8, 1.0))
        width = max(8, round(longer * min(1.0, ratio)))
        height = max(8, round(longer * min(1.0, 1 / ratio)))
        array = array.resize(
            (width, height), Image.Resampling.BILINEAR, box=(left, top, columns - right, rows - bottom)
        )
        fill = 0 if rng.random() < 0.8 else int(rng.integers(0, 256))
        if rng.random() < 0.5:
            array = array.rotate(rng.uniform(-self.rotation, self.rotation), Image.Resampling.BILINEAR, fillcolor=fill)
        if rng.random() < self.turn:
            array = array.rotate(90 * int(rng.integers(1, 4)), expand=True)
        model_input = Image.new("L", (self.size, self.size), fill)
        model_input.paste(array, ((self.size - array.width) // 2, (self.size - array.height) // 2))
        return model_input


def match_histogram(grey: Grey, reference: Grey, share: float) -> Grey:
    """Give `grey` the grey-level distribution of `reference`, mixed `share` (0..1) of the way."""
    own = np.bincount(grey.ravel(), minlength=256).cumsum() / grey.size
    other = np.bincount(reference.ravel(), minlength=256).cumsum() / reference.size
    table = np.interp(own, other, np.arange(256))
    mixed = share * table + (1 - share) * np.arange(256)
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)[grey]


def match_spectrum(grey: Grey, reference: Grey, share: float) -> Grey:
    """Give `grey` the fine-detail power (sharpness, noise, blocking) of `reference`; coarse structure is kept.

    Amplitudes are scaled per frequency ring, only above 1/8 of the sampling frequency, by a factor between 1/4 and 4.
    """
    side = grey.shape[0]
    other = np.asarray(Image.fromarray(reference).resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    fy = np.fft.fftfreq(side)[:, None]
    fx = np.fft.rfftfreq(grey.shape[1])[None, :]
    rings = np.minimum((np.hypot(fy, fx) * 48).astype(np.int64), 24)
    spectrum = np.fft.rfft2(grey.astype(np.float32))
    count = np.bincount(rings.ravel(), minlength=25) + 1e-6
    own_power = np.bincount(rings.ravel(), np.abs(spectrum).ravel(), 25) / count
    other_power = np.bincount(rings.ravel(), np.abs(np.fft.rfft2(other.astype(np.float32))).ravel(), 25) / count
    gain = np.clip((other_power + 1e-3) / (own_power + 1e-3), 0.25, 4.0) ** share
    gain[:6] = 1.0
    changed = np.fft.irfft2(spectrum * gain[rings], s=grey.shape)
    return np.clip(changed + 0.5, 0, 255).astype(np.uint8)


def scramble(grey: Grey, rng: np.random.Generator) -> Grey:
    """An image without anatomy, same rows and columns: the greys, spectrum or pieces of a chest, but no chest.

    One of: its pieces (4 to 36) in another order, its spectrum with random phases, a blur in which nothing can be
    recognised, and soft blobs with its grey scale.
    """
    kind = rng.random()
    rows, columns = grey.shape
    if kind < 0.5:
        return _pieces(grey, int(rng.integers(2, 7)), rng)
    if kind < 0.65:
        spectrum = np.abs(np.fft.rfft2(grey)) * np.exp(1j * np.angle(np.fft.rfft2(rng.standard_normal(grey.shape))))
        noise = np.fft.irfft2(spectrum, s=grey.shape)
        return match_histogram(_stretched(noise), grey, 1.0)
    if kind < 0.75:
        return np.asarray(
            Image.fromarray(grey).filter(ImageFilter.GaussianBlur(min(rows, columns) / rng.uniform(8, 13)))
        )
    coarse = rng.integers(0, 256, (int(rng.integers(2, 9)), int(rng.integers(2, 9))), np.uint8)
    blobs = np.asarray(Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC))
    return match_histogram(blobs, grey, rng.uniform(0.0, 1.0))


def _pieces(grey: Grey, across: int, rng: np.random.Generator) -> Grey:
    """`across` x `across` pieces, each at another place; the remainder at the right and bottom stays."""
    height, width = grey.shape[0] // across, grey.shape[1] // across
    order = rng.permutation(across * across)
    origins = np.empty_like(order)
    origins[order] = np.roll(order, 1)  # one cycle through all of them
    moved = grey.copy()
    for place, origin in enumerate(origins):
        y, x = divmod(place, across)
        v, u = divmod(int(origin), across)
        moved[y * height : (y + 1) * height, x * width : (x + 1) * width] = grey[
            v * height : (v + 1) * height, u * width : (u + 1) * width
        ]
    return moved


def _stretched(x: NDArray[np.float64]) -> Grey:
    low, high = np.percentile(x, (0.5, 99.5))
    stretched: Grey = np.clip((x - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    return stretched


def _on_another(array: Image.Image, reference: Grey, rng: np.random.Generator) -> Image.Image:
    """The middle of the image, softly blended onto another: edges, borders and letters then carry no information."""
    side = array.width
    under = Image.fromarray(reference).resize(array.size, Image.Resampling.BILINEAR)
    half_width, half_height = rng.uniform(0.38, 0.52, 2) * side
    mask = Image.new("L", array.size, 0)
    box = (side / 2 - half_width, side / 2 - half_height, side / 2 + half_width, side / 2 + half_height)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius=side * rng.uniform(0.05, 0.35), fill=255)
    return Image.composite(array, under, mask.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.005, 0.03))))


def _tone(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gamma, contrast and brightness; or global or local equalisation."""
    kind = rng.random()
    if kind < 0.15:
        return Image.blend(array, ImageOps.equalize(array), rng.uniform(0.4, 1.0))
    if kind < 0.35:
        return _local_contrast(array, rng)
    if kind < 0.45:
        return ImageOps.autocontrast(array, cutoff=(rng.uniform(0, 4), rng.uniform(0, 4)))
    x = np.arange(256) / 255
    x = x ** np.exp(rng.uniform(-0.6, 0.6))
    x = (x - 0.5) * np.exp(rng.uniform(-0.6, 0.4)) + 0.5 + rng.uniform(-0.15, 0.15)
    return array.point(list(np.clip(x * 255 + 0.5, 0, 255).astype(int)))


def _local_contrast(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Imitate contrast-limited local equalisation: attenuate structures coarser than a sixth of the image."""
    x = np.asarray(array, np.float32)
    radius = array.width * rng.uniform(0.06, 0.16)
    coarse = np.asarray(array.filter(ImageFilter.BoxBlur(radius)), np.float32)
    detail = x - coarse
    flattened = 128 + detail * (rng.uniform(35, 60) / (detail.std() + 8)) + rng.uniform(0.2, 0.7) * (coarse - 128)
    return Image.fromarray(np.clip(flattened, 0, 255).astype(np.uint8))


def _sharpness(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.5:
        return array.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    return array.filter(ImageFilter.UnsharpMask(rng.uniform(0.8, 3.0), int(rng.integers(50, 220)), 0))


def _noise(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    x = np.asarray(array, np.float32)
    grain = rng.standard_normal(x.shape, dtype=np.float32) * rng.uniform(2, 11)
    return Image.fromarray(np.clip(x + grain, 0, 255).astype(np.uint8))


def _markers(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Letters, arrows, boxes and captions, light or dark, mostly near the edges."""
    array = array.copy()
    draw = ImageDraw.Draw(array)
    side = array.width
    for _ in range(int(rng.integers(1, 4))):
        ink = int(rng.integers(180, 256)) if rng.random() < 0.75 else int(rng.integers(0, 60))
        edge = rng.random() < 0.8
        x, y = rng.uniform(0.02, 0.9, 2) * side
        if edge:
            x = rng.choice([rng.uniform(0.01, 0.12), rng.uniform(0.8, 0.95)]) * side
        kind = rng.random()
        if kind < 0.55:
            font = ImageFont.load_default(max(1, int(side * rng.uniform(0.05, 0.11))))
            draw.text((x, y), str(rng.choice(_LETTERS)), fill=ink, font=font)
        elif kind < 0.7:
            dx, dy = rng.uniform(-0.1, 0.1, 2) * side
            draw.line((x, y, x + dx, y + dy), fill=ink, width=int(rng.integers(1, 4)))
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink)
        elif kind < 0.85:
            w, h = rng.uniform(0.04, 0.2, 2) * side
            fill = ink if rng.random() < 0.7 else None
            draw.rectangle((x, y, x + w, y + h), outline=ink, fill=fill)
        else:
            h = rng.uniform(0.03, 0.1) * side
            draw.rectangle((0, side - h, side, side), fill=ink)
            draw.text((side * 0.1, side - h), str(rng.choice(_LETTERS)), fill=255 - ink)
    return array


def _borders(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Black, white or grey strips along one to four sides."""
    x = np.array(array)
    side = x.shape[0]
    ink = int(rng.choice([0, 0, 0, 255, int(rng.integers(0, 256))]))
    for edge in range(4):
        if rng.random() < 0.45:
            width = max(1, int(side * rng.uniform(0.01, 0.12)))
            turned = np.rot90(x, edge)
            turned[:width] = ink
    return Image.fromarray(x)


def _recompress(array: Image.Image, rng: np.random.Generator) -> Image.Image:
    """JPEG artefacts, at quality 15 to 90, at this size or a smaller one."""
    full = array.size
    if rng.random() < 0.4:
        side = int(full[0] * rng.uniform(0.5, 0.95))
        array = array.resize((side, side), Image.Resampling.BILINEAR)
    buffer = BytesIO()
    array.save(buffer, "JPEG", quality=int(rng.integers(15, 91)))
    again = Image.open(buffer)
    return again.convert("L").resize(full, Image.Resampling.BILINEAR)
