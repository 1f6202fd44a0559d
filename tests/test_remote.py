"""`cxrbatch scan s3://…` and `watch s3://…` against a real S3 server (moto's), with faults of the network before it."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.intake import remote
from cxrbatch.intake.discover import Wanted, discover, roots_of
from cxrbatch.intake.object_stores import Object
from cxrbatch.ops.scan import Exports, run_scan
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from daemon import Arithmetic
from factories import make_bundle
from fork_server import LIMIT_S, fork_server
from pipelines import Pipeline, image
from s3_server import Bucket, Proxy, pointed_at
from store_images import begin, reject

pytest.importorskip("s3fs", reason="needs the extra 'remote'")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(autouse=True)
def _environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    pointed_at(proxy.url, monkeypatch)
    monkeypatch.setattr("cxrbatch.ops.scan.open_engine", lambda *_: Arithmetic())
    remote.store_of.cache_clear()


@dataclass
class Scanner:
    """`cxrbatch scan` without a process of its own: decode workers are real ones."""

    folder: Path
    bundle: Path
    url: str

    def scan(self, *roots: object, **settings: Any) -> ExitCode:
        key = str(self.folder / "key")
        given = {"cascade": str(self.bundle), "workers": 1, "quiet_s": 0, "id_key_file": key} | settings
        how: dict[str, Any] = {"reprocess": "none", "limit": None, "dry_run": False, "error_on_empty": False}
        return run_scan(Settings(db=self.url, **given), [str(root) for root in roots], Exports(), quiet=True, **how)

    def ask(self, query: str) -> list[Any]:
        return Pipeline(self.folder, self.url, self.bundle).ask(query)

    def states(self) -> dict[str, tuple[str, str | None]]:
        rows = self.ask("SELECT path, state, reason_code FROM files")
        return {path.rpartition("/")[2]: (state, reason) for path, state, reason in rows}


@pytest.fixture
def scanner(tmp_path: Path, bundle: Path) -> Scanner:
    return Scanner(tmp_path, bundle, f"sqlite:///{tmp_path}/s.db")


def test_objects_become_the_rows_that_files_become_and_a_second_scan_reads_none(
    scanner: Scanner, bucket: Bucket, proxy: Proxy
) -> None:
    folder = scanner.folder / "in"
    for i in range(3):
        with image(folder / f"{i}.png", i).open("ab") as file:
            file.write(b"0")  # behind the end of the image
        bucket.put(f"p/day/{i}.png", (folder / f"{i}.png").read_bytes())
    for name, data in {"empty.dcm": b"", "page.dcm": b"<html>no", "name with ä +%2F.png": b"x"}.items():
        bucket.put(f"p/{name}", data)
        (folder / name).write_bytes(data)
    bucket.put("p/nul\0.dcm", b"x")  # S3 takes every key that is UTF-8
    (folder / "nul.dcm").write_bytes(b"x")
    bucket.put("p/slash/", b"x")  # an object like any other; only without bytes it stands for a folder
    (folder / "slash.dcm").write_bytes(b"x")
    for key, data in {"p/.hidden/0.png": b"x", "p/day/9.tmp": b"x", "pq/other.png": b"x", "p/day/": b""}.items():
        bucket.put(key, data)
    root = f"s3://{bucket.name}/p"
    assert scanner.scan(folder, root + "/") == ExitCode.SOME_REJECTED
    rows = "SELECT label, confidence, state, reason_code, sha256 FROM results WHERE path {} 's3:%' ORDER BY 5, 4"
    assert len(scanner.ask(rows.format("LIKE"))) == 8
    assert scanner.ask(rows.format("LIKE")) == scanner.ask(rows.format("NOT LIKE"))
    proxy.requests.clear()
    scanner.scan(root)
    assert proxy.requests and all("list-type" in path for _, path in proxy.requests), "nothing but listings"

    bucket.delete("p/day/0.png")
    same_size = (folder / "1.png").read_bytes()[:-1] + b"1"
    bucket.put("p/day/1.png", same_size)  # perhaps within the second that LastModified tells
    scanner.scan(root)
    assert scanner.states()["0.png"] == ("missing", None)
    (found,) = scanner.ask(f"SELECT sha256 FROM results WHERE path = '{root}/day/1.png'")
    assert found == (hashlib.sha256(same_size).hexdigest(),)


def test_what_s3_fails_at_is_tried_again_by_the_next_scan(scanner: Scanner, bucket: Bucket, proxy: Proxy) -> None:
    contents = {name: image(scanner.folder / name, i).read_bytes() + b"0" for i, name in enumerate(NAMES)}
    for name, data in contents.items():
        bucket.put(name, data)
    bucket.put("archived.png", contents["good.png"], "GLACIER")
    refused = {"broken.png": 500, "forbidden.png": 403}
    changed = contents["changed.png"][:-1] + b"1"

    def fault(method: str, path: str) -> int | None:
        name = path.rpartition("/")[2]
        if name == "changed.png":
            bucket.put(name, changed)
        if name == "gone.png":
            bucket.delete(name)
        return refused.get(name)

    proxy.fault = fault
    proxy.slow = "slow.png"
    scanner.scan(f"s3://{bucket.name}", decode_timeout_s=20)
    assert scanner.states() == {
        "good.png": ("done", None),
        "archived.png": ("retry", "unreadable"),
        "broken.png": ("retry", "unreadable"),
        "changed.png": ("retry", "changed_while_read"),
        "forbidden.png": ("retry", "permission_denied"),
        "gone.png": ("retry", "vanished"),
        "slow.png": ("retry", "unreadable"),
    }
    (why,) = scanner.ask("SELECT reason FROM files WHERE path LIKE '%archived.png'")
    assert why == ("The object is archived: restore it first, then it is tried again.",)
    bucket.restore("archived.png")
    proxy.slow, once = "", iter([500])
    proxy.fault = lambda method, path: next(once, None) if path.endswith("broken.png") else None
    scanner.scan(f"s3://{bucket.name}")  # a single 500 costs nothing
    states = scanner.states()
    assert states.pop("gone.png") == ("missing", "vanished")
    assert set(states.values()) == {("done", None)}


NAMES = ("good.png", "broken.png", "changed.png", "forbidden.png", "gone.png", "slow.png")


def test_a_listing_goes_page_by_page_and_one_that_breaks_off_says_so(
    scanner: Scanner, bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAGE", 4)
    for i in range(10):
        bucket.put(f"p/{i:04}.dcm", b"<html>no")
    root = f"s3://{bucket.name}/p"
    assert len({file.path for file in discover([root], Wanted())}) == 10
    assert [file.path for file in discover([root + "/0007.dcm"], Wanted())] == [root + "/0007.dcm"]
    proxy.fault = lambda method, path: 404 if "continuation-token" in path else None
    unlisted: list[str] = []
    found = list(discover([root], Wanted(), unlisted))
    assert len(found) == 5 and found[-1].problem is not None
    assert unlisted == [root], "so that nothing below it is marked as missing"
    scanner.scan(root)
    assert scanner.states().pop("") == ("retry", "unreadable")
    proxy.fault = lambda method, path: None
    scanner.scan(root)
    states = scanner.states()
    assert states.pop("") == ("missing", "unreadable"), "the folder's own row is no file that stays unreadable"
    assert len(states) == 10 and set(states.values()) == {("rejected", "not_an_image")}
    answers = iter([None])  # to the question whether the object can be listed at all; 404 from then on
    proxy.fault = lambda method, path: next(answers, 404) if "list-type" in path else None
    scanner.scan(f"{root}/0007.dcm")
    assert scanner.states()["0007.dcm"] == ("rejected", "not_an_image"), "nobody knows whether it is gone"


def test_an_empty_page_is_not_the_end_of_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Google and Azure may answer with one; the object that is named comes after it."""
    named = Object("p", 1, datetime.now(UTC), "1")
    pages = {("p", ""): ([], "more"), ("p", "more"): ([named], "more"), ("p/", ""): ([], "")}
    monkeypatch.setattr(remote, "store_of", lambda scheme, bucket: None)
    monkeypatch.setattr(remote, "_wait", lambda store, method, bucket, prefix, most, after: pages[prefix, after])
    assert [file.path for file in remote.list_objects("gs://b/p")] == ["gs://b/p"]


