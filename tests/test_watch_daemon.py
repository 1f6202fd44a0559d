"""`cxrbatch watch` as a process: incoming files become rows; stopping, reloading and sharing work as documented."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
from pynetdicom import AE, build_context

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import Bundle
from cxrbatch.ops import daemon as ops_daemon
from cxrbatch.ops.health import Health
from cxrbatch.ops.heartbeat import Heartbeat
from cxrbatch.ops.sd_notify import sd_notify
from cxrbatch.settings import SendTo, Settings
from factories import make_bundle
from pacs import free_port
from pipelines import image
from test_receiver import CLASSES, instance
from watchers import Place, Process, some_files

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def place(tmp_path: Path, bundle: Path) -> Iterator[Place]:
    made = Place(tmp_path, f"sqlite:///{tmp_path / 'store.db'}", bundle)
    yield made
    made.clean_up()


def test_once_gives_every_file_that_is_there_its_row(place: Place) -> None:
    some_files(place.incoming)
    os.mkfifo(place.incoming / "fifo")
    os.utime(image(place.incoming / "far.png", 99), (13e9, 13e9))  # the year 2381: more nanoseconds than int64 holds
    before = {path: (path.stat(), path.is_file() and path.read_bytes()) for path in place.incoming.rglob("*")}
    assert place.run("--once", CXRBATCH_TRUNCATED_TRIES="1") == ExitCode.SOME_REJECTED
    rows = place.rows()
    assert rows.pop("fifo")[3] == "not_a_regular_file"
    assert rows.keys() == place.files()
    assert {name: row[3] for name, row in rows.items() if row[3]} == {
        "junk.dcm": "not_an_image",
        "half.png": "truncated",
    }
    assert rows["same.png"] == rows["0/0.png"] and rows["far.png"][0] == "done"
    assert f" done={sum(row[0] == 'done' for row in rows.values())} " in place.log.splitlines()[-1]  # same.png too
    place.no_orphans()
    assert place.ask("SELECT device, engine FROM runs") == [
        ("cpu", f"arithmetic 1; Python {platform.python_version()}")
    ]
    # The incoming folder was only read: no name, byte or time has changed, except access times.
    after = {path: (path.stat(), path.is_file() and path.read_bytes()) for path in place.incoming.rglob("*")}
    assert after.keys() == before.keys()
    for path, (info, data) in before.items():
        assert after[path][1] == data
        assert (info.st_mtime_ns, info.st_ctime_ns, info.st_ino) == (
            after[path][0].st_mtime_ns,
            after[path][0].st_ctime_ns,
            after[path][0].st_ino,
        )


def test_a_day_in_the_life(place: Place) -> None:
    """One daemon, one event after another, because starting a daemon takes time."""
    incoming = place.incoming
    image(incoming / "early.png", 1)
    daemon = place.start(CXRBATCH_DRAIN_S="600")
    place.wait(place.settled, daemon)

    # A slow writer, with a pause longer than quiet_s: the last bytes count.
    whole = image(place.cwd / "whole.png", 2).read_bytes()
    with open(incoming / "slow.png", "wb") as slow:
        for start in range(0, len(whole), len(whole) // 4 + 1):
            slow.write(whole[start : start + len(whole) // 4 + 1])
            slow.flush()
            time.sleep(0.5)
    image(place.cwd / "late.png", 3).rename(incoming / "late.part")
    (incoming / "late.part").rename(incoming / "late.png")
    place.wait(lambda: {"slow.png", "late.png"} <= {n for n, row in place.rows().items() if row[0] == "done"}, daemon)

    # Changed, replaced by rename with the same size and mtime, renamed, the same content again, gone.
    first = place.rows()["early.png"]
    image(incoming / "early.png", 4)
    late = (incoming / "late.png").stat()
    twin = bytearray((incoming / "late.png").read_bytes())
    twin[-1] ^= 1  # in the last checksum: a reader that looks sees another content
    (place.cwd / "twin").write_bytes(twin)
    os.utime(place.cwd / "twin", ns=(late.st_atime_ns, late.st_mtime_ns))
    (place.cwd / "twin").rename(incoming / "late.png")
    shutil.copy(incoming / "slow.png", incoming / "again.png")
    place.wait(
        lambda: place.settled() and place.rows()["early.png"] != first and place.rows()["late.png"][0] != "done", daemon
    )
    assert place.rows()["again.png"] == place.rows()["slow.png"]
    (incoming / "again.png").rename(incoming / "moved.png")
    place.wait(lambda: place.settled() and "moved.png" in place.rows(), daemon)
    assert [row[0] for row in place.ask("SELECT path FROM files WHERE state = 'missing'")] == [
        str(incoming / "again.png")
    ]

    # This daemon holds the store: a second daemon and a scan are refused.
    assert place.run() == ExitCode.STORE_IN_USE
    assert place.run(incoming, command="scan") == ExitCode.STORE_IN_USE
    assert "is in use by a scan or a watch" in place.log

    # The share is lost for a while and comes back: one log line each, nothing lost.
    incoming.rename(place.cwd / "away")
    place.wait(lambda: "folder_paused" in place.log, daemon)
    before = place.rows()
    image(place.cwd / "away" / "meanwhile.png", 5)
    (place.cwd / "away").rename(place.cwd / "in")
    place.wait(lambda: "folder_back" in place.log and "meanwhile.png" in place.rows() and place.settled(), daemon)
    assert before.items() <= place.rows().items()
    assert place.log.count("folder_paused") == 1

    # A user requests another try.
    asked = place.ask("SELECT count(*) FROM audit")
    assert place.run("--reason", "corrupt_pixels", command="retry") == 0
    assert asked == place.ask("SELECT count(*) FROM audit")

    assert place.stop(daemon) == ExitCode.OK  # at once: drain_s is longer than we wait
    place.no_orphans()
    place.check(place.rows())


def test_two_received_data_sets_with_one_uid_are_two_rows(place: Place) -> None:
    sent = [instance("1.2.3.4", seed=seed) for seed in (1, 2, 1)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    daemon = place.start("--listen", f"127.0.0.1:{port}")
    place.wait(lambda: "receiving" in place.log, daemon)
    entity = AE()
    entity.requested_contexts = [build_context(CLASSES[0], "1.2.840.10008.1.2.1")]
    association = entity.associate("127.0.0.1", port)
    assert [association.send_c_store(dataset).Status for dataset in sent] == [0x0000] * 3
    association.release()
    place.wait(lambda: len(place.rows()) == 2 and place.settled(), daemon)
    assert place.stop(daemon) == ExitCode.OK
    assert len({row[4] for row in place.rows().values()}) == 2
    assert place.log.count("duplicate_instance") == 1
    ((path, old, new),) = place.ask("SELECT path, old, new FROM audit WHERE event = 'duplicate_instance'")
    assert {old, new} == {row[4] for row in place.rows().values()} and "-" in Path(path).name


def test_settings_are_read_again_when_they_are_valid_and_systemd_is_told(place: Place) -> None:
    config = place.cwd / "config.toml"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = f"\0cxrbatch-{os.getpid()}-{time.monotonic_ns()}"
    manager.bind(address)
    said: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:  # all the time, as systemd does: its queue holds few messages
        with suppress(OSError):
            while True:
                said.put(manager.recv(4096).decode())

    def hear(wanted: str) -> None:
        while wanted not in said.get(timeout=100):
            pass

    threading.Thread(target=listen, daemon=True).start()

    place.url, url = "", place.url  # the file of settings names the store
    config.write_text(f'log_format = "json"\ndb = "{url}"\n')
    daemon = place.start(NOTIFY_SOCKET="@" + address[1:], WATCHDOG_USEC="600000")
    place.url = url
    hear("READY=1")
    hear("WATCHDOG=1")
    config.write_text("no_such_setting = 1\n")
    daemon.send_signal(signal.SIGHUP)
    place.wait(lambda: "settings_refused" in place.log, daemon)
    hear("RELOADING=1")
    hear("READY=1")
    config.write_text('db = "sqlite:///another.db"\n')
    daemon.send_signal(signal.SIGHUP)
    place.wait(lambda: "another store needs a restart" in place.log, daemon)
    hear("READY=1")
    config.write_text(f'id_key_file = "/no/such/folder/key"\ndb = "{url}"\n')  # valid, and cannot be used
    daemon.send_signal(signal.SIGHUP)
    place.wait(lambda: "The key file /no/such/folder/key cannot be made" in place.log, daemon)
    hear("READY=1")
    config.write_text(f'exclude = ["*.png"]\ndb = "{url}"\n')
    daemon.send_signal(signal.SIGHUP)
    place.wait(lambda: place.log.count("settings_renewed") == 2, daemon)
    hear("READY=1")
    image(place.incoming / "not wanted.png", 1)
    (place.incoming / "junk").write_text("junk")
    place.wait(lambda: "junk" in place.rows(), daemon)
    assert place.stop(daemon, signal.SIGINT) == ExitCode.INTERRUPTED
    assert place.rows().keys() == {"junk"}
    hear("STOPPING=1")
    manager.close()


def test_a_reload_that_is_asked_for_during_a_reload_is_not_lost() -> None:
    """The settings may have changed again since they were read."""
    read: list[int] = []
    heartbeat = Heartbeat(Health())

    def settings() -> tuple[Settings, Bundle]:
        read.append(1)
        return Settings(), None  # type: ignore[return-value]

    heartbeat.begin(lambda: None, settings)
    for _ in range(2):
        heartbeat.ask_for_settings()
        heartbeat.heartbeat()
    assert heartbeat.renewed is not None and len(read) == 1, "the first one still ends what it has in hand"
    heartbeat.begin(lambda: None, settings)
    heartbeat.heartbeat()
    assert len(read) == 2


def test_an_extra_that_is_missing_is_a_setting_that_cannot_be_worked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a reload goes on with the old settings."""
    monkeypatch.setitem(sys.modules, "cxrbatch.ops.dispatch", None)  # as without highdicom
    settings = Settings(send_to=[SendTo(name="pacs", url="dicom://A@127.0.0.1:104")])
    with pytest.raises(Fatal, match=r"cxrbatch\[dicom\]"):
        ops_daemon.start_dispatch(ops_daemon.Daemon(settings, None, [], False), None)  # type: ignore[arg-type]


