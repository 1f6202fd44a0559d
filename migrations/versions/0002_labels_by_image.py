"""An index for the most common query on the view: how many files of each label?

SQLite joins images even if only files are counted. With the image's id in the index, it reads no row of files for that
and reads the images in their order.

Frozen: it imports nothing from cxrbatch, so that its result never changes.

Revision ID: 0002
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_files_label_image_id", "files", ["label", "image_id"])


def downgrade() -> None:
    op.drop_index("ix_files_label_image_id", "files")
