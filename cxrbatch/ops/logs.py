"""The log: events with a name, values under a few known keys, and nothing else.

Whatever is not on the list below is left out, so that no patient's name, id or accession number gets into a log by
way of a message somebody else composed: not from our own code, not from a library, not in a traceback. File names
are left out too, for people name files after patients; `cxrbatch results` knows them.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Literal

import structlog

__all__ = ["ALLOWED", "listen_to_everything", "log", "where"]

#: Keys that may be printed. The folders are those of the command line.
ALLOWED = frozenset(
    {
        *("event", "level", "timestamp", "why", "error", "where", "library", "seconds", "files", "free_mib"),
        *("folder", "poll", "host", "port", "ae_title", "status", "signal", "pid", "version", "cascade", "device"),
        *("engine", "state", "done", "rejected", "late", "held", "associations", "received", "refused"),
    }
)

log: structlog.stdlib.BoundLogger = structlog.get_logger("cxrbatch")


def listen_to_everything(format: Literal["console", "json"], level: int = logging.INFO) -> None:
    """Set up structlog and the standard library's logging, warnings and uncaught exceptions, all to stderr."""
    last: Any = structlog.processors.JSONRenderer() if format == "json" else _console
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _only_allowed,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(max(level, logging.WARNING) if level > logging.DEBUG else logging.DEBUG)
    for name in ("pydicom", "pynetdicom", "PIL", "sqlalchemy", "watchdog"):  # some bring handlers of their own
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [], True
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    sys.excepthook = lambda kind, error, trace: _uncaught(kind, trace)
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_traceback)


def where(trace: TracebackType | None) -> str:
    """The last few frames of a traceback as file:line, without any value."""
    frames = traceback.extract_tb(trace)[-4:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))


def _uncaught(kind: type[BaseException], trace: TracebackType | None) -> None:
    log.critical("uncaught", error=kind.__name__, where=where(trace))


class _Foreign(logging.Handler):
    """What a library logs: that it did, where, and how loud. Never its words: they may quote a header."""

    def emit(self, record: logging.LogRecord) -> None:
        origin = f"{record.filename}:{record.lineno}"
        log.log(record.levelno, "library_message", library=record.name.partition(".")[0], where=origin)


def _only_allowed(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {key: value for key, value in event.items() if key in ALLOWED}


def _console(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    time, level, name = event.pop("timestamp"), event.pop("level"), event.pop("event")
    rest = " ".join(f"{key}={_plain(value)}" for key, value in event.items())
    return f"{time[:19]}Z {level:8} {name} {rest}".rstrip()


def _plain(value: object) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return f'"{text}"' if " " in text else text
