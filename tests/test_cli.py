"""The command line in a broken environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cxrbatch import settings_sources
from cxrbatch.cli import main
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.settings import SendTo, Settings


@pytest.mark.parametrize("module", ["matplotlib", "sklearn"])
def test_a_command_whose_extra_is_not_installed_says_which(module: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from cxrbatch.cli import app, main\n"
        f"app.command('needs')(lambda: __import__({module!r}))\n"
        "sys.argv = ['cxrbatch', 'needs']; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (
        1,
        "cxrbatch: This command needs an extra: pip install 'cxrbatch[train]'.\n",
    )


@pytest.mark.parametrize(
    ("command", "code"), [("{} config show | true", 0), ("{} scna 2>/dev/full", 2)], ids=["stdout", "stderr"]
)
def test_a_reader_that_leaves_early_is_no_error(command: str, code: int, tmp_path: Path) -> None:
    whole = "export PYTHONUNBUFFERED=1; " + command.format(f"{sys.executable} -m cxrbatch")
    run = subprocess.run(["bash", "-o", "pipefail", "-c", whole], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (code, "")


@pytest.mark.parametrize("how", ["exec >&- 2>&- <&-", "export PYTHONIOENCODING=ascii"])
def test_a_closed_stream_and_an_old_encoding_are_no_traceback(how: str, tmp_path: Path) -> None:
    command = f"{how}; exec {sys.executable} -m cxrbatch models list"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_name_that_is_no_utf_8_is_printed_as_an_escape(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom cxrbatch.cli import app, main\napp.command('told')(lambda: print('\\udcff'))\n"
        "sys.argv = ['cxrbatch', 'told']; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path)
    assert (run.stdout, run.stderr) == (b"\\udcff\n", b"")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_small_product_wakes_no_threads() -> None:
    program = """
import os
import cxrbatch.inference.cascade
import numpy as np
np.ones((8, 1280), np.float32) @ np.ones((1280, 256), np.float32)
print(len(os.listdir("/proc/self/task")))
"""
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    outputs = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    ).stdout
    assert outputs.strip() == "1"


def test_what_a_decode_process_imports_of_its_parents_file_is_not_the_command_line() -> None:
    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, _ = scripts["cxrbatch"].partition(":")
    program = f"import sys, {module}; print('cxrbatch.cli' in sys.modules, 'numpy' in sys.modules)"
    outputs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert outputs.split() == ["False", "False"]


def test_a_settings_file_that_cannot_be_looked_for_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as /etc/cxrbatch/config.toml in a folder that this user may not enter."""
    monkeypatch.setattr(settings_sources, "_CONFIG_PLACES", (Path("x" * 300),))  # any OSError but "not there" will do
    with pytest.raises(Fatal, match="cannot be told") as caught:
        settings_sources.load_settings()
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_working_folder_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && {sys.executable} -m cxrbatch scan /tmp"
    env = {**os.environ, "PYTHONPATH": str(Path(settings_sources.__file__).parents[1])}
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (run.returncode, run.stderr) == (2, "cxrbatch: The working folder is gone; change to one that is there.\n")


def test_a_folder_that_cannot_be_made_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cxrbatch", "train", "best-gate", "--data", ".", "-o", "/proc/nowhere"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "cxrbatch: /proc/nowhere cannot be used (No such file or directory): check it, or name another.\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        ["receive", "", "--listen", "A@127.0.0.1:0"],
        ["samples", ""],
        ["scan", "a", ""],
        ["scan", ".", "--csv", ""],
        ["train", "disease", "--data", "", "-o", "b"],
        ["models", "verify", ""],
        ["db", "backup", ""],
        ["review", "--host", ""],  # a socket would listen on every address
        ["--config", "", "config", "check"],
    ],
    ids=" ".join,
)
def test_an_empty_text_is_not_the_working_folder(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cxrbatch", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n"), "is empty (an unset variable" in said) == (2, 1, True), said
    assert list(tmp_path.iterdir()) == []


def test_an_empty_address_turns_listening_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXRBATCH_LISTEN", "A@127.0.0.1:0")
    monkeypatch.setattr(sys, "argv", ["cxrbatch", "receive", str(tmp_path), "--listen", ""])
    with pytest.raises(SystemExit):
        main()
    assert "Say where to listen" in capsys.readouterr().err


def test_a_global_option_after_the_command_is_told_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, told in (("--db", True), ("-q", True), ("--dbs", False)):
        monkeypatch.setattr(sys, "argv", ["cxrbatch", "results", option, "x"])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and ("stands before the command" in said) == told, said


def test_too_little_memory_is_a_sentence(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom cxrbatch.cli import app, main\n"
        "def eats():\n    raise MemoryError\n"
        "app.command('eats')(eats)\nsys.argv = ['cxrbatch', 'eats']; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(settings_sources.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1) and "not enough memory" in run.stderr


@pytest.mark.parametrize("text", ["", "pacs", "[{"])
def test_destinations_in_the_environment_that_are_no_json_are_a_sentence(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXRBATCH_SEND_TO", text)
    with pytest.raises(Fatal, match="CXRBATCH_SEND_TO cannot be read: write JSON") as caught:
        settings_sources.load_settings()
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "gpu"}, "The setting 'device' cannot be 'gpu': write auto, cpu, cuda or cuda:0,1."),
        ({"listen": "11112"}, r"The setting 'listen' cannot be '11112': write \[AET@\]HOST:PORT"),
        ({"workers": True}, "The setting 'workers' cannot be True: write a number."),  # pydantic: 1
        ({"batch_age_s": False}, "The setting 'batch_age_s' cannot be False: write a number."),
        ({"id_key_file": ""}, "The setting 'id_key_file' cannot be '': "),
        ({"review_user_header": "X User"}, "write letters, digits and hyphens"),
        ({"send_to": [{"name": "a b", "url": "dicom://A@h:1"}]}, "'send_to.0.name' cannot be 'a b': write at most 64"),
    ],
)
def test_no_regular_expression_is_shown_to_people(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(Fatal, match=sentence) as caught:
        settings_sources.load_settings(flags=given)
    assert caught.value.exit_code is ExitCode.USAGE


def test_every_setting_with_a_pattern_says_in_words_what_it_takes() -> None:
    fields = {**Settings.model_fields, **SendTo.model_fields}
    patterned = {name for name, field in fields.items() if any(getattr(m, "pattern", None) for m in field.metadata)}
    assert patterned == set(settings_sources._WRITTEN) != set()
