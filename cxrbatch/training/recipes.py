"""Recipes of training runs: TOML -> a frozen Recipe. The shipped ones are in recipes/, with a comment for every key."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.training.recipe_ranges import out_of_range
from cxrbatch.types import ModelInputSpec

__all__ = [
    "Augmentation",
    "Optimiser",
    "Partial",
    "Phase",
    "Recipe",
    "Schedule",
    "load_recipe",
    "recipe_file",
    "shipped_recipes",
    "shortened",
]

_SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The augmentation of training images. "plain": the usual flips and jitter; "style": `augment.py`."""

    kind: Literal["plain", "style", "none"] = "plain"
    flip: float = 0.5  # chance
    rotation: float = 0.0  # degrees in either direction
    brightness: float = 0.0  # plain: relative range, as in torchvision's ColorJitter
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    look: float = 0.35  # style: probability of each change of style
    turn: float = 0.0  # style: probability of a rotation by 90, 180 or 270 degrees
    invert: float = 0.0  # style: probability of inverting
    crop: float = 0.18  # style: largest share of a side that is cut off
    aspect: float = 1.4  # style: largest change of the aspect ratio, in either direction
    thumbnail: float = 0.03  # style: probability of shrinking to a thumbnail and enlarging again
    surroundings: float = 0.0  # style: probability of replacing all but the middle by another image
    scramble: float = 0.0  # gate: probability that a chest image is scrambled and used as not-chest


