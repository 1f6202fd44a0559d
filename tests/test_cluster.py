"""`cxrbatch scan … --ray`: a real Ray cluster on this machine, a real Postgres, a bucket that fails now and then, and
nodes that are killed."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import gs_az_servers
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import ExitCode, Fatal, StoreDown
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.intake import remote
from cxrbatch.intake.discover import Wanted, discover
from cxrbatch.ops.cluster import check_cluster_settings, connected, distribute
from cxrbatch.ops.cluster_runner import Job, Runner, folders_of
from cxrbatch.ops.scan import Exports, run_scan
from cxrbatch.ops.setup import begin_run, job_queue_of
from cxrbatch.pipeline import Counts
from cxrbatch.settings import Settings
from cxrbatch.store import JobQueue, Store
from cxrbatch.store.connection import parse_url
from cxrbatch.types import FoundFile
from factories import make_bundle
from gs_az_servers import GoogleBucket
from pipelines import image
from ray_cluster import Killer, Nodes, ray_cluster
from s3_server import Bucket, Proxy, before, pointed_at

KILLS = 5 if int(os.environ.get("CXRBATCH_CRASH_N", "0")) > 4 else 1
RESULTS = "SELECT path, label, round(confidence * 1000), state, reason_code, sha256 FROM results ORDER BY path"


@pytest.fixture(scope="module")
def network(s3: str) -> Iterator[Proxy]:
    """What lies between the nodes and S3."""
    pytest.importorskip("s3fs", reason="needs the extra 'remote'")
    with before(s3) as made, pytest.MonkeyPatch.context() as patch:
        pointed_at(made.url, patch)
        remote.store_of.cache_clear()
        yield made


@pytest.fixture(scope="module")
def google() -> Iterator[GoogleBucket]:
    """A bucket of Google's that every node can reach."""
    with gs_az_servers.serving("gs") as url, pytest.MonkeyPatch.context() as patch:
        gs_az_servers.pointed_at(url, patch)
        yield GoogleBucket(url)


@pytest.fixture(scope="module")
def nodes(network: Proxy, google: GoogleBucket) -> Iterator[Nodes]:
    with ray_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


def settings_of(folder: Path, bundle: Path, url: str) -> Settings:
    how: dict[str, Any] = {"workers": 1, "quiet_s": 0, "lease_s": 3, "batch_size": 2, "record_age_s": 0}
    how |= {"retry_first_s": 1, "decode_timeout_s": 900}
    return Settings(db=url, cascade=str(bundle), id_key_file=str(folder / "key"), **how)


def scan(settings: Settings, *roots: str | Path, ray: str | None = None) -> ExitCode:
    how: dict[str, Any] = {"reprocess": "none", "limit": None, "dry_run": False, "error_on_empty": False}
    return run_scan(settings, roots, Exports(), quiet=True, ray=ray, **how)


def ask(url: str, query: str) -> list[tuple[Any, ...]]:
    engine = sa.create_engine(parse_url(url))
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(sa.text(query))]
    engine.dispose()
    return rows


class Faults:
    """Every third object is answered once with a 500, every seventh body ends half-way once, and all are slow. While
    the gate is closed, there is no answer at all."""

    def __init__(self, network: Proxy, keys: list[str]) -> None:
        self.gate = threading.Event()
        self._network = network
        self._left = set(keys[::3])
        network.cut = {f"/{key}" for key in keys[5::7]}
        network.pause_s = 0.05
        network.fault = self._fault

    def _fault(self, method: str, path: str) -> int | None:
        if "list-type" in path:
            return None
        self.gate.wait()
        if path[1:] in self._left:
            self._left.discard(path[1:])
            return 500
        return None

    def end(self) -> None:
        assert not self._left and not self._network.cut, "all of them came"
        self._network.fault, self._network.pause_s = (lambda method, path: None), 0.0


