"""`cxrbatch status`: what waits, how long, who works on it; an exit code that Nagios and its like understand."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cxrbatch.errors import TRANSIENT_REASONS, Fatal, ReasonCode, StoreDown
from cxrbatch.ops.terminal import plain, to_stdout
from cxrbatch.settings import Settings, without_password
from cxrbatch.store import Store
from cxrbatch.store.backlog import Backlog, Daemon, read_backlog, read_daemons, read_rates
from cxrbatch.store.connection import store_file

__all__ = ["Limits", "State", "Status", "judge", "print_status", "read_status"]

ALIVE_S = 90.0  # a daemon writes its heartbeat every 20 s
_WALK_S = 3600.0  # a folder that was walked longer ago than this, and than twice rescan_s, is not looked after
_LOW_MIB, _VERY_LOW_MIB = 2048, 512  # free beside a SQLite store
_MANY_RETRIES = 10  # of more files at once, something is wrong with the folder or this machine


class State(IntEnum):
    """Exit codes of the monitoring plugins (Nagios, Icinga, Zabbix and others)."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """From when on the state is WARNING or CRITICAL."""

    warning_age_s: float = 900.0  # of the oldest file that waits
    critical_age_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a store and its daemons."""

    backlog: Backlog
    files_last_hour: int
    files_last_day: int
    rejected_last_day: dict[str, int]  # by reason code
    daemons: list[Daemon]
    free_mib: int | None  # beside a SQLite store
    problems: list[tuple[State, str]] = field(default_factory=list)

    @property
    def state(self) -> State:
        return max((state for state, _ in self.problems), default=State.OK)


def read_status(store: Store, url: str) -> Status:
    """Raises StoreDown."""
    per_hour, _ = read_rates(store, 1)
    per_day, reasons = read_rates(store, 24)
    file = store_file(url)
    free_mib = shutil.disk_usage(file.absolute().parent).free >> 20 if file else None
    return Status(read_backlog(store), per_hour, per_day, reasons, _current(read_daemons(store)), free_mib)


def _current(daemons: Iterable[Daemon]) -> list[Daemon]:
    """Those that live, and the newest one where none does: earlier ones that were killed are history."""
    known = list(daemons)
    alive = [daemon for daemon in known if not daemon.finished and daemon.age_s <= ALIVE_S]
    return alive or [daemon for daemon in known[:1] if not daemon.finished]


def judge(status: Status, limits: Limits, now: float | None = None) -> list[tuple[State, str]]:
    """What is not as it should be, one sentence each."""
    moment = time.time() if now is None else now
    found: list[tuple[State, str]] = []
    age_s, waiting = status.backlog.oldest_age_s, status.backlog.queue["waiting"] + status.backlog.queue["claimed"]
    if age_s >= min(limits.warning_age_s, limits.critical_age_s):
        level = State.CRITICAL if age_s >= limits.critical_age_s else State.WARNING
        found.append((level, f"the oldest of {waiting:,} waiting files was queued {_ago(age_s)} ago"))
    alive = [daemon for daemon in status.daemons if daemon.age_s <= ALIVE_S]
    if not alive and status.daemons:
        found.append((State.CRITICAL, f"no daemon lives; the last sign of one is {_ago(status.daemons[0].age_s)} old"))
    elif not alive and waiting:
        found.append((State.CRITICAL, f"{waiting:,} files wait and no daemon lives"))
    for daemon in alive:
        for root in daemon.roots:
            if root["paused"]:
                found.append((State.WARNING, f"the folder {plain(root['folder'])} is away"))
            elif root["last_walk"] and moment - root["last_walk"] > max(_WALK_S, 2 * root.get("every_s", 0.0)):
                age = _ago(moment - root["last_walk"])
                found.append((State.WARNING, f"the folder {plain(root['folder'])} was last walked {age} ago"))
            if unlisted := root.get("unlisted", 0):
                text = f"{unlisted:,} folders in {plain(root['folder'])} cannot be listed: allow it, or `exclude` them"
                found.append((State.WARNING, text))
    if (retries := status.backlog.queue["retry"]) > _MANY_RETRIES:
        reasons = [code for code in status.rejected_last_day if code in (*TRANSIENT_REASONS, ReasonCode.TRUNCATED)]
        why = f": {', '.join(reasons)}" if reasons else ""
        found.append((State.WARNING, f"{retries:,} files could not be read and are tried again{why}"))
    if refused := status.backlog.outbox.get("refused", 0):
        found.append((State.WARNING, f"{refused:,} results were refused by a PACS (`cxrbatch outbox list`)"))
    if status.free_mib is not None and status.free_mib < _LOW_MIB:
        level = State.CRITICAL if status.free_mib < _VERY_LOW_MIB else State.WARNING
        found.append((level, f"{status.free_mib:,} MiB are free beside the store"))
    return found


