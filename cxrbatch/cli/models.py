"""The verbs about models: train, evaluate, calibrate, and `models …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.bundles import find_bundle
from cxrbatch.cli.given import given

__all__ = ["app", "models"]

app = typer.Typer()
models = typer.Typer(no_args_is_help=True, help="The bundles that score: list, show, verify.")

Data = Annotated[Path, typer.Option("--data", help="Folder of DIR/<class>/… or DIR/{train,val,test}/<class>/…")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write, or to add a stage to.")],
    limit: Annotated[int | None, typer.Option(min=1, help="About so many films of each split: to try it.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many epochs a phase: to try it.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where a run that was killed stopped.")] = True,
    without_source: Annotated[
        list[str] | None,
        typer.Option(help="Leave out training films whose source in manifest.csv has this in its name; repeatable."),
    ] = None,
) -> None:
    """Train one stage of a bundle by a recipe."""
    from cxrbatch.training.fit import train

    train(recipe, data, out, limit=limit, epochs=epochs, resume=resume, without_sources=without_source or ())


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A shipped bundle's name, or a bundle's folder.")],
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for evaluation.json and the plots.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
) -> None:
    """Score labelled films end to end and say how good it is, with intervals."""
    from cxrbatch.ops.terminal import to_stdout
    from cxrbatch.training.evaluate import evaluate
    from cxrbatch.training.report import print_report

    result = evaluate(find_bundle(bundle), data, out, split=split)
    if not given.quiet:
        print_report(result, to_stdout())


@app.command()
def calibrate(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder; it is changed.")],
    data: Data,
    split: Annotated[str, typer.Option(help="The split to choose on; never test.")] = "val",
) -> None:
    """Choose temperature, thresholds and the unlike-training score on validation films."""
    from cxrbatch.training.calibrate import calibrate

    calibrate(find_bundle(bundle), data, split=split)


@models.command("list")
def models_list() -> None:
    """The shipped bundles."""
    from cxrbatch.ops.models import list_models

    list_models()


@models.command("show")
def models_show(name: Annotated[str, typer.Argument(help="A shipped bundle's name, or a folder.")]) -> None:
    """A bundle's stages, thresholds, hashes and card."""
    from cxrbatch.ops.models import show_model

    show_model(name)


@models.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(help="A bundle; all the shipped ones when left out.")] = None,
) -> None:
    """Recompute every hash, and score synthetic planes against the recorded logits."""
    from cxrbatch.ops.models import verify_models

    raise typer.Exit(verify_models(name, given.settings()))
