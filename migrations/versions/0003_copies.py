"""A mark on paths that came to a content which another path had held: which files hold the same picture?

Without it that question reads the index on contents from end to end.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("files", sa.Column("is_copy", sa.Boolean, nullable=False, server_default=sa.false()))
    op.execute(
        """
        UPDATE files SET is_copy = TRUE WHERE image_id IN (
            SELECT image_id FROM files WHERE image_id IS NOT NULL GROUP BY image_id HAVING count(*) > 1
        )
        """
    )
    copied = sa.text("is_copy")
    op.create_index("ix_files_copies", "files", ["image_id"], sqlite_where=copied, postgresql_where=copied)


def downgrade() -> None:
    op.drop_index("ix_files_copies", "files")
    op.drop_column("files", "is_copy")
