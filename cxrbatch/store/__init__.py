"""The store: everything that is known about every file, in SQLite or Postgres."""

from cxrbatch.store.connection import StoreDown
from cxrbatch.store.job_queue import JobQueue
from cxrbatch.store.leases import Backoff, Claimed
from cxrbatch.store.paths import path_to_text, text_to_path
from cxrbatch.store.queries import PathCounts
from cxrbatch.store.recording import Recorded
from cxrbatch.store.rejected import retry_now
from cxrbatch.store.retry import RetryPolicy
from cxrbatch.store.review_schema import ReviewAction
from cxrbatch.store.reviews import Act, record_act
from cxrbatch.store.schema import FileState
from cxrbatch.store.store import CascadeIdentity, Reprocess, Run, Store
from cxrbatch.store.views import RESULT_COLUMNS
from cxrbatch.store.writer_lock import only_writer

__all__ = [
    "RESULT_COLUMNS",
    "Act",
    "Backoff",
    "CascadeIdentity",
    "Claimed",
    "FileState",
    "JobQueue",
    "PathCounts",
    "Recorded",
    "Reprocess",
    "RetryPolicy",
    "ReviewAction",
    "Run",
    "Store",
    "StoreDown",
    "only_writer",
    "path_to_text",
    "record_act",
    "retry_now",
    "text_to_path",
]
