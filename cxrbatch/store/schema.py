"""The tables. The statements that make them are in migrations/; a test holds the two together.

Read `files` first: one row a path, and the one current outcome of that path. What a network said lives in
`predictions` and `scores` and belongs to a content (`images`), not to a path. The view `results` puts it all
side by side (views.py).
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from cxrbatch.nouns import Decision
from cxrbatch.store.columns import PathText, Utc, big_id

__all__ = [
    "FileState",
    "ReviewAction",
    "audit",
    "files",
    "images",
    "metadata",
    "models",
    "predictions",
    "reviews",
    "runs",
    "scores",
]


class FileState(StrEnum):
    """Where a path stands. A changed size or mtime sends any state through `waiting` again.

    `scan` goes straight to an outcome; only `watch` shares work and therefore waits and claims.
    """

    WAITING = "waiting"  # no outcome yet: to claimed, or straight to done, rejected, retry; to missing
    CLAIMED = "claimed"  # leased until lease_until: to done, rejected, retry; to waiting on expiry
    DONE = "done"  # prediction_id is the verdict of these bytes: to missing
    REJECTED = "rejected"  # reason_code is final for these bytes (but `--reprocess failed`): to missing
    RETRY = "retry"  # reason_code may pass: again from next_attempt_at on, or by the next scan
    MISSING = "missing"  # gone from the folder; all is kept: back to what it was when it returns


class ReviewAction(StrEnum):
    """What a reader did with a row."""

    ACCEPT = "accept"
    OVERRIDE = "override"
    FLAG = "flag"


def _one_of(column: str, values: type[StrEnum]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def _words(name: str) -> sa.Column[str]:
    """Text that is empty, never NULL, where nothing is known."""
    return sa.Column(name, sa.Text, nullable=False, server_default="")


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: A cascade (one bundle: its gate and its disease model). What made a number is the manifest's sha256,
#: with " exact" behind it (and behind the version) where every picture was decoded in full.
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
    sa.Column("finished_at", Utc),  # NULL: still at work, or killed
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),  # of cxrbatch
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("engine", sa.Text, nullable=False),
    sa.Column("settings_json", sa.Text, nullable=False),
    sa.Column("counts_json", sa.Text),
)

#: One content (a file's bytes), whatever it is called and however often it lies there.
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
    _words("photometric_interpretation"),
    _words("transfer_syntax_uid"),
    _words("modality"),
    _words("body_part_examined"),
    _words("view_position"),
    _words("sop_class_uid"),
    _words("sop_instance_uid"),
    _words("series_instance_uid"),
    _words("study_instance_uid"),
    _words("patient_id_hash"),
    _words("accession_number_hash"),
    _words("manufacturer"),
    _words("study_date"),
    _words("decoder"),
    _words("grey_path"),
    sa.Column("inverted", sa.Boolean, nullable=False),
    _words("quality_flags"),  # comma separated
    sa.Column("first_seen", Utc, nullable=False),
    sa.Index(None, "sop_instance_uid"),
    sa.Index(None, "study_instance_uid"),
)

#: What one cascade says of one content. The same bytes through the same bundle give the same row.
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
    _words("review_reasons"),  # comma separated
    sa.Column("processed_at", Utc, nullable=False),
    _one_of("decision", Decision),
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
#: prediction_id, so that counting a million rows is a walk along one index; `db check` compares them.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("path", PathText, nullable=False, unique=True),  # see paths.py
    sa.Column("size", sa.BigInteger, nullable=False),  # bytes
    sa.Column("mtime_ns", sa.BigInteger, nullable=False),
    sa.Column("inode", sa.BigInteger, nullable=False),  # told, never compared: it changes on network mounts
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
    sa.Column("last_seen", Utc, nullable=False),  # when an outcome was last recorded
    sa.Column("missing_since", Utc),
    # Another path had held these bytes when this one came to them. Of the paths that share a content at least one
    # says so; one that says so may be the only one left.
    sa.Column("is_copy", sa.Boolean, nullable=False, server_default=sa.false()),
    _one_of("state", FileState),
    _one_of("decision", Decision),
    sa.CheckConstraint("state <> 'done' OR prediction_id IS NOT NULL", name="done_has_a_prediction"),
    sa.CheckConstraint("state NOT IN ('rejected', 'retry') OR reason_code IS NOT NULL", name="why"),
    sa.CheckConstraint("(prediction_id IS NULL) = (label IS NULL)", name="label_of_prediction"),
    sa.CheckConstraint("prediction_id IS NULL OR reason_code IS NULL", name="one_outcome"),
    sa.CheckConstraint("(state = 'missing') = (missing_since IS NOT NULL)", name="missing_since"),
    sa.CheckConstraint("(state = 'claimed') = (lease_owner IS NOT NULL)", name="lease"),
    sa.Index(None, "label", "confidence"),
    sa.Index(None, "label", "image_id"),  # counting through the view, which joins images
    sa.Index(None, "decision", "confidence"),
    sa.Index(None, "state", "label", "decision"),
    # What is still to be done is few among a million rows, and so are copies: these three stay small.
    sa.Index(None, "next_attempt_at", sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED),
    sa.Index(None, "reason_code", sqlite_where=_REASONED, postgresql_where=_REASONED),
    sa.Index("ix_files_copies", "image_id", sqlite_where=_COPIED, postgresql_where=_COPIED),
    sa.Index(None, "processed_at"),
)

#: Append-only: the newest row of a prediction counts.
reviews = sa.Table(
    "reviews",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("prediction_id", sa.ForeignKey("predictions.id"), nullable=False),
    sa.Column("reviewer", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("label", sa.Text),  # the reader's; NULL for a flag
    _words("comment"),
    sa.Column("at", Utc, nullable=False),
    _one_of("action", ReviewAction),
    sa.Index(None, "prediction_id", "id"),
)

#: Append-only: what happened to rows that the current state does not tell.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("at", Utc, nullable=False),
    sa.Column("event", sa.Text, nullable=False),  # "content_changed", "missing", "returned", "pruned", ...
    sa.Column("path", PathText),
    sa.Column("run_id", sa.ForeignKey("runs.id")),
    sa.Column("old", sa.Text),  # for content_changed: the sha256 before
    sa.Column("new", sa.Text),
    _words("detail"),
    sa.Index(None, "path", "id"),
)
