"""Synthetic files for trying cxrbatch: phantom chest images, images of other things, and broken files."""

from cxrbatch.samples.files import write_samples

__all__ = ["write_samples"]
