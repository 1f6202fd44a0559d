"""The table of what is to be sent to a PACS, and what became of it (outbox.py)."""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from cxrbatch.store.sql import Utc, big_id, metadata, one_of, text_column

__all__ = ["SUPERSEDED", "OutboxState", "outbox"]

SUPERSEDED = "superseded"  #: `last_status` of what was dropped because something else is said by now


class OutboxState(StrEnum):
    """Where an object that is to be sent stands."""

    WAITING = "waiting"  # from next_attempt_at on, unless a sender has it until lease_until: to any other
    SENT = "sent"  # the destination answered with success, or stored it with a warning (last_status)
    REFUSED = "refused"  # last_status will not heal by itself: `cxrbatch outbox retry` makes it wait again
    DROPPED = "dropped"  # by a person, or a newer revision took its place; `outbox retry` makes it wait again


_UNSENT = sa.text("state = 'waiting'")

#: One row for each object and destination. Holds no name and no id of a patient: objects are made when they are sent.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", big_id, primary_key=True),
    sa.Column("destination", sa.Text, nullable=False),  # its name in the settings, or an address without password
    sa.Column("image_id", sa.ForeignKey("images.id"), nullable=False),
    sa.Column("cascade_id", sa.ForeignKey("models.id"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),  # "sc", "sr"
    text_column("revision"),  # of what is said (reported.py)
    text_column("sop_instance_uid"),  # of the object; empty before the first attempt
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    text_column("last_status"),  # "0x0000", "http 503", "no_connection": never words of the destination
    sa.Column("lease_until", Utc),  # a sender has it in hand
    sa.Column("next_attempt_at", Utc),
    sa.Column("created_at", Utc, nullable=False),
    sa.Column("sent_at", Utc),
    one_of("state", OutboxState),
    sa.CheckConstraint("(state = 'sent') = (sent_at IS NOT NULL)", name="sent_at"),
    sa.UniqueConstraint("destination", "image_id", "cascade_id", "kind", "revision", name="uq_outbox_object"),
    sa.Index(None, "image_id"),
    sa.Index(None, "destination", "next_attempt_at", sqlite_where=_UNSENT, postgresql_where=_UNSENT),
    sa.Index(None, "state", "destination"),
)
