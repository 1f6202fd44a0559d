"""`cxrbatch export --dicom | send | outbox`: results as DICOM objects, into a folder or to a PACS."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cxrbatch.dicom_out.objects import KINDS, Explain, MadeObject, NotMade, make_objects
from cxrbatch.dicom_out.send import parse_destination
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.imaging.limits import limits_of
from cxrbatch.intake.remote import normal_path
from cxrbatch.ops.explainer import Explainer
from cxrbatch.ops.logs import quieten_libraries
from cxrbatch.ops.sender import sender_of
from cxrbatch.ops.setup import stopping
from cxrbatch.ops.terminal import tell, to_stdout
from cxrbatch.output_file import new_file
from cxrbatch.own_objects import MANUFACTURER
from cxrbatch.settings import SendTo, Settings
from cxrbatch.store import RetryPolicy, Store, outbox
from cxrbatch.store.outbox_schema import OutboxState
from cxrbatch.store.reported import Selection, all_reported, not_dicom
from cxrbatch.store.sql import utc_text

__all__ = ["drop_objects", "export_dicom", "list_outbox", "retry_objects", "run_send"]

_STATES = {"sent": "green", "waiting": "yellow", "refused": "red", "dropped": "dim"}


def export_dicom(settings: Settings, folder: Path, under: str | None, *, quiet: bool = False) -> ExitCode:
    """A capture and a report for each image that came as DICOM, into `folder` (made if missing).

    Exit 3 where the objects of some image could not be made. Raises Fatal where none came as DICOM.
    """
    quieten_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    roots = _roots(under)
    explain, limits = explain_of(settings), limits_of(settings)
    written, reasons = 0, dict[str, int]()
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        for reported in all_reported(store.engine, Selection(roots=roots)):
            try:
                for made in make_objects(reported, KINDS, limits, explain):
                    _write(folder, reported.sha256, made)
                    written += 1
            except NotMade as problem:
                reasons[problem.why] = reasons.get(problem.why, 0) + 1
        others = not_dicom(store.engine, roots)
    _refuse_without_dicom(written + sum(reasons.values()), others)
    if not quiet:
        _tell_all(f"{written:,} object(s) in {folder}", reasons, others)
    return ExitCode.SOME_REJECTED if reasons else ExitCode.OK


def run_send(settings: Settings, to: str, under: str | None, *, quiet: bool = False) -> ExitCode:
    """Put what the destination wants into the outbox and send what waits there, each object once.

    Exit 3 where something was refused or is left for another try. Raises Fatal: no such destination.
    """
    quieten_libraries()
    destination, roots, stop = _destination(settings, to), _roots(under), threading.Event()
    sent = refused = waiting = warned = 0
    unreachable = False
    with Store.open(settings.db, may_create=False) as store, stopping(stop) as caught:
        sender = sender_of(settings, store, destination, explain_of(settings), RetryPolicy(stop=stop), stop)
        sender.fill(roots)
        others = not_dicom(store.engine, roots)
        before = sender.outbox.progress()
        _refuse_without_dicom(before.waiting + before.sent + before.refused + before.dropped, others)
        sender.outbox.make_due()
        try:
            while not stop.is_set() and not unreachable:
                done = sender.round()
                sent, refused, warned = sent + done.sent, refused + done.refused, warned + done.warned
                unreachable = done.unreachable
                if not done.tried:
                    if not sender.outbox.progress().in_hand:
                        break
                    stop.wait(1)  # another sender has them, or died with them: until its lease ends
        finally:
            sender.close()
        waiting = sender.outbox.progress().waiting
    if not quiet:
        words = f"{sent:,} object(s) sent to {destination.name}"
        words += f", {warned:,} of them stored with a warning (`cxrbatch outbox list` has its status)" if warned else ""
        words += f", {waiting:,} wait for another try" if waiting else ""
        words += f", {refused:,} refused (`cxrbatch outbox list` says why)" if refused else ""
        _tell_all(words, {}, others)
        if unreachable:
            tell("The destination does not answer: check its address, and send again.")
    if caught:
        return ExitCode.INTERRUPTED
    return ExitCode.SOME_REJECTED if waiting or refused else ExitCode.OK


def list_outbox(settings: Settings, to: str | None, state: str | None, limit: int) -> None:
    """A table of the newest objects. Raises Fatal (exit 2) for a state that does not exist."""
    if state is not None and state not in set(OutboxState):
        raise Fatal(f"No state '{state}'; the ones there are: {', '.join(OutboxState)}.", ExitCode.USAGE)
    with Store.open(settings.db, may_create=False, read_only=True) as store:
        rows = outbox.listed(store, to, OutboxState(state) if state else None, limit)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("id", "to", "kind", "image", "state", "tries", "last status", "next try", "sent"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("id", "tries") else "left")
    for row in rows:
        times = [utc_text(moment) if moment else "" for moment in (row.next_attempt_at, row.sent_at)]
        shown = Text(row.state, _STATES[row.state])
        table.add_row(
            str(row.id), row.destination, row.kind, row.sha256[:12], shown, str(row.attempts), row.last_status, *times
        )
    to_stdout().print(table)


def retry_objects(settings: Settings, to: str | None, ids: Sequence[int]) -> None:
    """Let objects wait for another try."""
    with Store.open(settings.db, may_create=False) as store:
        number = outbox.retry(store, to, ids)
    print(f"{number:,} object(s) are sent by the watch that runs, or by the next `cxrbatch send`.")


def drop_objects(settings: Settings, to: str | None, ids: Sequence[int], *, every: bool) -> None:
    """Give up on objects. Raises Fatal (exit 2) unless it is said which."""
    if not ids and to is None and not every:
        raise Fatal("Say which: ids of `cxrbatch outbox list`, --to NAME, or --all.", ExitCode.USAGE)
    with Store.open(settings.db, may_create=False) as store:
        number = outbox.drop(store, to, ids)
    print(f"{number:,} object(s) will not be sent.")


def explain_of(settings: Settings) -> Explain:
    """What makes the maps of captures; nothing where the settings say so."""
    if not settings.send_gradcam:
        return lambda data, reported: None
    return Explainer(settings.cascade, limits_of(settings))


def _destination(settings: Settings, to: str) -> SendTo:
    for known in settings.send_to:
        if known.name == to:
            return known
    if "://" not in to:
        names = ", ".join(one.name for one in settings.send_to) or "none"
        raise Fatal(
            f"There is no destination '{to}' in send_to (there: {names}); name one, or write dicom://AET@HOST:PORT.",
            ExitCode.USAGE,
        )
    # "PACS@10.0.0.5:104", "pacs.example/dicom-web"
    destination = parse_destination(to)
    named = destination.base_url.partition("://")[2] or f"{destination.ae_title}@{destination.host}:{destination.port}"
    name = re.sub(r"[^\w.@:/-]", "_", named)[:64]
    return SendTo(name=name, url=to)


def _roots(under: str | None) -> tuple[str, ...]:
    return () if under is None else (normal_path(under),)


def _refuse_without_dicom(dicom: int, others: int) -> None:
    if not dicom and others:
        raise Fatal("None of these images came as DICOM: without a study there is nothing to file a result in.")


def _tell_all(words: str, reasons: dict[str, int], others: int) -> None:
    tell(words)
    for why, number in reasons.items():
        tell(f"{number:,} image(s) left out: {why}", "yellow")
    if others:
        tell(f"{others:,} image(s) left out: they came as PNG, JPEG or TIFF and have no study.", "yellow")


def _write(folder: Path, sha256: str, made: MadeObject) -> None:
    """`ab/abcdef…-sc.dcm`, named after the image. Only an earlier object of ours is replaced."""
    target = folder / sha256[:2] / f"{sha256[:16]}-{made.kind}.dcm"
    target.parent.mkdir(exist_ok=True)
    with new_file(target, lambda first, last: MANUFACTURER.encode() in first) as file:
        file.write(made.encoded)
