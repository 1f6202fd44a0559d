"""Find the read that a review has made: without an index, each review that `db prune` deletes reads the whole table.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0009
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_reads_review_id", "reads", ["review_id"])


def downgrade() -> None:
    op.drop_index("ix_reads_review_id", "reads")
