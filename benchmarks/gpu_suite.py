"""Everything that needs a GPU, in one call: the tests marked gpu, the step's ladder, each kernel.

    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.csv
    python benchmarks/gpu_suite.py --out benchmarks/results/gpu.csv --resume   # what was left out
    python benchmarks/gpu_suite.py --out rehearsal.csv --device cpu            # the same code, tiny

Sections run in order; a test is a row as soon as it has ended, and so is a timing. When the time is
used up, the section that runs and those after it are left out, by name; `--resume` runs them. The
exit code is 0 if all tests passed, 1 if something failed, 2 without a GPU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import tyro
from baseline.step import Format, Kind, plain_step
from bench_kernels import BENCHES
from bench_step import Options as StepOptions
from bench_step import ceilings, highest, masks_of, our_step, step_operations, synthetic
from harness import Results, Row, interleave, row
from plot import read
from step_budget.stands import CLASSES, build_method, build_stand

from letheon.engine.models.classifier import build
from letheon.engine.precision import Precision
from letheon.methods import catalogue
from letheon.methods.neg_grad_plus import NegGradPlus
from letheon.methods.salun import SalUn

ROOT = Path(__file__).resolve().parents[1]
END = "section ended"
Step = Callable[[], object]


def _sizes(device: str) -> StepOptions:
    if device == "cpu":
        return StepOptions(device=device, model="small", size=16, batch=2)
    return StepOptions(device=device, model="resnet50", size=224, batch=256)


def _entry(name: str, options: StepOptions) -> Callable[..., Row]:
    x = f"{options.model} {options.size}px b{options.batch}"

    def entry(variant: str, values: list[float], metric: str, unit: str) -> Row:
        return row(name, variant, values, metric=metric, unit=unit, mode="step", x=x,
                   device=options.device)  # fmt: skip

    return entry


def _with_tf32(step: Step, allowed: bool) -> Step:
    """The process-wide switches are set anew before each step of a rung."""

    def step_with_tf32() -> object:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed
        return step()

    return step_with_tf32


@contextmanager
def _library_convolutions() -> Iterator[None]:
    """`max` takes convolutions from the library: searching ResNet-50's takes too many minutes."""
    with torch._inductor.config.patch(
        max_autotune_conv_backends="ATEN",
        max_autotune_conv_bwd_weight_backends="ATEN",
        max_autotune_conv_bwd_input_backends="ATEN",
    ):
        yield


def _rows(
    name: str, options: StepOptions, steps: dict[str, Step], repeats: int, operations: int
) -> list[Row]:
    """Time, rate, share of a product's rate and ratio over the first variant."""
    entry = _entry(name, options)
    times = interleave(steps, repeats, 3, device=options.device)
    tiny = options.device == "cpu"
    top = highest(list(ceilings(options.device, 10, tiny)), "bf16")
    first = next(iter(times))
    rows = []
    for variant, each in times.items():
        rows.append(entry(variant, each, "time", "ms"))
        rows.append(entry(variant, [1e3 * options.batch / t for t in each], "rate", "images/s"))
        shares = [100 * operations / (1e-3 * t * top) for t in each]
        rows.append(entry(variant, shares, "share of a bf16 product's rate", "%"))
        over = [base / mine for base, mine in zip(times[first], each, strict=True)]
        rows.append(entry(variant, over, f"ratio over {first!r}", "x"))
    return rows


def ladder(device: str, repeats: int) -> list[Row]:
    """The plain step, rung by rung, from the field's loop to one compiled graph."""
    options = _sizes(device)
    model = build(options.model, 100, seed=0).to(device)
    batch = synthetic(options)
    masks = masks_of(model)
    steps: dict[str, Step] = {}
    for name, last, bf16, tf32 in (
        ("field: fp32 NCHW, loss read back", False, False, False),
        ("field, tf32", False, False, True),
        ("field, bf16 NCHW", False, True, True),
        ("field, bf16, channels-last", True, True, True),
    ):
        step: Step = plain_step(model, batch, "plain", masks, Format(last, bf16))
        steps[name] = _with_tf32(step, tf32)
    precision = Precision("bf16")
    steps["our step, bf16"], _ = our_step(model, batch, "plain", masks, precision)
    compiling: dict[str, Callable[[], float]] = {}
    if device != "cpu":
        modes: dict[str, Literal["blocks", "default"]] = {
            "our step, bf16, blocks compiled": "blocks",
            "our step, bf16, compiled": "default",
        }
        for name, mode in modes.items():
            compiled = replace(precision, compile=mode)
            steps[name], compiling[name] = our_step(model, batch, "plain", masks, compiled)
    operations = step_operations(steps["our step, bf16"])
    rows = _rows("step plain", options, steps, repeats, operations)
    entry = _entry("step plain", options)
    return rows + [entry(name, [s()], "compile", "s") for name, s in compiling.items() if s()]