@pytest.mark.crash
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_the_rows_are_those_of_one_machine_though_nodes_are_killed_and_s3_fails(
    nodes: Nodes, network: Proxy, s3: str, bucket: Bucket, store_url: str, bundle: Path, tmp_path: Path
) -> None:
    folder, root = tmp_path / "in", f"s3://{bucket.name}/p"
    images = [image(folder / f"{i:02}.png", i) for i in range(8)]
    (folder / "twin.png").write_bytes(images[0].read_bytes())
    (folder / "page.dcm").write_bytes(b"<html>no")
    keys = [f"{bucket.name}/p/{i:03}.png" for i in range(30 * KILLS + 10)]
    for i, key in enumerate(keys):
        bucket.put(key.partition("/")[2], image(tmp_path / "object.png", 100 + i).read_bytes())
    faults = Faults(network, keys)
    settings = settings_of(tmp_path, bundle, store_url)
    seed = int(os.environ.get("CXRBATCH_SEED", time.time_ns() % 10**6))
    with Killer(nodes, store_url, faults.gate, KILLS, seed) as killer:
        assert scan(settings, folder, root, ray=nodes.address) == ExitCode.SOME_REJECTED
    print(f"seed {seed}: the {len(killer.held)} killed nodes had {killer.held} files in hand")
    assert killer.failure is None and len(killer.held) == KILLS, killer.failure
    assert ask(store_url, "SELECT count(*) FROM files WHERE lease_owner IS NOT NULL") == [(0,)]
    if ask(store_url, "SELECT 1 FROM files WHERE state = 'retry'"):  # what S3 failed at last
        scan(settings, folder, root, ray=nodes.address)
    faults.end()

    alone = settings_of(tmp_path, bundle, f"sqlite:///{tmp_path}/alone.db")
    scan(alone, folder, root)
    with closing(sqlite3.connect(tmp_path / "alone.db")) as connection:
        expected = connection.execute(RESULTS).fetchall()
    assert len(expected) == len(images) + 2 + len(keys)
    assert ask(store_url, RESULTS.replace("round(confidence", "round(confidence::numeric")) == expected
    contents = len(images) + len(keys)
    assert ask(store_url, "SELECT count(*), count(DISTINCT image_id) FROM predictions") == [(contents, contents)]
    assert ask(store_url, "SELECT count(*) FROM audit WHERE event = 'image_changed'") == [(0,)]


