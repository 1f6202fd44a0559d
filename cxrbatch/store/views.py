"""The view `results`: one row a file path, the current prediction and the newest review side by side.

A column that nobody asks for costs nothing: what comes from predictions, scores, reviews and models is a look-up by
key inside its own column (SQLite does not leave out an unused LEFT JOIN when it counts or groups). Only images is
joined, so that a filter on a UID or a sha256 can start there.
"""

from __future__ import annotations

import sqlalchemy as sa

from cxrbatch.store.columns import Utc

__all__ = ["RESULT_COLUMNS", "drop_results", "make_results", "results"]

#: In the order of the view and of every export.
results = sa.Table(
    "results",
    sa.MetaData(),  # its own: a view is no table that a migration compares
    sa.Column("path", sa.Text),
    sa.Column("label", sa.Text),
    sa.Column("confidence", sa.Double),
    sa.Column("decision", sa.Text),
    sa.Column("prob_normal", sa.Double),
    sa.Column("prob_covid19", sa.Double),
    sa.Column("prob_pneumonia", sa.Double),
    sa.Column("prob_tuberculosis", sa.Double),
    sa.Column("gate_probability", sa.Double),
    sa.Column("is_chest", sa.Boolean),
    sa.Column("state", sa.Text),
    sa.Column("reason_code", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("review_reasons", sa.Text),
    sa.Column("quality_flags", sa.Text),
    sa.Column("ood_score", sa.Double),
    sa.Column("review_label", sa.Text),
    sa.Column("reviewed_by", sa.Text),
    sa.Column("reviewed_at", Utc),
    sa.Column("cascade", sa.Text),
    sa.Column("processed_at", Utc),
    sa.Column("format", sa.Text),
    sa.Column("rows", sa.Integer),
    sa.Column("columns", sa.Integer),
    sa.Column("bits_stored", sa.Integer),
    sa.Column("photometric_interpretation", sa.Text),
    sa.Column("transfer_syntax_uid", sa.Text),
    sa.Column("modality", sa.Text),
    sa.Column("body_part_examined", sa.Text),
    sa.Column("view_position", sa.Text),
    sa.Column("decoder", sa.Text),
    sa.Column("grey_path", sa.Text),
    sa.Column("inverted", sa.Boolean),
    sa.Column("sha256", sa.Text),
    sa.Column("sop_instance_uid", sa.Text),
    sa.Column("series_instance_uid", sa.Text),
    sa.Column("study_instance_uid", sa.Text),
    sa.Column("patient_id_hash", sa.Text),
    sa.Column("accession_number_hash", sa.Text),
    sa.Column("manufacturer", sa.Text),
    sa.Column("study_date", sa.Text),
    sa.Column("size", sa.BigInteger),
    sa.Column("mtime", sa.Text),
    sa.Column("run_id", sa.BigInteger),
)

RESULT_COLUMNS: tuple[str, ...] = tuple(column.name for column in results.columns)

_MTIME = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S', f.mtime_ns / 1000000000, 'unixepoch')",
    "postgresql": ("to_char(to_timestamp(f.mtime_ns / 1000000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"),
}

_RESULTS = """\
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


def make_results(dialect_name: str) -> str:
    """The statement that makes the view on "sqlite" or "postgresql"."""
    return _RESULTS.format(mtime=_MTIME[dialect_name])


def drop_results() -> str:
    """The statement that takes it away again."""
    return "DROP VIEW results"
