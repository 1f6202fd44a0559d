"""The tables. The statements that create them are in migrations/; a test compares the two.

Read `files` first: one row a path, and the one current outcome of that path. What a network said lives in
`predictions` and `scores` and belongs to a content (`images`), not to a path. What readers say is in
review_schema.py, what is sent in outbox_schema.py. The view `results` puts it all side by side (views.py).
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from cxrbatch.store.outbox_schema import outbox
from cxrbatch.store.review_schema import reviews
from cxrbatch.store.sql import PathText, Utc, big_id, metadata, one_of, text_column
from cxrbatch.types import Decision

__all__ = [
    "FileState",
    "audit",
    "files",
    "images",
    "metadata",
    "models",
    "outbox",
    "predictions",
    "reviews",
    "runs",
    "scores",
]


class FileState(StrEnum):
    """The state of a path. A changed size or mtime leads from any state to `waiting` again.

    `scan` goes directly to an outcome; only `watch` shares work between daemons and uses `waiting` and `claimed`.
    """

    WAITING = "waiting"  # no outcome yet: to claimed, or straight to done, rejected, retry; to missing
    CLAIMED = "claimed"  # leased until lease_until: to done, rejected, retry; to waiting on expiry
    DONE = "done"  # prediction_id is the prediction of these bytes: to missing
    REJECTED = "rejected"  # reason_code is final for these bytes (but `--reprocess failed`): to missing
    RETRY = "retry"  # reason_code may pass: again from next_attempt_at on, or by the next scan
    MISSING = "missing"  # gone from the folder; the row is kept, and gets its old state back if the file returns


#: A cascade (one bundle: its gate and its disease model). It is identified by the manifest's sha256, followed by
#: " exact" (as is the version) if every image was decoded in full.
models = sa.Table(
    "models",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("manifest_sha256", sa.Text, nullable=False, unique=True),
    sa.Column("stages", sa.Text, nullable=False),  # "gate,disease"
    sa.Column("weights_sha256", sa.Text, nullable=False),  # comma separated, in the order of stages
    sa.Column("manifest_json", sa.Text, nullable=False),
    sa.Column("first_used", Utc, nullable=False),
)

#: One start of a scan or a watch.
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("cascade_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("started_at", Utc, nullable=False, index=True),
    sa.Column("finished_at", Utc),  # NULL: still running, or killed
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),  # of cxrbatch
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("engine", sa.Text, nullable=False),
    sa.Column("settings_json", sa.Text, nullable=False),
    sa.Column("counts_json", sa.Text),
)

_IDENTIFIED = sa.text("patient_id_hash <> ''")

#: One content (a file's bytes), under any number of file names.
images = sa.Table(
    "images",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("format", sa.Text, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),  # pixels
    sa.Column("columns", sa.Integer, nullable=False),
    sa.Column("bits_stored", sa.Integer, nullable=False),
    sa.Column("number_of_frames", sa.Integer, nullable=False),
    text_column("photometric_interpretation"),
    text_column("transfer_syntax_uid"),
    text_column("modality"),
    text_column("body_part_examined"),
    text_column("view_position"),
    text_column("sop_class_uid"),
    text_column("sop_instance_uid"),
    text_column("series_instance_uid"),
    text_column("study_instance_uid"),
    text_column("patient_id_hash"),
    text_column("accession_number_hash"),
    text_column("manufacturer"),
    text_column("study_date"),
    text_column("decoder"),
    text_column("grey_path"),
    sa.Column("inverted", sa.Boolean, nullable=False),
    text_column("quality_flags"),  # comma separated
    sa.Column("first_seen", Utc, nullable=False),
    sa.Column("grey_mean", sa.Double),  # 0..255, for drift; NULL: read before schema 0007
    sa.Index(None, "sop_instance_uid"),
    sa.Index(None, "study_instance_uid"),
    sa.Index(None, "patient_id_hash", sqlite_where=_IDENTIFIED, postgresql_where=_IDENTIFIED),
)

#: The prediction of one cascade for one content. The same bytes and the same bundle give the same row.
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("image_id", sa.ForeignKey("images.id"), nullable=False),
    sa.Column("cascade_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("gate_probability", sa.Double),  # NULL: no gate
    sa.Column("is_chest", sa.Boolean),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("confidence", sa.Double, nullable=False),
    sa.Column("decision", sa.Text, nullable=False),
    sa.Column("ood_score", sa.Double),
    text_column("review_reasons"),  # comma separated
    sa.Column("processed_at", Utc, nullable=False),
    sa.Column("label_set", sa.Text),  # classes that hold the right one, most probable first: "A|B"; NULL: none chosen
    sa.Column("abnormal_probability", sa.Double),
    sa.Column("scores_json", sa.Text),  # probabilities by class, as JSON: also classes without a column in `results`
    one_of("decision", Decision),
    sa.UniqueConstraint("image_id", "cascade_id"),
    sa.Index(None, "cascade_id", "image_id", "label"),  # two cascades side by side
)

scores = sa.Table(
    "scores",
    metadata,
    sa.Column("prediction_id", sa.ForeignKey("predictions.id"), primary_key=True),
    sa.Column("label", sa.Text, primary_key=True),
    sa.Column("logit", sa.Double),
    sa.Column("probability", sa.Double),  # calibrated
    sqlite_with_rowid=False,
)

_UNFINISHED = sa.text("state IN ('waiting', 'claimed', 'retry')")
_REASONED = sa.text("reason_code IS NOT NULL")
_COPIED = sa.text("is_copy")

#: One path, and its one current outcome. label, confidence, decision and processed_at repeat the row of
#: prediction_id, so that counting a million rows reads one index; `db check` compares them.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("path", PathText, nullable=False, unique=True),  # see paths.py
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column(
        "inode", sa.BigInteger, nullable=False
    ),  # `watch` compares it, but not on network mounts, where it changes
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("image_id", sa.ForeignKey("images.id"), index=True),  # NULL: never read whole
    sa.Column("prediction_id", sa.ForeignKey("predictions.id"), index=True),
    sa.Column("cascade_id", sa.ForeignKey("models.id")),  # whose outcome this is
    sa.Column("run_id", sa.ForeignKey("runs.id")),  # that recorded it
    sa.Column("label", sa.Text),
    sa.Column("confidence", sa.Double),
    sa.Column("decision", sa.Text),
    sa.Column("reason_code", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("processed_at", Utc),  # of the prediction, or of the rejection
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),  # that ended in `retry`, in a row
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", Utc),
    sa.Column("next_attempt_at", Utc),
    sa.Column("first_seen", Utc, nullable=False),
    sa.Column("last_seen", Utc, nullable=False),  # when its outcome was last recorded or restored, or it was queued
    sa.Column("missing_since", Utc),
    # Another path already held these bytes when this path got them. Of several paths with one content, at least one is
    # marked; a marked path may be the only one left.
    sa.Column("is_copy", sa.Boolean, nullable=False, server_default=sa.false()),
    # What people search the view by repeats the row of image_id; `db check` compares them.
    sa.Column("sha256", sa.Text),
    sa.Column("sop_instance_uid", sa.Text),
    sa.Column("study_instance_uid", sa.Text),
    sa.Column("version", sa.Text),  # of an object in a bucket (VersionId or ETag); NULL: a file
    one_of("state", FileState),
    one_of("decision", Decision),
    sa.CheckConstraint("state <> 'done' OR prediction_id IS NOT NULL", name="done_has_a_prediction"),
    sa.CheckConstraint("state NOT IN ('rejected', 'retry') OR reason_code IS NOT NULL", name="why"),
    sa.CheckConstraint("(prediction_id IS NULL) = (label IS NULL)", name="label_of_prediction"),
    sa.CheckConstraint("prediction_id IS NULL OR reason_code IS NULL", name="one_outcome"),
    sa.CheckConstraint("(state = 'missing') = (missing_since IS NOT NULL)", name="missing_since"),
    sa.CheckConstraint("(state = 'claimed') = (lease_owner IS NOT NULL)", name="lease"),
    sa.Index(None, "label", "confidence"),
    sa.Index(None, "decision", "confidence"),
    sa.Index(None, "state", "label", "decision"),
    # Few of a million rows are unfinished or copies: these three indexes stay small.
    sa.Index(None, "next_attempt_at", sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED),
    sa.Index(None, "reason_code", sqlite_where=_REASONED, postgresql_where=_REASONED),
    sa.Index("ix_files_copies", "image_id", sqlite_where=_COPIED, postgresql_where=_COPIED),
    sa.Index(None, "processed_at"),
    sa.Index(None, "sha256"),
    sa.Index(None, "sop_instance_uid"),
    sa.Index(None, "study_instance_uid"),
)

#: Append-only: changes of rows that their current state does not show.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("at", Utc, nullable=False),
    sa.Column("event", sa.Text, nullable=False),  # "image_changed", "missing", "returned", "pruned", "mounted", ...
    sa.Column("path", PathText),
    sa.Column("run_id", sa.ForeignKey("runs.id")),
    sa.Column("old", sa.Text),  # for image_changed: the sha256 before
    sa.Column("new", sa.Text),
    text_column("detail"),
    sa.Column("actor", sa.Text),  # the reader or administrator; NULL: the program
    sa.Index(None, "path", "id"),
)
