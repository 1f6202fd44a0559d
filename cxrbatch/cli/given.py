"""The options that stand before the verb, and the settings that follow from all options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrbatch.settings import Settings, load_settings

__all__ = ["Given", "given"]


@dataclass
class Given:
    """What was said before the verb: `cxrbatch --db URL -q scan …`."""

    config: Path | None = None
    db: str | None = None
    quiet: bool = False
    verbose: bool = False
    log_format: str | None = None

    def settings(self, **flags: Any) -> Settings:
        """All sources together; a flag of None was not given. Raises Fatal (exit 2)."""
        return load_settings(self.config, {"db": self.db, "log_format": self.log_format, **flags})


given = Given()
