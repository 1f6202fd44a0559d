"""The tables of the review: who may log in, what readers said, what is current, and rounds of reading.

`reviews` is append-only and belongs to an image, not to a prediction: each row repeats what the reader was shown, so
that a new bundle or `--reprocess all` changes nothing about it. `reads` and `review_status` are its current state;
store/reviews.py writes all three in one transaction.
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from cxrbatch.store.sql import Utc, big_id, metadata, one_of, text_column

__all__ = [
    "ADJUDICATION",
    "NO_ROUND",
    "ReviewAction",
    "ReviewStatus",
    "Role",
    "login_throttle",
    "reads",
    "review_leases",
    "review_status",
    "reviews",
    "round_assignments",
    "round_items",
    "round_readers",
    "rounds",
    "sessions",
    "users",
]

ADJUDICATION = -1  #: `reads.round_id` of an adjudication
NO_ROUND = 0  #: `reads.round_id` outside rounds: part of a primary key, which cannot be NULL


class ReviewAction(StrEnum):
    """What a reader did with an image."""

    ACCEPT = "accept"  # the label that was shown
    OVERRIDE = "override"  # a label of the reader's own; the only way to give one where none was shown
    FLAG = "flag"  # for another reader; no label
    SKIP = "skip"  # not now; no label
    WITHDRAW = "withdraw"  # takes back the reader's current read; no label


class ReviewStatus(StrEnum):
    """What all current reads of an image come to. An image without a row here is unreviewed."""

    AGREED = "agreed"  # all labels that readers gave are the same, or there is one
    DISPUTED = "disputed"  # readers gave different labels
    FLAGGED = "flagged"  # a reader wants another one's eyes
    ADJUDICATED = "adjudicated"  # decided after a dispute


class Role(StrEnum):
    """What a user may do."""

    READER = "reader"
    ADMIN = "admin"  # also: rounds, adjudication, every report


users = sa.Table(
    "users",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("password_hash", sa.Text, nullable=False),  # argon2id
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("disabled_at", Utc),
    one_of("role", Role),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("token_sha256", sa.Text, primary_key=True),  # the token itself is in the reader's cookie alone
    sa.Column("user_name", sa.Text, nullable=False, index=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("last_seen_at", Utc, nullable=False),
    sa.Column("expires_at", Utc, nullable=False),
    one_of("role", Role),
)

#: Failed logins of a name or an address, in the store so that a restart forgets none.
login_throttle = sa.Table(
    "login_throttle",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),  # "user NAME" or "address IP"
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("last_at", Utc, nullable=False),
    sa.Column("blocked_until", Utc),
)

#: Images that several readers read in a set way.
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("closed_at", Utc),
    sa.Column("blinded", sa.Boolean, nullable=False),  # to the model and to each other, until it is closed
    sa.Column("reads_per_image", sa.Integer, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("filter_json", sa.Text, nullable=False),  # what the images were chosen by
    sa.CheckConstraint("reads_per_image BETWEEN 1 AND 3", name="reads_per_image"),
)

round_readers = sa.Table(
    "round_readers",
    metadata,
    sa.Column("round_id", sa.ForeignKey("rounds.id"), primary_key=True),
    sa.Column("reader", sa.Text, primary_key=True),
    sa.Index(None, "reader", "round_id"),
)

#: An image of a round. `repeat` 1 is the same image once more, to compare a reader with themselves. The model's
#: answer is that of the round's beginning.
round_items = sa.Table(
    "round_items",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("round_id", sa.ForeignKey("rounds.id"), nullable=False),
    sa.Column("image_id", sa.ForeignKey("images.id"), nullable=False, index=True),
    sa.Column("repeat", sa.Integer, nullable=False),
    sa.Column("model_label", sa.Text),
    sa.Column("model_confidence", sa.Double),
    sa.Column("model_cascade_id", sa.ForeignKey("models.id")),
    sa.UniqueConstraint("round_id", "image_id", "repeat"),
)

#: Which reader reads which item, and in which order.
round_assignments = sa.Table(
    "round_assignments",
    metadata,
    sa.Column("round_id", sa.ForeignKey("rounds.id"), primary_key=True),
    sa.Column("reader", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("item_id", sa.ForeignKey("round_items.id"), nullable=False),
    sa.UniqueConstraint("item_id", "reader"),
)

#: Append-only: every act of every reader. Only `db prune --include-reviewed` removes rows, with their image.
reviews = sa.Table(
    "reviews",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("image_id", sa.ForeignKey("images.id"), nullable=False),
    sa.Column("reviewer", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("label", sa.Text),  # the reader's; NULL for flag, skip and withdraw
    text_column("comment"),
    sa.Column("at", Utc, nullable=False),
    sa.Column("shown_label", sa.Text),  # NULL where nothing was shown
    sa.Column("shown_confidence", sa.Double),
    sa.Column("shown_cascade_id", sa.ForeignKey("models.id")),
    sa.Column("blinded", sa.Boolean, nullable=False),
    sa.Column("adjudication", sa.Boolean, nullable=False),  # decides a dispute
    sa.Column("round_id", sa.ForeignKey("rounds.id")),
    sa.Column("repeat", sa.Integer, nullable=False, server_default="0"),
    sa.Column("opened_at", Utc),  # by the server's clock
    sa.Column("active_ms", sa.Integer),  # while the page was in sight, as the browser says
    sa.Column("act_id", sa.Text, nullable=False, unique=True),  # made by the client: the same act twice is one row
    one_of("action", ReviewAction),
    sa.CheckConstraint("(action IN ('accept', 'override')) = (label IS NOT NULL)", name="label_of_action"),
    sa.CheckConstraint("NOT blinded OR shown_label IS NULL", name="blinded_shows_nothing"),
    sa.Index(None, "image_id", "id"),
)

#: The current read of a reader: their last act on an image in a round, unless it was withdrawn.
reads = sa.Table(
    "reads",
    metadata,
    sa.Column("image_id", sa.ForeignKey("images.id"), primary_key=True),
    sa.Column("reader", sa.Text, primary_key=True),
    sa.Column("round_id", sa.Integer, primary_key=True),  # NO_ROUND outside rounds, or ADJUDICATION
    sa.Column("repeat", sa.Integer, primary_key=True),
    sa.Column("review_id", sa.ForeignKey("reviews.id"), nullable=False, index=True),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("label", sa.Text),
    sa.Column("blinded", sa.Boolean, nullable=False),
    sa.Column("at", Utc, nullable=False),
    sa.Index(None, "reader", "at"),
    sa.Index(None, "round_id", "reader", "image_id"),
    sqlite_with_rowid=False,
)

#: One row an image that somebody has read: the final label, or why there is none yet.
review_status = sa.Table(
    "review_status",
    metadata,
    sa.Column("image_id", sa.ForeignKey("images.id"), primary_key=True),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("label", sa.Text),  # NULL while disputed or flagged
    sa.Column("decided_by", sa.Text, nullable=False),  # readers, comma separated
    sa.Column("decided_at", Utc, nullable=False),
    one_of("status", ReviewStatus),
    sa.CheckConstraint("(status IN ('agreed', 'adjudicated')) = (label IS NOT NULL)", name="label_of_status"),
    sa.Index(None, "status", "image_id"),
    sa.Index(None, "label", "image_id"),
    sqlite_with_rowid=False,
)

#: Who has an image open. A courtesy to others: it expires by the store's clock and stops nobody.
review_leases = sa.Table(
    "review_leases",
    metadata,
    sa.Column("image_id", sa.ForeignKey("images.id"), primary_key=True),
    sa.Column("round_id", sa.Integer, primary_key=True),
    sa.Column("reader", sa.Text, nullable=False),
    sa.Column("until", Utc, nullable=False),
    sqlite_with_rowid=False,
)
