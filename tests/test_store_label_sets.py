"""What a bundle says beyond its label is in the rows: the label set, the abnormal probability, every class by name."""

from __future__ import annotations

import json
from typing import Any

from cxrbatch.store import Store
from cxrbatch.store.connection import connect
from cxrbatch.types import Decision, Outcome, Prediction
from store_images import begin, found, image, scored_file

COLUMNS = "path, label, label_set, abnormal_probability, scores_json, prob_normal"


def rows(store: Store) -> dict[str, tuple[Any, ...]]:
    with connect(store.engine) as connection:
        return {row[0]: tuple(row)[1:] for row in connection.exec_driver_sql(f"SELECT {COLUMNS} FROM results")}


def test_every_bundle_fills_its_columns(store_url: str) -> None:
    named = {"Covid": 0.7, "Viral Pneumonia": 0.2, "Normal": 0.1}
    other = Prediction(
        "Covid", 0.7, Decision.NEEDS_REVIEW, None, None, dict.fromkeys(named, 1.0), named,
        label_set=("Covid", "Viral Pneumonia"), abnormal_probability=0.9,
    )  # fmt: skip
    lateral = Prediction("NOT_FRONTAL", 1.0, Decision.NEEDS_REVIEW, True, 0.99, review_reasons=("not_frontal",))
    with Store.open(store_url) as store:
        run = begin(store)
        outcomes = [
            scored_file("/a.dcm", "COVID19", 0.97, label_set=("COVID19",), abnormal_probability=0.99),
            Outcome(found("/b.dcm"), image("b"), other),
            Outcome(found("/c.dcm"), image("c"), lateral),
            scored_file("/d.dcm", "NOT_CHEST", 0.99),
        ]
        store.record(run.run_id, run.cascade_id, outcomes)
        seen = rows(store)
    assert seen["/a.dcm"][:3] == ("COVID19", "COVID19", 0.99)
    assert json.loads(seen["/a.dcm"][3])["COVID19"] == 0.97 and seen["/a.dcm"][4] is not None
    assert seen["/b.dcm"][:3] == ("Covid", "Covid|Viral Pneumonia", 0.9)
    assert json.loads(seen["/b.dcm"][3]) == named and seen["/b.dcm"][4] is None
    assert seen["/c.dcm"] == ("NOT_FRONTAL", None, None, None, None)
    assert seen["/d.dcm"] == ("NOT_CHEST", None, None, None, None)
