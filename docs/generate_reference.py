"""Writes the reference pages that are made from the code: `python docs/generate_reference.py`. A test compares them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cxrbatch.cli import app
from cxrbatch.ops.metrics import described
from cxrbatch.settings import Settings

ROOT = Path(__file__).parent.parent
MADE = "<!-- Made by docs/generate_reference.py: change the code, then run it. -->"


def pages() -> dict[str, str]:
    """Each page's text by its name in docs/reference/."""
    return {
        "cli.md": "\n".join(_cli()),
        "settings.md": "\n".join(_settings()),
        "metrics.md": "\n".join(_metrics()),
    }


def _cli() -> Iterator[str]:
    yield f"# Commands\n\n{MADE}\n"
    yield "`cxrbatch COMMAND --help` says the same. Results go to stdout or a file, progress and logs to stderr.\n"
    root: Any = typer.main.get_command(app)
    yield "These options stand before the command:\n"
    yield from _parameters(root)
    for name, command in sorted(root.commands.items()):
        yield from _command([name], command)


def _command(names: list[str], command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = " ".join(["cxrbatch", *names, *map(_metavar, arguments)])
    yield f"\n## `{words}`\n"
    yield _cell(command.help or "").replace("\\|", "|") + "\n"
    yield from _parameters(command)
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _command([*names, name], below)


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()) + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _parameters(command: Any) -> Iterator[str]:
    rows = []
    for one in command.params:
        if getattr(one, "hidden", False) or one.name in ("help", "install_completion", "show_completion"):
            continue
        if one.param_type_name == "argument":
            if one.help:
                rows.append((f"`{_metavar(one)}`", one.help))
            continue
        name = " ".join(f"`{option}`" for option in [*one.opts, *one.secondary_opts])
        text = one.help or ""
        if one.default not in (None, False, "", [], ()) and not callable(one.default):
            text = f"{text.removesuffix('.')}. Default: {one.default}."
        rows.append((name, text))
    if rows:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| {name} | {_cell(text)} |" for name, text in rows)


def _settings() -> Iterator[str]:
    yield f"# Settings\n\n{MADE}\n"
    yield "Where a value comes from, strongest first: a command-line flag, the environment variable `CXRBATCH_<NAME>`,"
    yield "the file of `--config` (else `config.toml` here, else `/etc/cxrbatch/config.toml`), the default."
    yield "[config.toml](../../config.toml) has them all; `cxrbatch config show` says where each value comes from.\n"
    text = (ROOT / "config.toml").read_text()
    defaults = tomllib.loads(text)
    assert defaults.keys() == Settings.model_fields.keys()
    for section in re.split(r"^# --- ", text, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        yield f"\n## {title.strip(' -')}\n\n| setting | default | meaning |\n|---|---|---|"
        for comment, names in re.findall(r"((?:^#.*\n)+)((?:^\w+ = .*\n?)+)", body, re.M):
            meaning = _cell(" ".join(line.lstrip("# ") for line in comment.splitlines()))
            lines = [line.partition(" = ") for line in names.splitlines()]
            named, values = (" ".join(f"`{line[part]}`" for line in lines) for part in (0, 2))
            yield f"| {named} | {values} | {meaning} |"


def _metrics() -> Iterator[str]:
    yield f"# Metrics\n\n{MADE}\n"
    yield "`cxrbatch watch --metrics HOST:PORT` serves them at `/metrics`. [How to use them](../howto/operate.md)."
    yield "Labels take values of closed sets; nothing comes from an image, a file name or a sender. A folder is known"
    yield "by its index on the command line. What the store says (queue, reviews, drift) is the same in each daemon on"
    yield "it: use `max`, not `sum`. Histograms have `_bucket`, `_sum` and `_count`.\n"
    yield "| metric | kind | labels | meaning |\n|---|---|---|---|"
    for name, kind, labels, meaning in described():
        yield f"| `{name}` | {kind} | {labels} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write them."""
    for name, text in pages().items():
        (ROOT / "docs" / "reference" / name).write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
