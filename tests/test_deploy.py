"""deploy/: each command in there is one that this program takes, each setting and each metric one that it knows.

What the formats ask for is checked by their own tools where they are installed: hadolint, check-jsonschema,
kubernetes-validate, promtool, systemd-analyze.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cxrbatch.cli import app
from cxrbatch.errors import ExitCode
from cxrbatch.ops.health import Health
from cxrbatch.ops.metrics import Metrics, described
from cxrbatch.ops.monitor import serve_monitor
from cxrbatch.settings import Settings
from cxrbatch.store import Store
from cxrbatch.store.housekeeping import check

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = {path.stem: path.read_text() for path in sorted(DEPLOY.glob("*.service"))}
WATCH, NIGHTLY = UNITS["cxrbatch-watch"], UNITS["cxrbatch-nightly"]
PRUNE = (DEPLOY / "cxrbatch-nightly.service.d" / "prune.conf").read_text()
ENV, DOCKERFILE, COMPOSE = ((DEPLOY / name).read_text() for name in ("cxrbatch.env", "Dockerfile", "compose.yaml"))
KUBERNETES = (DEPLOY / "kubernetes" / "cxrbatch.yaml").read_text()
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "cxrbatch.json").read_text())
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path = DEPLOY) -> str:
    """The output of a checker that finds nothing wrong."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def containers() -> Iterator[dict[str, Any]]:
    for document in yaml.safe_load_all(KUBERNETES):
        if document["kind"] in ("Deployment", "Job"):
            yield from document["spec"]["template"]["spec"]["containers"]


def commands() -> Iterator[list[str]]:
    """What is run, without the program's own name."""
    for unit in (*UNITS.values(), PRUNE):
        for line in re.findall(r"^ExecStart=(.+)$", unit, re.M):
            if line.startswith("/bin/sh "):
                (line,) = re.findall(r"/\S+/cxrbatch [^;]+", line)
            program, *args = shlex.split(line)
            assert Path(program).name == "cxrbatch"
            yield args
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)
    assert json.loads(entry) == ["cxrbatch"]
    yield from map(json.loads, re.findall(r"^CMD (.+)$", DOCKERFILE, re.M))
    for service in yaml.safe_load(COMPOSE)["services"].values():
        if service["command"][0] != "postgres":
            yield service["command"]
    yield from (container["args"] for container in containers())


def test_there_are_commands() -> None:
    verbs = {next(word for word in command if word in (*VERBS, "review")) for command in commands()}
    assert verbs == {"watch", "receive", "review", "db"}


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_the_command_line_takes_it(command: list[str]) -> None:
    """Parsed down to its last option by the real command line; only running it is left out."""
    if "review" in command and "review" not in VERBS:
        pytest.skip("this version has no review")
    found: Any = typer.main.get_command(app)
    context = found.make_context("cxrbatch", list(command))
    while hasattr(found, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        name, found, args = found.resolve_command(context, rest)
        context = found.make_context(name, args, parent=context)
    assert not context.args


def test_settings_exist_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given = re.findall(r"\b(CXRBATCH_[A-Z_]+)[=:] ?(\S+)", ENV + DOCKERFILE + COMPOSE + re.sub("#.*", "", KUBERNETES))
    given = [(name, value) for name, value in given if value != "\\"]
    assert given
    for name, value in given:
        assert name.removeprefix("CXRBATCH_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value.strip('"'))
    Settings()


def test_the_container_can_do_what_its_settings_offer() -> None:
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) >= {"dicom", "postgres", "review"}  # send_to, db, `review`


def test_nobody_runs_as_root_and_no_secret_is_written_down() -> None:
    assert all(re.search(r"^User=cxrbatch$", unit, re.M) for unit in UNITS.values())
    assert re.search(r"^USER 10001$", DOCKERFILE, re.M)
    everything = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    assert not re.search(r"password\s*[=:]\s*\S|://[^/\s:@]+:[^@\s]+@", everything, re.I)
    for name, service in yaml.safe_load(COMPOSE)["services"].items():
        if name != "postgres":
            assert service["cap_drop"] == ["ALL"] and service["read_only"], name
    assert yaml.safe_load(COMPOSE)["services"]["postgres"]["network_mode"] == "none"
    assert all(port.startswith("127.0.0.1:") for port in yaml.safe_load(COMPOSE)["services"]["review"]["ports"])
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in containers())


