"""The paths that one walk saw, in eight bytes each: a million files take eight megabytes."""

from __future__ import annotations

import os
import stat
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping

import numpy as np

from cxrbatch.store.paths import text_to_path

__all__ = ["PathHashSet"]


class PathHashSet:
    """Path texts (store/paths.py), by their hashes.

    `text in seen` is evaluated after the walk. A path that the walk did not see may have appeared since, or may exist
    but be excluded now. It is not gone, so the file system is checked again before the answer is no.
    """

    def __init__(self, long_paths: Mapping[str, str] | None = None) -> None:
        self._hashes = array("q")
        self._sorted = 0  # how many of them are in order
        self._long_paths = {} if long_paths is None else long_paths  # path by its text, where the text was cut

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, text: str) -> None:
        self._hashes.append(hash(text))

    def __contains__(self, text: object) -> bool:
        return self._holds(hash(text)) or self._is_there(str(text))

    def lacks(self, hashes: Iterable[int]) -> list[int]:
        """Those of these text hashes that the walk did not see."""
        asked = np.fromiter(hashes, np.int64)
        return [int(number) for number in asked[~np.isin(asked, np.frombuffer(self._hashes, np.int64))]]

    def _holds(self, number: int) -> bool:
        if self._sorted < len(self._hashes):
            np.frombuffer(self._hashes, np.int64).sort()
            self._sorted = len(self._hashes)
        at = bisect_left(self._hashes, number)
        return at < len(self._hashes) and self._hashes[at] == number

    def _is_there(self, text: str) -> bool:
        try:
            info = os.lstat(self._long_paths.get(text) or text_to_path(text))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        except OSError:
            return True  # unknown
        return not stat.S_ISDIR(info.st_mode)  # a folder had a row while it could not be listed; now it can
