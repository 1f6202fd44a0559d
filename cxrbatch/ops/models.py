"""`cxrbatch models list | show | verify`."""

from __future__ import annotations

from rich.markdown import Markdown
from rich.table import Table

from cxrbatch.bundles import Bundle, load_bundle, shipped_bundles
from cxrbatch.engines.verify import largest_difference
from cxrbatch.errors import ExitCode
from cxrbatch.ops.terminal import to_stdout
from cxrbatch.settings import Settings

__all__ = ["list_models", "show_model", "verify_models"]


def list_models() -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("bundle", "version", "stages", "classes"):
        table.add_column(heading)
    for folder in shipped_bundles():
        bundle = load_bundle(folder)
        stages = " → ".join(f"{s.role} ({s.architecture}, {s.plane.size} px)" for s in bundle.stages)
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
    for stage in bundle.stages:
        plane = stage.plane
        classes = ", ".join(stage.classes)
        table.add_row(stage.role, f"{stage.architecture}, {plane.size} px, {plane.fit}: {classes}")
        table.add_row("", f"temperature {stage.temperature:.4g}, threshold {stage.threshold:.4g}")
        table.add_row("", f"chosen on {stage.manifest.get('chosen_on', 'nothing')}")
        table.add_row("", f"weights {stage.weights.name} sha256 {stage.sha256}")
    console.print(table)
    card = bundle.path / "CARD.md"
    if card.is_file():
        console.rule()
        console.print(Markdown(card.read_text(encoding="utf-8")))


def verify_models(name: str | None, settings: Settings) -> ExitCode:
    """Hashes first (load_bundle refuses with exit 12), then the recorded logits on this machine's engine."""
    from cxrbatch.engines import TOLERANCE, open_engine

    bundles: list[Bundle] = [load_bundle(name)] if name else [load_bundle(p) for p in shipped_bundles()]
    engine = open_engine(settings.engine, settings.device)
    console = to_stdout()
    code = ExitCode.OK
    for bundle in bundles:
        for stage in bundle.stages:
            difference = largest_difference(stage, engine)
            if difference is None:
                verdict = "[yellow]hash ok; no recorded logits to compare with[/yellow]"
            elif difference <= TOLERANCE:
                verdict = f"[green]ok[/green]  hash, and logits within {difference:.1g} of the recorded ones"
            else:
                verdict = f"[red]logits differ by {difference:.3g}[/red]: this engine does not compute what was made"
                code = ExitCode.BUNDLE_UNUSABLE
            console.print(f"{bundle.name} {bundle.version}  {stage.role:8} {verdict}", highlight=False)
    return code
