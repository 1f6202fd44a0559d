"""`cxrbatch scan s3://…` and `watch s3://…` as a user runs them: processes that find their S3 by AWS_ENDPOINT_URL."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from factories import make_bundle
from pipelines import Pipeline, image
from s3_server import Bucket, Proxy, pointed_at

pytest.importorskip("s3fs", reason="needs the extra 'remote'")


@pytest.fixture(autouse=True)
def _environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    pointed_at(proxy.url, monkeypatch)
    monkeypatch.setenv("CXRBATCH_WORKERS", "1")
    monkeypatch.setenv("CXRBATCH_POLL_S", "0.5")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def pipeline(tmp_path: Path, bundle: Path) -> Pipeline:
    return Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", bundle)


def test_a_bucket_becomes_a_csv_and_watch_goes_on_with_it(
    pipeline: Pipeline, bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    contents = {f"{i}.png": image(tmp_path / f"{i}.png", i).read_bytes() for i in range(4)}
    for name in ("0.png", "1.png"):
        bucket.put(f"p/{name}", contents[name])
    bucket.put("p/page.dcm", b"<html>no")

    def fault(method: str, path: str) -> None:
        if path.endswith("/1.png"):
            bucket.put("p/1.png", contents["2.png"])  # while it is read: another ETag than the listing's

    proxy.fault = fault
    root = f"s3://{bucket.name}/p"
    scanned = pipeline.run("scan", root, "--csv", "out.csv")
    assert scanned.code == 3, scanned.err
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert {path: row["reason_code"] for path, row in rows.items()} == {
        f"{root}/0.png": "",
        f"{root}/1.png": "changed_while_read",
        f"{root}/page.dcm": "not_an_image",
    }
    assert rows[f"{root}/0.png"]["label"] and not rows[f"{root}/1.png"]["label"]

    proxy.fault = lambda method, path: None
    daemon = pipeline.start("watch", root)
    states = "SELECT path, state FROM files ORDER BY path"
    done = [(f"{root}/{name}", "done") for name in ("0.png", "1.png", "3.png")]
    try:
        pipeline.wait_until(lambda: ("done",) in pipeline.ask(STATE.format(f"{root}/1.png")), daemon)
        bucket.put("p/3.png", contents["3.png"])
        bucket.delete("p/page.dcm")
        pipeline.wait_until(lambda: pipeline.ask(states) == [*done, (f"{root}/page.dcm", "missing")], daemon)
        daemon.send_signal(signal.SIGTERM)
        _, err = daemon.communicate(timeout=60)
    finally:
        daemon.kill()
    assert daemon.returncode == 0, err


STATE = "SELECT state FROM files WHERE path = '{}'"


@pytest.mark.parametrize(
    ("command", "root", "status", "says"),
    [
        (
            "scan",
            "s3://no-such-bucket-here/p",
            None,
            "There is no bucket s3://no-such-bucket-here; check the name and the endpoint (AWS_ENDPOINT_URL).",
        ),
        (
            "watch",
            "s3://somebodys/p",
            403,
            "s3://somebodys may not be listed with these credentials; check them (AWS_PROFILE, AWS_ACCESS_KEY_ID).",
        ),
    ],
    ids=["no bucket", "refused"],
)
def test_what_a_user_gets_wrong_ends_with_one_sentence_and_exit_1(
    pipeline: Pipeline, proxy: Proxy, command: str, root: str, status: int | None, says: str
) -> None:
    proxy.fault = lambda method, path: status
    ended = pipeline.run(command, root)
    assert (ended.code, ended.out, ended.err) == (1, "", f"cxrbatch: {says}\n")
    assert not (pipeline.cwd / "s.db").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("scheme", "module", "more"),
    [
        ("s3", "fsspec", ""),
        ("s3", "s3fs", ""),
        ("gs", "gcsfs", " gcsfs"),
        ("az", "adlfs", " adlfs"),
        ("sftp", "fsspec", " paramiko"),
        ("sftp", "paramiko", " paramiko"),
    ],
)
def test_without_the_extra_it_says_what_to_install(scheme: str, module: str, more: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from cxrbatch.cli import main\n"
        f"sys.argv = ['cxrbatch', 'scan', '{scheme}://b/p']; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=os.environ.copy()
    )
    assert (ended.returncode, ended.stderr) == (
        1,
        f"cxrbatch: Reading {scheme}:// needs a library that is not installed: pip install 'cxrbatch[remote]'{more}.\n",
    )