def test_a_log_that_cannot_be_written_stops_nothing(place: Place) -> None:
    (place.cwd / "log.txt").symlink_to("/dev/full")
    some_files(place.incoming)
    assert place.run("--once", CXRBATCH_TRUNCATED_TRIES="1") == ExitCode.SOME_REJECTED
    assert place.settled()


def test_a_service_manager_that_reads_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        name = f"cxrbatch-deaf-{os.getpid()}-{time.monotonic_ns()}"
        deaf.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert not all(sd_notify("WATCHDOG=1") for _ in range(10_000))


def test_a_thread_that_cannot_go_on_stops_the_whole() -> None:
    """Leases that are not renewed would be taken over while this daemon continues."""

    def breaks(*_: object) -> None:
        raise MemoryError

    daemon = ops_daemon.Daemon(Settings(), None, [], once=False)  # type: ignore[arg-type]
    ops_daemon._or_fail(breaks, daemon, None)  # type: ignore[arg-type]
    assert isinstance(daemon.failure, MemoryError) and daemon.stop.is_set()


def test_an_engine_that_is_lost_ends_the_process_and_the_next_one_goes_on(place: Place) -> None:
    some_files(place.incoming)
    assert place.run(TEST_LOST_GPU="1") == ExitCode.FATAL
    assert "The GPU no longer answers." in place.log and "Traceback" not in place.log
    place.no_orphans()
    assert not place.ask("SELECT 1 FROM files WHERE reason_code = 'engine_failed' OR lease_owner IS NOT NULL")
    place.run("--once", CXRBATCH_TRUNCATED_TRIES="1")
    assert place.settled()


