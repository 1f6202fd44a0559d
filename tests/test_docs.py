"""The documents agree with the code."""

from __future__ import annotations

import csv
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cxrbatch.cli import app
from cxrbatch.errors import TRANSIENT_REASONS, ExitCode, Fatal, ReasonCode
from cxrbatch.inference.bundle import SHIPPED, load_bundle
from cxrbatch.inference.decision import REVIEW_FLAGS
from cxrbatch.review.work_list import NOT_DISEASE_LABELS, REASONS
from cxrbatch.settings import Settings
from cxrbatch.store import RESULT_COLUMNS
from cxrbatch.training.recipes import load_recipe
from cxrbatch.training.report import percent

ROOT = Path(__file__).parent.parent
VERBS = "|".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_config_toml_has_every_setting_with_its_default_and_a_reason() -> None:
    text = (ROOT / "config.toml").read_text()
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert tomllib.loads(text) == defaults
    for name in defaults:
        assert re.search(rf"^# .*\n(?:\w+ = .*\n){{0,4}}{name} = ", text, re.M), f"{name} has no reason above it"


def test_every_column_is_explained_and_none_that_is_not_there() -> None:
    section = (ROOT / "docs/reference/columns.md").read_text().split("## Reason codes")[0]
    explained = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    ]
    assert sorted(explained) == sorted(RESULT_COLUMNS)


def test_every_label_of_the_gate_and_every_reason_for_review_is_explained() -> None:
    page = (ROOT / "docs/reference/columns.md").read_text()
    (label,), (reasons,) = (re.findall(rf"^\| `{column}` \|(.+)", page, re.M) for column in ("label", "review_reasons"))
    assert all(f"`{name}`" in label for name in NOT_DISEASE_LABELS)
    assert all(f"`{name}`" in reasons for name in REASONS)


def test_every_reason_code_is_explained_and_whether_it_is_tried_again() -> None:
    section = (ROOT / "docs/reference/columns.md").read_text().split("## Reason codes")[1]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    explained = {code: "yes" in again for codes, _, again in rows for code in re.findall(r"`(\w+)`", codes)}
    assert explained == {str(code): code in TRANSIENT_REASONS for code in ReasonCode}


def test_every_exit_code_is_explained() -> None:
    page = (ROOT / "docs/reference/exit-codes.md").read_text()
    reported = {int(code): name for code, name in re.findall(r"^\| (\d+) \| (\w+) \|", page, re.M)}
    assert reported == {int(code): code.name.lower() for code in ExitCode}


def test_the_rows_in_the_readme_are_those_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app, ["samples", "incoming"]).exit_code == 0
    assert runner.invoke(app, ["scan", "incoming", "--csv", "out.csv"]).exit_code == ExitCode.SOME_REJECTED
    with open("out.csv", newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    text = (ROOT / "README.md").read_text()
    assert f"writes {len(rows)} synthetic files" in text
    shown = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if re.match(r"\| \w+\.", line)
    ]
    assert len(shown) == 6 and "Six of the" in text
    for name, label, confidence, decision, review_reasons, reason in shown:
        row = rows[name]
        assert (row["label"], row["decision"], row["reason"]) == (label, decision, reason), name
        assert row["review_reasons"].replace(",", ", ") == review_reasons, name
        assert float(row["confidence"] or 0) == pytest.approx(float(confidence or 0), abs=0.01), name
    phantoms = [row for name, row in rows.items() if name.startswith("chest_")]
    assert len(phantoms) == 15 and sum(row["label"] == "COVID19" for row in phantoms) == 14
    assert sum(row["decision"] == "reported" for row in phantoms) == 2


def test_the_settings_and_recipes_in_the_documents_are_valid(tmp_path: Path) -> None:
    for document in ROOT.glob("docs/**/*.md"):
        for block in re.findall(r"^```toml\n(.*?)^```", document.read_text(), re.M | re.S):
            given = tomllib.loads(block)
            if given.keys() <= Settings.model_fields.keys():
                Settings.model_validate(given)
            elif "role" in given:
                (tmp_path / "recipe.toml").write_text(block)
                load_recipe(tmp_path / "recipe.toml")


def test_the_shipped_gate_can_be_copied_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/howto/own-model.md").read_text()
    words, *_ = re.findall(r"^\$ cxrbatch (models add-gate [^#\n]+)", page, re.M)
    shutil.copytree(SHIPPED / "covid3", tmp_path / "my-bundle")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, words.split()).exit_code == 0
    assert CliRunner().invoke(app, words.split()).exit_code == 0  # the one that is there is replaced
    refused = CliRunner().invoke(app, ["models", "add-gate", "my-bundle", "--from", "covid3"])
    assert isinstance(refused.exception, Fatal) and "has no gate" in str(refused.exception)
    mine, gate = load_bundle(tmp_path / "my-bundle"), load_bundle("default").gate
    assert mine.gate is not None and gate is not None and mine.gate.manifest == gate.manifest
    assert mine.disease.classes == load_bundle("covid3").disease.classes


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            page = document.parent / link if link else document
            assert page.exists(), f"{document.name} links to {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
                slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{document.name} links to {link}#{anchor}"


