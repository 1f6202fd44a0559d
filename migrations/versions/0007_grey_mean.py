"""The mean grey of each image, which `cxrbatch drift` compares: the networks bear other grey scales, and hide them.

It is known from now on; images that are there already get it with `--reprocess all`.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

OF_IMAGES = (
    "quality_flags",
    "format",
    "rows",
    "columns",
    "bits_stored",
    "photometric_interpretation",
    "transfer_syntax_uid",
    "modality",
    "body_part_examined",
    "view_position",
    "decoder",
    "grey_path",
    "inverted",
    "grey_mean",
    "series_instance_uid",
    "patient_id_hash",
    "accession_number_hash",
    "manufacturer",
    "study_date",
)
MTIME = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S', f.mtime_ns / 1000000000, 'unixepoch')",
    "postgresql": ("to_char(to_timestamp(f.mtime_ns / 1000000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"),
}
VIEW = """\
CREATE VIEW results AS
SELECT f.path,
       f.label,
       f.confidence,
       f.decision,
       (SELECT s.probability FROM scores s
         WHERE s.prediction_id = f.prediction_id AND s.label = 'NORMAL') AS prob_normal,
       (SELECT s.probability FROM scores s
         WHERE s.prediction_id = f.prediction_id AND s.label = 'COVID19') AS prob_covid19,
       (SELECT s.probability FROM scores s
         WHERE s.prediction_id = f.prediction_id AND s.label = 'PNEUMONIA') AS prob_pneumonia,
       (SELECT s.probability FROM scores s
         WHERE s.prediction_id = f.prediction_id AND s.label = 'TUBERCULOSIS') AS prob_tuberculosis,
       (SELECT p.label_set FROM predictions p WHERE p.id = f.prediction_id) AS label_set,
       (SELECT p.abnormal_probability FROM predictions p WHERE p.id = f.prediction_id) AS abnormal_probability,
       (SELECT p.scores_json FROM predictions p WHERE p.id = f.prediction_id) AS scores_json,
       (SELECT p.gate_probability FROM predictions p WHERE p.id = f.prediction_id) AS gate_probability,
       (SELECT p.is_chest FROM predictions p WHERE p.id = f.prediction_id) AS is_chest,
       f.state,
       f.reason_code,
       f.reason,
       (SELECT p.review_reasons FROM predictions p WHERE p.id = f.prediction_id) AS review_reasons,
       {quality_flags},
       (SELECT p.ood_score FROM predictions p WHERE p.id = f.prediction_id) AS ood_score,
       (SELECT v.label FROM review_status v WHERE v.image_id = f.image_id) AS review_label,
       (SELECT v.status FROM review_status v WHERE v.image_id = f.image_id) AS review_status,
       (SELECT v.decided_by FROM review_status v WHERE v.image_id = f.image_id) AS reviewed_by,
       (SELECT v.decided_at FROM review_status v WHERE v.image_id = f.image_id) AS reviewed_at,
       (SELECT m.name || ' ' || m.version FROM models m WHERE m.id = f.cascade_id) AS cascade,
       f.processed_at,
       {format},
       {rows},
       {columns},
       {bits_stored},
       {photometric_interpretation},
       {transfer_syntax_uid},
       {modality},
       {body_part_examined},
       {view_position},
       {decoder},
       {grey_path},
       {inverted},
       {grey_mean},
       f.sha256,
       f.sop_instance_uid,
       {series_instance_uid},
       f.study_instance_uid,
       {patient_id_hash},
       {accession_number_hash},
       {manufacturer},
       {study_date},
       f.size,
       {mtime} AS mtime,
       COALESCE((SELECT p.run_id FROM predictions p WHERE p.id = f.prediction_id), f.run_id) AS run_id
FROM files f"""


def upgrade() -> None:
    op.execute("DROP VIEW results")
    op.add_column("images", sa.Column("grey_mean", sa.Double()))
    make_view(VIEW)


def downgrade() -> None:
    op.execute("DROP VIEW results")
    op.drop_column("images", "grey_mean")
    make_view(VIEW.replace("       {grey_mean},\n", ""))


def make_view(statement: str) -> None:
    connection = op.get_bind()
    look_up = "(SELECT i.{0} FROM images i WHERE i.id = f.image_id) AS {0}"
    looked_up = {name: look_up.format(name) for name in OF_IMAGES}
    # Not op.execute: it would take the % and : of the time formats for its own.
    connection.exec_driver_sql(statement.format(mtime=MTIME[connection.dialect.name], **looked_up))
