"""Synthetic files to try cxrbatch on: phantom chest films, things that are none, and broken files."""

from cxrbatch.samples.files import write_samples

__all__ = ["write_samples"]