def test_once_says_that_a_name_is_no_file_also_when_it_is_known(place: Place) -> None:
    os.mkfifo(place.incoming / "fifo")
    for _ in range(2):
        assert place.run("--once") == ExitCode.SOME_REJECTED


def test_once_that_is_ended_before_its_end_says_so(place: Place) -> None:
    image(place.incoming / "young.png", 1)
    daemon = place.start("--once", CXRBATCH_QUIET_S="3600")
    place.wait(lambda: " watching " in place.log, daemon)
    assert place.stop(daemon) == ExitCode.INTERRUPTED
    assert not place.settled(), "it was there, and has no outcome"


@pytest.mark.parametrize(("signum", "args"), [(signal.SIGINT, []), (signal.SIGTERM, ["--once"])])
def test_what_cannot_be_drained_in_time_is_given_back(place: Place, signum: int, args: list[str]) -> None:
    some_files(place.incoming)
    daemon = place.start(*args, TEST_SLOW_S="60", CXRBATCH_DRAIN_S="0.5")
    place.wait(lambda: bool(place.ask("SELECT 1 FROM files WHERE state = 'claimed'")), daemon)
    time.sleep(1)
    assert place.stop(daemon, signum) == ExitCode.INTERRUPTED
    place.no_orphans()
    assert not place.ask("SELECT 1 FROM files WHERE state = 'claimed'")
    place.run("--once", CXRBATCH_TRUNCATED_TRIES="1")
    assert place.settled()


