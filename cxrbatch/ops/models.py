"""`cxrbatch models list | show | verify`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from cxrbatch.errors import ExitCode
from cxrbatch.inference.bundle import Bundle, load_bundle, shipped_bundles
from cxrbatch.inference.engines.verify import largest_difference
from cxrbatch.inference.model_spec import ModelSpec, refused
from cxrbatch.ops.terminal import plain, to_stdout
from cxrbatch.settings import Settings

__all__ = ["list_models", "show_model", "verify_models"]


def list_models() -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("bundle", "version", "stages", "classes"):
        table.add_column(heading)
    for folder in shipped_bundles():
        bundle = load_bundle(folder)
        stages = " → ".join(f"{s.role} ({s.architecture}, {s.model_input.size} px)" for s in bundle.stages)
        table.add_row(bundle.path.name, bundle.version, stages, ", ".join(bundle.disease.classes))
    to_stdout().print(table)


def show_model(name: str) -> None:
    bundle = load_bundle(name)
    console = to_stdout()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("bundle", f"{bundle.name} {bundle.version}")
    table.add_row("folder", str(bundle.path))
    table.add_row("manifest sha256", bundle.manifest_sha256)
    if licence := bundle.manifest.get("licence"):
        table.add_row("licence", plain(str(licence)))
    for stage in bundle.stages:
        model_input = stage.model_input
        classes = ", ".join(stage.classes)
        table.add_row(stage.role, f"{stage.architecture}, {model_input.size} px, {model_input.fit}: {classes}")
        table.add_row("", f"temperature {stage.temperature:.4g}, threshold {stage.threshold:.4g}")
        try:
            for what in _beyond_the_label(stage):
                table.add_row("", what)
        except (AttributeError, KeyError, TypeError, ValueError):  # nothing but this command reads them
            raise refused(bundle.path, f"the label_set or the abnormal of its {stage.role} stage is unusable") from None
        table.add_row("", f"chosen on {stage.manifest.get('chosen_on', 'nothing')}")
        table.add_row("", f"weights {stage.weights.name} sha256 {stage.sha256}")
    console.print(table)
    card = bundle.path / "CARD.md"
    if card.is_file():
        console.rule()
        console.print(Markdown(card.read_text(encoding="utf-8")))


def _beyond_the_label(stage: ModelSpec) -> Iterable[str]:
    """The second answer of a gate, the label sets and the operating points, where the bundle has them."""
    if stage.frontal_threshold is not None:
        yield f"frontal from {stage.frontal_threshold:.4g}"
    if stage.label_set is not None:
        named = ", ".join(f"{name} {t:.4g}" for name, t in zip(stage.classes, stage.label_set, strict=True))
        yield f"label sets of {stage.manifest['label_set'].get('coverage', 0):.0%}: {named}"
    for point in stage.manifest.get("abnormal", {}).get("operating_points", ()):
        yield (
            f"abnormal_probability from {point['threshold']:.4g}: {point['sensitivity']:.0%} of the abnormal, "
            f"{1 - point['specificity']:.0%} of the normal validation images"
        )


def verify_models(name: str | None, settings: Settings) -> ExitCode:
    """Check the hashes (load_bundle exits with 12), then compare the recorded logits on this machine's engine."""
    from cxrbatch.inference.engines import open_engine, tolerance

    bundles: list[Bundle] = [load_bundle(name)] if name else [load_bundle(p) for p in shipped_bundles()]
    engine = open_engine(settings.engine, settings.device)
    console = to_stdout()
    code = ExitCode.OK
    for bundle in bundles:
        for stage in bundle.stages:
            difference = largest_difference(stage, engine)
            if difference is None:
                found = Text("hash ok; no recorded logits to compare with", "yellow")
            elif difference <= tolerance(stage):
                found = Text.assemble(
                    ("ok", "green"), f"  hash, and logits within {difference:.1g} of the recorded ones"
                )
            else:
                differ = (f"logits differ by {difference:.3g}", "red")
                found = Text.assemble(differ, ": this engine does not compute what was made")
                code = ExitCode.BUNDLE_UNUSABLE
            console.print(f"{bundle.name} {bundle.version}  {stage.role:8}", found)
    return code
