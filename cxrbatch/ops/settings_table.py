"""`cxrbatch config show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.table import Table

from cxrbatch.ops.terminal import to_stdout
from cxrbatch.settings import Settings, sources

__all__ = ["print_settings", "without_password"]


def print_settings(settings: Settings, config: Path | None, flags: dict[str, Any]) -> None:
    """One row a setting; passwords in URLs are not shown."""
    where = sources(config, flags)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for name, value in settings.model_dump().items():
        table.add_row(name, without_password(str(value)), where[name])
    to_stdout().print(table, markup=False)


def without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", url)
