"""`gs://` and `az://` against real servers (fake-gcs-server and Azurite), with faults of the network before them."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import s3_server
from cxrbatch.errors import Fatal, ReasonCode, Retry
from cxrbatch.imaging.limits import Limits
from cxrbatch.intake import remote
from cxrbatch.intake.discover import Wanted, discover, roots_of
from factories import make_bundle
from gs_az_servers import AzureBucket, GoogleBucket, bucket_on, pointed_at, serving
from pipelines import Pipeline, image
from s3_server import Proxy


@pytest.fixture(scope="module", params=["gs", "az"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    with serving(request.param) as url:
        yield request.param, url


@pytest.fixture
def proxy(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with s3_server.before(server[1]) as made:
        pointed_at(made.url, monkeypatch)
        remote.store_of.cache_clear()
        yield made


@pytest.fixture
def bucket(server: tuple[str, str]) -> GoogleBucket | AzureBucket:
    return bucket_on(*server)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def pipeline(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("CXRBATCH_WORKERS", "1")
    monkeypatch.setenv("TEST_ENGINE", "arithmetic")
    return Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", bundle)


def test_objects_become_rows_and_are_read_again_only_when_they_have_changed(
    pipeline: Pipeline, bucket: GoogleBucket | AzureBucket, proxy: Proxy
) -> None:
    names = ("kept.png", "written.png", "changed.png", "gone.png", "forbidden.png")
    contents = {name: image(pipeline.cwd / name, i).read_bytes() + b"0" for i, name in enumerate(names)}
    for name, data in contents.items():
        bucket.put(f"p/{name}", data)
    bucket.put("p/empty.dcm", b"")
    for key in ("p/.hidden/0.png", "p/9.tmp", "pq/other.png"):
        bucket.put(key, b"not wanted")

    def fault(method: str, path: str) -> int | None:
        if _is_listing(path):
            return None
        if "changed.png" in path:
            bucket.put("p/changed.png", contents["changed.png"][:-1] + b"1")  # of the same size
        if "gone.png" in path:
            bucket.delete("p/gone.png")
        return 403 if "forbidden.png" in path else None

    proxy.fault = fault
    root = f"{bucket.scheme}://{bucket.name}/p"
    scanned = pipeline.run("--quiet", "scan", root + "/")
    assert (scanned.code, scanned.err) == (3, "")
    assert dict(pipeline.ask(REASONS)) == {
        f"{root}/kept.png": None,
        f"{root}/written.png": None,
        f"{root}/changed.png": "changed_while_read",
        f"{root}/gone.png": "vanished" if bucket.scheme == "gs" else "changed_while_read",  # Azurite's If-Match: 412
        f"{root}/forbidden.png": "permission_denied",
        f"{root}/empty.dcm": "empty_file",
    }
    proxy.fault = lambda method, path: None
    proxy.requests.clear()
    same_size = contents["written.png"][:-1] + b"1"
    bucket.put("p/written.png", same_size)
    pipeline.run("scan", root)
    read = {path.partition("?")[0].rpartition("p/")[2].rpartition("p%2F")[2] for _, path in proxy.requests}
    assert {name for name in read if name.endswith(".png")} == {"written.png", "changed.png", "forbidden.png"}
    (found,) = pipeline.ask(f"SELECT sha256 FROM results WHERE path = '{root}/written.png'")
    assert found == (hashlib.sha256(same_size).hexdigest(),)


def test_watch_polls_a_bucket(
    pipeline: Pipeline, bucket: GoogleBucket | AzureBucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXRBATCH_POLL_S", "0.5")
    root = f"{bucket.scheme}://{bucket.name}/p"
    states = "SELECT path, state FROM files ORDER BY path"
    bucket.put("p/a.png", image(pipeline.cwd / "a.png", 1).read_bytes())
    pipeline.run("scan", root)
    proxy.requests.clear()
    daemon = pipeline.start("watch", root)
    try:
        pipeline.wait_until(lambda: bool(proxy.requests), daemon)
        proxy.fault = lambda method, path: 500 if _is_listing(path) else None
        bucket.put("p/b.png", image(pipeline.cwd / "b.png", 2).read_bytes())
        bucket.delete("p/a.png")
        proxy.requests.clear()
        pipeline.wait_until(lambda: len(proxy.requests) > 1, daemon)
        assert pipeline.ask(states) == [(f"{root}/a.png", "done")], "what cannot be listed is not missing"
        proxy.fault = lambda method, path: None
        expected = [(f"{root}/a.png", "missing"), (f"{root}/b.png", "done")]
        pipeline.wait_until(lambda: pipeline.ask(states) == expected, daemon)
        daemon.send_signal(signal.SIGTERM)
        _, err = daemon.communicate(timeout=60)
    finally:
        daemon.kill()
    assert daemon.returncode == 0, err


REASONS = "SELECT path, reason_code FROM files"


def _is_listing(path: str) -> bool:
    return "comp=list" in path or path.partition("?")[0].endswith("/o")


def test_a_listing_goes_page_by_page_and_one_that_breaks_off_says_so(
    bucket: GoogleBucket | AzureBucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PAGE", 4)
    for i in range(10):
        bucket.put(f"p/{i:04}.dcm", b"<html>no")
    root = f"{bucket.scheme}://{bucket.name}/p"
    assert len({file.path for file in discover([root], Wanted())}) == 10
    assert sum(_is_listing(path) and "p%2F" in path.replace("/", "%2F") for _, path in proxy.requests) >= 3
    assert [file.path for file in discover([root + "/0007.dcm"], Wanted())] == [root + "/0007.dcm"]
    proxy.fault = lambda method, path: 404 if "marker=" in path or "pageToken=" in path else None
    unlisted: list[str] = []
    found = list(discover([root], Wanted(), unlisted))
    assert len(found) == 5 and found[-1].problem is not None
    assert unlisted == [root], "so that nothing below it is marked as missing"


def test_a_version_lasts_until_the_object_is_written_again_and_names_may_hold_anything(
    bucket: GoogleBucket | AzureBucket, proxy: Proxy
) -> None:
    keys = ("name with ä +%2F.png", "q?#[a]*.dcm", "folder/x", "no folder/")
    for key in keys:
        bucket.put(key, b"first")
    bucket.put("folder/", b"")
    root = f"{bucket.scheme}://{bucket.name}"
    first = {file.path: file for file in remote.list_objects(root)}
    assert sorted(first) == sorted(f"{root}/{key}" for key in keys)
    assert first == {file.path: file for file in remote.list_objects(root)}
    assert [remote.read_object(file, Limits()) for file in first.values()] == [b"first"] * 4

    bucket.put(keys[1], b"first")  # the very same, within the second
    second = {file.path: file for file in remote.list_objects(root)}
    again = f"{root}/{keys[1]}"
    assert second[again].version != first[again].version
    assert {path for path in first if first[path] != second[path]} == {again}
    with pytest.raises(Retry) as changed:
        remote.read_object(first[again], Limits())
    assert changed.value.reason_code == ReasonCode.CHANGED_WHILE_READ


@pytest.mark.parametrize(
    ("status", "says"),
    [(404, "There is no bucket URL; "), (403, "URL may not be listed with these credentials; "), (401, "URL may not ")],
    ids=["no bucket", "forbidden", "not known"],
)
def test_what_a_user_gets_wrong_is_one_sentence_on_stderr(
    pipeline: Pipeline, bucket: GoogleBucket | AzureBucket, proxy: Proxy, status: int, says: str
) -> None:
    url = f"{bucket.scheme}://no-such-bucket-here"
    proxy.fault = lambda method, path: None if status == 404 else status
    ended = pipeline.run("scan", url + "/p")
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith("cxrbatch: " + says.replace("URL", url))


@pytest.mark.parametrize(("scheme", "library"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_server_that_nobody_answers_at_is_one_sentence(
    scheme: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr(remote, "_ANSWER_S", 1.0)  # both libraries would try for half a minute and more
    pointed_at("http://127.0.0.1:9", monkeypatch)
    remote.store_of.cache_clear()
    with pytest.raises(Fatal, match=rf"{scheme}://b cannot be listed \(FSTimeoutError\)"):
        roots_of([f"{scheme}://b/p"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "az:// needs a storage account; check AZURE_STORAGE_CONNECTION_STRING "),
        ("SECRET", "az:// needs a storage account; check AZURE_STORAGE_CONNECTION_STRING "),
        ("AccountName=a;AccountKey=SECRET", "az://b may not be listed with these credentials; "),
    ],
    ids=["nothing", "nonsense", "nonsense for a key"],
)
def test_az_without_an_account_says_what_to_set(given: str | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adlfs")
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME"):
        monkeypatch.delenv("AZURE_STORAGE_" + name, raising=False)
    if given is not None:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", given)
    remote.store_of.cache_clear()
    with pytest.raises(Fatal) as ended:
        roots_of(["az://b/p"])
    assert str(ended.value).startswith(says) and "SECRET" not in str(ended.value)


def test_google_credentials_that_are_refused_are_not_tried_for_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a service account that Google has deleted: no token for it, from a server that always answers 403."""
    pytest.importorskip("gcsfs")
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    account = {"type": "service_account", "client_email": "a@b", "private_key": secret.decode()}
    file = tmp_path / "key.json"
    with s3_server.before("http://127.0.0.1:9") as google:
        google.fault = lambda method, path: 403
        file.write_text(json.dumps(account | {"token_uri": google.url + "/token"}))
        pointed_at(google.url, monkeypatch)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        monkeypatch.setattr(remote, "_ANSWER_S", 1.0)
        remote.store_of.cache_clear()
        with pytest.raises(Fatal, match="gs://b may not be listed with these credentials; "):
            roots_of(["gs://b/p"])
    assert [path for _, path in google.requests] == ["/token"]
