"""The view `results`: one row a file path, the current prediction and the final label of its readers side by side;
and the view `studies`: one row a study, with the decision that needs a reader most.

An unused column costs nothing: values from other tables than files are look-ups by key inside their own column (SQLite
keeps an unused LEFT JOIN when it counts or groups). The columns of images that people search by are in files, too.
Whole rows would look up images twenty times each: `whole_results` joins it.
"""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa

from cxrbatch.store.sql import Utc

__all__ = ["RESULT_COLUMNS", "STUDY_COLUMNS", "VIEWS", "make_view", "results", "whole_results"]

#: In the order of the view and of every export.
results = sa.Table(
    "results",
    sa.MetaData(),  # separate: a view is not a table, and migrations must not compare it
    sa.Column("path", sa.Text),
    sa.Column("label", sa.Text),
    sa.Column("confidence", sa.Double),
    sa.Column("decision", sa.Text),
    sa.Column("prob_normal", sa.Double),
    sa.Column("prob_covid19", sa.Double),
    sa.Column("prob_pneumonia", sa.Double),
    sa.Column("prob_tuberculosis", sa.Double),
    sa.Column("label_set", sa.Text),
    sa.Column("abnormal_probability", sa.Double),
    sa.Column("scores_json", sa.Text),
    sa.Column("gate_probability", sa.Double),
    sa.Column("is_chest", sa.Boolean),
    sa.Column("state", sa.Text),
    sa.Column("reason_code", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("review_reasons", sa.Text),
    sa.Column("quality_flags", sa.Text),
    sa.Column("ood_score", sa.Double),
    sa.Column("review_label", sa.Text),
    sa.Column("review_status", sa.Text),
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
    sa.Column("grey_mean", sa.Double),
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

#: In braces: columns of images, and what each database writes in its own way.
_SELECT = """\
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
_OF_IMAGES = (
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


_STUDIES = """\
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
_JOINED = {"sqlite": "group_concat(l.label, ',')", "postgresql": "string_agg(l.label, ',')"}

#: The columns of the view `studies`, in its order.
STUDY_COLUMNS = (
    "study_instance_uid",
    "patient_id_hash",
    "study_date",
    "images",
    "decision",
    "labels",
    "review_labels",
)

#: The views there are, and the columns of each.
VIEWS = {"results": RESULT_COLUMNS, "studies": STUDY_COLUMNS}


def make_view(name: str, dialect_name: str) -> str:
    """The statement that makes a view on "sqlite" or "postgresql"."""
    if name == "studies":
        return _STUDIES.format(joined=_JOINED[dialect_name])
    look_up = "(SELECT i.{0} FROM images i WHERE i.id = f.image_id) AS {0}"
    looked_up = {name: look_up.format(name) for name in _OF_IMAGES}
    return "CREATE VIEW results AS\n" + _SELECT.format(mtime=_MTIME[dialect_name], **looked_up)


@cache
def whole_results(dialect_name: str) -> sa.Subquery:
    """The rows of `results` for who wants all columns of them: the same, a third faster."""
    joined = {name: f"i.{name}" for name in _OF_IMAGES}
    rows = _SELECT.format(mtime=_MTIME[dialect_name], **joined) + "\nLEFT JOIN images i ON i.id = f.image_id"
    return sa.text(rows).columns(*results.columns).subquery("results")
