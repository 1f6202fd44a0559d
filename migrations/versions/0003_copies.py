"""Mark paths that got a content which another path already held: which files hold the same image?

Without the mark, that query reads the whole index on contents.

Frozen: it imports nothing from cxrbatch, so that its result never changes.

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
