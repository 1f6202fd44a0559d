"""What the documents say is what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import PASSING_REASONS, ReasonCode
from cxrbatch.settings import Settings
from cxrbatch.store import RESULT_COLUMNS

ROOT = Path(__file__).parent.parent
VERBS = "scan|watch|receive|results|show|export|explain|samples|doctor|retry|train|evaluate|calibrate|models|db|config"


def test_config_toml_has_every_setting_with_its_default_and_a_reason() -> None:
    text = (ROOT / "config.toml").read_text()
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert tomllib.loads(text) == defaults
    for name in defaults:
        assert re.search(rf"^# .*\n(?:\w+ = .*\n){{0,4}}{name} = ", text, re.M), f"{name} has no reason above it"


def test_every_column_is_explained_and_none_that_is_not_there() -> None:
    section = (ROOT / "docs/reference/columns.md").read_text().split("## Reason codes")[0]
    explained = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert sorted(explained) == sorted(RESULT_COLUMNS)


def test_every_reason_code_is_explained_and_whether_it_is_tried_again() -> None:
    section = (ROOT / "docs/reference/columns.md").read_text().split("## Reason codes")[1]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    explained = {code: "yes" in again for codes, _, again in rows for code in re.findall(r"`(\w+)`", codes)}
    assert explained == {str(code): code in PASSING_REASONS for code in ReasonCode}


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


@pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/howto/*.md"))])
def test_commands_in_the_documents_exist_with_the_options_they_use(document: str) -> None:
    commands = re.findall(rf"cxrbatch ((?:{VERBS})\b[^`\n#;|)]*)", (ROOT / document).read_text())
    for command in commands:
        words = command.split()
        verb = words[:2] if words[0] in ("models", "db", "config") and len(words) > 1 else words[:1]
        shown = CliRunner().invoke(app, [*verb, "--help"], terminal_width=200, color=False)
        assert shown.exit_code == 0, f"{document}: cxrbatch {command}"
        for option in re.findall(r"(--[a-z-]+)", command):
            assert option in shown.output, f"{document}: {option} in `cxrbatch {command}`"