def decode_process_of(daemon: Process) -> psutil.Process:
    (found,) = (one for one in psutil.Process(daemon.pid).children() if "spawn_main" in " ".join(one.cmdline()))
    return found


def hold_a_file(place: Place, *args: str, **env: str) -> Process:
    """A daemon whose only decode process has a file and does not answer."""
    daemon = place.start(*args, **env)
    image(place.incoming / "first.png", 1)
    place.wait(lambda: "first.png" in place.rows() and place.settled(), daemon)
    decode_process_of(daemon).suspend()
    image(place.incoming / "held.png", 2)
    place.wait(lambda: place.rows().get("held.png", ("",))[0] == "claimed", daemon)
    return daemon


def test_a_reload_that_cannot_be_drained_in_time_starts_the_same_command_again(place: Place) -> None:
    config = place.cwd / "config.toml"
    config.write_text("drain_s = 0.5\n")
    ports = [free_port(), free_port()]
    daemon = hold_a_file(place, "--listen", f"127.0.0.1:{ports[0]}", "--metrics", f"127.0.0.1:{ports[1]}")
    decode_process = decode_process_of(daemon)
    config.write_text('exclude = ["*.txt"]\n')
    with ExitStack() as open_connections:
        for port in ports:
            open_connections.enter_context(socket.create_connection(("127.0.0.1", port)))
        daemon.send_signal(signal.SIGHUP)
        place.wait(lambda: place.log.count(" ready ") == 2 and place.settled(), daemon)
    assert place.log.count(" receiving ") == 2
    assert "drain_cut_short" in place.log and place.rows()["held.png"][0] == "done"
    assert not decode_process.is_running(), "not even as a zombie"
    inotify = [name for name in os.listdir(f"/proc/{daemon.pid}/fd") if is_inotify(daemon.pid, name)]
    assert len(inotify) == 1, "that of the old one is closed"
    (place.incoming / "not wanted.txt").write_text("junk")
    (place.incoming / "junk").write_text("junk")
    place.wait(lambda: "junk" in place.rows(), daemon)
    assert "not wanted.txt" not in place.rows()
    assert place.run(place.incoming, command="scan") == ExitCode.STORE_IN_USE
    assert place.stop(daemon) == ExitCode.OK
    place.no_orphans()
    assert not place.ask("SELECT 1 FROM runs WHERE finished_at IS NULL")
    assert "Traceback" not in place.log


def is_inotify(pid: int, descriptor: str) -> bool:
    with suppress(OSError):
        return "inotify" in str(Path(f"/proc/{pid}/fd/{descriptor}").readlink())
    return False


def test_a_stop_during_a_reload_is_the_end(place: Place) -> None:
    daemon = hold_a_file(place, CXRBATCH_DRAIN_S="3")
    daemon.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert place.stop(daemon) == ExitCode.OK
    assert "drain_cut_short" in place.log and place.log.count(" ready ") == 1
    place.no_orphans()


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_is_none_is_a_sentence(place: Place, folder: str) -> None:
    (place.cwd / "file").write_text("")
    assert place.run(place.cwd / folder) == ExitCode.FATAL
    assert "Traceback" not in place.log