@dataclass(frozen=True, slots=True)
class Optimiser:
    name: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    momentum: float = 0.9  # sgd only
    weight_decay: float = 0.0  # of weight matrices; never of biases and batch norm


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the learning rate decreases: with the step ("cosine"), the epoch ("step") or the validation loss."""

    name: Literal["constant", "step", "plateau", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()  # step: epochs after which the rate is multiplied by `factor`
    factor: float = 0.1
    patience: int = 2  # plateau: epochs without a lower validation loss before it falls
    warm_up: int = 0  # cosine: steps


@dataclass(frozen=True, slots=True)
class Phase:
    """A number of epochs with a part of the backbone frozen (batch-norm statistics too)."""

    epochs: int
    frozen: int  # feature blocks from the input that are not trained; -1: the whole backbone, only the head is trained
    learning_rate: float | None = None  # instead of the optimiser's
    size: int | None = None  # pixels: a smaller model input for this phase
    source_power: float | None = None  # balanced: a source counts by its size ** this; default the recipe's


@dataclass(frozen=True, slots=True)
class Partial:
    """Labels that say less than a class: one of several classes, none of them, or the recipe's `other`."""

    labels: tuple[str, ...]  # folders, or "task/folder" where a name means different things in different tasks
    classes: tuple[str, ...]  # the right one is among these; empty: it is none of the recipe's classes
    share: float  # of the images that a balanced epoch draws, over all sources
    smoothing: float = 0.1  # share of the loss that asks for all classes alike


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run. `data` and `classes` select the folders and map labels to classes."""

    name: str
    role: Literal["gate", "disease", "findings"]  # gate, findings: binary cross-entropy; disease: softmax
    architecture: Literal["mobilenet_v2", "mobilenet_v2_int8", "mobilenet_v3_large"]
    model_input: ModelInputSpec
    optimiser: Optimiser
    phases: tuple[Phase, ...]
    pretrained: str = "none"  # "imagenet" (a download), "bundle:NAME", a safetensors file, or "none"
    distillation: bool = False  # start as all of the bundle's network and learn its logits instead of labels
    channels: Literal[1, 3] = 1
    # half: x / 127.5 - 1; int8: (x - 128) / 127.5, whole steps; dataset: by mean and deviation of the training images
    normalise: Literal["half", "int8", "dataset"] = "half"
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # class -> labels; empty: the folders
    partial: tuple[Partial, ...] = ()  # disease only; learnt from, never validated on
    other: str = ""  # disease: a name for one more output, of what is none of the classes; only [[partial]] teaches it
    data: tuple[str, ...] = ()  # folders of --data that are used where present; empty: --data itself
    validation: Literal["folder", "split"] = "folder"  # split: a share of train, at random, besides val/
    validation_share: float = 0.2
    batch: int = 32  # images
    sampling: Literal["shuffle", "balanced"] = "shuffle"  # balanced: over class, and over source
    source_power: float = 0.5  # balanced: 1 is by size, 0 gives every source of a class the same weight
    source_weights: dict[str, float] = field(default_factory=dict)  # balanced: "LABEL/source" or a part of it -> factor
    samples: int = 0  # images per epoch when balanced; 0: as many as there are
    label_smoothing: float = 0.0
    mixup: float = 0.0  # beta parameter, on half of the batches; 0: none
    mixstyle: float = 0.0  # probability, at each of two early blocks, of mixing statistics between images
    average: float = 0.0  # decay per step of the moving average of the weights; 0: none
    keep: Literal["best", "last"] = "best"  # best: the epoch of lowest validation loss
    class_grid: bool = False  # write class-grid.png before training
    seed: int = 7
    version: str = ""  # of the bundle; empty: as it is, 0.1.0 at first
    licence: str = ""  # of the bundle's weights, for whoever gets it
    schedule: Schedule = Schedule()
    augmentation: Augmentation = Augmentation()
    sha256: str = ""  # of the TOML text

    @property
    def binary(self) -> bool:
        """Whether each output answers yes or no for itself."""
        return self.role != "disease"

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)


def shipped_recipes() -> list[str]:
    """The names of the recipes inside the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def recipe_file(name_or_file: str | Path) -> Path:
    """A recipe by its shipped name or its path. Raises Fatal."""
    shipped, given = _SHIPPED / f"{name_or_file}.toml", Path(name_or_file)
    if given.is_file():
        return given
    if shipped.is_file():
        return shipped
    raise Fatal(
        f"There is no recipe '{name_or_file}': give a .toml file or one of {', '.join(shipped_recipes())}.",
        ExitCode.USAGE,
    )


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Read a recipe. Raises Fatal with the name of the key if it cannot be used."""
    path = recipe_file(name_or_file)
    raw = path.read_bytes()
    try:
        table = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fatal(f"The recipe {path} is not valid TOML: {error}.") from None
    except RecursionError:
        raise Fatal(f"The recipe {path} is nested too deeply.") from None
    try:
        recipe: Recipe = _build(Recipe, table | {"sha256": hashlib.sha256(raw).hexdigest()}, "")
    except _Unusable as problem:
        raise Fatal(f"The recipe {path} can't be used: {problem}.") from None
    problem_ = out_of_range(recipe) or _contradiction(recipe)
    if problem_:
        raise Fatal(f"The recipe {path} can't be used: {problem_}.")
    return recipe


def shortened(recipe: Recipe, epochs: int | None, limit: int | None) -> Recipe:
    """The recipe for a trial: at most `epochs` in each phase, and about `limit` images in an epoch."""
    if epochs is not None:
        recipe = replace(recipe, phases=tuple(replace(p, epochs=min(p.epochs, epochs)) for p in recipe.phases))
    if limit is not None:
        recipe = replace(recipe, samples=min(recipe.samples, max(2, limit)))
    return recipe


def _contradiction(recipe: Recipe) -> str:
    if not recipe.phases or any(phase.epochs < 1 for phase in recipe.phases):
        return "every phase needs at least one epoch, and there must be a phase"
    if recipe.role == "gate" and len(recipe.classes) not in (2, 3):
        return "a gate needs two [classes]: what passes, named first, and what does not; a third is of other views"
    if recipe.partial and (recipe.role == "gate" or recipe.sampling != "balanced" or not recipe.classes):
        return "[[partial]] labels need the role disease, [classes] and balanced sampling"
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in recipe.data):
        return "data names folders inside of --data"
    for one in recipe.partial:
        if unknown := sorted(set(one.classes) - {*recipe.classes, recipe.other}):
            return f"[[partial]] names {unknown[0]}, which is none of its [classes]"
        if not (0 < one.share < 1 and 0 <= one.smoothing <= 1):
            return "the share and smoothing of [[partial]] must be between 0 and 1"
    if recipe.other in recipe.classes:
        return f"its other output has the name of a class, {recipe.other}"
    if recipe.other and not any(recipe.other in one.classes for one in recipe.partial):
        return f"no [[partial]] label teaches its other output, {recipe.other}"
    if recipe.source_weights and recipe.sampling != "balanced":
        return "[source_weights] need balanced sampling"
    if sum(one.share for one in recipe.partial) >= 1:
        return "the shares of [[partial]] leave nothing for the classes"
    if recipe.role == "findings" and (not recipe.classes or recipe.sampling == "balanced"):
        return "the role findings needs [classes] and draws its images by a shuffle"
    if recipe.augmentation.scramble and recipe.role != "gate":
        return "augmentation.scramble makes images that are no chest, and only a gate has a class for them"
    if recipe.distillation and not (recipe.pretrained.startswith("bundle:") and recipe.role in ("gate", "disease")):
        return 'distillation needs the role gate or disease, and pretrained = "bundle:NAME", the bundle that teaches'
    if recipe.distillation and (recipe.mixup or recipe.mixstyle):
        return "distillation has no mixup and no mixstyle: teacher and student see the same image"
    if recipe.batch < 2:
        return "batch norm needs a batch of at least 2"
    if not 0 < recipe.validation_share < 1:
        return "validation_share must be between 0 and 1"
    return ""


class _Unusable(Exception):
    """Names the key that is wrong."""


def _build(kind: type[Any], table: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise _Unusable(f"it has an unknown key {where}{unknown[0]}")
    values = {}
    for one in fields(kind):
        key = f"{where}{one.name}"
        if one.name in table:
            values[one.name] = _value(hints[one.name], table[one.name], key)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise _Unusable(f"it lacks {key}")
    return kind(**values)


def _value(hint: Any, given: Any, key: str) -> Any:
    """`given`, checked against the type hint, with lists converted to tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not any(given == one and type(given) is type(one) for one in inner):
            raise _Unusable(f"{key} is {given!r} and must be one of {', '.join(map(str, inner))}")
        return given
    if origin is UnionType:
        return _value(next(t for t in inner if t is not type(None)), given, key)
    if origin is tuple and isinstance(given, list):
        return tuple(_value(inner[0], item, f"{key}[{i}]") for i, item in enumerate(given))
    if origin is dict and isinstance(given, dict):
        return {name: _value(inner[1], item, f"{key}.{name}") for name, item in given.items()}
    if hasattr(hint, "__dataclass_fields__") and isinstance(given, dict):
        return _build(hint, given, f"{key}.")
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if isinstance(hint, type) and isinstance(given, hint) and not (hint is int and isinstance(given, bool)):
        return given
    raise _Unusable(f"{key} is {given!r}, which is not of the right kind")
