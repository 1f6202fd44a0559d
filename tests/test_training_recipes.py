"""Recipes: the shipped ones load and say what was published; a bad one is refused in one sentence."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from cxrbatch.errors import Fatal
from cxrbatch.training.recipe_ranges import RANGES
from cxrbatch.training.recipes import (
    Augmentation,
    Optimiser,
    Partial,
    Phase,
    Recipe,
    Schedule,
    load_recipe,
    recipe_file,
    shipped_recipes,
)
from cxrbatch.types import ModelInputSpec


def test_all_shipped_recipes_load() -> None:
    assert shipped_recipes() == [
        "best-alveoli",
        "best-covid3",
        "best-disease",
        "best-disease-144",
        "best-disease-int8",
        "best-gate",
        "best-gate-int8",
        "covid3",
        "disease",
        "findings",
        "gate",
        "pretrain-v3",
    ]
    for name in shipped_recipes():
        assert load_recipe(name).name == name


def test_every_key_of_a_shipped_recipe_fits_one_screen_and_has_its_reason() -> None:
    for name in shipped_recipes():
        lines = recipe_file(name).read_text().splitlines()
        assert len(lines) <= 80, name
        assert sum("#" in line for line in lines) >= 18, name


def test_covid3_is_the_published_recipe() -> None:
    recipe = load_recipe("covid3")
    assert (recipe.architecture, recipe.model_input.size, recipe.channels) == ("mobilenet_v3_large", 446, 3)
    assert recipe.model_input.fit == "stretch" and recipe.normalise == "dataset" and recipe.class_grid
    assert recipe.optimiser.name == "sgd" and recipe.keep == "best" and recipe.validation == "split"
    assert (recipe.schedule.name, recipe.schedule.milestones, recipe.schedule.factor) == ("step", (4, 6), 0.1)
    assert recipe.augmentation.flip == 0.5 and recipe.augmentation.hue > 0 and recipe.augmentation.saturation > 0


@pytest.mark.parametrize("name", ["gate", "disease"])
def test_the_published_cascade_has_two_phases(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.architecture, recipe.model_input.size, recipe.batch) == ("mobilenet_v2", 224, 64)
    assert (recipe.optimiser.name, recipe.optimiser.learning_rate, recipe.schedule.name) == ("adam", 1e-3, "plateau")
    assert recipe.epochs == 20
    first, second = recipe.phases
    assert first.frozen == -1 and 0 < second.frozen < 19


GOOD = """
name = "x"
role = "disease"
architecture = "mobilenet_v2"
model_input = { size = 32 }
[[phases]]
epochs = 1
frozen = 0
[optimiser]
name = "adam"
learning_rate = 1e-3
"""


SIZE = "model_input = { size = 32 }"
PARTIAL = (
    SIZE
    + """
sampling = "balanced"
[classes]
A = ["A"]
B = ["B"]
[[partial]]
labels = ["C"]
"""
)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('role = "disease"', 'role = "other"', "role"),
        ("learning_rate = 1e-3", 'learning_rate = "fast"', "optimiser.learning_rate"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\nmomentun = 1", "optimiser.momentun"),
        ('name = "x"', "", "name"),
        ("epochs = 1", "epochs = 0", "epoch"),
        ("epochs = 1", "epochs = true", "phases[0].epochs"),
        ('role = "disease"', 'role = "gate"', "two [classes]"),
        (
            "learning_rate = 1e-3",
            'learning_rate = 1e-3\n[[partial]]\nlabels = ["A"]\nclasses = []\nshare = 0.1',
            "balanced",
        ),
        (SIZE, PARTIAL + 'classes = ["NONE"]\nshare = 0.1', "NONE"),
        (SIZE, PARTIAL + "classes = []\nshare = 1.5", "share"),
        ("learning_rate = 1e-3", "learning_rate = 1e-3\n[augmentation]\nscramble = 0.1", "scramble"),
        ('name = "x"', 'name = "x', "TOML"),
        ('name = "x"', 'name = "x"\nbatch = 1', "batch"),
        ('name = "x"', 'name = "x"\nchannels = true', "channels"),
        ('name = "x"', 'name = "x"\nseed = -1', "seed is -1 and must be from 0"),
        ('name = "x"', 'name = "x"\nsampling = "balanced"\nsamples = 1', "samples"),
        ("size = 32", "size = 0", "model_input.size"),
        ('name = "x"', 'name = "x"\ndata = ["/etc"]', "inside of --data"),
        ("epochs = 1", "epochs = 1\nsize = -4", "phases[0].size"),
        ("learning_rate = 1e-3", "learning_rate = nan", "optimiser.learning_rate"),
        (
            "learning_rate = 1e-3",
            "learning_rate = 1e-3\n[augmentation]\ncrop = 1.5",
            "augmentation.crop is 1.5 and must be from 0 to 0.9",
        ),
        (
            'name = "x"',
            'name = "x"\nsampling = "balanced"\nsource_weights = { "TB/site" = inf }',
            "source_weights.TB/site",
        ),
    ],
)
def test_a_bad_recipe_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    load_recipe(file)
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(Fatal) as refused:
        load_recipe(file)
    assert said in str(refused.value) and "\n" not in str(refused.value).strip()


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(Fatal, match="best-disease"):
        load_recipe("nothing-of-the-kind")


def test_a_recipe_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.toml"
    file.write_text("a = " + "[" * 20_000)
    with pytest.raises(Fatal, match="nested too deeply"):
        load_recipe(file)


def test_every_number_of_a_recipe_has_a_range() -> None:
    """Those that are left out have a check of their own, or none that would be true of all recipes."""
    checked = {"phases.epochs", "batch", "validation_share", "partial.share", "partial.smoothing"}

    tables = (Augmentation, Optimiser, Schedule, Phase, Partial, ModelInputSpec)

    def numbers(kind: type, key: str) -> set[str]:
        found = set()
        for one in fields(kind):
            hint, name = str(get_type_hints(kind)[one.name]), key + one.name
            if inner := [table for table in tables if table.__name__ in hint]:
                found |= numbers(inner[0], f"{name}.")
            elif re.search(r"\b(int|float)\b", hint):
                found.add(name)
        return found

    assert numbers(Recipe, "") - checked == set(RANGES)
