"""docs/tutorial.md is run as it stands, and the generated pages are what the code says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.mark.timeout(600)
def test_every_command_of_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    commands = re.findall(r"^\$ (.+?)(?:   # exit (\d+))?$", TUTORIAL, re.M)
    assert len(commands) >= 14
    script = f'set -e\ncxrbatch() {{ "{sys.executable}" -m cxrbatch "$@"; }}\n'
    for command, code in commands:
        print_it = f"echo '+ {command[:60].replace(chr(39), '')}'"
        script += f"{print_it}\n" + (f"{command} || test $? -eq {code}\n" if code else f"{command}\n")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "CXRBATCH OK" in done.stdout and "The store is sound." in done.stdout
    assert (tmp_path / "copy.db").exists()


def test_the_generated_pages_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pages().items():
        page = (ROOT / "docs" / "reference" / name).read_text()
        assert page == text.rstrip() + "\n", f"{name} is out of date: run python docs/generate_reference.py"


def test_the_start_page_leads_to_every_page() -> None:
    links = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text()))
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        if name != "index.md" and not name.startswith("adr/"):
            assert name in links, f"docs/index.md does not lead to {name}"
