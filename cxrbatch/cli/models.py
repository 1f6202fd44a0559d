"""The commands for models: train, evaluate, calibrate, and `models …`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cxrbatch.cli.options import options
from cxrbatch.errors import ExitCode, Fatal
from cxrbatch.inference.bundle import SHIPPED, find_bundle, load_bundle

__all__ = ["app", "models"]

app = typer.Typer()
models = typer.Typer(no_args_is_help=True, help="The bundles that score: list, show, verify, add a gate.")

Data = Annotated[Path, typer.Option("--data", help="Folder of DIR/<class>/… or DIR/{train,val,test}/<class>/…")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write, or to add a stage to.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="About so many images a split and an epoch: to try it.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many epochs a phase: to try it.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where a run that was killed stopped.")] = True,
    without_source: Annotated[
        list[str] | None,
        typer.Option(help="Leave out training images whose source in manifest.csv has this in its name; repeatable."),
    ] = None,
    without_files: Annotated[
        Path | None,
        typer.Option(help="A CSV whose column `path` (relative to --data) names training images to leave out."),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="First weights instead of the recipe's: a safetensors file, imagenet, bundle:NAME or none."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a CUDA GPU where there is one), cpu or cuda")] = "auto",
) -> None:
    """Train one stage of a bundle by a recipe."""
    from cxrbatch.training.fit import train

    train(
        recipe, data, out, limit=limit, epochs=epochs, resume=resume, without_sources=without_source or (),
        without_files=without_files, pretrained=pretrained, device=device,
    )  # fmt: skip


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="A shipped bundle's name, or a bundle's folder.")],
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for evaluation.json and the plots.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    without_source: Annotated[
        list[str] | None,
        typer.Option(help="Leave out images whose source in manifest.csv has this in its name; repeatable."),
    ] = None,
) -> None:
    """Score labelled images end to end and report the accuracy, with intervals."""
    from cxrbatch.ops.terminal import to_stdout
    from cxrbatch.training.evaluate import evaluate
    from cxrbatch.training.report import print_report

    result = evaluate(find_bundle(bundle), data, out, split=split, without_sources=without_source or ())
    if not options.quiet:
        print_report(result, to_stdout(markup=True))


@app.command()
def calibrate(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder; it is changed, but for --from-reviews.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of DIR/<class>/… or DIR/<split>/<class>/…")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to choose on; never test.")] = "val",
    balance: Annotated[
        bool,
        typer.Option("--balance", help="First shift the classes' logits so that each folder in --data counts alike."),
    ] = False,
    review_share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the validation images that readers may be sent.")
    ] = 0.25,
    label_set_margin: Annotated[
        float,
        typer.Option(min=0, max=0.09, help="Coverage above 90 % for the label sets, for hospitals not in --data."),
    ] = 0.0,
    from_reviews: Annotated[bool, typer.Option("--from-reviews", help="Fit to the store's own blinded reads.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --from-reviews: the new bundle.")] = None,
) -> None:
    """Choose temperature, thresholds and the unlike-training score on validation images, or on a site's own reads."""
    if from_reviews != (out is not None) or from_reviews == (data is not None):
        raise Fatal("Calibrate with --data DIR, or with --from-reviews -o NEW_BUNDLE.", ExitCode.USAGE)
    if from_reviews and (balance or label_set_margin or split != "val"):
        raise Fatal("--balance, --label-set-margin and --split go with --data DIR.", ExitCode.USAGE)
    folder = find_bundle(bundle) if out is not None else _own_bundle(bundle)
    if out is not None:
        from cxrbatch.ops.feedback import calibrate_from_reviews

        calibrate_from_reviews(options.settings(), folder, out, review_share=review_share)
        return
    from cxrbatch.training.calibrate import calibrate

    assert data is not None
    calibrate(
        folder,
        data,
        split=split,
        balance=balance,
        review_share=review_share,
        label_set_margin=label_set_margin,
    )


def _own_bundle(name: str) -> Path:
    folder = find_bundle(name)
    if folder.parent == SHIPPED:
        raise Fatal(f"The shipped bundle would be changed: copy {folder}, and change the copy.", ExitCode.USAGE)
    return folder


@models.command("add-gate")
def models_add_gate(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder; it is changed.")],
    of: Annotated[
        str, typer.Option("--from", help="The bundle whose gate it is: a shipped one's name, or a folder.")
    ] = "default",
) -> None:
    """Copy the gate of another bundle into your own, in place of the one that it may have. Calibrate afterwards."""
    from cxrbatch.training.bundle_writer import add_gate

    folder, gate = _own_bundle(bundle), load_bundle(of).gate
    if gate is None:
        raise Fatal(f"The bundle {of} has no gate: name another with --from.", ExitCode.USAGE)
    add_gate(folder, gate)
    print(f"The gate of {of} is in {folder}. Next: cxrbatch calibrate {shlex.quote(str(folder))} --data DIR")


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
    """Recompute every hash, and score synthetic model inputs against the recorded logits."""
    from cxrbatch.ops.models import verify_models

    raise typer.Exit(verify_models(name, options.settings()))
