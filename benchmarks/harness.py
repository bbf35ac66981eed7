"""Timing that survives a busy machine: variants interleaved, medians with their spread, CSV rows.

    results = Results(Path("results/kernels_cpu.csv"))
    results.add(compare("similarity", {"plain": plain, "compiled": compiled}, repeats=30, x=256))

Every repeat runs each variant once, in turn, so that a neighbour's load falls on all of them.
Compile and warm-up lie outside the clock. Rows are on the disk as soon as they are measured, so
that a run that is cut off loses nothing. A results file is never edited by hand.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import torch

from letheon.spans import OUTSIDE, Recorder


@dataclass(frozen=True)
class Row:
    """One line of a results file; `median`, `p20` and `p80` are in `unit`, over `n` repeats."""

    name: str
    variant: str
    mode: str
    metric: str
    unit: str
    x: str
    median: float
    p20: float
    p80: float
    n: int
    device: str
    versions: str
    revision: str
    power_limit: str


def row(
    name: str, variant: str, values: Sequence[float], *,
    metric: str = "time", unit: str = "ms", mode: str = "forward", x: object = "",
    device: str | None = None,
) -> Row:  # fmt: skip
    """A row from repeated measurements; `device` is "cpu" or "cuda", by default where CUDA is."""
    on_cuda = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    low, high = spread(values)
    return Row(
        name, variant, mode, metric, unit, str(x),
        _digits(statistics.median(values)), _digits(low), _digits(high), len(values),
        describe_gpu() if on_cuda else describe_cpu(),
        describe_versions(), revision(), power_limit() if on_cuda else "",
    )  # fmt: skip


def compare(
    name: str,
    variants: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    *,
    mode: str = "forward",
    x: object = "",
    device: str = "cpu",
    setup: Callable[[], object] | None = None,
) -> list[Row]:
    """Milliseconds of each variant, interleaved; `setup` runs before each, outside the clock."""
    times = interleave(variants, repeats, warmup, device=device, setup=setup)
    return [row(name, v, t, mode=mode, x=x, device=device) for v, t in times.items()]


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    *,
    device: str = "cpu",
    setup: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds per call: CUDA events on a GPU, the host's clock elsewhere."""
    for _ in range(warmup):
        for run in variants.values():
            if setup is not None:
                setup()
            run()
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, run in variants.items():
            if setup is not None:
                setup()
            times[variant].append(_cuda_ms(run) if device.startswith("cuda") else _host_ms(run))
    return times


def _host_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 20th and 80th percentile."""
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], cuts[3]


class Results:
    """A results file that grows row by row; every row is printed too."""

    def __init__(self, path: Path | None, append: bool = False, once: bool = False) -> None:
        """Begin the file anew, or go on with what is there. None prints only.

        With `once` a row that the file holds is not added again, for a benchmark that goes on.
        """
        self.path = path
        self._there: Counter[str] = Counter()
        if once and append and path is not None and path.exists():
            self._there = Counter(path.read_text().splitlines())
        self.rows: list[Row] = []
        if path is not None and not (append and path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([f.name for f in fields(Row)])

    def add(self, rows: Iterable[Row]) -> list[Row]:
        """Append each row as it comes and flush it to the disk; returns these rows."""
        new = []
        for r in rows:
            new.append(r)
            text = io.StringIO()
            csv.writer(text, lineterminator="").writerow(astuple(r))
            line = text.getvalue()
            if self._there[line]:
                self._there[line] -= 1
            elif self.path is not None:
                with self.path.open("a", newline="") as file:
                    file.write(f"{line}\n")
                    file.flush()
                    os.fsync(file.fileno())
            show(r)
        self.rows += new
        return new


def show(r: Row) -> None:
    """Print a row as a line of an aligned table."""
    span = f"[{r.p20:g}, {r.p80:g}]"
    print(f"{r.name:24} {r.x!s:>16} {r.variant:28} {r.mode:9} "
          f"{r.median:>10g} {r.unit:10} {span:24} n={r.n}", flush=True)  # fmt: skip


PARTS = (OUTSIDE, "data", "compute", "statistics", "evaluation", "validation", "saving")
"""What the end-to-end benchmark books its time to."""
SPAWNED, SECONDS = "BENCH_SPAWNED", "BENCH_SECONDS"


@contextmanager
def report_spans() -> Iterator[None]:
    """Record the spans of this process and leave them as JSON where its parent looks for them.

    The clock starts when the parent spawned this process, where it says so (`SPAWNED`, in seconds
    since the epoch), so imports are in start-up; so is all that is in none of `PARTS`.
    """
    waited = time.time() - float(os.environ.get(SPAWNED, time.time()))
    with Recorder(waited) as recorder:
        yield
    seconds = dict.fromkeys(PARTS, 0.0)
    for name, value in recorder.wall.items():
        seconds[name if name in PARTS else OUTSIDE] += value
    if os.environ.get(SECONDS) and os.environ.get("RANK", "0") == "0":
        Path(os.environ[SECONDS]).write_text(json.dumps(seconds) + "\n")


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def memory(entry: str) -> float:
    """One entry of this process's memory, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return float(line.split()[1]) / 1e3
    raise LookupError(entry)


def reset_peak() -> None:
    """Let the largest size of this process (VmHWM) be that of now."""
    Path("/proc/self/clear_refs").write_text("5")


@cache
def describe_cpu() -> str:
    """The processor's name, and the threads that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, threads: {torch.get_num_threads()}"


@cache
def describe_gpu() -> str:
    """The first GPU's name."""
    return torch.cuda.get_device_name(0)


@cache
def describe_versions() -> str:
    """Versions of Python, torch, CUDA and Triton."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.append(f"cuda {torch.version.cuda}")
        parts.append(f"cudnn {torch.backends.cudnn.version()}")
    try:
        import triton

        parts.append(f"triton {triton.__version__}")
    except ImportError:
        pass
    return "; ".join(parts)


@cache
def revision() -> str:
    """The short commit of this checkout, with + where files differ from it; "" outside git.

    Results are not counted: a benchmark that writes its own is of the revision it began with.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results"],
            capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


@cache
def power_limit() -> str:
    """The first GPU's power limit as nvidia-smi prints it, or ""."""
    try:
        query = ["nvidia-smi", "-i", "0", "--query-gpu=power.limit", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
