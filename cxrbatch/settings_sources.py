"""Where the values of settings come from, and what is said of those that cannot be used.

Sources of a value, highest priority first: a command-line flag, an environment variable CXRBATCH_<NAME>, the file of
--config (or ./config.toml, or /etc/cxrbatch/config.toml), the default in settings.py.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.settings import ENV_PREFIX, Settings, without_password

__all__ = ["config_file", "load_settings", "sources"]

#: Variables with our prefix that are not settings: those of tests and the Makefile, and those that Kubernetes sets in
#: each pod for a service of this name (CXRBATCH_SERVICE_HOST, CXRBATCH_PORT_80_TCP, ...).
_OTHER_VARIABLES = re.compile(
    r"CXRBATCH_(CRASH_AT|FAILPOINT\w*|SEED|(CRASH|FUZZ|SOAK)_\w+|TEST_\w+"
    r"|(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?))"
)
_MOST_CONFIG_BYTES = 1_000_000
_SHOWN_CHARACTERS = 200  # of a value that is refused
#: What a setting with a pattern takes, for people who read no regular expressions.
_WRITTEN = {
    "device": "auto, cpu, cuda or cuda:0,1",
    "listen": "[AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112, the AE title of at most 16 characters",
    "name": "at most 64 letters, digits and _.@:/-",
    "review_user_header": "letters, digits and hyphens",
}
_CONFIG_PLACES = (Path("config.toml"), Path("/etc/cxrbatch/config.toml"))


def config_file(explicit: Path | None) -> Path | None:
    """The configuration file to use, or None. Raises Fatal if it cannot be determined."""
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
    """Read all sources, highest priority first. A flag of None was not given.

    Raises Fatal (exit 2) with the name of the unknown or invalid setting.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        os.getcwd()  # stores, keys and folders may be named from here
    except OSError:
        raise Fatal("The working folder is gone; change to one that is there.", ExitCode.USAGE) from None
    _demand_known_variables()
    try:
        # pydantic-settings reads the environment itself; its values take precedence over those of the file.
        values = {k: v for k, v in _file_values(explicit_file).items() if not _in_environment(k)}
        return Settings(**{**values, **given})
    except ValidationError as error:
        raise Fatal(_sentence(error), ExitCode.USAGE) from None
    except SettingsError as error:  # of a table in the environment that is no JSON
        name = str(error).split('"')[1]
        raise Fatal(
            f"{ENV_PREFIX}{name.upper()} cannot be read: write JSON, or use the settings file.", ExitCode.USAGE
        ) from None


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


def _demand_known_variables() -> None:
    """Raise Fatal for an unknown variable such as CXRBATCH_PIH=drop: it is probably a misspelled setting."""
    for variable in os.environ:
        upper = variable.upper()
        if upper.startswith(ENV_PREFIX) and not _OTHER_VARIABLES.fullmatch(upper):
            name = upper.removeprefix(ENV_PREFIX).lower()
            if name not in Settings.model_fields:
                raise Fatal(
                    f"Unknown setting '{name}' (from {variable}); `cxrbatch config show` lists the ones there are.",
                    ExitCode.USAGE,
                )


def _in_environment(name: str) -> bool:
    return (ENV_PREFIX + name).upper() in {key.upper() for key in os.environ}


def _file_values(explicit: Path | None) -> dict[str, Any]:
    path = config_file(explicit)
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_CONFIG_BYTES + 1)
        if len(content) > _MOST_CONFIG_BYTES:
            raise Fatal(f"The configuration file {path} is no settings file: it is over 1 MB.", ExitCode.USAGE)
        values = tomllib.loads(content.decode("utf-8-sig"))  # some editors of Windows begin with a mark
    except OSError as error:
        raise Fatal(
            f"The configuration file {path} cannot be read ({error.strerror}); check the path given to --config.",
            ExitCode.USAGE,
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal(f"The configuration file {path} is not valid TOML: {error}.", ExitCode.USAGE) from None
    except RecursionError:
        raise Fatal(f"The configuration file {path} is nested too deeply.", ExitCode.USAGE) from None
    return values


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"Unknown setting '{name}'; `cxrbatch config show` lists the ones there are."
    if first["type"] == "missing":
        return f"The setting '{name}' is missing."
    given = without_password(repr(first.get("input")))[:_SHOWN_CHARACTERS]
    pattern = first["type"] == "string_pattern_mismatch"
    what = f"write {_WRITTEN[str(first['loc'][-1])]}" if pattern else first["msg"].removeprefix("Value error, ")
    return f"The setting '{name}' cannot be {given}: {what}."
