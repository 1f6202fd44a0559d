"""`cxrbatch scan sftp://…` and `watch sftp://…` against a real server, Debian's openssh-server."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cxrbatch.errors import Fatal
from cxrbatch.intake import remote
from factories import make_bundle
from pipelines import Pipeline, image

fsspec = pytest.importorskip("fsspec", reason="needs the extra 'remote'")
pytest.importorskip("paramiko", reason="needs paramiko")
_SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(_SSHD is None, reason="needs Debian's openssh-server")


@dataclass
class Server:
    """An sshd for one folder of keys. Its clients find its key in ~/.ssh/known_hosts of the HOME that a test has."""

    keys: Path
    port: int
    process: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def url(self, folder: Path) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{folder}"

    def start(self) -> None:
        assert _SSHD is not None
        command = [_SSHD, "-D", "-e", "-f", str(self.keys / "config")]
        self.process.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, process_group=0))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as tried:
                if not tried.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.02)
        pytest.skip("sshd does not start here")

    def stop(self) -> None:
        """Kill it, with its open connections."""
        for process in self.process:
            subprocess.run(["pkill", "-9", "-P", str(process.pid)], check=False)
            process.kill()
            process.wait()
        self.process.clear()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": keys / "host",
        "AuthorizedKeysFile": keys / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    (keys / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    kind, key, _ = (keys / "host.pub").read_text().split()
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FSSPEC_SFTP_KEY_FILENAME", str(keys / "user"))
    monkeypatch.setitem(fsspec.config.conf, "sftp", {"key_filename": str(keys / "user")})  # read once, at its import
    monkeypatch.setenv("CXRBATCH_WORKERS", "1")
    remote.store_of.cache_clear()
    server = Server(keys, port)
    server.start()
    yield server
    server.stop()
    remote.store_of.cache_clear()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def pipeline(tmp_path: Path, bundle: Path) -> Pipeline:
    return Pipeline(tmp_path, f"sqlite:///{tmp_path}/s.db", bundle)


def test_files_of_a_server_become_rows_and_are_read_again_when_they_have_changed(
    server: Server, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for name in ("a.png", "b/b.png", "b/c/c.png"):
        image(folder / name, len(name))
    (folder / "page.dcm").write_bytes(b"<html>no")
    (folder / "round").symlink_to(folder)
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "z.png").symlink_to(image(tmp_path / "elsewhere/z.png", 8))
    root = server.url(folder)
    scanned = pipeline.run("scan", root)
    assert scanned.code == 3, scanned.err
    states = "SELECT path, state, reason_code FROM results ORDER BY path"
    done = [(f"{root}/{name}", "done", None) for name in ("a.png", "b/b.png", "b/c/c.png")]
    z = (f"{root}/z.png", "done", None)
    assert pipeline.ask(states) == [*done, (f"{root}/page.dcm", "rejected", "not_an_image"), z]

    (folder / "page.dcm").write_bytes(image(tmp_path / "9.png", 9).read_bytes())
    (folder / "b/b.png").unlink()
    again = pipeline.run("scan", root)
    assert again.code == 0, again.err
    assert (again.summary["processed_now"], again.summary["unchanged"]) == (1, 3)
    assert pipeline.ask(states.replace("reason_code", "label IS NULL")) == [
        (f"{root}/a.png", "done", 0),
        (f"{root}/b/b.png", "missing", 0),
        (f"{root}/b/c/c.png", "done", 0),
        (f"{root}/page.dcm", "done", 0),
        (f"{root}/z.png", "done", 0),
    ]
    one = pipeline.run("scan", f"{root}/a.png")
    assert (one.code, one.summary["unchanged"]) == (0, 1), one.err


def test_what_cannot_be_listed_is_one_sentence(server: Server, pipeline: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    image(folder / "a.png", 1)
    root = server.url(folder)
    known = Path(os.environ["HOME"]) / ".ssh/known_hosts"
    for url, sentence in (
        (f"{root}/nothing", f"There is no {root}/nothing; check the path."),
        (root.replace("//", "//nobody-", 1), "may not be listed with these credentials; check them (an SSH agent,"),
    ):
        failed = pipeline.run("scan", url)
        assert (failed.code, sentence in failed.err) == (1, True), failed.err
    known.write_text("")
    failed = pipeline.run("scan", root)
    assert (failed.code, "is not in ~/.ssh/known_hosts" in failed.err) == (1, True), failed.err
    server.stop()
    failed = pipeline.run("scan", root)
    assert (failed.code, "check the network and the name of the server" in failed.err) == (1, True), failed.err


def test_a_folder_that_cannot_be_listed_leaves_the_rest_and_is_told(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a/a.png", "b/b.png", "c.png"):
        image(folder / name, 1)
    root = server.url(folder)
    found = remote.list_objects(root)
    assert next(found).path == f"{root}/c.png"
    shutil.rmtree(folder / "b")
    rest = list(found)
    assert {file.path for file in rest if file.problem is None} == {f"{root}/a/a.png"}
    assert [file.path for file in rest if file.problem is not None] == [f"{root}/"]
    with pytest.raises(Fatal, match="There is no"):
        remote.check_remote(f"{root}/b")


def test_watch_waits_for_an_upload_to_end_and_for_a_server_that_was_away(
    server: Server, pipeline: Pipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = image(tmp_path / "whole.png", 1, 300).read_bytes()
    root = server.url(folder)
    daemon = pipeline.start("watch", root, CXRBATCH_POLL_S="0.2", CXRBATCH_QUIET_S="3")
    states = "SELECT path, state FROM files ORDER BY path"
    try:
        pipeline.wait_until(lambda: "watching" in daemon.err.read_text(), daemon)
        with (folder / "slow.png").open("wb") as file:
            for start in range(0, len(whole), len(whole) // 4 + 1):
                file.write(whole[start : start + len(whole) // 4 + 1])
                file.flush()
                time.sleep(0.5)
                assert not pipeline.rows()
        pipeline.wait_until(lambda: pipeline.ask(states) == [(f"{root}/slow.png", "done")], daemon)

        server.stop()
        pipeline.wait_until(lambda: "paused" in daemon.err.read_text(), daemon)
        image(folder / "later.png", 2)
        server.start()
        both = [(f"{root}/later.png", "done"), (f"{root}/slow.png", "done")]
        pipeline.wait_until(lambda: pipeline.ask(states) == both, daemon)
        daemon.send_signal(signal.SIGTERM)
        _, err = daemon.communicate(timeout=60)
    finally:
        daemon.kill()
    assert daemon.returncode == 0, err
