"""Reviews belong to images and say what was shown; users, rounds and the current state of the reading.

Reviews hung on predictions: a new bundle left them behind, and `--reprocess all` put another answer under them. Going
back keeps accepts, overrides and flags that are current, of images that have a prediction: before, nothing could be
withdrawn, so what was would be back. Skips are lost, as are users and rounds.

Frozen: it imports nothing of cxrbatch, so that it makes tomorrow what it makes today.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.Text().with_variant(TIMESTAMP(timezone=True), "postgresql")

MTIME = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S', f.mtime_ns / 1000000000, 'unixepoch')",
    "postgresql": ("to_char(to_timestamp(f.mtime_ns / 1000000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"),
}
JOINED = {"sqlite": "group_concat(l.label, ',')", "postgresql": "string_agg(l.label, ',')"}

# The two views, in pieces: {old} and {new} are what 0004 changes in `results`.
HEAD = """\
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
"""
LABEL_SETS = """\
       (SELECT p.label_set FROM predictions p WHERE p.id = f.prediction_id) AS label_set,
       (SELECT p.abnormal_probability FROM predictions p WHERE p.id = f.prediction_id) AS abnormal_probability,
       (SELECT p.scores_json FROM predictions p WHERE p.id = f.prediction_id) AS scores_json,
"""
MIDDLE = """\
       (SELECT p.gate_probability FROM predictions p WHERE p.id = f.prediction_id) AS gate_probability,
       (SELECT p.is_chest FROM predictions p WHERE p.id = f.prediction_id) AS is_chest,
       f.state,
       f.reason_code,
       f.reason,
       (SELECT p.review_reasons FROM predictions p WHERE p.id = f.prediction_id) AS review_reasons,
       i.quality_flags,
       (SELECT p.ood_score FROM predictions p WHERE p.id = f.prediction_id) AS ood_score,