def test_an_object_that_another_program_recorded_after_the_listing_is_not_missing(
    scanner: Scanner, bucket: Bucket, proxy: Proxy, new_postgres: Callable[[], str]
) -> None:
    """One object is new, the other one was deleted before the listing and is back."""
    scanner.url, root = new_postgres(), f"s3://{bucket.name}/p"
    for name in ("0.dcm", "back.dcm", "gone.dcm"):
        bucket.put(f"p/{name}", b"<html>no")
    scanner.scan(root)
    for name in ("back.dcm", "gone.dcm"):
        bucket.delete(f"p/{name}")
    bucket.put("p/changed.dcm", b"<html>no")
    beside = [reject(f"{root}/{name}") for name in ("back.dcm", "new.dcm")]

    def fault(method: str, path: str) -> None:
        if path.endswith("changed.dcm"):  # the scan has listed everything
            time.sleep(1)  # times have whole seconds
            with Store.open(scanner.url) as store:
                run = begin(store)
                store.record(run.run_id, run.cascade_id, beside)

    proxy.fault = fault
    scanner.scan(root)
    states = scanner.states()
    assert states.pop("gone.dcm")[0] == "missing"
    assert states == dict.fromkeys(("0.dcm", "back.dcm", "changed.dcm", "new.dcm"), ("rejected", "not_an_image"))


