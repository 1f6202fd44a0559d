"""What the bench found: a table on the terminal, a plot, and docs/performance.md between its markers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.figures import Figure, figures_of
from bench.inputs import KINDS

__all__ = ["all_figures", "machine", "print_report", "write_docs"]

_TITLES = {
    "scan": "cxrbatch scan",
    "batch1": "loop, batch 1",
    "loader": "DataLoader, 2 × 32",
    "process": "process_batch shape",
    "floor": "the floor",
}
_PACKAGES = ("torch", "openvino", "pillow", "pydicom", "imagecodecs", "numpy", "pylibjpeg-openjpeg", "python-gdcm")
_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


def machine() -> dict[str, Any]:
    """What the figures depend on besides our code."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags = Path("/proc/cpuinfo").read_text()
    vectors = next((name for name in ("amx_bf16", "avx512f", "avx2") if name in flags), "no AVX")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": f"{cpu} ({vectors})",
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def all_figures(found: dict[str, Any]) -> dict[str, list[Figure]]:
    """By kind, of those that were measured."""
    return {kind: figures_of(rounds, found["start"]) for kind, rounds in found["kinds"].items()}


def print_report(console: Console, found: dict[str, Any]) -> None:
    """Everything, for a person at a terminal."""
    titles = {kind.name: kind.title for kind in KINDS}
    for kind, figures in all_figures(found).items():
        table = Table(title=titles[kind], title_justify="left", title_style="bold", box=None, header_style="dim")
        table.add_column("")
        headings = ("files/s", "scan is faster by", "CPU ms/image", "its CPU / ours", "peak MiB", "labels as ours")
        for heading in headings:
            table.add_column(heading, justify="right")
        for figure in figures:
            style = {"scan": "green", "floor": "blue"}.get(figure.subject, "")
            table.add_row(Text(_TITLES[figure.subject], style), *_cells(figure))
        for name, why in _failed(found["kinds"][kind]):
            table.add_row(Text(_TITLES[name], "red"), Text(f"cannot: {why}", "red", overflow="ellipsis", no_wrap=True))
        console.print(table, "")
    table = Table(title="One run", title_justify="left", title_style="bold", box=None, show_header=False)
    for name, value in _single_figures(found):
        table.add_row(Text(name, "dim"), value)
    console.print(table)


def _cells(figure: Figure) -> list[str]:
    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if figure.subject == "floor" else f"{value:.1f} ×"

    return [
        _rate(figure),
        times(figure.ratio),
        f"{figure.cpu_ms:.1f}",
        times(figure.cpu_ratio),
        "" if figure.rss_mib is None else f"{figure.rss_mib:,.0f}",
        "" if figure.agree is None else f"{figure.agree:.0%}",
    ]


def _rate(figure: Figure) -> str:
    return f"{figure.rate:.1f}" if figure.rate >= 1 else f"{figure.rate:.2g}"


def _failed(rounds: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, one["failed"]) for name, one in rounds[0].items() if "failed" in one]


def _single_figures(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    start, load = found["start"], found["load"]
    yield "scan of one image: first row after", f"{median(one['first_row_s'] for one in start):.2f} s"
    yield "the same, CPU of the whole tree", f"{median(one['cpu_s'] for one in start):.2f} s"
    for name, one in found.get("loop_start", {}).items():
        yield f"{_TITLES[name]}, one image: first row after", f"{one['first_row_s']:.2f} s (CPU {one['cpu_s']:.2f} s)"
    if long := found.get("long"):
        scan, floor = long["scan"], long["floor"]
        reached = sum(floor["wall_s"].values()) / scan["wall_s"]
        of_cpu = sum(floor["cpu_s"].values()) / scan["cpu_s"]
        name = f"share of the floor, {scan['files']:,} JPEG images of 1024 px, start included: wall / CPU"
        yield name, f"{reached:.0%} / {of_cpu:.0%}"
        yield "peak of that run, whole tree", f"{scan['rss_mib']:,.0f} MiB"
    if kept := found.get("kept"):
        rows = ", ".join(f"{_TITLES[name]} {rows}" for name, rows in kept.items())
        yield "rows left by kill -9 at half-way", rows
    if again := found.get("again"):
        yield (
            f"second scan of {again['files']:,} unchanged files",
            f"{again['files'] / again['seconds']:,.0f} files/s, {again['wall_s']:.2f} s with the start",
        )
    if watch := found.get("watch"):
        figures = f"{watch['p50_s']:.2f} / {watch['p99_s']:.2f} s ({watch['files']} files)"
        yield "watch, from close to committed row above quiet_s: p50 / p99", figures
    yield "other work on the machine: load average before / after", f"{load[0]:.1f} / {load[1]:.1f}"


def write_docs(path: Path, found: dict[str, Any]) -> None:
    """Put the tables between the markers of the document; the rest of it stays."""
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}\n{_markdown(found)}\n{_END}{after}", encoding="utf-8")


def _markdown(found: dict[str, Any]) -> str:
    this = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in this["versions"].items())
    before, after = found["load"]
    alone = (
        "the machine was ours"
        if before < 0.7
        else "**the machine had other work: trust only the CPU of scan and floor**"
    )
    lines = [
        f"{this['date']}: {this['cores']} cores, {this['cpu']}, {this['memory_gib']} GiB, Python {this['python']};",
        f"{versions}; {found['rounds']} round(s). Load average {before:.1f} before and {after:.1f} after: {alone}.",
        "",
        "| images | files/s: scan | loop | loader | process | floor | scan is faster than: loop | loader | process "
        "| share of the floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cpu = [
        "| images | CPU ms an image: scan | loop | loader | process | floor | labels as ours: loop | loader | process "
        "| peak MiB: scan | loop | loader | process |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, figures in all_figures(found).items():
        by_name = {figure.subject: figure for figure in figures}
        title = next(k.title for k in KINDS if k.name == kind)
        subjects = [by_name.get(name) for name in ("scan", "batch1", "loader", "process", "floor")]
        rates = [_rate(f) if f else "cannot" for f in subjects]
        ratios = [f"{f.ratio:.1f}" if f and f.ratio else "–" for f in subjects[1:4]]
        floor = by_name.get("floor")
        share = f"{floor.ratio:.0%}" if floor and floor.ratio else "–"
        lines.append(f"| {title} | " + " | ".join([*rates, *ratios, share]) + " |")
        costs = [f"{f.cpu_ms:.1f}" if f else "cannot" for f in subjects]
        agreed = [f"{f.agree:.0%}" if f and f.agree is not None else "–" for f in subjects[1:4]]
        peaks = [f"{f.rss_mib:,.0f}" if f and f.rss_mib else "–" for f in subjects[:4]]
        cpu.append(f"| {title} | " + " | ".join([*costs, *agreed, *peaks]) + " |")
    image = "![Images a second and CPU an image, each way](images/bench.png)"
    single = ["| one run | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in _single_figures(found))]
    return "\n".join([*lines, "", image, "", *cpu, "", *single])
