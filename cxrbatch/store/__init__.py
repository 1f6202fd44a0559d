"""The store: what is known of every file, in SQLite or Postgres."""

from cxrbatch.store.engine import StoreDown
from cxrbatch.store.leases import Claimed, Waits
from cxrbatch.store.ledger import CascadeIdentity, Counts, Reprocess, Run, Store
from cxrbatch.store.paths import path_to_text, text_to_path
from cxrbatch.store.patience import Patience
from cxrbatch.store.recording import Recorded
from cxrbatch.store.schema import FileState, ReviewAction
from cxrbatch.store.views import RESULT_COLUMNS
from cxrbatch.store.work import Work, retry_now
from cxrbatch.store.writer_lock import only_writer

__all__ = [
    "RESULT_COLUMNS",
    "CascadeIdentity",
    "Claimed",
    "Counts",
    "FileState",
    "Patience",
    "Recorded",
    "Reprocess",
    "ReviewAction",
    "Run",
    "Store",
    "StoreDown",
    "Waits",
    "Work",
    "only_writer",
    "path_to_text",
    "retry_now",
    "text_to_path",
]