def test_an_object_that_is_excluded_by_now_is_not_missing(scanner: Scanner, bucket: Bucket) -> None:
    for key in ("p/0.dcm", "p/1.png", "p/2.png"):
        bucket.put(key, b"<html>no")
    scanner.scan(f"s3://{bucket.name}/p")
    bucket.delete("p/2.png")
    scanner.scan(f"s3://{bucket.name}/p", include=["*.dcm"])
    states = {name: state for name, (state, _) in scanner.states().items()}
    assert states == {"0.dcm": "rejected", "1.png": "rejected", "2.png": "missing"}


@pytest.mark.parametrize(
    ("root", "fault", "says", "code"),
    [
        ("s3://no-such-bucket-here/p", None, "There is no bucket s3://no-such-bucket-here; ", 1),
        ("s3://BUCKET", 403, "may not be listed with these credentials; ", 1),
        ("nonsense://BUCKET", None, "nonsense:// cannot be read; use ", 2),
        ("s3://user:secret@BUCKET/p", None, "must not carry a password: ", 2),
    ],
    ids=["bucket", "credentials", "scheme", "password"],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    bucket: Bucket, proxy: Proxy, root: str, fault: int | None, says: str, code: int
) -> None:
    proxy.fault = lambda method, path: fault
    with pytest.raises(Fatal, match=says) as ended:
        roots_of([root.replace("BUCKET", bucket.name)])
    assert ended.value.exit_code == code and "secret" not in str(ended.value)


def test_an_endpoint_that_nobody_answers_at_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Fatal, match="cannot be listed"):
        roots_of(["s3://b/p"])


def test_watch_polls_a_bucket_and_waits_while_it_cannot_be_listed(
    scanner: Scanner, bucket: Bucket, proxy: Proxy
) -> None:
    with Store.open(scanner.url) as opened:
        run = begin(opened)
        opened.record(run.run_id, run.cascade_id, [reject(f"s3://{bucket.name}/p/2.dcm")])
    for key in ("p", "p/", "p/2.dcm"):  # objects that are called as the folder, and one that is excluded now
        bucket.put(key, b"<html>no")
    always = dict.fromkeys(("p", "", "2.dcm"), ("rejected", "not_an_image"))
    bucket.put("p/0.png", image(scanner.folder / "0.png", 0).read_bytes())
    environment = os.environ | {"CXRBATCH_CASCADE": str(scanner.bundle), "CXRBATCH_POLL_S": "0.3"}
    environment |= {"CXRBATCH_EXCLUDE": '["*.dcm"]'}
    environment |= {"CXRBATCH_WORKERS": "1", "TEST_ENGINE": "arithmetic"}
    process = fork_server().start(["--db", scanner.url, "watch", f"s3://{bucket.name}/p"], scanner.folder, environment)

    def wait_until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert process.poll() is None
            time.sleep(0.1)

    try:
        wait_until(lambda: scanner.states().get("0.png") == ("done", None))
        proxy.fault = lambda method, path: 403
        image(scanner.folder / "1.png", 1)
        bucket.put("p/1.png", (scanner.folder / "1.png").read_bytes())
        bucket.delete("p/0.png")
        seen = len(proxy.requests)
        wait_until(lambda: len(proxy.requests) > seen + 3)
        assert scanner.states() == always | {"0.png": ("done", None)}, "nothing is missing while nobody can look"
        proxy.fault = lambda method, path: None
        wait_until(lambda: scanner.states() == always | {"0.png": ("missing", None), "1.png": ("done", None)})
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
    assert process.returncode == 0


def test_watch_once_says_that_a_bucket_could_not_be_listed(scanner: Scanner, bucket: Bucket, proxy: Proxy) -> None:
    answers = iter([None])  # to the question whether it can be listed at all
    proxy.fault = lambda method, path: next(answers, 403)
    environment = os.environ | {"CXRBATCH_CASCADE": str(scanner.bundle), "TEST_ENGINE": "arithmetic"}
    process = fork_server().start(
        ["--db", scanner.url, "watch", "--once", f"s3://{bucket.name}/p"], scanner.folder, environment
    )
    _, log = process.communicate(LIMIT_S)
    assert process.wait(LIMIT_S) == ExitCode.SOME_REJECTED and "The folder cannot be listed." in log


def test_credentials_for_a_prefix_alone_are_enough(bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("p/0.png", b"x")
    proxy.fault = lambda method, path: 403 if "list-type" in path and "prefix=p" not in path else None
    root = f"s3://{bucket.name}/p"
    assert roots_of([root]) == [root]
    assert [file.path for file in discover([root], Wanted())] == [f"{root}/0.png"]