"""
OLD_REVIEWS = """\
       (SELECT r.label FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS review_label,
       (SELECT r.reviewer FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS reviewed_by,
       (SELECT r.at FROM reviews r
         WHERE r.prediction_id = f.prediction_id ORDER BY r.id DESC LIMIT 1) AS reviewed_at,
"""
NEW_REVIEWS = """\
       (SELECT v.label FROM review_status v WHERE v.image_id = f.image_id) AS review_label,
       (SELECT v.status FROM review_status v WHERE v.image_id = f.image_id) AS review_status,
       (SELECT v.decided_by FROM review_status v WHERE v.image_id = f.image_id) AS reviewed_by,
       (SELECT v.decided_at FROM review_status v WHERE v.image_id = f.image_id) AS reviewed_at,
"""
TAIL = """\
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
STUDIES = """\
CREATE VIEW studies AS
SELECT s.study_instance_uid,
       s.patient_id_hash,
       s.study_date,
       s.images,
       CASE s.rank WHEN 3 THEN 'needs_review' WHEN 2 THEN 'reported' WHEN 1 THEN 'not_chest' END AS decision,
       (SELECT {joined} FROM (SELECT DISTINCT f.label AS label
                                FROM images i JOIN files f ON f.image_id = i.id
                               WHERE i.study_instance_uid = s.study_instance_uid AND f.label IS NOT NULL
                               ORDER BY f.label) l) AS labels,
       (SELECT {joined} FROM (SELECT DISTINCT v.label AS label
                                FROM images i JOIN review_status v ON v.image_id = i.id
                               WHERE i.study_instance_uid = s.study_instance_uid AND v.label IS NOT NULL
                               ORDER BY v.label) l) AS review_labels
FROM (SELECT i.study_instance_uid,
             max(i.patient_id_hash) AS patient_id_hash,
             max(i.study_date) AS study_date,
             count(DISTINCT i.id) AS images,
             max(CASE f.decision WHEN 'needs_review' THEN 3 WHEN 'reported' THEN 2 WHEN 'not_chest' THEN 1 END) AS rank
        FROM images i JOIN files f ON f.image_id = i.id
       WHERE i.study_instance_uid <> ''
       GROUP BY i.study_instance_uid) s"""


def upgrade() -> None:
    connection = op.get_bind()
    dialect = connection.dialect.name
    op.execute("DROP VIEW results")
    op.add_column("predictions", sa.Column("label_set", sa.Text()))
    op.add_column("predictions", sa.Column("abnormal_probability", sa.Double()))
    op.add_column("predictions", sa.Column("scores_json", sa.Text()))
    op.add_column("audit", sa.Column("actor", sa.Text()))
    # A person's images are looked up one by one; most stores know no person (phi = "drop") and keep this empty.
    known = sa.text("patient_id_hash <> ''")
    op.create_index(
        "ix_images_patient_id_hash", "images", ["patient_id_hash"], sqlite_where=known, postgresql_where=known
    )
    _make_people_and_rounds()
    # A table of its own, not a rename: on Postgres a renamed table keeps the names of its keys.
    op.execute("CREATE TABLE reviews_before AS SELECT * FROM reviews")
    op.drop_table("reviews")
    _make_reviews()
    op.execute(
        """
        INSERT INTO reviews (id, image_id, reviewer, action, label, comment, at, shown_label, shown_confidence,
                             shown_cascade_id, blinded, adjudication, repeat, act_id)
        SELECT r.id, p.image_id, r.reviewer,
               CASE WHEN r.action <> 'flag' AND COALESCE(r.label, p.label) = p.label THEN 'accept' ELSE r.action END,
               CASE WHEN r.action = 'flag' THEN NULL ELSE COALESCE(r.label, p.label) END,
               r.comment, r.at, p.label, p.confidence, p.cascade_id, FALSE, FALSE, 0, 'before 0004: ' || r.id
          FROM reviews_before r JOIN predictions p ON p.id = r.prediction_id
        """
    )
    op.drop_table("reviews_before")
    _count_ids_on(dialect)
    op.execute(
        """
        INSERT INTO reads (image_id, reader, round_id, repeat, review_id, action, label, blinded, at)
        SELECT r.image_id, r.reviewer, 0, 0, r.id, r.action, r.label, FALSE, r.at
          FROM reviews r
         WHERE r.id = (SELECT max(n.id) FROM reviews n WHERE n.image_id = r.image_id AND n.reviewer = r.reviewer)
        """
    )
    readers = "group_concat(d.reader, ', ')" if dialect == "sqlite" else "string_agg(d.reader, ', ')"
    op.execute(
        """
        INSERT INTO review_status (image_id, status, label, decided_by, decided_at)
        SELECT d.image_id,
               CASE WHEN count(d.flag) > 0 THEN 'flagged'
                    WHEN count(DISTINCT d.label) > 1 THEN 'disputed' ELSE 'agreed' END,
               CASE WHEN count(d.flag) = 0 AND count(DISTINCT d.label) = 1 THEN max(d.label) END,
               READERS, max(d.at)
          FROM (SELECT image_id, reader, label, at, CASE WHEN action = 'flag' THEN 1 END AS flag
                  FROM reads ORDER BY image_id, reader) d
         GROUP BY d.image_id
        """.replace("READERS", readers)
    )
    # Not op.execute: it would take the % and : of the time formats for its own.
    connection.exec_driver_sql((HEAD + LABEL_SETS + MIDDLE + NEW_REVIEWS + TAIL).format(mtime=MTIME[dialect]))
    connection.exec_driver_sql(STUDIES.format(joined=JOINED[dialect]))


def downgrade() -> None:
    connection = op.get_bind()
    dialect = connection.dialect.name
    op.execute("DROP VIEW studies")
    op.execute("DROP VIEW results")
    op.execute("CREATE TABLE reviews_after AS SELECT * FROM reviews WHERE id IN (SELECT review_id FROM reads)")
    op.drop_table("reads")
    op.drop_table("review_status")
    op.drop_table("review_leases")
    op.drop_table("reviews")
    for table in ("round_assignments", "round_items", "round_readers", "rounds", "login_throttle", "sessions", "users"):
        op.drop_table(table)
    op.create_table(
        "reviews",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("prediction_id", BIG_ID, nullable=False),
        sa.Column("reviewer", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("comment", sa.Text(), nullable=False, server_default=""),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reviews"),
        sa.ForeignKeyConstraint(["prediction_id"], ["predictions.id"], name="fk_reviews_prediction_id"),
        sa.CheckConstraint("action IN ('accept', 'override', 'flag')", name=op.f("ck_reviews_action")),
    )
    op.create_index("ix_reviews_prediction_id_id", "reviews", ["prediction_id", "id"])
    # The prediction that was shown; where none was (a blinded read), the newest of the image.
    op.execute(
        """
        INSERT INTO reviews (id, prediction_id, reviewer, action, label, comment, at)
        SELECT r.id, p.id, r.reviewer, r.action, r.label, r.comment, r.at
          FROM reviews_after r JOIN predictions p
            ON p.id = COALESCE((SELECT s.id FROM predictions s
                                 WHERE s.image_id = r.image_id AND s.cascade_id = r.shown_cascade_id),
                               (SELECT max(n.id) FROM predictions n WHERE n.image_id = r.image_id))
         WHERE r.action IN ('accept', 'override', 'flag')
        """
    )
    op.drop_table("reviews_after")
    _count_ids_on(dialect)
    op.drop_index("ix_images_patient_id_hash", "images")
    op.drop_column("audit", "actor")
    for column in ("scores_json", "abnormal_probability", "label_set"):
        op.drop_column("predictions", column)
    connection.exec_driver_sql((HEAD + MIDDLE + OLD_REVIEWS + TAIL).format(mtime=MTIME[dialect]))


def _count_ids_on(dialect: str) -> None:
    """Postgres counts ids by a sequence that knows nothing of rows inserted with theirs."""
    if dialect == "postgresql":
        op.execute(
            "SELECT setval(pg_get_serial_sequence('reviews', 'id'), "
            "COALESCE((SELECT max(id) FROM reviews), 1), (SELECT count(*) > 0 FROM reviews))"
        )


def _make_people_and_rounds() -> None:
    role = "role IN ('reader', 'admin')"
    op.create_table(
        "users",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("disabled_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
        sa.CheckConstraint(role, name=op.f("ck_users_role")),
    )
    op.create_table(
        "sessions",
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("last_seen_at", MOMENT, nullable=False),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("token_sha256", name="pk_sessions"),
        sa.CheckConstraint(role, name=op.f("ck_sessions_role")),
    )
    op.create_index("ix_sessions_user_name", "sessions", ["user_name"])
    op.create_table(
        "login_throttle",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("last_at", MOMENT, nullable=False),
        sa.Column("blocked_until", MOMENT),
        sa.PrimaryKeyConstraint("key", name="pk_login_throttle"),
    )
    op.create_table(
        "rounds",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("closed_at", MOMENT),
        sa.Column("blinded", sa.Boolean(), nullable=False),
        sa.Column("reads_per_image", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("filter_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rounds"),
        sa.UniqueConstraint("name", name="uq_rounds_name"),
        sa.CheckConstraint("reads_per_image BETWEEN 1 AND 3", name=op.f("ck_rounds_reads_per_image")),
    )
    op.create_table(
        "round_readers",
        sa.Column("round_id", BIG_ID, nullable=False),
        sa.Column("reader", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("round_id", "reader", name="pk_round_readers"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_round_readers_round_id"),
    )
    op.create_index("ix_round_readers_reader_round_id", "round_readers", ["reader", "round_id"])
    op.create_table(
        "round_items",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("round_id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("repeat", sa.Integer(), nullable=False),
        sa.Column("model_label", sa.Text()),
        sa.Column("model_confidence", sa.Double()),
        sa.Column("model_cascade_id", BIG_ID),
        sa.PrimaryKeyConstraint("id", name="pk_round_items"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_round_items_round_id"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_round_items_image_id"),
        sa.ForeignKeyConstraint(["model_cascade_id"], ["models.id"], name="fk_round_items_model_cascade_id"),
        sa.UniqueConstraint("round_id", "image_id", "repeat", name="uq_round_items_round_id_image_id_repeat"),
    )
    op.create_index("ix_round_items_image_id", "round_items", ["image_id"])
    op.create_table(
        "round_assignments",
        sa.Column("round_id", BIG_ID, nullable=False),
        sa.Column("reader", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("item_id", BIG_ID, nullable=False),
        sa.PrimaryKeyConstraint("round_id", "reader", "position", name="pk_round_assignments"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_round_assignments_round_id"),
        sa.ForeignKeyConstraint(["item_id"], ["round_items.id"], name="fk_round_assignments_item_id"),
        sa.UniqueConstraint("item_id", "reader", name="uq_round_assignments_item_id_reader"),
    )


def _make_reviews() -> None:
    op.create_table(
        "reviews",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("reviewer", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("comment", sa.Text(), nullable=False, server_default=""),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("shown_label", sa.Text()),
        sa.Column("shown_confidence", sa.Double()),
        sa.Column("shown_cascade_id", BIG_ID),
        sa.Column("blinded", sa.Boolean(), nullable=False),
        sa.Column("adjudication", sa.Boolean(), nullable=False),
        sa.Column("round_id", BIG_ID),
        sa.Column("repeat", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("opened_at", MOMENT),
        sa.Column("active_ms", sa.Integer()),
        sa.Column("act_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reviews"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_reviews_image_id"),
        sa.ForeignKeyConstraint(["shown_cascade_id"], ["models.id"], name="fk_reviews_shown_cascade_id"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_reviews_round_id"),
        sa.UniqueConstraint("act_id", name="uq_reviews_act_id"),
        sa.CheckConstraint(
            "action IN ('accept', 'override', 'flag', 'skip', 'withdraw')", name=op.f("ck_reviews_action")
        ),
        sa.CheckConstraint(
            "(action IN ('accept', 'override')) = (label IS NOT NULL)", name=op.f("ck_reviews_label_of_action")
        ),
        sa.CheckConstraint("NOT blinded OR shown_label IS NULL", name=op.f("ck_reviews_blinded_shows_nothing")),
    )
    op.create_index("ix_reviews_image_id_id", "reviews", ["image_id", "id"])
    op.create_table(
        "reads",
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("reader", sa.Text(), nullable=False),
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("repeat", sa.Integer(), nullable=False),
        sa.Column("review_id", BIG_ID, nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("blinded", sa.Boolean(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("image_id", "reader", "round_id", "repeat", name="pk_reads"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_reads_image_id"),
        sa.ForeignKeyConstraint(["review_id"], ["reviews.id"], name="fk_reads_review_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_reads_reader_at", "reads", ["reader", "at"])
    op.create_index("ix_reads_round_id_reader_image_id", "reads", ["round_id", "reader", "image_id"])
    op.create_table(
        "review_status",
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("decided_by", sa.Text(), nullable=False),
        sa.Column("decided_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("image_id", name="pk_review_status"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_review_status_image_id"),
        sa.CheckConstraint(
            "status IN ('agreed', 'disputed', 'flagged', 'adjudicated')", name=op.f("ck_review_status_status")
        ),
        sa.CheckConstraint(
            "(status IN ('agreed', 'adjudicated')) = (label IS NOT NULL)", name=op.f("ck_review_status_label_of_status")
        ),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_review_status_status_image_id", "review_status", ["status", "image_id"])
    op.create_index("ix_review_status_label_image_id", "review_status", ["label", "image_id"])
    op.create_table(
        "review_leases",
        sa.Column("image_id", BIG_ID, nullable=False),
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("reader", sa.Text(), nullable=False),
        sa.Column("until", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("image_id", "round_id", name="pk_review_leases"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_review_leases_image_id"),
        sqlite_with_rowid=False,
    )