def print_status(load: Callable[[], Settings], limits: Limits, *, as_json: bool) -> State:
    """One line for a monitoring system, then details for people; or all of it as JSON.

    Settings that `load` refuses are UNKNOWN too: exit code 2 would be CRITICAL, and a monitor reads no stderr.
    """
    try:
        settings = load()
        with Store.open(settings.db, may_create=False, read_only=True) as store:
            status = read_status(store, settings.db)
    except (StoreDown, Fatal, OSError) as error:
        why = without_password(str(error))
        state = State.CRITICAL if isinstance(error, StoreDown) else State.UNKNOWN
        print(
            json.dumps({"state": state.name, "problems": [why]}) if as_json else f"CXRBATCH {state.name} - {_text(why)}"
        )
        return state
    status.problems.extend(judge(status, limits))
    if as_json:
        print(json.dumps(_as_json(status), indent=2))
    else:
        print(_line(status))
        _details(to_stdout(), status)
    return status.state


def _line(status: Status) -> str:
    queue, backlog = status.backlog.queue, status.backlog
    said = "; ".join(text for _, text in sorted(status.problems, reverse=True)) or (
        f"{queue['waiting']:,} waiting, {status.files_last_hour:,} files in the last hour"
    )
    numbers = {
        "waiting": queue["waiting"],
        "claimed": queue["claimed"],
        "retry": queue["retry"],
        "oldest": f"{backlog.oldest_age_s:.0f}s",
        "files_1h": status.files_last_hour,
        "review_waiting": backlog.review_waiting,
        "daemons": sum(daemon.age_s <= ALIVE_S for daemon in status.daemons),
    }
    performance = " ".join(f"{name}={value}" for name, value in numbers.items())
    return f"CXRBATCH {status.state.name} - {_text(said)} | {performance}"


def _text(text: str) -> str:
    """`text` for a monitoring system, to which numbers follow a `|` in any line: a folder's name may have one."""
    return text.replace("|", "¦")


def _details(console: Console, status: Status) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", min_width=20)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(_text(text)))

    queue, backlog = status.backlog.queue, status.backlog
    row("queue", f"{queue['waiting']:,} waiting, {queue['claimed']:,} claimed, {queue['retry']:,} to be tried again")
    row("oldest", _ago(backlog.oldest_age_s) if queue["waiting"] + queue["claimed"] else "nothing waits")
    row("processed", f"{status.files_last_hour:,} in the last hour, {status.files_last_day:,} in the last day")
    row("rejected, last day", ", ".join(f"{code} {n:,}" for code, n in status.rejected_last_day.items()) or "none")
    row("needs review", f"{backlog.review_waiting:,} without a review")
    if any(backlog.outbox.values()):
        row("results to a PACS", ", ".join(f"{number:,} {state}" for state, number in backlog.outbox.items()))
    if status.free_mib is not None:
        row("free disk", f"{status.free_mib:,} MiB beside the store")
    if not status.daemons:
        row("daemons", "none (`cxrbatch watch` starts one)")
    for daemon in status.daemons:
        lives = "alive" if daemon.age_s <= ALIVE_S else f"silent for {_ago(daemon.age_s)}"
        since = f"{daemon.started_at:%Y-%m-%d %H:%M} UTC"
        row("daemon", f"{lives}, {plain(daemon.host)}, since {since}, {daemon.processed:,} files")
        for root in daemon.roots:
            walked = f"walked {_ago(time.time() - root['last_walk'])} ago" if root["last_walk"] else "not walked yet"
            how = "away" if root["paused"] else {"events": "by events", "poll": "by polling"}[root["mode"]]
            row("  folder", f"{plain(root['folder'])}: {how}, {walked}")
    console.print(table)


def _as_json(status: Status) -> dict[str, Any]:
    daemons = []
    for daemon in status.daemons:
        shown = asdict(daemon) | {"started_at": daemon.started_at.isoformat(), "alive": daemon.age_s <= ALIVE_S}
        shown["roots"] = [dict(root) | {"last_walk": _iso(root["last_walk"])} for root in daemon.roots]
        daemons.append(shown)
    return {
        "state": status.state.name,
        "problems": [text for _, text in status.problems],
        "queue": status.backlog.queue,
        "oldest_age_s": round(status.backlog.oldest_age_s, 3),
        "review_waiting": status.backlog.review_waiting,
        "reviews": status.backlog.reviews,
        "outbox": status.backlog.outbox,
        "files_last_hour": status.files_last_hour,
        "files_last_day": status.files_last_day,
        "rejected_last_day": status.rejected_last_day,
        "free_mib": status.free_mib,
        "daemons": daemons,
    }


def _iso(moment: float) -> str | None:
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds") if moment else None


def _ago(seconds: float) -> str:
    """A length of time, short: 40 s, 12 min, 5 h, 3 days."""
    for size, unit in ((86_400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / (size if unit != 'days' else 86_400):.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
