"""docs/promises.md names the tests that keep the promises: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "promises.md").read_text()


def test_each_test_that_is_named_exists() -> None:
    named = re.findall(r"`((?:[a-z_]+/)*test_\w+\.py)::(test_\w+)`", TEXT)
    assert len(named) > 20
    for file, function in named:
        assert f"def {function}(" in (TESTS / file).read_text(), (file, function)


def test_each_promise_has_a_test() -> None:
    parts = re.split(r"^## \d\. ", TEXT, flags=re.M)[1:]
    assert len(parts) == 7
    for part in parts:
        assert re.search(r"`[\w/]+\.py::test_\w+`", part), part[:60]
