"""The log: events with a name, values under a few known keys, and nothing else.

Values under other keys are dropped, so that no patient's name, ID or accession number gets into a log: not from our own
code, not through a library's message, not in a traceback. File names are dropped too, because people name files after
patients; `cxrbatch results` shows them.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Literal

import structlog

from cxrbatch.unexpected import where

__all__ = ["ALLOWED", "listen_to_everything", "log", "quieten_libraries", "where"]

#: The keys that may be logged. Folders are those of the command line.
ALLOWED = frozenset(
    {
        *("event", "level", "timestamp", "why", "error", "where", "library", "seconds", "files", "free_mib"),
        *("folder", "poll", "host", "port", "pid", "cascade", "device", "engine", "done", "rejected", "held"),
        *("destination", "sent", "refused", "state"),
    }
)

_LIBRARIES = ("pydicom", "pynetdicom", "highdicom", "dicomweb_client", "urllib3", "PIL", "sqlalchemy", "watchdog")

log: structlog.stdlib.BoundLogger = structlog.get_logger("cxrbatch")


def listen_to_everything(format: Literal["console", "json"], level: int = logging.INFO) -> None:
    """Configure structlog and the standard library's logging, warnings and uncaught exceptions, all to stderr."""
    last: Any = structlog.processors.JSONRenderer() if format == "json" else _console
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _only_allowed,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(max(level, logging.WARNING) if level > logging.DEBUG else logging.DEBUG)
    for name in _LIBRARIES:  # some bring handlers of their own
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [], True
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    sys.excepthook = lambda kind, error, trace: _uncaught(kind, trace)
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_traceback)


def quieten_libraries() -> None:
    """For commands that print no log: no word of a library, which may quote a header, gets onto the terminal."""
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers[:], library.propagate = [logging.NullHandler()], False
    warnings.simplefilter("ignore")


def _uncaught(kind: type[BaseException], trace: TracebackType | None) -> None:
    log.critical("uncaught", error=kind.__name__, where=where(trace))


class _Foreign(logging.Handler):
    """Logs the level and place of a library's message, never its text, which may quote a header.

    For our own logger, it logs the event and its values (unexpected.py).
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "cxrbatch" and hasattr(record, "event"):
            log.log(record.levelno, record.event, **{k: getattr(record, k) for k in ("error", "where", "files")})
            return
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
