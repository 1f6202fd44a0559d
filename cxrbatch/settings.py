"""All settings with their defaults. config.toml at the top of the repository gives the reason for each.

Sources of a value, highest priority first: a command-line flag, an environment variable CXRBATCH_<NAME>, the file of
--config (or ./config.toml, or /etc/cxrbatch/config.toml), the default here.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from cxrbatch.errors import ExitCode, Fatal

__all__ = ["SendTo", "Settings", "config_file", "load_settings", "sources", "without_password"]

_ENV_PREFIX = "CXRBATCH_"
#: Variables with our prefix that are not settings: those of tests and the Makefile, and those that Kubernetes sets in
#: each pod for a service of this name (CXRBATCH_SERVICE_HOST, CXRBATCH_PORT_80_TCP, ...).
_OTHER_VARIABLES = re.compile(
    r"CXRBATCH_(CRASH_AT|FAILPOINT\w*|SEED|(CRASH|FUZZ|SOAK)_\w+|TEST_\w+"
    r"|(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?))"
)
_MOST_CONFIG_BYTES = 1_000_000
_LARGEST_PORT = 65_535
_SHOWN_CHARACTERS = 200  # of a value that is refused
#: Options of a database URL that are not secret; the values of all others are hidden.
_SHOWN_OPTIONS = frozenset(
    {
        *("host", "hostaddr", "port", "dbname", "user", "service", "sslmode", "sslrootcert", "connect_timeout"),
        *("application_name", "target_session_attrs", "keepalives", "keepalives_idle", "tcp_user_timeout"),
    }
)
#: What a setting with a pattern takes, for people who read no regular expressions.
_WRITTEN = {
    "device": "auto, cpu, cuda or cuda:0,1",
    "listen": "[AET@]HOST:PORT, e.g. CXR@0.0.0.0:11112, the AE title of at most 16 characters",
    "name": "at most 64 letters, digits and _.@:/-",
    "review_user_header": "letters, digits and hyphens",
}
_CONFIG_PLACES = (Path("config.toml"), Path("/etc/cxrbatch/config.toml"))


def _listed(value: object) -> object:
    """Parse a list from an environment variable: JSON, or comma-separated items."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [item.strip() for item in value.split(",") if item.strip()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('write a JSON list, e.g. ["*.dcm", "*.png"], or items with commas between them') from None


#: Application entity titles (PS3.5 6.2, AE).
AE_TITLE = re.compile(r"(?=.*[^ ])[ -\[\]-~]{1,16}")
AE_TITLE_RULE = "An application entity title has 1 to 16 ASCII characters, no backslash, and more than spaces"

Texts = Annotated[list[str], NoDecode, BeforeValidator(_listed)]