def methods(device: str, repeats: int) -> list[Row]:
    """SalUn over the plain step, and SPKD's share of what its extra forward pass allows."""
    options = _sizes(device)
    model, batch = build(options.model, 100, seed=0).to(device), synthetic(options)
    masks = masks_of(model)
    operations, steps = {}, {}
    kinds: tuple[Kind, ...] = ("plain", "salun", "spkd")
    for kind in kinds:
        plain: Step = plain_step(model, batch, kind, masks, Format(True, True))
        operations[kind] = step_operations(plain)
        steps[f"field {kind}"] = plain
        precision = Precision("bf16", compile="default" if device != "cpu" else "off")
        if kind == "salun":  # the masked step in one kernel
            precision = replace(precision, reduce="flat")
        steps[kind], _ = our_step(model, batch, kind, masks, precision)
    times = interleave(steps, repeats, 3, device=device)
    entry = _entry("step methods", options)
    rows = [entry(name, each, "time", "ms") for name, each in times.items()]
    for kind in kinds[1:]:
        pairs = list(zip(times["plain"], times[kind], strict=True))
        beside = [100 * (mine / plain - 1) for plain, mine in pairs]
        rows.append(entry(kind, beside, "more than the plain step", "%"))
        work = operations[kind] / operations["plain"]
        allowed = [100 * plain * work / mine for plain, mine in pairs]
        rows.append(entry(kind, allowed, "share of what its operations allow", "%"))
        over = zip(times[f"field {kind}"], times[kind], strict=True)
        rows.append(entry(kind, [f / m for f, m in over], "ratio over the field's bf16", "x"))
    return rows


def every_method(device: str, repeats: int) -> Iterator[Row]:
    """One step of each phase of every method with its defaults, a row as soon as it is measured."""
    options = _sizes(device)
    model = build(options.model, CLASSES, 0)
    small = replace(model.preset, size=32, resize="none", resize_to=32, augment="flip")
    model = build(options.model, CLASSES, 0, small)
    precision = Precision("bf16" if device == "cuda" else "fp32")
    entry = _entry("step of every method", options)
    for name, kind in catalogue().items() if device == "cuda" else REHEARSED.items():
        method = build_method(kind, options.batch)
        if not method.recipe.epochs:
            continue  # it has no steps
        stand = build_stand(method, model, options.size, torch.device(device), precision)
        step = stand.step()
        for phase in stand.phases():
            one = stand.begin(step, phase)
            batch = stand.batch(options.batch, phase)
            beside = phase.beside
            other = None if beside is None else stand.batch(options.batch, beside)
            take = partial(one.take, batch, other)
            times = interleave({"step": take}, repeats, 3, device=device)["step"]
            yield entry(f"{name}, {phase.name}", times, "time", "ms")


REHEARSED = {method.name: method for method in (SalUn, NegGradPlus)}


def graphs(device: str, repeats: int) -> list[Row]:
    """The compiled plain step, and the same replayed by CUDA graphs (`--compile max`)."""
    options = _sizes(device)
    model, batch = build(options.model, 100, seed=0).to(device), synthetic(options)
    masks = masks_of(model)
    steps: dict[str, Step] = {}
    compiling = {}
    with _library_convolutions():
        for name, mode in (("compiled", "default"), ("compiled, CUDA graphs", "max")):
            precision = Precision("bf16", compile=mode)  # type: ignore[arg-type]
            steps[name], compiling[name] = our_step(model, batch, "plain", masks, precision)
        operations = step_operations(plain_step(model, batch, "plain", masks, Format(True, True)))
        rows = _rows("step graphs", options, steps, repeats, operations)
    entry = _entry("step graphs", options)
    return rows + [entry(name, [s()], "compile", "s") for name, s in compiling.items()]


