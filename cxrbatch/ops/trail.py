"""Exports leave an entry in the audit trail, whichever command made them."""

from __future__ import annotations

from cxrbatch.errors import Fatal
from cxrbatch.ops.terminal import tell, user_name
from cxrbatch.settings import Settings
from cxrbatch.store import Store, StoreDown
from cxrbatch.store.review_images import write_audit

__all__ = ["note_export"]


def note_export(settings: Settings, what: str) -> None:
    """Put an export that was made into the audit trail, under the name of this machine's user.

    A store that cannot be written (on a read-only mount) can be exported all the same, and a line says that it was not
    noted.
    """
    try:
        with Store.open(settings.db, may_create=False) as store:
            write_audit(store, user_name(), "exported", detail=what)
    except (Fatal, StoreDown):
        tell("This export is not in the audit trail: the store cannot be written.", "yellow")
