"""The limits on size and memory of one file. Each name ends in its unit; config.toml explains the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # decode processes need no settings
    from cxrbatch.settings import Settings

__all__ = ["Limits", "limits_of"]

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that are checked before anything of that size is read, inflated or allocated."""

    max_file_mib: int = 512  # a 100-megapixel 16-bit image is 200 MB; whole series in one file are larger
    max_pixels_mpx: float = 100.0  # the largest images are 5000 x 6000 = 30 megapixels
    max_inflated_mib: int = 512  # deflated DICOM, after inflating: the same bound as for plain files
    min_side_px: int = 32  # smaller images show nothing

    @property
    def max_file_bytes(self) -> int:
        return self.max_file_mib * _MIB

    @property
    def max_inflated_bytes(self) -> int:
        return self.max_inflated_mib * _MIB

    @property
    def max_pixels(self) -> int:
        return int(self.max_pixels_mpx * 1_000_000)


def limits_of(settings: Settings) -> Limits:
    """The limits that the settings have."""
    return Limits(settings.max_file_mib, settings.max_pixels_mpx, settings.max_inflated_mib, settings.min_side_px)
