"""deploy/: each command in there is one that this program takes, and each setting one that it knows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cxrbatch.cli import app
from cxrbatch.settings import Settings

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT, ENV, DOCKERFILE, COMPOSE = (
    (DEPLOY / name).read_text() for name in ("cxrbatch-watch.service", "cxrbatch.env", "Dockerfile", "compose.yaml")
)


def commands() -> Iterator[list[str]]:
    """What is run, without the program's own name."""
    for line in re.findall(r"^ExecStart=(.+)$", UNIT, re.M):
        program, *args = shlex.split(line)
        assert Path(program).name == "cxrbatch"
        yield args
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    assert json.loads(entry) == ["cxrbatch"]
    yield from map(json.loads, re.findall(r"^CMD (.+)$", DOCKERFILE, re.M))
    for command in map(json.loads, re.findall(r"^    command: (.+)$", COMPOSE, re.M)):
        if command[0] != "postgres":
            yield command


def test_there_are_commands() -> None:
    assert [" ".join(command[:2]) for command in commands()] == [
        "--log-format json",
        "watch /incoming",
        "db upgrade",
        "watch /incoming",
    ]


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_the_command_line_takes_it(command: list[str]) -> None:
    """Parsed down to its last option by the real command line; only running it is left out."""
    found: Any = typer.main.get_command(app)
    context = found.make_context("cxrbatch", list(command))
    while hasattr(found, "resolve_command"):
        name, found, args = found.resolve_command(context, [*context._protected_args, *context.args])
        context = found.make_context(name, args, parent=context)
    assert not context.args


def test_settings_exist_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given = re.findall(r"\b(CXRBATCH_[A-Z_]+)[=:] ?(\S+)", ENV + DOCKERFILE + COMPOSE)
    given = [(name, value) for name, value in given if value != "\\"]
    assert given
    for name, value in given:
        assert name.removeprefix("CXRBATCH_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value.strip('"'))
    Settings()


def test_nobody_runs_as_root_and_no_secret_is_written_down() -> None:
    assert re.search(r"^User=cxrbatch$", UNIT, re.M) and re.search(r"^USER 10001$", DOCKERFILE, re.M)
    assert not re.search(r"password\s*[=:]\s*\S|://[^/\s:@]+:[^@\s]+@", UNIT + ENV + DOCKERFILE + COMPOSE, re.I)


def test_the_unit_can_keep_what_it_promises() -> None:
    """The unit waits longer for the end than drain_s, and hears from the road more often than its watchdog bites."""
    number = dict(re.findall(r"^(\w+Sec)=(\d+)$", UNIT, re.M))
    assert int(number["TimeoutStopSec"]) > Settings().drain_s + 5
    assert int(number["WatchdogSec"]) > 2 * Settings().decode_timeout_s
    assert "Type=notify" in UNIT