def checks(device: str, repeats: int) -> Iterator[Row]:
    """One row per test marked gpu as it ends, 1 where it passed; on the CPU a few others."""
    where = ["tests/gpu", "tests/engine", "tests/methods"]
    chosen = [*where, "-m", "gpu"] if device == "cuda" else ["tests/kernels/test_small_conv.py"]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short"]
    command.append("--override-ini=addopts=--import-mode=importlib")
    if device == "cuda" and find_spec("xdist"):  # most of their time is a compiler's, on one core
        command += ["-n", str(max(1, (os.cpu_count() or 1) * 3 // 4)), "-p", "no:benchmark"]
    with subprocess.Popen(
        [*command, *chosen],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as tests:
        assert tests.stdout is not None
        try:
            for line in tests.stdout:
                if ended := _test_result(line):
                    file, test, passed = ended
                    yield row(file, test, [float(passed)], metric="passed", unit="", mode="check",
                              device=device)  # fmt: skip
                elif line.startswith("E  "):
                    print(line, end="", file=sys.stderr)
        finally:
            tests.terminate()


def _test_result(line: str) -> tuple[str, str, bool] | None:
    """File, test and whether it passed, from a line of pytest, alone or with workers."""
    if match := re.match(r"tests/(\S+\.py)::(.+?) (PASSED|FAILED|ERROR)", line):
        return match[1], match[2], match[3] == "PASSED"
    if match := re.match(r"\[gw\d+\] .*?(PASSED|FAILED|ERROR) tests/(\S+\.py)::(.+?) *$", line):
        return match[2], match[3], match[1] == "PASSED"
    return None


Section = Callable[[str, int], Iterable[Row]]
SECTIONS: dict[str, Section] = {
    "checks": checks,
    "ceilings": lambda device, repeats: ceilings(device, repeats, device == "cpu"),
    "ladder": ladder,
    "methods": methods,
    "every method": every_method,
    **BENCHES,
    "graphs": graphs,
}
"""In this order; the one that compiles longest is the last."""


@dataclass(frozen=True)
class Options:
    """What to run, and for how long."""

    out: Path = Path("benchmarks/results/gpu.csv")
    """CSV file"""
    resume: bool = False
    """keep the rows of the file and leave out the sections that have ended in it"""
    seconds: float = 530
    """a section that is not done by then is left out; 0 for no limit"""
    repeats: int = 50
    """timed calls of each variant"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a rehearsal without a GPU; its numbers say nothing"""
    only: tuple[str, ...] = ()
    """sections to run; all, if not given"""


class OutOfTime(BaseException):
    """Raised in whatever runs when the time is used up; no section catches it."""


def _stop(*_: object) -> None:
    raise OutOfTime


def main(options: Options) -> int:
    """Run the sections, write their rows, and return the exit code."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_suite: got no CUDA device, expected one; run it on a GPU machine", file=sys.stderr
        )
        return 2
    ended: set[str] = set()
    if options.resume and options.out.exists():
        ended = {line["name"] for line in read(options.out) if line["metric"] == END}
    results = Results(options.out, append=options.resume)
    start, failed = time.monotonic(), False
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    names = [name for name in options.only or SECTIONS if name not in ended]
    for place, name in enumerate(names):
        print(f"== {name} ({time.monotonic() - start:.0f} s)", flush=True)
        try:
            new = results.add(SECTIONS[name](options.device, options.repeats))
        except OutOfTime:
            print(f"left out when the time was up: {', '.join(names[place:])}", file=sys.stderr)
            failed = True
            break
        except Exception as error:  # rows of the other sections are worth having
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        broken = [r for r in new if r.metric == "passed" and r.median != 1]
        empty = name == "checks" and not new
        failed |= bool(broken) or empty
        if not broken and not empty:
            results.add([row(name, "", [time.monotonic() - start], metric=END, unit="s",
                             device=options.device)])  # fmt: skip
    signal.setitimer(signal.ITIMER_REAL, 0)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
