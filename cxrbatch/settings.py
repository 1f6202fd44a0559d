"""Every setting, with its default. config.toml at the top of the repository gives the reason for each.

Where a value comes from, strongest first: a command-line flag, an environment variable CXRBATCH_<NAME>,
the file of --config (or ./config.toml, or /etc/cxrbatch/config.toml), the default here.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cxrbatch.errors import ExitCode, Fatal

__all__ = ["Settings", "config_file", "load_settings", "sources"]

_ENV_PREFIX = "CXRBATCH_"
_CONFIG_PLACES = (Path("config.toml"), Path("/etc/cxrbatch/config.toml"))


class Settings(BaseSettings):
    """All settings, flat; the unit of every number is in its name."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, extra="forbid", frozen=True)

    # Where rows go, and what scores the films.
    db: str = "sqlite:///cxrbatch.db"
    cascade: str = "default"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+(,\d+)*)?)$")
    batch_size: int = Field(0, ge=0, le=1024)  # images; 0: what suits the engine
    batch_age_s: float = Field(0.1, gt=0, le=60)
    record_age_s: float = Field(0.2, ge=0, le=5)
    # What is read.
    include: list[str] = []
    exclude: list[str] = []
    ignore_suffixes: list[str] = [".part", ".tmp", ".partial", ".filepart", ".crdownload"]
    quiet_s: float = Field(1.0, ge=0, le=3600)
    # Decoding, and what bad input may cost.
    exact: bool = False
    workers: int = Field(0, ge=0, le=512)  # processes; 0: one a core
    decode_timeout_s: float = Field(30.0, gt=0, le=3600)
    worker_memory_mib: int = Field(4096, ge=512)
    max_file_mib: int = Field(512, ge=1)
    max_pixels_mpx: float = Field(100.0, gt=0)
    max_inflated_mib: int = Field(512, ge=1)
    min_side_px: int = Field(32, ge=1)
    # Watching.
    rescan_s: float = Field(60.0, ge=0.1, le=86_400)
    poll: Literal["auto", "always", "never"] = "auto"
    poll_s: float = Field(5.0, ge=0.1, le=3600)
    lease_s: float = Field(60.0, ge=2, le=3600)
    retry_first_s: float = Field(5.0, ge=1, le=3600)
    retry_most_s: float = Field(3600.0, ge=1, le=86_400)
    truncated_tries: int = Field(5, ge=1, le=100)
    drain_s: float = Field(8.0, gt=0, le=600)
    # Receiving by DICOM C-STORE.
    listen: str = Field("", pattern=r"^$|^([^@\s]{1,16}@)?\S*:\d{1,5}$")
    calling_ae_titles: list[str] = []
    max_associations: int = Field(32, ge=1, le=1000)
    max_pdu_kib: int = Field(128, ge=16, le=16_384)
    min_free_mib: int = Field(1024, ge=0)
    idle_association_s: float = Field(30.0, gt=0, le=3600)
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    # Log.
    log_format: Literal["console", "json"] = "console"
    # Privacy.
    phi: Literal["hash", "keep", "drop"] = "hash"
    id_key_file: str = "cxrbatch.key"


def config_file(explicit: Path | None) -> Path | None:
    """The configuration file that counts, or None where there is none. Raises Fatal where that cannot be told."""
    if explicit is not None:
        return explicit
    for place in _CONFIG_PLACES:
        try:
            if place.is_file():
                return place
        except OSError as error:
            raise Fatal(
                f"Whether there is a configuration file {place} cannot be told ({error.strerror}); name one with "
                "--config.",
                ExitCode.USAGE,
            ) from None
    return None


def load_settings(explicit_file: Path | None = None, flags: dict[str, Any] | None = None) -> Settings:
    """Read all sources, strongest first. A flag of None was not given.

    Raises Fatal (exit 2) with the name of the unknown or impossible setting.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        os.getcwd()  # stores, keys and folders may be named from here
    except OSError:
        raise Fatal("The working folder is gone; change to one that is there.", ExitCode.USAGE) from None
    try:
        # Environment variables are read by pydantic-settings itself, and are stronger than the file's values.
        values = {k: v for k, v in _file_values(explicit_file).items() if not _in_environment(k)}
        return Settings(**{**values, **given})
    except ValidationError as error:
        raise Fatal(_sentence(error), ExitCode.USAGE) from None


def sources(explicit_file: Path | None, flags: dict[str, Any] | None = None) -> dict[str, str]:
    """For each setting, where its value comes from: 'flag', 'environment', the file's path or 'default'."""
    path = config_file(explicit_file)
    from_file = _file_values(explicit_file)
    given = {name for name, value in (flags or {}).items() if value is not None}

    def source(name: str) -> str:
        if name in given:
            return "flag"
        if _in_environment(name):
            return "environment"
        return str(path) if name in from_file else "default"

    return {name: source(name) for name in Settings.model_fields}


def _in_environment(name: str) -> bool:
    return (_ENV_PREFIX + name).upper() in {key.upper() for key in os.environ}


def _file_values(explicit: Path | None) -> dict[str, Any]:
    path = config_file(explicit)
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Fatal(
            f"The configuration file {path} cannot be read ({error.strerror}); check the path given to --config.",
            ExitCode.USAGE,
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal(f"The configuration file {path} is not valid TOML: {error}.", ExitCode.USAGE) from None
    return values


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{name}'; `cxrbatch config show` lists the ones there are."
    return f"The setting '{name}' cannot be {first.get('input')!r}: {first['msg']}."
