"""The outbox: which objects go where, and what became of them.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.Text().with_variant(TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("cascade_id", BIG_ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False, server_default=""),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False, server_default=""),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("last_status", sa.Text(), nullable=False, server_default=""),
        sa.Column("lease_until", MOMENT),
        sa.Column("next_attempt_at", MOMENT),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("sent_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_outbox_image_id"),
        sa.ForeignKeyConstraint(["cascade_id"], ["models.id"], name="fk_outbox_cascade_id"),
        sa.UniqueConstraint("destination", "image_id", "cascade_id", "kind", "revision", name="uq_outbox_object"),
        sa.CheckConstraint("state IN ('waiting', 'sent', 'refused', 'dropped')", name=op.f("ck_outbox_state")),
        sa.CheckConstraint("(state = 'sent') = (sent_at IS NOT NULL)", name=op.f("ck_outbox_sent_at")),
    )
    unsent = sa.text("state = 'waiting'")
    op.create_index("ix_outbox_image_id", "outbox", ["image_id"])
    op.create_index(
        "ix_outbox_destination_next_attempt_at",
        "outbox",
        ["destination", "next_attempt_at"],
        sqlite_where=unsent,
        postgresql_where=unsent,
    )
    op.create_index("ix_outbox_state_destination", "outbox", ["state", "destination"])


def downgrade() -> None:
    op.drop_table("outbox")