def fails_once(method: Any) -> Any:
    errors = iter([StoreDown("It restarts.")])

    def call(*given: Any, **named: Any) -> Any:
        for error in errors:
            raise error
        return method(*given, **named)

    return call


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_path_that_the_store_cannot_hold_whole_ends_as_a_row(
    nodes: Nodes, store_url: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    image(folder / "short.png", 1)
    for name in ("offer", "unfinished"):  # a store that restarts does not end a scan of days
        monkeypatch.setattr(JobQueue, name, fails_once(getattr(JobQueue, name)))
    deep = folder.joinpath(*["d" * 240] * 10)
    os.makedirs(deep)
    (deep / "long.png").write_bytes(b"no node reads it")

    def settle(found: Iterator[FoundFile], quiet_s: float) -> Iterator[FoundFile | None]:
        yield from found
        while not ask(store_url, "SELECT id FROM files WHERE state = 'done'"):
            yield None  # as if another file still changed: the nodes begin without it

    monkeypatch.setattr("cxrbatch.ops.cluster.settle", settle)
    settings = settings_of(tmp_path, bundle, store_url)
    (tmp_path / "new").mkdir()  # empty, which does not mean that the nodes lack it
    assert scan(settings, folder, tmp_path / "new", ray=nodes.address) == ExitCode.SOME_REJECTED
    states = "SELECT state, reason_code FROM files ORDER BY state"
    assert ask(store_url, states) == [("done", None), ("retry", "unreadable")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_nodes_read_a_bucket_of_google(
    nodes: Nodes, google: GoogleBucket, store_url: str, bundle: Path, tmp_path: Path
) -> None:
    for i in range(6):
        google.put(f"p/{i}.png", image(tmp_path / "object.png", 300 + i).read_bytes())
    google.put("p/page.dcm", b"<html>no")
    settings = settings_of(tmp_path, bundle, store_url)
    assert scan(settings, f"gs://{google.name}/p", ray=nodes.address) == ExitCode.SOME_REJECTED
    states = "SELECT state, count(*), count(version) FROM files GROUP BY state ORDER BY state"
    assert ask(store_url, states) == [("done", 6, 6), ("rejected", 1, 1)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_no_room_and_another_bundle_are_one_sentence(
    nodes: Nodes, store_url: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image(tmp_path / "in/a.png", 1)
    settings = settings_of(tmp_path, bundle, store_url)
    loaded = load_bundle(settings.cascade)
    with Store.open(store_url) as store:
        run = begin_run(store, settings, loaded, None)

        def hold(sign: Path, seconds: float) -> None:  # in here, so that a node need not import this file
            sign.touch()
            time.sleep(seconds)

        def give_out(key: str, placed_s: float, *, busy: bool = False) -> None:
            ray = connected(nodes.address)
            signs = [tmp_path / f"held{i}" for i, _ in enumerate(nodes.alive) if busy]
            holding = [ray.remote(num_cpus=1)(hold).remote(sign, 600) for sign in signs]
            while not all(sign.exists() for sign in signs):
                time.sleep(0.1)
            job = Job(settings, Identifiers(mode="drop"), (str(tmp_path / "in"),), run, key)
            found = discover([str(tmp_path / "in")], Wanted())
            distribute(ray, found, store, job, Counts(), lambda counts: None, threading.Event(), placed_s=placed_s)
            del holding

        with pytest.raises(Fatal, match="is another one here: install the same"):
            give_out("0" * 64, 500)
        with pytest.raises(Fatal, match=r"no room for 2 runner\(s\)"):
            give_out(loaded.key(settings.exact), 2, busy=True)
        with pytest.raises(Fatal, match="no node with a CPU"), monkeypatch.context() as patch:
            patch.setattr("ray.nodes", list)
            give_out(loaded.key(settings.exact), 0)
    assert ask(store_url, "SELECT state FROM files") == [("waiting",)], "the next run goes on"


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)
def test_a_node_without_the_folder_takes_no_file(store_url: str, bundle: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, bundle, store_url)
    loaded = load_bundle(settings.cascade)
    with Store.open(store_url) as store:
        run = begin_run(store, settings, loaded, None)
        files = [FoundFile(f"{tmp_path}/share/{i}.png", 1, 1, 1) for i in range(3)]
        job_queue_of(store, run, settings).offer(files, inodes_tell=False)
    image(tmp_path / "share/0.png", 1)
    (tmp_path / "new").mkdir()  # nothing came into it yet, on any machine
    roots = (f"{tmp_path}/new", f"{tmp_path}/share/0.png", "s3://b/p")
    folders = folders_of(roots)
    (tmp_path / "share/0.png").unlink()
    for left in (True, False):  # there but not mounted, and not there
        if not left:
            (tmp_path / "share").rmdir()
        runner = Runner(Job(settings, Identifiers("drop"), roots, run, loaded.key(settings.exact), folders=folders))
        while not runner.status().finished:
            time.sleep(0.01)
        assert "share is missing or empty on" in runner.status().error
    assert ask(store_url, "SELECT state, count(*) FROM files GROUP BY state") == [("waiting", 3)]


def test_what_a_user_gets_wrong_is_one_sentence(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(Fatal, match="name a Postgres with --db") as refused:
        scan(settings_of(tmp_path, bundle, f"sqlite:///{tmp_path}/s.db"), tmp_path, ray="127.0.0.1:9")
    assert refused.value.exit_code == ExitCode.USAGE
    postgres = settings_of(tmp_path, bundle, "postgresql://nobody@localhost/none")
    with pytest.raises(Fatal, match="does not go with --limit"):
        check_cluster_settings(postgres, limit=3, reprocess="none")
    pytest.importorskip("ray")
    for address, says in (("127.0.0.1:9", "No Ray cluster answers at"), ("nonsense", "takes HOST:PORT")):
        with pytest.raises(Fatal, match=says):
            connected(address)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(Fatal, match=r"pip install 'cxrbatch\[ray\]'"):
        connected("127.0.0.1:6379")
