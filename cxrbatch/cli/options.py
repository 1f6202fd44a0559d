"""The global options before the verb, and the settings that result from all options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrbatch.settings import Settings
from cxrbatch.settings_sources import load_settings

__all__ = ["GlobalOptions", "options"]


@dataclass
class GlobalOptions:
    """The options before the verb: `cxrbatch --db URL -q scan …`."""

    config: Path | None = None
    db: str | None = None
    quiet: bool = False
    verbose: bool = False
    log_format: str | None = None

    def settings(self, **flags: Any) -> Settings:
        """The settings from all sources; a flag of None was not given. Raises Fatal (exit 2)."""
        return load_settings(self.config, {"db": self.db, "log_format": self.log_format, **flags})


options = GlobalOptions()
