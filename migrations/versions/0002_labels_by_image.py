"""An index for the question that people ask the view first: how many of each label?

SQLite joins images even where only files are counted; with the image's id in the index it needs no row of files for
that, and comes to the images in their order.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

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
