"""All settings with their defaults. config.toml at the top of the repository gives the reason for each."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

__all__ = ["ENV_PREFIX", "SendTo", "Settings", "without_password"]

ENV_PREFIX = "CXRBATCH_"
_LARGEST_PORT = 65_535
#: Options of a database URL that are not secret; the values of all others are hidden.
_SHOWN_OPTIONS = frozenset(
    {
        *("host", "hostaddr", "port", "dbname", "user", "service", "sslmode", "sslrootcert", "connect_timeout"),
        *("application_name", "target_session_attrs", "keepalives", "keepalives_idle", "tcp_user_timeout"),
    }
)


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

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

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
    id_key_file: str = Field("cxrbatch.key", min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("write a number")  # pydantic takes true for 1
        return value

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


def without_password(text: str) -> str:
    """`text` without the passwords of database URLs in it: neither user:password@ nor those in options."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&])([^=&?\s]+)=([^&\s'\"]*)", _shown_option, text) if "://" in text else text


def _shown_option(match: re.Match[str]) -> str:
    return match[0] if match[2] in _SHOWN_OPTIONS else f"{match[1]}{match[2]}=***"
