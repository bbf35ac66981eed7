"""The whole training step on a GPU, as sections of gpu_suite.py: ladder, methods, graphs, waits.

On the CPU the same code runs on a tiny network: a rehearsal, whose numbers say nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from bench_step import Options as StepOptions
from bench_step import masks_of, our_step, synthetic
from ceilings import ceilings, highest, step_operations
from field_step import Kind, field_step
from harness import Row, interleave, row
from torch import nn

from letheon.engine.models.classifier import build
from letheon.engine.precision import Precision

TESTS = Path(__file__).parents[1] / "tests" / "engine" / "test_precision.py"
Step = Callable[[], object]


def _sizes(device: str) -> StepOptions:
    if device == "cpu":
        return StepOptions(device=device, model="resnet18", size=32, batch=4)
    return StepOptions(device=device, model="resnet50", size=224, batch=256)


def _told(name: str, options: StepOptions) -> Callable[..., Row]:
    x = f"{options.model} {options.size}px b{options.batch}"

    def entry(variant: str, values: list[float], metric: str, unit: str) -> Row:
        return row(name, variant, values, metric=metric, unit=unit, mode="step", x=x,
                   device=options.device)  # fmt: skip

    return entry


def _with_tf32(step: Step, allowed: bool) -> Step:
    """The process-wide switches are set anew before each step of a rung."""

    def switched() -> object:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed
        return step()

    return switched


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
    entry = _told(name, options)
    times = interleave(steps, repeats, 3, device=options.device)
    top = highest(ceilings(options.device, 10), "bf16")
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
    model: nn.Module = build(options.model, 100, seed=0).to(device)
    batch = synthetic(options)
    masks = masks_of(model)
    steps: dict[str, Step] = {}
    for name, last, bf16, tf32 in (
        ("field: fp32 NCHW, loss read back", False, False, False),
        ("field, tf32", False, False, True),
        ("field, bf16 NCHW", False, True, True),
        ("field, bf16, channels-last", True, True, True),
    ):
        step = field_step(model, batch, "plain", masks, last, bf16, 1e-4)
        steps[name] = _with_tf32(step, tf32)
    precision = Precision("bf16")
    steps["our step, bf16"], _ = our_step(model, batch, "plain", masks, precision)
    compiling = {}
    compiled = replace(precision, compile="default")
    name = "our step, bf16, compiled"
    steps[name], compiling[name] = our_step(model, batch, "plain", masks, compiled)
    operations = step_operations(steps["our step, bf16"])
    rows = _rows("step plain", options, steps, repeats, operations)
    told = _told("step plain", options)
    return rows + [told(name, [s()], "compile", "s") for name, s in compiling.items() if s()]


def methods(device: str, repeats: int) -> list[Row]:
    """SalUn over the plain step, and SPKD's share of what its extra forward pass allows."""
    options = _sizes(device)
    model, batch = build(options.model, 100, seed=0).to(device), synthetic(options)
    masks = masks_of(model)
    operations, steps = {}, {}
    kinds: tuple[Kind, ...] = ("plain", "salun", "spkd")
    for kind in kinds:
        plain = field_step(model, batch, kind, masks, True, True, 1e-4)
        operations[kind] = step_operations(plain)
        steps[f"field {kind}"] = plain
        precision = Precision("bf16", compile="default" if device != "cpu" else "off")
        if kind == "salun":  # the masked step in one kernel
            precision = replace(precision, reduce="flat")
        steps[kind], _ = our_step(model, batch, kind, masks, precision)
    times = interleave(steps, repeats, 3, device=device)
    entry = _told("step methods", options)
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
        operations = step_operations(field_step(model, batch, "plain", masks, True, True, 1e-4))
        rows = _rows("step graphs", options, steps, repeats, operations)
    entry = _told("step graphs", options)
    return rows + [entry(name, [s()], "compile", "s") for name, s in compiling.items()]


def waits(device: str, repeats: int) -> list[Row]:
    """Every method's step under the sync-debug mode "error": the tests of it, with their count."""
    chosen = "waits_for_the_device and off" if device != "cpu" else "reads_a_value_back"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu" if device != "cpu" else "",
               str(TESTS), "-k", chosen]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parents[2])
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not passed:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-500:])
    return [row("no host sync", "every method", [float(passed[1])], metric="tests passed", unit="",
                mode="check", device=device)]  # fmt: skip
