"""`cxrbatch config show | check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from cxrbatch.ops.terminal import to_stdout
from cxrbatch.settings import Settings, without_password
from cxrbatch.settings_sources import sources

__all__ = ["check_settings", "print_settings"]


def print_settings(settings: Settings, config: Path | None, flags: dict[str, Any]) -> None:
    """Print one row per setting; passwords in URLs are not shown."""
    where = sources(config, flags)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for name, value in settings.model_dump().items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # as in TOML: true, ["a"]
        table.add_row(name, without_password(text), where[name])
    to_stdout().print(table)


def check_settings(settings: Settings) -> None:
    """Check settings in the modules that use them. Raises Fatal for the first setting that cannot be used."""
    from cxrbatch.inference.bundle import find_bundle
    from cxrbatch.ops.monitor import parse_address
    from cxrbatch.ops.receive import listen_of
    from cxrbatch.store.connection import parse_url

    parse_url(settings.db)
    find_bundle(settings.cascade)
    if settings.listen:
        listen_of(settings)
    if settings.metrics:
        parse_address(settings.metrics)
    if settings.send_to:
        from cxrbatch.ops.sender import destination_of  # needs the extra `dicom`, as sending does

        for to in settings.send_to:
            destination_of(to)