class SendTo(BaseModel):
    """A destination of results: one table of `send_to`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.@:/-]{1,64}$")  # in the outbox, the log and `cxrbatch send NAME`
    url: str  # dicom://AET@HOST:PORT?calling=AET, dicoms://… with TLS, or https://HOST/dicom-web
    kinds: list[Literal["sc", "sr"]] = ["sc", "sr"]  # Secondary Capture, structured report
    decisions: list[Literal["reported", "needs_review", "not_chest"]] = ["reported", "needs_review"]
    labels: list[str] = []  # empty: all
    reviewed_only: bool = False  # only what has a final label of the readers
    tls_ca: str = ""  # PEM files; empty: the system's authorities, no certificate of ours
    tls_certificate: str = ""
    tls_key: str = ""


class Settings(BaseSettings):
    """All settings; the unit of every number is in its name."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, extra="forbid", frozen=True)

    # Where rows go, and what scores the images.
    db: str = "sqlite:///cxrbatch.db"
    cascade: str = "default"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+(,\d+)*)?)$")
    batch_size: int = Field(0, ge=0, le=1024)  # images; 0: what suits the engine
    batch_age_s: float = Field(0.1, gt=0, le=60)
    record_age_s: float = Field(0.2, ge=0, le=5)
    # What is read.
    include: Texts = []
    exclude: Texts = []
    ignore_suffixes: Texts = [".part", ".tmp", ".partial", ".filepart", ".crdownload"]
    quiet_s: float = Field(1.0, ge=0, le=3600)
    # Decoding, and what bad input may cost.
    exact: bool = False
    workers: int = Field(0, ge=0, le=512)  # processes; 0: one a core
    decode_timeout_s: float = Field(30.0, gt=0, le=3600)
    worker_memory_mib: int = Field(0, ge=0, le=1_000_000_000)  # 0: by the machine's memory; otherwise at least 512
    max_file_mib: int = Field(512, ge=1)
    max_pixels_mpx: float = Field(100.0, gt=0, le=1_000_000)
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
    duplicate_instances: Literal["keep", "refuse"] = "keep"
    calling_ae_titles: Texts = []
    max_associations: int = Field(32, ge=1, le=1000)
    max_associations_per_peer: int = Field(16, ge=0, le=1000)  # 0: no limit of its own
    max_pdu_kib: int = Field(128, ge=16, le=16_384)
    min_free_mib: int = Field(1024, ge=0)
    idle_association_s: float = Field(30.0, gt=0, le=3600)
    pdu_timeout_s: float = Field(10.0, gt=0, le=3600)
    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    # Results to a PACS.
    send_to: list[SendTo] = []
    send_gradcam: bool = True
    # Reviewing in a browser.
    review_host: str = "127.0.0.1"
    review_port: int = Field(8321, ge=0, le=65_535)
    review_workers: int = Field(2, ge=1, le=64)
    review_trusted_proxies: Texts = []
    review_user_header: str = Field("", pattern=r"^[A-Za-z0-9-]*$")
    # What is kept.
    retention_days: int = Field(0, ge=0, le=36_500)  # 0: for ever
    # Metrics and health.
    metrics: str = ""
    # Log.
    log_format: Literal["console", "json"] = "console"
    # Privacy.
    phi: Literal["hash", "keep", "drop"] = "hash"
    id_key_file: str = "cxrbatch.key"

    @field_validator("worker_memory_mib")
    @classmethod
    def _room_for_the_codecs(cls, value: int) -> int:
        if 0 < value < 512:
            raise ValueError("Input should be 0 (by the machine's memory) or at least 512")
        return value

    @field_validator("include", "exclude", "ignore_suffixes")
    @classmethod
    def _say_something(cls, texts: list[str]) -> list[str]:
        if "" in texts:  # as a suffix it is that of every file, as a pattern that of none
            raise ValueError("an empty text in the list would match everything or nothing; leave it out")
        return texts

    @field_validator("listen")
    @classmethod
    def _port_exists(cls, listen: str) -> str:
        if listen and int(listen.rpartition(":")[2]) > _LARGEST_PORT:
            raise ValueError(f"the largest port is {_LARGEST_PORT}")
        title, has_title, _ = listen.partition("@")
        if has_title and not AE_TITLE.fullmatch(title):
            raise ValueError(AE_TITLE_RULE)
        return listen

    @field_validator("calling_ae_titles")
    @classmethod
    def _are_titles(cls, titles: list[str]) -> list[str]:
        if not all(AE_TITLE.fullmatch(title) for title in titles):
            raise ValueError(AE_TITLE_RULE)
        return titles

    @field_validator("review_trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:  # also of 10.0.0.1/8: which of the two is meant cannot be known
                raise ValueError(f"{error}; write addresses or networks, e.g. 10.0.0.1, 10.0.0.0/8") from None
        return proxies

    @field_validator("send_to")
    @classmethod
    def _names_differ(cls, destinations: list[SendTo]) -> list[SendTo]:
        if len({one.name for one in destinations}) < len(destinations):
            raise ValueError("two destinations have the same name")
        return destinations


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
            f"{_ENV_PREFIX}{name.upper()} cannot be read: write JSON, or use the settings file.", ExitCode.USAGE
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


def without_password(text: str) -> str:
    """`text` without the passwords of database URLs in it: neither user:password@ nor those in options."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&])([^=&?\s]+)=([^&\s'\"]*)", _shown_option, text) if "://" in text else text


def _shown_option(match: re.Match[str]) -> str:
    return match[0] if match[2] in _SHOWN_OPTIONS else f"{match[1]}{match[2]}=***"


def _demand_known_variables() -> None:
    """Raise Fatal for an unknown variable such as CXRBATCH_PIH=drop: it is probably a misspelled setting."""
    for variable in os.environ:
        upper = variable.upper()
        if upper.startswith(_ENV_PREFIX) and not _OTHER_VARIABLES.fullmatch(upper):
            name = upper.removeprefix(_ENV_PREFIX).lower()
            if name not in Settings.model_fields:
                raise Fatal(
                    f"Unknown setting '{name}' (from {variable}); `cxrbatch config show` lists the ones there are.",
                    ExitCode.USAGE,
                )


def _in_environment(name: str) -> bool:
    return (_ENV_PREFIX + name).upper() in {key.upper() for key in os.environ}


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
    given = without_password(repr(first.get("input")))[:_SHOWN_CHARACTERS]
    pattern = first["type"] == "string_pattern_mismatch"
    what = f"write {_WRITTEN[str(first['loc'][-1])]}" if pattern else first["msg"].removeprefix("Value error, ")
    return f"The setting '{name}' cannot be {given}: {what}."