def test_pixels_md_says_which_quality_flags_send_an_image_to_review() -> None:
    section = (ROOT / "docs/pixels.md").read_text().split("## Quality flags")[1].split("\n## ")[0]
    (excepted,) = re.findall(r"^Every flag except (.+?) sends the image to review", section, re.M)
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    flags = {flag for row in rows for flag in re.findall(r"`(\w+)`", row)}
    assert flags - set(re.findall(r"`(\w+)`", excepted)) == REVIEW_FLAGS


def test_contributing_has_every_module() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().split("All files of")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/]+)(?:\.py)?`", page))
    files = {str(p.relative_to(ROOT / "cxrbatch").with_suffix("")) for p in (ROOT / "cxrbatch").rglob("*.py")}
    assert not set(re.findall(r"`([\w/]+)\.py`", page)) - files
    hidden = {f for f in files if f.startswith("samples/") or f.split("/")[-1].startswith("__")}
    assert not {f for f in files - hidden if f not in named and f.split("/")[-1] not in named}


def test_contributing_names_modules_of_dicom_out_that_are_there() -> None:
    (row,) = re.findall(r"^\| `dicom_out/` \| (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    there = {path.stem for path in (ROOT / "cxrbatch/dicom_out").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+)`", row)) == there


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/models.md",
        "docs/model-history.md",
        *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/howto/*.md")),
    ],
)
def test_commands_in_the_documents_exist_with_the_options_they_use(document: str) -> None:
    commands = re.findall(rf"cxrbatch ((?:{VERBS})\b[^`\n#;|)]*)", (ROOT / document).read_text())
    for command in commands:
        words = command.split()
        groups = ("models", "db", "config", "outbox", "review", "audit")
        verb = words[:2] if words[0] in groups and words[1:] and words[1][0] != "-" else words[:1]
        shown = CliRunner().invoke(app, [*verb, "--help"], terminal_width=200, color=False)
        assert shown.exit_code == 0, f"{document}: cxrbatch {command}"
        for option in re.findall(r"(--[a-z-]+)", command):
            assert option in shown.output, f"{document}: {option} in `cxrbatch {command}`"


def test_readme_models_and_cards_give_the_figures_of_the_shipped_bundles() -> None:
    documents = [(ROOT / name).read_text() for name in ("README.md", "docs/models.md")]
    bundles = ("default", "alveoli", "covid3")
    reported = {name: load_bundle(name).disease.manifest["metrics"] for name in bundles}
    for name, sets in reported.items():
        card = (SHIPPED / name / "CARD.md").read_text()
        for found in (f for f in sets.values() if "accuracy" in f):
            assert percent(found["accuracy"][0], found["accuracy"][1:]) in card
            assert percent(found["balanced_accuracy"][0], found["balanced_accuracy"][1:]) in card
            assert f"| {found['ece']:.3f} (" in card
            assert "normal_auc" not in found or f"| {found['normal_auc']:.3f} (" in card
            assert all(f"| {percent(recall)} (" in card for recall in found["recall"].values())
    away, home = reported["default"]["external"], reported["default"]["cascade"]
    four = reported["alveoli"]["alveoli_test"]
    f1 = " / ".join(f"{four['f1'][name]:.3f}" for name in ("COVID19", "NORMAL", "PNEUMONIA", "TUBERCULOSIS"))
    both = " / ".join(percent(reported["covid3"][name]["accuracy"][0]) for name in ("covid3", "covid3-leak-free"))
    errors, sent = 100 * away["errors_sent_to_review"], 100 * home["sent_to_review"]
    figures = [
        f"| {away['balanced_accuracy'][0]:.2f} / {away['recall']['PNEUMONIA']:.2f} / {away['normal_auc']:.3f} |",
        f"| {away['ece']:.3f} ({home['ece']:.3f}) |",
        f"| {100 * away['sent_to_review']:.0f} % / {sent:.0f} % | at most 30 % at home |",
        f"| {errors:.0f} % | 75 %, missed |",
        f"| {home['balanced_accuracy'][0]:.3f}, {min(home['recall'].values()):.2f} |",
        f"| **{percent(four['accuracy'][0])}** |",
        f"| {f1} |",
        f"| {percent(reported['default']['alveoli_test']['accuracy'][0])} |",
        f"| {both} |",
    ]
    for text in documents:
        for figure in figures:
            assert figure in text, figure
