"""docs/promises.md and SECURITY.md name the tests that keep what they say: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "promises.md").read_text()
SECURITY = (TESTS.parent / "SECURITY.md").read_text()


def test_each_test_that_is_named_exists() -> None:
    named = re.findall(r"`((?:[a-z_]+/)*test_\w+\.py)::(test_\w+)`", TEXT + SECURITY)
    assert len(named) > 60
    for file, function in named:
        assert f"def {function}(" in (TESTS / file).read_text(), (file, function)


def test_each_promise_has_a_test() -> None:
    parts = re.split(r"^## \d\. ", TEXT, flags=re.M)[1:]
    assert len(parts) == 8
    for part in parts:
        assert re.search(r"`[\w/]+\.py::test_\w+`", part), part[:60]


def test_each_threat_has_a_rule_and_a_test() -> None:
    threats = SECURITY.split("## Files")[1].split("## What it does not do")[0]
    rows = [line.strip("|").split("|") for line in threats.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() != "threat"]
    assert len(rows) > 25
    for threat, rule, test in rows:
        assert rule.strip() and re.search(r"`[\w/]+\.py::test_\w+`", test), threat
