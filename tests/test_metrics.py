"""Metrics, health and status of a real daemon, as Prometheus, an orchestrator and a person at night see them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context

from cxrbatch import intake
from cxrbatch.errors import ExitCode, Fatal, ReasonCode
from cxrbatch.imaging.limits import Limits as DecodeLimits
from cxrbatch.intake.receiver import Listen, receive
from cxrbatch.ops import heartbeat, monitor
from cxrbatch.ops.drift_statistics import STATISTICS
from cxrbatch.ops.health import BEAT_LIMIT_S, ROOT_LIMIT_S, Health
from cxrbatch.ops.metrics import Metrics, ReceiverMetrics, described
from cxrbatch.ops.monitor import StoreFigures, parse_address, serve_monitor
from cxrbatch.ops.status import Limits, State, Status, _details, _line, judge
from cxrbatch.ops.terminal import to_stdout
from cxrbatch.store import JobQueue, Store
from cxrbatch.store.backlog import Backlog, Daemon, read_backlog, read_daemons, write_heartbeat
from cxrbatch.store.connection import connect, make_engine
from cxrbatch.store.leases import Backoff
from cxrbatch.store.schema import files
from cxrbatch.types import Decision
from factories import make_bundle
from store_images import begin, found, reject, scored_file
from test_receiver import CLASSES, instance
from watchers import Place, some_files

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def place(tmp_path: Path, bundle: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", bundle)
    yield made
    made.clean_up()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[f"cxrbatch_{name}", frozenset(labels.items())]


def test_a_daemon_counts_what_it_does(place: Place) -> None:
    some_files(place.incoming)
    secret = "SECRETNAME"
    (place.incoming / f"{secret}.txt").write_text("no image")
    os.mkfifo(place.incoming / "fifo")
    port = free_port()
    daemon = place.start("--metrics", f"127.0.0.1:{port}", CXRBATCH_TRUNCATED_TRIES="1")
    place.wait(lambda: get(port, "/readyz")[0] == 200 and len(place.rows()) == len(place.files()) + 1, daemon)
    place.wait(lambda: not {row[0] for row in place.rows().values()} & {"waiting", "claimed"}, daemon)
    text = get(port, "/metrics")[1]
    rows = place.rows().values()
    assert value(text, "files_processed_total", outcome="done") == sum(row[0] == "done" for row in rows)
    assert value(text, "files_processed_total", outcome="rejected") == sum(row[0] == "rejected" for row in rows) == 4
    assert value(text, "files_rejected_total", reason="not_an_image") == 2
    assert value(text, "files_rejected_total", reason="not_a_regular_file") == 1
    by_label = [v for (name, _), v in samples(text).items() if name == "cxrbatch_predictions_total"]
    assert sum(by_label) == len({row[4] for row in rows if row[0] == "done"}) == 12
    assert value(text, "decode_seconds_count", format="png") == 13
    assert value(text, "inference_seconds_count", stage="gate") >= 2
    assert value(text, "commit_seconds_count") >= 2
    assert value(text, "store_up") == 1 and value(text, "root_paused", root="0") == 0
    assert value(text, "heartbeat_timestamp_seconds") > time.time() - 60
    assert value(text, "root_walk_timestamp_seconds", root="0") > time.time() - 60
    assert value(text, "disk_free_bytes", what="store") > 0
    # No path, no name, no identifier: only words from closed sets.
    assert secret not in text and str(place.cwd) not in text and str(place.incoming) not in text
    assert get(port, "/healthz")[0] == 200
    assert get(port, "/")[0] == 404

    # A person looks, and a program.
    assert place.run(command="status") == State.OK
    assert "CXRBATCH OK - 0 waiting" in place.log and "folder" in place.log
    started = len(place.log)
    assert place.run("--json", command="status") == State.OK
    reported = json.loads(place.log[place.log.index("{\n", started) :])
    (known,) = reported["daemons"]
    assert known["alive"] and known["roots"][0]["folder"] == str(place.incoming)
    assert reported["rejected_last_day"]["not_an_image"] == 2

    # Another daemon cannot have the same port: one sentence, before it touches anything.
    other = Place(place.cwd / "other", f"sqlite:///{place.cwd / 'other' / 'store.db'}", place.bundle)
    other.cwd.mkdir()
    assert other.run("--metrics", f"127.0.0.1:{port}") == ExitCode.FATAL
    assert "Metrics cannot be served at 127.0.0.1" in other.log and "Traceback" not in other.log
    assert other.run("--metrics", "9108") == ExitCode.USAGE

    # Frozen: the last sign of life grows old, and nobody answers.
    os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait(100)
    age = "UPDATE runs SET counts_json = replace(counts_json, substr(counts_json, 16, 4), '2020')"
    with sa.create_engine(place.url).begin() as connection:
        connection.exec_driver_sql(age)
    assert place.run(command="status") == State.CRITICAL
    assert "no daemon lives" in place.log


def test_the_review_has_metrics_too(place: Place) -> None:
    pytest.importorskip("fastapi")
    with Store.open(place.url) as store:
        store.record(begin(store).run_id, 1, [scored_file("/a", "COVID19", 0.5, decision=Decision.NEEDS_REVIEW)])
    port = free_port()
    review = place.start("--port", "0", "--metrics", f"127.0.0.1:{port}", command="review")
    place.wait(lambda: get(port, "/readyz")[0] == 200, review)
    text = get(port, "/metrics")[1]
    assert value(text, "review_waiting_files") == 1 and value(text, "store_up") == 1
    assert get(port, "/healthz")[0] == 200
    place.stop(review)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_review_whose_decoder_has_ended_is_not_healthy(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from cxrbatch.ops.review import _monitor
    from cxrbatch.review.decoding import ImageDecoder

    port, decoder = free_port(), ImageDecoder(DecodeLimits(), workers=1, timeout_s=30, memory_mib=0)
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store, _monitor(f"127.0.0.1:{port}", store, decoder):
        assert get(port, "/healthz")[0] == 200
        decoder._requests.put("no request")  # type: ignore[arg-type]  # any bug ends the thread
        decoder._thread.join(60)
        status, body = get(port, "/healthz")
        assert status == 503 and "decoder" in json.loads(body)["seconds_since"]
    decoder.close()


def test_the_receiver_alone_has_metrics_too(tmp_path: Path) -> None:
    folder, port, listen = tmp_path / "in", free_port(), free_port()
    folder.mkdir()
    (tmp_path / "config.toml").write_text('calling_ae_titles = ["MODALITY"]\nmin_free_mib = 1\n')
    command = [sys.executable, "-m", "cxrbatch", "--config", tmp_path / "config.toml", "receive", folder]
    options = ["--listen", f"127.0.0.1:{listen}", "--metrics", f"127.0.0.1:{port}"]
    receiver = subprocess.Popen([*command, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert receiver.stderr is not None and "receiving" in receiver.stderr.readline()
        assert send_to(listen, "STRANGER") is None
        assert [send_to(listen, "MODALITY") for _ in range(2)] == [0, 0]
        text = get(port, "/metrics")[1]
        assert value(text, "received_instances_total", result="stored") == 2
        assert value(text, "received_instances_total", result="out_of_resources") == 0
        assert value(text, "receiver_events_total", event="association_refused") == 1
        assert value(text, "receiver_events_total", event="store_failed") == 0
        assert value(text, "heartbeat_timestamp_seconds") > time.time() - 60
        assert value(text, "disk_free_bytes", what="root0") > 0
        assert "cxrbatch_store_up" not in text  # it has none: an alert would say that it is down
        assert str(folder) not in text and "STRANGER" not in text
        assert json.loads(get(port, "/healthz")[1])["seconds_since"]["receiver"] < 60
        assert get(port, "/readyz")[0] == 200
        # Where it cannot write: the sender hears of it, and so does who asks.
        shutil.rmtree(folder)
        assert send_to(listen, "MODALITY") == 0xA700
        text = get(port, "/metrics")[1]
        assert value(text, "received_instances_total", result="out_of_resources") == 1
        assert value(text, "receiver_events_total", event="store_failed") == 1
        until = time.monotonic() + 300
        while get(port, "/readyz")[0] != 503 and time.monotonic() < until:
            time.sleep(1)
        assert get(port, "/readyz")[0] == 503 and get(port, "/healthz")[0] == 200
        other = subprocess.run([*command[:-1], tmp_path, *options], cwd=tmp_path, capture_output=True, text=True)
        assert other.returncode == ExitCode.FATAL and "Metrics cannot be served at 127.0.0.1" in other.stderr
        receiver.terminate()
        assert receiver.wait(100) == 0
    finally:
        receiver.kill()


def send_to(port: int, title: str) -> int | None:
    """The status of one C-STORE request by a modality of this name; None where it is not let in."""
    entity = AE(ae_title=title)
    entity.requested_contexts = [build_context(CLASSES[0], ExplicitVRLittleEndian)]
    association = entity.associate("127.0.0.1", port)
    if not association.is_established:
        return None
    status = association.send_c_store(instance()).Status
    association.release()
    return int(status)


def test_a_receiver_that_accepts_nothing_more_gives_no_sign_of_life(tmp_path: Path) -> None:
    beats: list[float] = []
    with receive(tmp_path, Listen("127.0.0.1", 0), heartbeat=lambda: beats.append(time.monotonic())):
        until = time.monotonic() + 60
        while len(beats) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(beats) >= 3
    known = len(beats)
    time.sleep(1.5)
    assert len(beats) == known


def test_every_event_of_the_receiver_is_a_series() -> None:
    told = {"name_taken"}  # the other branch of "duplicate_instance"
    for source in Path(intake.__file__).parent.glob("*.py"):
        told |= set(re.findall(r"\b_?tell\(\"(\w+)\"", source.read_text()))
    events = {dict(labels)["event"] for name, labels in samples(metrics_text(ReceiverMetrics())) if "_events" in name}
    assert told == events and "association_refused" in events


def test_every_series_is_there_from_the_start_and_at_zero() -> None:
    metrics = Metrics(["NORMAL", "COVID19", "NOT_CHEST"], 2)
    text = metrics_text(metrics)
    for reason in ReasonCode:
        assert value(text, "files_rejected_total", reason=str(reason)) == 0
    for label in ("NORMAL", "COVID19", "NOT_CHEST"):
        for decision in Decision:
            assert value(text, "predictions_total", label=label, decision=str(decision)) == 0
    assert value(text, "root_paused", root="1") == 0
    for statistic in STATISTICS:
        assert math.isnan(value(text, "drift_score", statistic=statistic))
    for root in ("root0", "root1"):  # a daemon that waits for its store at the start has no full disk
        assert math.isnan(value(text, "disk_free_bytes", what=root))
    metrics.show_drift(dict.fromkeys(STATISTICS, (0.1, 0.2)))
    before = {key for key in samples(text) if key[0].startswith("cxrbatch_")}
    # Whatever happens, no series is added: labels are closed sets.
    metrics.count([scored_file("/a", "COVID19"), reject("/b"), scored_file("/c", "NOT_CHEST")], recorded(), 0.1)
    metrics.answered(0), metrics.answered(0xA700), metrics.answered(0xC000)
    metrics.show_backlog(Backlog({"waiting": 1, "claimed": 0, "retry": 0}, 5.0, 1, {"accept": 1}))
    after = {key for key in samples(metrics_text(metrics)) if key[0].startswith("cxrbatch_")}
    # Reviews of before this start would count as new ones if they began at zero.
    assert after == before | {("cxrbatch_reviews_total", frozenset({("action", "accept")}))}


def recorded() -> Any:
    from cxrbatch.store import Recorded

    return Recorded(done=2, rejected=1)


def metrics_text(metrics: Metrics) -> str:
    from prometheus_client import generate_latest

    return generate_latest(metrics.registry).decode()


def test_names_follow_the_rules_of_prometheus() -> None:
    for name, kind, labels, meaning in described():
        assert re.fullmatch(r"cxrbatch_[a-z_]+", name) and meaning.endswith(".")
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"path|file_name|uid|patient", labels)
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=metrics_text(Metrics(["NORMAL"], 1)), text=True, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_server_answers_what_health_says_and_sheds_what_is_too_much() -> None:
    now = [0.0]
    health = Health(clock=lambda: now[0])
    health.begin("store", "models")
    with serve_monitor("127.0.0.1:0", Metrics(), health) as (_, port):
        assert get(port, "/healthz")[0] == 200 and get(port, "/readyz")[0] == 503
        health.ready.update(store=True, models=True)
        health.runs("pipeline")
        health.add("root0", lambda: 0.0, ROOT_LIMIT_S)
        assert get(port, "/readyz")[0] == 200 and value(get(port, "/metrics")[1], "alive") == 1
        now[0] = BEAT_LIMIT_S + 1
        status, body = get(port, "/healthz")
        assert status == 503 and json.loads(body)["seconds_since"]["pipeline"] == BEAT_LIMIT_S + 1
        assert get(port, "/readyz")[0] == 503
        health.heartbeat()
        assert get(port, "/healthz")[0] == 200
        now[0] = ROOT_LIMIT_S + 1
        health.heartbeat()
        assert get(port, "/healthz")[0] == 503 and health.stale() == ["root0"]
        assert value(get(port, "/metrics")[1], "alive") == 0, "what an alert hears"
        odd = {"Accept": "application/openmetrics-text; version=abc"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=odd)
        assert b"cxrbatch_alive" in urllib.request.urlopen(asked, timeout=60).read(), "no traceback for anybody"
        # Half-open connections beyond the limit are dropped, and it answers again when they have gone.
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for one in idle:
            one.close()
        deadline = time.monotonic() + 60
        while get(port, "/metrics")[0] != 200:
            assert time.monotonic() < deadline
        with pytest.raises(Fatal, match="name another HOST"), serve_monitor(f"127.0.0.1:{port}", Metrics(), health):
            pass


def test_clients_that_never_come_to_an_end_hold_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_LONGEST_S", 0.5)
    with serve_monitor("127.0.0.1:0", Metrics(), Health()) as (_, port):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(monitor._MOST_REQUESTS)]
        deadline = time.monotonic() + 30
        while get(port, "/metrics")[0] != 200:
            assert time.monotonic() < deadline
            for one in slow:
                with suppress(OSError):
                    one.send(b"G")  # each byte is within the limit of a read
            time.sleep(0.1)
        for one in slow:
            one.close()


def test_a_restart_need_not_wait_for_the_connections_of_before() -> None:
    with serve_monitor("127.0.0.1:0", Metrics(), Health()) as (_, port):
        assert get(port, "/metrics")[0] == 200  # the server closes first: its end stays in TIME_WAIT for a minute
    with serve_monitor(f"127.0.0.1:{port}", Metrics(), Health()):
        assert get(port, "/metrics")[0] == 200


@pytest.mark.parametrize("text", ["9108", "", "host:", "host:99999", "host:x", "host:-1"])
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(Fatal) as failed:
        parse_address(text)
    assert failed.value.exit_code == ExitCode.USAGE
    assert parse_address(":9108") == ("127.0.0.1", 9108) and parse_address("[::1]:9108") == ("::1", 9108)


def test_the_watchdog_of_systemd_hears_nothing_once_a_part_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(heartbeat, "sd_notify", said.append)
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    last_walk = [time.monotonic()]
    health = Health()
    health.add("root0", lambda: last_walk[0], 60)
    heart = heartbeat.Heartbeat(health)
    heart.begin(lambda: None, lambda: None)  # type: ignore[arg-type,return-value]
    heart.heartbeat()
    assert said == ["WATCHDOG=1"]
    last_walk[0] -= 100
    time.sleep(0.01)
    heart.heartbeat()
    assert said == ["WATCHDOG=1"]


def test_the_age_of_the_oldest_file_tells_a_stall(store_url: str) -> None:
    now = [datetime(2026, 11, 24, 12, tzinfo=UTC)]
    with Store.open(store_url, clock=lambda: now[0]) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/old")])
        now[0] += timedelta(days=300)
        work = JobQueue(store, run, "one", 60, Backoff())
        assert read_backlog(store).oldest_age_s == 0
        # A file that is known for long and changes waits since it changed, not since it was first seen.
        work.offer([found("/in/old", size=7), found("/in/new")], inodes_tell=True)
        now[0] += timedelta(seconds=90)
        work.offer([found("/in/newer")], inodes_tell=True)
        assert read_backlog(store).queue == {"waiting": 3, "claimed": 0, "retry": 0}
        assert read_backlog(store).oldest_age_s == 90
        # Taking it in hand, and giving it back, finishes nothing: its age goes on.
        work.claim(["/in"], 10)
        now[0] += timedelta(seconds=10)
        assert read_backlog(store).oldest_age_s == 100
        work.release()
        assert read_backlog(store).oldest_age_s == 100
        needs = [scored_file("/in/x", "COVID19", 0.5, decision=Decision.NEEDS_REVIEW), scored_file("/in/y")]
        store.record(run.run_id, run.cascade_id, needs)
        assert read_backlog(store).review_waiting == 1
        write_heartbeat(store, run.run_id, processed=3, roots=[])
        now[0] += timedelta(seconds=7)
        (daemon,) = read_daemons(store)
        assert (daemon.age_s, daemon.finished, daemon.processed) == (7, False, 3)
        store.end_run(run.run_id, {"processed": 3})
        write_heartbeat(store, run.run_id, processed=4, roots=[])  # a late one changes nothing
        assert read_daemons(store) == []
        with connect(store.engine) as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(files)).scalar_one() == 5


def test_a_store_that_is_away_is_a_number_and_no_crash(tmp_path: Path) -> None:
    metrics, health = Metrics(), Health()
    health.begin("store", "disk")
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        disks = {"store": lambda: 2**40, "root0": lambda: None}
        StoreFigures(store, metrics, health, disks).refresh()
        assert math.isnan(value(metrics_text(metrics), "disk_free_bytes", what="root0")), "not a full disk"
        assert value(metrics_text(metrics), "store_up") == 1 and health.is_ready
        with connect(store.engine, write=True) as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
        StoreFigures(store, metrics, health, {}).refresh()
        assert value(metrics_text(metrics), "store_up") == 0 and not health.is_ready  # another schema than at the start
    away = Store(make_engine("postgresql://nobody@127.0.0.1:1/none"))
    StoreFigures(away, metrics, health, {}).refresh()
    assert value(metrics_text(metrics), "store_up") == 0 and not health.ready["store"] and health.alive


def status(
    oldest_s: float = 0.0, waiting: int = 0, daemons: list[Daemon] | None = None, free: int = 9999, retry: int = 0
) -> Status:
    queue = {"waiting": waiting, "claimed": 0, "retry": retry}
    reasons = {"permission_denied": retry, "not_an_image": 3}
    return Status(Backlog(queue, oldest_s, 0, {}), 0, 0, reasons, daemons or [], free)


def daemon(age_s: float = 1.0, **root: Any) -> Daemon:
    roots = [{"folder": "/in", "mode": "events", "paused": False, "last_walk": 1000.0} | root]
    return Daemon(1, "host", "1", datetime.now(UTC), age_s, False, 0, roots)


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        (status(), None, ""),
        (status(daemons=[daemon()]), None, ""),
        (status(1000, 5, [daemon()]), State.WARNING, "the oldest of 5 waiting files was queued 17 min ago"),
        (status(7200, 5, [daemon()]), State.CRITICAL, "2 h ago"),
        (status(1, 5), State.CRITICAL, "no daemon lives"),
        (status(daemons=[daemon(500)]), State.CRITICAL, "the last sign of one is 8 min old"),
        (status(daemons=[daemon(paused=True)]), State.WARNING, "is away"),
        (status(daemons=[daemon(last_walk=-9000.0)]), State.WARNING, "was last walked 3 h ago"),
        (status(daemons=[daemon(last_walk=-9000.0, every_s=86_400.0)]), None, ""),
        (status(daemons=[daemon(unlisted=2)]), State.WARNING, "2 folders in /in cannot be listed"),
        (status(retry=3), None, ""),
        (status(retry=12), State.WARNING, "12 files could not be read and are tried again: permission_denied"),
        (status(free=1000), State.WARNING, "1,000 MiB are free"),
        (status(free=100), State.CRITICAL, "100 MiB are free"),
    ],
)
def test_what_status_makes_of_it(given: Status, state: State | None, words: str) -> None:
    problems = judge(given, Limits(), now=1100.0)
    assert [level for level, _ in problems] == ([] if state is None else [state])
    assert all(words in text for _, text in problems)


def test_a_critical_age_below_the_warning_one_is_not_passed_over() -> None:
    problems = judge(status(700, 5, [daemon()]), Limits(critical_age_s=600.0), now=1100.0)
    assert [level for level, _ in problems] == [State.CRITICAL]


def test_only_numbers_follow_the_bar_that_a_monitoring_system_splits_at(capsys: pytest.CaptureFixture[str]) -> None:
    given = status(daemons=[daemon(folder="/in|out", paused=True)])
    given.problems.extend(judge(given, Limits(), now=1100.0))
    _details(to_stdout(), given)
    line = _line(given)
    assert line.startswith("CXRBATCH WARNING - the folder /in¦out is away | waiting=0") and line.count("|") == 1
    assert "/in¦out: away" in (shown := capsys.readouterr().out) and "|" not in shown


def test_status_of_no_store_is_one_line(place: Place) -> None:
    assert place.run(command="status") == State.UNKNOWN
    assert place.log.startswith("CXRBATCH UNKNOWN - There is no store") and place.log.count("\n") == 1
    assert place.run(command="status", CXRBATCH_QUIET_S="soon") == State.UNKNOWN
    assert "\nCXRBATCH UNKNOWN - The setting 'quiet_s' cannot be 'soon'" in place.log
    gone = Place(place.cwd, "postgresql://nobody@127.0.0.1:1/none", place.bundle)
    assert gone.run("--json", command="status") == State.CRITICAL
    assert json.loads(place.log.splitlines()[-1])["state"] == "CRITICAL"
