"""Mistakes with settings, keys and housekeeping: each gives one sentence, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.deidentify import Identifiers
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import load_bundle
from cxrbatch.ops import doctor
from cxrbatch.ops.database import check
from cxrbatch.ops.key_file import identifiers_of, key_file_of
from cxrbatch.settings import Settings, without_password
from cxrbatch.settings_sources import load_settings
from cxrbatch.store import Store, migrate, only_writer
from cxrbatch.store.connection import connect, make_engine
from cxrbatch.store.housekeeping import Pruned, prune
from cxrbatch.store.schema import audit
from factories import make_bundle
from fork_server import cxrbatch
from store_images import begin, scored_file


def one_sentence(run: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert run.returncode == code, run.stderr
    assert run.stderr.startswith("cxrbatch: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:s3cret@h/d",
        "postgresql://:s3cret@h/d",
        "postgresql://u:s3@cret@h/d",
        "postgresql://u:s3/cret@h/d",
        "postgresql://h/d?user=u&password=s3cret",
        "postgresql://h/d?sslmode=require&sslpassword=s3cret",
        "postgresql://h/d?PASSWORD=s3cret&port=5432",
        "postgresql://h/d?pass%77ord=s3cret",
        "postgresql://h/d?oauth_client_secret=s3cret",
        "cannot connect to postgresql://u:s3cret@h/d?password=cret: no",
    ],
)
def test_no_password_is_shown(url: str) -> None:
    shown = without_password(url)
    assert "cret" not in shown.replace("_secret=", "") and "s3" not in shown
    assert shown.count("***") >= 1 and ("port=5432" in shown) == ("port=5432" in url)


def test_config_show_and_the_rows_of_runs_hide_a_password_in_the_options(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["--db", "postgresql://h/d?password=s3cret", "config", "show"])
    assert shown.exit_code == 0 and "s3cret" not in shown.output and "password=***" in shown.output


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CXRBATCH_PIH", "drop", ["'pih'", "CXRBATCH_PIH"]),
        ("CXRBATCH_LISTEN", "0.0.0.0:99999", ["'listen'", "65535"]),
        ("CXRBATCH_LISTEN", "RÖNTGEN@0.0.0.0:104", ["'listen'", "ASCII"]),
        ("CXRBATCH_LISTEN", "A\\B@0.0.0.0:104", ["'listen'", "backslash"]),
        ("CXRBATCH_CALLING_AE_TITLES", "PACS,LONGER_THAN_SIXTEEN", ["'calling_ae_titles'", "16"]),
        ("CXRBATCH_CALLING_AE_TITLES", '["PACS", " "]', ["'calling_ae_titles'", "spaces"]),
        ("CXRBATCH_SEND_TO", '[{"name": "a", "url": "dicom://PÄCS@h:104"}]', ["ASCII"]),
        ("CXRBATCH_DB", "mysql://u:s3cret@h/d", ["mysql"]),
        ("CXRBATCH_MAX_PIXELS_MPX", "inf", ["'max_pixels_mpx'", "1000000"]),
        ("CXRBATCH_INCLUDE", "[[[", ["'include'", "JSON list"]),
        ("CXRBATCH_INCLUDE", "[" * 100_000, ["'include'", "JSON list"]),
        ("CXRBATCH_METRICS", "127.0.0.1:99999", ["127.0.0.1:99999", "HOST:PORT"]),
        ("CXRBATCH_METRICS", "rubbish", ["rubbish", "HOST:PORT"]),
        ("CXRBATCH_SEND_TO", '[{"name": "a", "url": "ftp://u:s3cret@h/d"}]', ["~/.netrc"]),
        ("CXRBATCH_SEND_TO", '[{"name": "a", "url": "ftp://h/d"}]', ["'ftp", "dicom://AET@HOST:PORT"]),
        ("CXRBATCH_REVIEW_TRUSTED_PROXIES", "proxy,10.0.0.1", ["'review_trusted_proxies'", "10.0.0.0/8"]),
        ("CXRBATCH_IGNORE_SUFFIXES", '["", ".tmp"]', ["'ignore_suffixes'", "leave it out"]),
        ("CXRBATCH_REVIEW_TRUSTED_PROXIES", "10.0.0.1/8", ["'review_trusted_proxies'", "host bits"]),
    ],
)
def test_config_check_refuses_what_cannot_be(tmp_path: Path, variable: str, value: str, words: list[str]) -> None:
    done = cxrbatch("config", "check", cwd=tmp_path, **{variable: value})
    assert done.returncode in (1, 2)
    one_sentence(done, done.returncode, *words)
    assert "s3cret" not in done.stderr


def test_config_check_wants_a_cascade_that_is_there(tmp_path: Path) -> None:
    one_sentence(cxrbatch("config", "check", cwd=tmp_path, CXRBATCH_CASCADE="defualt"), 12, "'defualt'")


def test_a_list_in_the_environment_may_be_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for text, items in {"*.png": ["*.png"], "*.png, *.dcm": ["*.png", "*.dcm"], '["a,b"]': ["a,b"], "": []}.items():
        monkeypatch.setenv("CXRBATCH_INCLUDE", text)
        assert load_settings().include == items
    monkeypatch.setenv("CXRBATCH_REVIEW_SERVICE_HOST", "10.0.0.1")  # Kubernetes gives these to every pod
    monkeypatch.setenv("CXRBATCH_PORT_80_TCP_ADDR", "10.0.0.1")
    load_settings()


def test_a_settings_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("workers = 3\n", encoding="utf-8-sig")
    assert load_settings(tmp_path / "config.toml").workers == 3


def test_settings_files_that_are_nested_deeply_or_have_no_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("include = " + "[" * 100_000)
    for file in (tmp_path / "deep.toml", Path("/dev/zero")):
        with pytest.raises(Fatal) as refused:
            load_settings(file)
        assert refused.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("manifest", ['{"format": ' + "[" * 100_000, "[]", "null", '{"format": null}'])
def test_odd_manifests_are_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(Fatal, match="is refused") as refused:
        load_bundle(tmp_path)
    assert refused.value.exit_code is ExitCode.BUNDLE_UNUSABLE


def test_a_bundle_without_a_version_is_refused(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "b") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": "0"', '"version": null'))
    with pytest.raises(Fatal, match="the version in its manifest"):
        load_bundle(tmp_path / "b")


def test_numbers_beyond_what_a_store_counts_are_no_tracebacks(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
    for format in ("table", "csv"):
        done = cxrbatch("--db", url, "results", "--limit", "9" * 20, f"--format={format}", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and "/in/a" in done.stdout
    one_sentence(cxrbatch("--db", url, "results", "--since", "0001-01-01T00:00+23:00", cwd=tmp_path), 2, "not a time")
    assert cxrbatch("--db", url, "db", "prune", "--days", "9" * 12, cwd=tmp_path).returncode == 2
    for format in ("table", "csv"):
        done = cxrbatch("--db", url, "results", f"--format={format}", cwd=tmp_path, out=Path("/dev/full"))
        one_sentence(done, 1, "No space left")


def test_the_key_lies_beside_the_store_wherever_a_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(db=f"sqlite:///{tmp_path / 's.db'}")
    keys = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        keys.add(identifiers_of(settings).key)
    assert len(keys) == 1 and key_file_of(settings) == tmp_path / "cxrbatch.key"
    assert key_file_of(settings.model_copy(update={"id_key_file": "/etc/key"})) == Path("/etc/key")


def test_a_missing_key_is_not_made_anew_for_a_store_with_hashes(store_url: str, tmp_path: Path) -> None:
    settings = Settings(db=store_url, id_key_file=str(tmp_path / "key"))
    with Store.open(store_url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
        identifiers_of(settings, store)
        (tmp_path / "key").unlink()
        identifiers_of(settings, store)
        (tmp_path / "key").unlink()
        store.record(run.run_id, run.cascade_id, [scored_file("/in/b", facts={"patient_id_hash": "abc"})])
        with pytest.raises(Fatal, match="is missing, and the store holds hashes"):
            identifiers_of(settings, store)
    assert not (tmp_path / "key").exists()


def test_a_key_file_that_is_no_file_is_refused_and_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(bytes(5000))
    for path, why in ((Path("/dev/zero"), "regular"), (tmp_path / "fifo", "regular"), (tmp_path / "large", "no key")):
        with pytest.raises(Fatal, match=why):
            identifiers_of(Settings(id_key_file=str(path)))


def test_the_doctor_reads_the_key_and_knows_the_limits_of_the_shell(tmp_path: Path) -> None:
    key = tmp_path / "cxrbatch.key"
    key.write_bytes(b"short")
    settings = Settings(db=f"sqlite:///{tmp_path / 'store.db'}", worker_memory_mib=4096)
    with pytest.raises(Fatal, match="holds fewer than 32 bytes"):
        list(doctor._privacy(settings))
    key.write_bytes(bytes(32))
    assert [health for health, _ in doctor._privacy(settings)] == ["ok"]
    assert any(f"GiB free in {tmp_path}" in sentence for _, sentence in doctor._machine(settings))
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({3000 << 20},) * 2)\n" + _IN_THAT_SHELL
    ran = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert "`ulimit -v` leaves 3,000 MiB for a decode worker; 4,096 are meant" in ran.stdout, ran.stderr
    assert ran.stdout.endswith("vanished\n"), "a decode worker starts with what there is"


_IN_THAT_SHELL = """
from cxrbatch.decoding.decode_pool import DecodeFile, decode_all
from cxrbatch.deidentify import Identifiers
from cxrbatch.imaging.limits import Limits
from cxrbatch.ops import doctor
from cxrbatch.settings import Settings
from cxrbatch.types import FoundFile

