"""What may be logged is a list of keys (ops/logs.py). A key that is not on it is dropped without a word, so all are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cxrbatch.ops.logs import ALLOWED

PACKAGE = Path(__file__).parents[1] / "cxrbatch"
ADDED = {"event", "level", "timestamp", "library", "files"}  # by structlog, the handler for libraries, unexpected.py


def keys_logged(tree: ast.AST) -> Iterator[str]:
    """The keys of `log.info("event", key=…)`, `tell("event", key=…)` and the like."""
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant | ast.IfExp)):
            continue
        f = call.func
        name = f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
        of_log = isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "log"
        if of_log or name.strip("_") == "tell":
            yield from (keyword.arg for keyword in call.keywords if keyword.arg)


def test_every_key_that_is_logged_may_be_and_no_other_may() -> None:
    found = {key for file in PACKAGE.rglob("*.py") for key in keys_logged(ast.parse(file.read_text()))}
    assert {"why", "folder", "state"} <= found
    assert found <= ALLOWED, f"dropped without a word: {sorted(found - ALLOWED)}"
    assert ALLOWED - found <= ADDED, f"allowed, and never logged: {sorted(ALLOWED - found - ADDED)}"
