"""One destination's way out: claim objects of the outbox, make them, send them, write down the answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import datetime

from cxrbatch.dicom_out.objects import Explain, NotMade, make_objects
from cxrbatch.dicom_out.send import Destination, Sending, open_destination, parse_destination
from cxrbatch.failpoints import failpoint
from cxrbatch.imaging.limits import Limits, limits_of
from cxrbatch.settings import SendTo, Settings
from cxrbatch.store import Backoff, RetryPolicy, Store
from cxrbatch.store.outbox import Answer, Outbox, OutboxItem
from cxrbatch.store.outbox_schema import SUPERSEDED, OutboxState
from cxrbatch.store.reported import Selection

__all__ = ["Round", "Sender", "destination_of", "selection_of", "sender_of"]

_IN_HAND = 8  # objects of one claim


@dataclass(slots=True)
class Round:
    """What became of the objects of one claim."""

    tried: int = 0
    sent: int = 0
    refused: int = 0
    waiting: int = 0  # for their next try
    warned: int = 0  # sent, and stored with a warning
    unreachable: bool = False  # nobody answers, or the association was not accepted


#: Said of the destination, not of the object: trying the next object now would only wait as long again.
_UNREACHABLE = frozenset({"no_connection", "association_rejected", "tls_failed"})
#: Two new objects without an answer, one after the other: it is not the object, and each one waits for half a minute.
_SILENT = 2
_NO_ANSWER = "no_answer"


@dataclass(slots=True)
class Sender:
    """Sends to one destination. Not for several threads."""

    outbox: Outbox
    to: SendTo
    limits: Limits
    explain: Explain
    missing_tries: int  # a source that is gone may be on a share that comes back; after so many tries it is final
    retry: RetryPolicy
    stop: threading.Event
    _sending: Sending | None = field(default=None, init=False)
    _unanswered: int = field(default=0, init=False)  # the last objects sent, in a row, at their first try

    def fill(self, roots: tuple[str, ...] = (), changed_since: datetime | None = None) -> int:
        """Let what the destination wants wait in the outbox; returns how many objects are new."""
        selection = selection_of(self.to, roots, changed_since)
        return self.retry(lambda: self.outbox.enqueue(selection, self.to.kinds))

    def round(self) -> Round:
        """Claim some objects and try each. `tried` is 0 when none is due. Raises StoreDown, Fatal."""
        result = Round()
        items = self.retry(lambda: self.outbox.claim(_IN_HAND))
        for number, item in enumerate(items):
            if self.stop.is_set() or result.unreachable:
                rest = items[number:]
                self.retry(lambda rest=rest: self.outbox.release(rest))  # type: ignore[misc]
                break
            answer = self._attempt(item, result)
            self.retry(lambda item=item, answer=answer: self.outbox.record(item, answer))  # type: ignore[misc]
            result.tried += 1
            result.sent += answer.state == OutboxState.SENT
            result.refused += answer.state == OutboxState.REFUSED
            result.waiting += answer.state == OutboxState.WAITING
            silent = answer.status == _NO_ANSWER and self._unanswered >= _SILENT
            result.unreachable = silent or answer.status in _UNREACHABLE
        return result

    def _attempt(self, item: OutboxItem, result: Round) -> Answer:
        if item.reported is None:
            return Answer(OutboxState.DROPPED, SUPERSEDED)
        kind = "sc" if item.kind == "sc" else "sr"
        try:
            made = make_objects(item.reported, [kind], self.limits, self.explain)[0]  # type: ignore[list-item]
        except NotMade as problem:
            again = problem.may_pass and item.attempts + 1 < self.missing_tries
            return Answer(OutboxState.WAITING if again else OutboxState.REFUSED, problem.code)
        failpoint("outbox.made")
        if self._sending is None:
            self._sending = open_destination(destination_of(self.to))
        status = self._sending.send(made)
        failpoint("outbox.answered")
        self._unanswered = self._unanswered + 1 if status.code == _NO_ANSWER and not item.attempts else 0
        result.warned += status.warned
        state = OutboxState.WAITING if status.may_pass else OutboxState.REFUSED
        return Answer(OutboxState.SENT if status.stored else state, status.code, made.sop_instance_uid)

    def close(self) -> None:
        """End the association; the next round opens another one."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.close()


def destination_of(to: SendTo) -> Destination:
    """Raises Fatal (exit 2) for an address that is none."""
    return parse_destination(to.url, tls_ca=to.tls_ca, tls_certificate=to.tls_certificate, tls_key=to.tls_key)


def selection_of(to: SendTo, roots: tuple[str, ...] = (), changed_since: datetime | None = None) -> Selection:
    return Selection(tuple(to.decisions), tuple(to.labels), to.reviewed_only, roots, changed_since)


def sender_of(
    settings: Settings, store: Store, to: SendTo, explain: Explain, retry: RetryPolicy, stop: threading.Event
) -> Sender:
    """Raises Fatal (exit 2) for an address that is none."""
    destination_of(to)
    backoff = Backoff(settings.retry_first_s, settings.retry_most_s, settings.truncated_tries)
    return Sender(
        Outbox(store, to.name, settings.lease_s, backoff),
        to,
        limits_of(settings),
        explain,
        settings.truncated_tries,
        retry,
        stop,
    )
