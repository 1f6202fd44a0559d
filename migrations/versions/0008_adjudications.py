"""Adjudications are kept in `reads` beside what the same person reads outside rounds, under round -1 instead of 0.

Under one key a later read replaced the adjudication. Those of before move, so that their withdrawal still finds them
and a read leaves them alone. Going back an adjudication takes the place of the same person's read again.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0008
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A program between the two wrote under -1 without moving what was there: its row is the newer one.
    op.execute(
        """
        DELETE FROM reads
         WHERE round_id = 0
           AND review_id IN (SELECT r.id FROM reviews r WHERE r.adjudication)
           AND EXISTS (SELECT 1 FROM reads o WHERE o.image_id = reads.image_id AND o.reader = reads.reader
                                               AND o.round_id = -1 AND o.repeat = reads.repeat)
        """
    )
    op.execute(
        """
        UPDATE reads SET round_id = -1
         WHERE round_id = 0 AND review_id IN (SELECT r.id FROM reviews r WHERE r.adjudication)
        """
    )


def downgrade() -> None:
    # A flag or a skip decides nothing, so it takes no read's place.
    op.execute(
        """
        DELETE FROM reads
         WHERE round_id = -1 AND label IS NULL
           AND EXISTS (SELECT 1 FROM reads o WHERE o.image_id = reads.image_id AND o.reader = reads.reader
                                               AND o.round_id = 0 AND o.repeat = reads.repeat)
        """
    )
    op.execute(
        """
        DELETE FROM reads
         WHERE round_id = 0
           AND EXISTS (SELECT 1 FROM reads o WHERE o.image_id = reads.image_id AND o.reader = reads.reader
                                               AND o.round_id = -1 AND o.repeat = reads.repeat)
        """
    )
    op.execute("UPDATE reads SET round_id = 0 WHERE round_id = -1")