def test_the_unit_can_keep_what_it_promises() -> None:
    """The unit waits longer for the end than drain_s, and its watchdog is more patient than a decoder."""
    number = dict(re.findall(r"^(\w+Sec)=(\d+)$", WATCH, re.M))
    assert int(number["TimeoutStopSec"]) > Settings().drain_s + 5
    assert int(number["WatchdogSec"]) > 2 * Settings().decode_timeout_s
    assert "Type=notify" in WATCH
    # A scan from cron that has the store for a while must not leave the watcher down for good.
    (gives_up,) = re.findall(r"^RestartPreventExitStatus=(.+)$", WATCH, re.M)
    assert str(int(ExitCode.STORE_IN_USE)) not in gives_up.split()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("with_gpu", [False, True], ids=["", "gpu"])
def test_the_exposure_of_a_unit(unit: str, with_gpu: bool, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    if "--offline" not in subprocess.run([analyze, "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this systemd-analyze cannot look at a unit that is not loaded")
    shutil.copy(DEPLOY / f"{unit}.service", tmp_path)
    drop_in = DEPLOY / f"{unit}.service.d"
    if with_gpu and not (drop_in / "gpu.conf").exists():
        pytest.skip("this unit has no use for a GPU")
    if with_gpu:
        shutil.copytree(drop_in, tmp_path / drop_in.name)
    shown = run(analyze, "security", "--no-pager", "--offline=yes", "--threshold=15", f"{unit}.service", cwd=tmp_path)
    assert float(re.findall(r"exposure level for \S+: ([\d.]+)", shown)[0]) <= 1.5


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_reads_every_line_of_a_unit(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / f"{unit}.service").read_text().replace("/opt/cxrbatch/bin/cxrbatch", "/bin/true")
    (tmp_path / f"{unit}.service").write_text(text)
    said = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", f"{unit}.service"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    wrong = [line for line in said.stderr.splitlines() if f"{unit}.service:" in line]
    assert not wrong, wrong


def test_the_timer_starts_the_nightly_work_and_its_drop_in_adds_to_it(tmp_path: Path) -> None:
    for path in DEPLOY.glob("cxrbatch-nightly*"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    drop_in = tmp_path / "cxrbatch-nightly.service.d" / "prune.conf"
    drop_in.write_text(PRUNE.replace("/opt/cxrbatch/bin/cxrbatch db", "/bin/true"))
    said = run(tool("systemd-analyze"), "verify", "--man=no", "./cxrbatch-nightly.timer", cwd=tmp_path)
    assert "nightly" not in said
    # Only a oneshot may have several commands, which run in turn until one fails: no copy, nothing is deleted.
    assert "Type=oneshot" in NIGHTLY and "--yes" in PRUNE


def test_the_nightly_copy_goes_beside_the_others_and_old_ones_go(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/cxrbatch.db"):
        pass
    (line,) = re.findall(r"^ExecStart=(/bin/sh .+)$", NIGHTLY, re.M)
    program, folder = tmp_path / "cxrbatch", tmp_path / "backups"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cxrbatch "$@"\n')
    program.chmod(0o755)
    words = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]
    words = [word.replace("/opt/cxrbatch/bin", str(tmp_path)) for word in words[:-1]] + [str(folder)]

    def night() -> int:
        return subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(DEPLOY.parent)}).returncode

    folder.mkdir()
    old = folder / "cxrbatch-20250101T023000.db"
    old.touch()
    os.utime(old, (0, 0))
    (tmp_path / "cxrbatch.db").rename(tmp_path / "away.db")
    assert night() == 1 and old.exists()  # no new copy: the old one stays
    (tmp_path / "away.db").rename(tmp_path / "cxrbatch.db")
    assert night() == 0
    (copy,) = folder.iterdir()
    assert copy != old and check(f"sqlite:///{copy}") == []


def test_the_calls_of_a_daemon_are_allowed_by_its_unit(tmp_path: Path) -> None:
    """What `scan` calls, decode processes and engine included, traced by strace and looked up in the unit's filter."""
    strace, analyze = tool("strace"), tool("systemd-analyze")
    program = f"{sys.executable} -m cxrbatch --db sqlite:///{tmp_path}/store.db"
    subprocess.run([*shlex.split(program), "samples", str(tmp_path / "in")], check=True, capture_output=True)
    trace = [strace, "-f", "-qq", "-e", "trace=all", "-e", "signal=none", "-o", str(tmp_path / "trace"), "-c"]
    done = subprocess.run([*trace, *shlex.split(program), "scan", str(tmp_path / "in")], capture_output=True, text=True)
    if done.returncode not in (0, 3) and "ptrace" in done.stderr:
        pytest.skip("ptrace is not allowed here")
    assert done.returncode == 3, done.stderr[-2000:]
    called = set(
        re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+\d+\s+(?:\d+\s+)?(\w+)$", (tmp_path / "trace").read_text(), re.M)
    )
    assert {"openat", "mmap", "clone3"} & called
    allowed = _filter(analyze, "@system-service") - _filter(analyze, "@privileged")
    ours = {"total"} | ({"fchown"} if os.geteuid() == 0 else set())  # SQLite calls it when it runs as root
    assert called - ours <= allowed, called - allowed


def _filter(analyze: str, name: str) -> set[str]:
    lines = run(analyze, "syscall-filter", "--no-pager", name).splitlines()[1:]
    names = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    found = {one for one in names if not one.startswith("@")}
    for group in names:
        if group.startswith("@"):
            found |= _filter(analyze, group)
    return found


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run(tool("hadolint"), "Dockerfile")


def test_the_health_check_of_the_container_asks_what_is_there() -> None:
    (words,) = re.findall(r"^    CMD (\[.+\])$", DOCKERFILE, re.M)
    program, *args = json.loads(words)
    assert program == "python"
    health, now = Health(), [0.0]
    health.add("pipeline", lambda: now[0], 60)
    with serve_monitor("127.0.0.1:0", Metrics(), health) as (_, port):
        asked = [sys.executable, *(arg.replace("9108", str(port)) for arg in args)]
        now[0] = health.clock()
        assert subprocess.run(asked, capture_output=True).returncode == 0
        now[0] -= 100
        assert subprocess.run(asked, capture_output=True).returncode == 1


def test_the_compose_file_fits_its_schema() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_the_manifests_fit_kubernetes() -> None:
    run(tool("kubernetes-validate"), "--strict", "kubernetes/cxrbatch.yaml")
    kinds = [document["kind"] for document in yaml.safe_load_all(KUBERNETES)]
    assert {"Deployment", "Job", "PersistentVolumeClaim", "NetworkPolicy"} <= set(kinds)


def test_every_alert_fires_in_its_case_and_not_before() -> None:
    promtool = tool("promtool")
    run(promtool, "check", "rules", "alerts.yaml", cwd=DEPLOY / "prometheus")
    run(promtool, "test", "rules", "alerts_test.yaml", cwd=DEPLOY / "prometheus")
    cases = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    rules = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert [case["name"] for case in cases] == rules


def expressions() -> list[str]:
    return [
        *(rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]),
        *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    ]


def test_alerts_and_dashboard_name_only_metrics_that_exist_and_values_of_their_labels() -> None:
    known = {name: set(labels.split(", ")) for name, _, labels, _ in described()}
    for expression in expressions():
        names = re.findall(r"\b(cxrbatch_\w+?)(?:_bucket|_sum|_count)?(?=[\s{)\[]|$)", expression)
        assert names or "up{" in expression or "process_" in expression, expression
        for name in names:
            assert name in known, (name, expression)
        for name, labels in re.findall(r"\b(cxrbatch_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)[=!]", labels)) <= known[name]


def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}:x", "expr": expression} for i, expression in enumerate(expressions())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run(tool("promtool"), "check", "rules", "rules.yaml", cwd=tmp_path)


def test_the_dashboard_has_panels_that_do_not_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"]) > 15
