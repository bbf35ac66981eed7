"""Draw the committed results, and write the performance tables of README and docs from them.

    python benchmarks/plot.py            # docs/pictures/*.svg, and the tables between the markers
    python benchmarks/plot.py --check    # writes nothing; exit code 1 where a page and CSV differ

A page has `<!-- performance:start -->` and `<!-- performance:end -->` around its table: the README
that of whole jobs, docs/benchmarks.md all rows. Between `<!-- opening:start -->` and
`<!-- opening:end -->` that page has the table of `tables/opening.py`, and the pages of
docs/results those of `tables/results.py`.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness import PARTS
from tables.opening import opening
from tables.results import results_pages
from tables.step_time import step_time

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAME = "performance"
START, END = f"<!-- {NAME}:start -->", f"<!-- {NAME}:end -->"
WRITE = "python benchmarks/plot.py"
TITLES = {
    "ft": "FT", "ga": "GA", "salun": "SalUn", "spkd": "SPKD",
    "evaluation": "evaluation of six models", "all": "the whole job",
    "all, one pass": "the whole job, our four methods by one command",
}  # fmt: skip
Line = dict[str, str]


@dataclass(frozen=True)
class Options:
    """What to write."""

    readme: Path = ROOT / "README.md"
    page: Path = ROOT / "docs" / "benchmarks.md"
    pictures: Path = ROOT / "docs" / "pictures"
    results: Path = RESULTS
    check: bool = False
    """Only compare the tables with the results."""


def read(path: Path) -> list[Line]:
    """The rows of a results file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(lines: Sequence[Line]) -> str:
    """The performance table in Markdown, from the rows of end_to_end_*.csv."""
    cells = {(r["x"], r["variant"], r["metric"]): r for r in lines}
    devices = "; ".join(sorted({r["device"] for r in lines}))
    text = [
        f"On {devices}; medians of n repeats, with the 20th and 80th percentile; seconds of wall",
        "clock, and how many times faster than the baseline.",
        "",
        "| setting | job | n | baseline s | ours s | faster | without validation | processor "
        "| bf16 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for x in dict.fromkeys(r["x"] for r in lines if r["metric"] == "wall"):
        setting, _, job = x.rpartition(": ")

        def cell(variant: str, metric: str, digits: int = 2, x: str = x) -> str:
            found = cells.get((x, variant, metric))
            if found is None:
                return "-"
            median, low, high = (float(found[k]) for k in ("median", "p20", "p80"))
            spread = f" ({low:.{digits}f}-{high:.{digits}f})" if low < high else ""
            return f"{median:.{digits}f}{spread}"

        found = [
            cells[x, "baseline", "wall"]["n"],
            cell("baseline", "wall", 1), cell("ours fp32", "wall", 1), cell("ours fp32", "ratio"),
            cell("ours fp32", "ratio without validation"), cell("ours fp32", "ratio, processor"),
            cell("ours bf16", "ratio"),
        ]  # fmt: skip
        text.append(f"| {setting} | {TITLES.get(job, job)} | {' | '.join(found)} |")
    return "\n".join([*text, *gaps(lines)])


def gaps(lines: Sequence[Line]) -> list[str]:
    """How far results are from the baseline's, at most, in two lines; none without such rows."""
    text = []
    for variant in ("ours fp32", "ours bf16"):
        most: dict[str, float] = {}
        for r in lines:
            if r["metric"] == "difference" and r["variant"] == variant:
                most[r["mode"]] = max(most.get(r["mode"], 0.0), float(r["median"]))
        if most:
            named = ", ".join(f"{mode} {value:.2g}" for mode, value in most.items())
            text.append(f"Largest differences of {variant} from the baseline: {named}.")
    return ["", *text] if text else []


def tables(results: Path) -> str | None:
    """What docs/benchmarks.md shows: one table for each machine's end_to_end_cpu*.csv, or None."""
    found = [table(read(source)) for source in sorted(results.glob("end_to_end_cpu*.csv"))]
    return "\n\n".join(found) or None


def summary(results: Path) -> str | None:
    """What the README shows: the whole job on each machine, all n of one; None without results."""
    text = [
        "| machine | setting | baseline s | ours s | faster | as one command s | faster |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for source in sorted(results.glob("end_to_end_cpu*.csv")):
        cells = {(r["x"], r["variant"], r["metric"]): r for r in read(source)}
        for x, variant, metric in cells:
            setting, _, job = x.rpartition(": ")
            if (variant, metric, job) != ("ours fp32", "wall", "all"):
                continue
            one = f"{setting}: all, one pass"
            numbers = [
                f"{float(cells[key]['median']):.{digits}f}" if key in cells else "-"
                for key, digits in (
                    ((x, "baseline", "wall"), 1), ((x, "ours fp32", "wall"), 1),
                    ((x, "ours fp32", "ratio"), 2), ((one, "ours fp32", "wall"), 1),
                    ((one, "ours fp32", "ratio"), 2),
                )
            ]  # fmt: skip
            device = cells[x, variant, metric]["device"]
            text.append(f"| {device} | {setting} | {' | '.join(numbers)} |")
    return "\n".join(text) if len(text) > 2 else None


def between(text: str, name: str = NAME) -> str | None:
    """What stands between the markers `name` of a page; None without markers."""
    start, end = (f"<!-- {name}:{side} -->" for side in ("start", "end"))
    if start not in text or end not in text:
        return None
    return text.partition(start)[2].partition(end)[0].strip()


def fill(text: str, content: str, name: str = NAME) -> str:
    """The page with `content` between its markers."""
    start, end = (f"<!-- {name}:{side} -->" for side in ("start", "end"))
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def end_to_end(lines: Sequence[Line], axes: Any) -> None:
    """Stacked bars: where the wall clock of each job went, side by side."""
    cells = {(r["x"], r["variant"], r["metric"]): float(r["median"]) for r in lines}
    jobs = [x for x in dict.fromkeys(r["x"] for r in lines if r["metric"] == "wall")]
    jobs = [x for x in jobs if x.rpartition(": ")[2] not in ("all", "evaluation", "all, one pass")]
    bars = [(x, v) for x in jobs for v in dict.fromkeys(r["variant"] for r in lines)
            if (x, v, "wall") in cells]  # fmt: skip
    names = [f"{x.rpartition(': ')[2]}, {x.partition(',')[0]}: {v}" for x, v in bars]
    left = [0.0] * len(bars)
    for part in PARTS:
        values = [cells.get((*bar, f"part {part}"), 0.0) for bar in bars]
        axes.barh(names, values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of wall clock, a sixth of the evaluation included")
    axes.legend(fontsize="small")


def growth(metric: str) -> Callable[[Sequence[Line], Any], None]:
    """A picture of how time or memory grows, each curve against its own axis, log-log."""

    def draw(lines: Sequence[Line], axes: Any) -> None:
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        slopes = {r["name"]: r["median"] for r in lines if r["metric"] == f"{metric} exponent"}
        for r in lines:
            if r["metric"] == metric and float(r["median"]) > 0:
                points[f"{r['name']} over {r['mode']}"].append((float(r["x"]), float(r["median"])))
        for name, known in points.items():
            slope = slopes.get(name.partition(" over ")[0])
            label = name if slope is None else f"{name}: exponent {float(slope):.2f}"
            axes.loglog(*zip(*known, strict=True), marker="o", label=label)
        axes.set_ylabel("seconds" if metric == "time" else "bytes added to the peak")
        axes.legend(fontsize="x-small")

    return draw


PICTURES: dict[str, tuple[str, Callable[[Sequence[Line], Any], None]]] = {
    "end_to_end_cpu": ("end_to_end_cpu.csv", end_to_end),
    "end_to_end_cpu_zen4": ("end_to_end_cpu_zen4.csv", end_to_end),
    "end_to_end_gpu": ("end_to_end_gpu.csv", end_to_end),
    "growth_time": ("growth_cpu.csv", growth("time")),
    "growth_memory": ("growth_cpu.csv", growth("memory")),
    "step_time": ("published_steps.csv", step_time),
}


def draw(results: Path, out: Path) -> list[Path]:
    """One SVG for each picture whose results are there; equal results give equal bytes."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "letheon"
    from matplotlib import pyplot

    written = []
    for name, (source, paint) in PICTURES.items():
        if not (results / source).is_file():
            continue
        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        paint(read(results / source), axes)
        out.mkdir(parents=True, exist_ok=True)
        written.append(out / f"{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def main(options: Options) -> int:
    """Write or compare; the exit code."""
    first, last = summary(options.results), tables(options.results)
    if first is None or last is None:
        name = options.results / "end_to_end_cpu.csv"
        print(f"plot: got no {name} with a whole job; make it with benchmarks/bench_end_to_end.py")
        return 2
    if not options.check:
        for path in draw(options.results, options.pictures):
            print(f"drew {path}")
    stale = 0
    for page, marks, content in (
        (options.readme, NAME, first),
        (options.page, NAME, last),
        (options.page, "opening", opening(options.results)),
        *results_pages(options.page.parent / "results"),
    ):
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        found = between(text, marks)
        if found is None:
            print(content)
        elif found != content and options.check:
            print(f"{page}: the table is not that of the results; run {WRITE}")
            stale = 1
        elif found != content:
            page.write_text(fill(text, content, marks), encoding="utf-8")
            print(f"wrote the table of {page}")
    return stale


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
