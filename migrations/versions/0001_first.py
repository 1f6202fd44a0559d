"""The first tables and the view results.

Frozen: it imports nothing from cxrbatch, so that its result never changes.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.Text().with_variant(TIMESTAMP(timezone=True), "postgresql")
PATH = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

MTIME = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S', f.mtime_ns / 1000000000, 'unixepoch')",
    "postgresql": ("to_char(to_timestamp(f.mtime_ns / 1000000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"),
}

RESULTS = """\
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
       (SELECT p.gate_probability FROM predictions p WHERE p.id = f.prediction_id) AS gate_probability,
       (SELECT p.is_chest FROM predictions p WHERE p.id = f.prediction_id) AS is_chest,
       f.state,
       f.reason_code,
       f.reason,
       (SELECT p.review_reasons FROM predictions p WHERE p.id = f.prediction_id) AS review_reasons,
       i.quality_flags,
       (SELECT p.ood_score FROM predictions p WHERE p.id = f.prediction_id) AS ood_score,
       (SELECT r.label FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS review_label,
       (SELECT r.reviewer FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS reviewed_by,
       (SELECT r.at FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS reviewed_at,
       (SELECT m.name || ' ' || m.version FROM models m WHERE m.id = f.cascade_id) AS cascade,
       f.processed_at,
       i.format,
       i.rows,
       i.columns,
       i.bits_stored,
       i.photometric_interpretation,
       i.transfer_syntax_uid,
       i.modality,
       i.body_part_examined,
       i.view_position,
       i.decoder,
       i.grey_path,
       i.inverted,
       i.sha256,
       i.sop_instance_uid,
       i.series_instance_uid,
       i.study_instance_uid,
       i.patient_id_hash,
       i.accession_number_hash,
       i.manufacturer,
       i.study_date,
       f.size,
       {mtime} AS mtime,
       COALESCE((SELECT p.run_id FROM predictions p WHERE p.id = f.prediction_id), f.run_id) AS run_id
FROM files f
LEFT JOIN images i ON i.id = f.image_id"""


UNFINISHED = sa.text("state IN ('waiting', 'claimed', 'retry')")
REASONED = sa.text("reason_code IS NOT NULL")


def words(name: str) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=False, server_default="")


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.Text(), nullable=False),
        sa.Column("stages", sa.Text(), nullable=False),
        sa.Column("weights_sha256", sa.Text(), nullable=False),
        sa.Column("manifest_json", sa.Text(), nullable=False),
        sa.Column("first_used", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("manifest_sha256", name="uq_models_manifest_sha256"),
    )
    op.create_table(
        "runs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("cascade_id", BIG_ID, nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("settings_json", sa.Text(), nullable=False),
        sa.Column("counts_json", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.ForeignKeyConstraint(["cascade_id"], ["models.id"], name="fk_runs_cascade_id"),
    )
    op.create_index("ix_runs_started_at", "runs", ["started_at"])
    op.create_table(
        "images",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("columns", sa.Integer(), nullable=False),
        sa.Column("bits_stored", sa.Integer(), nullable=False),
        sa.Column("number_of_frames", sa.Integer(), nullable=False),
        words("photometric_interpretation"),
        words("transfer_syntax_uid"),
        words("modality"),
        words("body_part_examined"),
        words("view_position"),
        words("sop_class_uid"),
        words("sop_instance_uid"),
        words("series_instance_uid"),
        words("study_instance_uid"),
        words("patient_id_hash"),
        words("accession_number_hash"),
        words("manufacturer"),
        words("study_date"),
        words("decoder"),
        words("grey_path"),
        sa.Column("inverted", sa.Boolean(), nullable=False),
        words("quality_flags"),
        sa.Column("first_seen", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
        sa.UniqueConstraint("sha256", name="uq_images_sha256"),
    )
    op.create_index("ix_images_sop_instance_uid", "images", ["sop_instance_uid"])
    op.create_index("ix_images_study_instance_uid", "images", ["study_instance_uid"])
    op.create_table(
        "predictions",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("cascade_id", BIG_ID, nullable=False),
        sa.Column("run_id", BIG_ID, nullable=False),
        sa.Column("gate_probability", sa.Double()),
        sa.Column("is_chest", sa.Boolean()),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("ood_score", sa.Double()),
        words("review_reasons"),
        sa.Column("processed_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_predictions"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_predictions_image_id"),
        sa.ForeignKeyConstraint(["cascade_id"], ["models.id"], name="fk_predictions_cascade_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_predictions_run_id"),
        sa.UniqueConstraint("image_id", "cascade_id", name="uq_predictions_image_id_cascade_id"),
        sa.CheckConstraint(
            "decision IN ('reported', 'needs_review', 'not_chest')", name=op.f("ck_predictions_decision")
        ),
    )
    op.create_index("ix_predictions_cascade_id_image_id_label", "predictions", ["cascade_id", "image_id", "label"])
    op.create_table(
        "scores",
        sa.Column("prediction_id", BIG_ID, nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("logit", sa.Double()),
        sa.Column("probability", sa.Double()),
        sa.PrimaryKeyConstraint("prediction_id", "label", name="pk_scores"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_scores_prediction_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "files",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("path", PATH, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("inode", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("image_id", BIG_ID),
        sa.Column("prediction_id", BIG_ID),
        sa.Column("cascade_id", BIG_ID),
        sa.Column("run_id", BIG_ID),
        sa.Column("label", sa.Text()),
        sa.Column("confidence", sa.Double()),
        sa.Column("decision", sa.Text()),
        sa.Column("reason_code", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("processed_at", MOMENT),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_until", MOMENT),
        sa.Column("next_attempt_at", MOMENT),
        sa.Column("first_seen", MOMENT, nullable=False),
        sa.Column("last_seen", MOMENT, nullable=False),
        sa.Column("missing_since", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.UniqueConstraint("path", name="uq_files_path"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_files_image_id"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_files_prediction_id"),
        sa.ForeignKeyConstraint(["cascade_id"], ["models.id"], name="fk_files_cascade_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_files_run_id"),
        sa.CheckConstraint(
            "state IN ('waiting', 'claimed', 'done', 'rejected', 'retry', 'missing')", name=op.f("ck_files_state")
        ),
        sa.CheckConstraint("decision IN ('reported', 'needs_review', 'not_chest')", name=op.f("ck_files_decision")),
        sa.CheckConstraint("state <> 'done' OR prediction_id IS NOT NULL", name=op.f("ck_files_done_has_a_prediction")),
        sa.CheckConstraint("state NOT IN ('rejected', 'retry') OR reason_code IS NOT NULL", name=op.f("ck_files_why")),
        sa.CheckConstraint("(prediction_id IS NULL) = (label IS NULL)", name=op.f("ck_files_label_of_prediction")),
        sa.CheckConstraint("prediction_id IS NULL OR reason_code IS NULL", name=op.f("ck_files_one_outcome")),
        sa.CheckConstraint("(state = 'missing') = (missing_since IS NOT NULL)", name=op.f("ck_files_missing_since")),
        sa.CheckConstraint("(state = 'claimed') = (lease_owner IS NOT NULL)", name=op.f("ck_files_lease")),
    )
    op.create_index("ix_files_image_id", "files", ["image_id"])
    op.create_index("ix_files_prediction_id", "files", ["prediction_id"])
    op.create_index("ix_files_label_confidence", "files", ["label", "confidence"])
    op.create_index("ix_files_decision_confidence", "files", ["decision", "confidence"])
    op.create_index("ix_files_state_label_decision", "files", ["state", "label", "decision"])
    op.create_index(
        "ix_files_next_attempt_at",
        "files",
        ["next_attempt_at"],
        sqlite_where=UNFINISHED,
        postgresql_where=UNFINISHED,
    )
    op.create_index("ix_files_reason_code", "files", ["reason_code"], sqlite_where=REASONED, postgresql_where=REASONED)
    op.create_index("ix_files_processed_at", "files", ["processed_at"])
    op.create_table(
        "reviews",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("prediction_id", BIG_ID, nullable=False),
        sa.Column("reviewer", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("label", sa.Text()),
        words("comment"),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reviews"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_reviews_prediction_id"),
        sa.CheckConstraint("action IN ('accept', 'override', 'flag')", name=op.f("ck_reviews_action")),
    )
    op.create_index("ix_reviews_prediction_id_id", "reviews", ["prediction_id", "id"])
    op.create_table(
        "audit",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("path", PATH),
        sa.Column("run_id", BIG_ID),
        sa.Column("old", sa.Text()),
        sa.Column("new", sa.Text()),
        words("detail"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_audit_run_id"),
    )
    op.create_index("ix_audit_path_id", "audit", ["path", "id"])
    # Not op.execute: it would take the % and : of the time formats for its own.
    connection = op.get_bind()
    connection.exec_driver_sql(RESULTS.format(mtime=MTIME[connection.dialect.name]))


def downgrade() -> None:
    op.execute("DROP VIEW results")
    for table in ("audit", "reviews", "files", "scores", "predictions", "images", "runs", "models"):
        op.drop_table(table)