print(*doctor._machine(Settings(worker_memory_mib=4096)))
task = DecodeFile((), Limits(), Identifiers("drop"))
found = decode_all(iter([FoundFile("/not/there", 1, 0, 0)]), task, workers=1, timeout_s=20, memory_mib=4096)
print(*(outcome.rejected.reason_code for outcome in found if outcome))
"""


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    before = sorted(tmp_path.iterdir())
    done = cxrbatch("scan", "in", "--dry-run", f"--cascade={bundle}", cwd=tmp_path)
    assert (done.returncode, done.stdout.split(" ")[0]) == (0, "1"), done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_check_of_a_store_that_is_only_behind_is_exit_10(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate.upgrade(empty_url)
    assert check(empty_url) is ExitCode.OK
    migrate.downgrade(empty_url, "-1")
    assert check(empty_url) is ExitCode.STORE_NOT_AT_HEAD
    assert "run `cxrbatch db upgrade`" in capsys.readouterr().out
    migrate.upgrade(empty_url)
    with connect(make_engine(empty_url), write=True) as connection:
        connection.exec_driver_sql("DROP VIEW results")
    assert check(empty_url) is ExitCode.FATAL


def test_a_store_goes_one_step_back_as_the_help_says(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    migrate.upgrade(url)
    done = cxrbatch("--db", url, "db", "downgrade", "-1", "--yes", cwd=tmp_path)
    assert (done.returncode, migrate.current(url)) == (0, f"{int(migrate.head()) - 1:04}"), done.stderr
    one_sentence(cxrbatch("--db", url, "db", "downgrade", "--typo", "--yes", cwd=tmp_path), 2, "--typo")
    one_sentence(cxrbatch("--db", url, "db", "downgrade", "base", cwd=tmp_path), 2, "db backup FILE")
    with only_writer(url):  # as a watch of the version before
        for moves in (["upgrade"], ["downgrade", "-1", "--yes"]):
            one_sentence(cxrbatch("--db", url, "db", *moves, cwd=tmp_path), 11, "in use by a scan or a watch")
    assert migrate.current(url) == f"{int(migrate.head()) - 1:04}"
    migrate.upgrade(url)
    with only_writer(url):
        assert cxrbatch("--db", url, "db", "upgrade", cwd=tmp_path).returncode == 0, "there is nothing to do"


def test_a_lock_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.db.lock").mkdir()  # even root cannot write it
    with pytest.raises(Fatal, match=r"The lock file .*store\.db\.lock"), only_writer(f"sqlite:///{tmp_path}/store.db"):
        raise AssertionError


def test_drop_keeps_no_study_date() -> None:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    from cxrbatch.imaging.dicom.identity import describe

    dataset = pydicom.Dataset()
    dataset.StudyDate, dataset.PatientID, dataset.SOPInstanceUID = "20260131", "DOE", "1.2.3"
    kept = describe(dataset, ExplicitVRLittleEndian, Identifiers(mode="drop"))
    assert {name for name, value in kept.items() if value} == {"transfer_syntax_uid"}
    assert describe(dataset, ExplicitVRLittleEndian, Identifiers(mode="keep"))["study_date"] == "2026-01-31"


def test_prune_keeps_an_overwritten_content_as_long_as_a_missing_file(store_url: str) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    with Store.open(store_url, clock=lambda: now[0]) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a", content="old")])
        now[0] += timedelta(days=100)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a", content="new", size=7)])
        with connect(store.engine) as connection:
            assert connection.execute(sa.select(audit.c.event)).scalars().all() == ["image_changed"]
        assert prune(store, 30, really=True, now=now[0]) == Pruned(0, 0)
        assert prune(store, 30, really=True, now=now[0] + timedelta(days=29)) == Pruned(0, 0)
        assert prune(store, 30, really=True, now=now[0] + timedelta(days=31)) == Pruned(0, 1)


#: Of a store with one file that is gone: `status` may warn of the disk, `export --dicom` leaves the file out.
_READ_ONLY_EXITS = {"status": (0, 1, 2), "export": (3,)}


def test_a_store_on_a_read_only_file_system_can_be_read(tmp_path: Path) -> None:
    folder, url = tmp_path / "media", f"sqlite:///{tmp_path}/media/s.db"
    folder.mkdir()
    with Store.open(url) as store:
        run = begin(store)
        store.record(run.run_id, run.cascade_id, [scored_file("/in/a")])
    with Store.open(url) as writer:
        writer.present()  # its log is there, and stays while it is open
        shutil.copytree(folder, tmp_path / "live")
    for name in ("media", "live"):
        place = tmp_path / name
        bind = [["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]]
        if any(subprocess.run(command, capture_output=True, check=False).returncode for command in bind):
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
            pytest.skip("mounting is not allowed here")
        url = f"sqlite:///{place}/s.db"
        try:
            for words in (["results", "--format=csv"], ["show", "/in/a"], ["db", "check"], ["db", "current"],
                          ["show", "--json", "/in/a"], ["status"], ["drift", "--since", "1h"], ["outbox", "list"],
                          ["review", "users"], ["export", "--dicom", tmp_path / "out"]):  # fmt: skip
                done = cxrbatch("--db", url, *words, cwd=tmp_path)
                assert "read-only" not in done.stdout + done.stderr, (name, words)
                assert done.returncode in _READ_ONLY_EXITS.get(words[0], (0,)), (name, words, done.stderr)
            with pytest.raises(Fatal, match="read-only"):
                Store.open(url)
        finally:
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)
