"""The whole training step, rung by rung, from the field's plain loop to ours compiled.

    python benchmarks/bench_step.py --out benchmarks/results/step_cpu.csv
    python benchmarks/bench_step.py --size 224 --batch 16 --only plain --no-compile --append

Synthetic input that is already on the device. The first rungs are the plain loop of
baseline/step.py; from "our step" on it is the step of `engine/step.py`: fused optimizer, SalUn's
mask in one pass, the teacher folded, nothing read back. "Small images by torch" is our step without
the products that small images become on a CPU (`engine/models/small_convolutions.py`). Each repeat
runs all rungs. The machine's ceilings are measured first: matrix products, of which one counts
2 n^3 operations, and a large copy. A step's share of the ceiling is the operations of its
convolutions and products in its time, over what a product reaches. Rows named "ratio" divide
medians: over the first rung, and over the fastest eager fp32 rung.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from baseline.step import LR, Format, Kind, plain_step
from harness import Results, Row, interleave, row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.models.small_convolutions import SmallConv2d
from letheon.engine.models.teacher import frozen_copy
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.step import assemble
from letheon.loaders.batch import Batch
from letheon.methods.finetune import Finetune
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn, SalunState
from letheon.methods.spkd import Spkd, SpkdState

RECIPE = Recipe(epochs=1, lr=LR)
_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What to time."""

    out: Path = Path("benchmarks/results/step_cpu.csv")
    append: bool = False
    """keep the rows that are in --out"""
    model: str = "resnet18"
    size: int = 64
    """pixels"""
    batch: int = 64
    repeats: int = 8
    compile: bool = True
    """the last rung; its first step takes a minute or two"""
    device: str = "cpu"
    threads: int = 0
    """of torch on the CPU; 0 for as many as it takes by itself"""
    only: tuple[Kind, ...] = ("plain", "salun", "spkd")


def ceilings(device: str, repeats: int, tiny: bool = False) -> Iterator[Row]:
    """Rows of Tera-operations/s of square products, and GB/s of a copy (read and written)."""
    side, words = (8192, 1 << 28) if device.startswith("cuda") else (2048, 1 << 25)
    if tiny:
        side, words = 64, 1 << 12
    variants: dict[str, Callable[[], object]] = {}
    for name, kind in _KINDS.items():
        left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        variants[name] = partial(torch.matmul, left, right)
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    variants["copy"] = lambda: target.copy_(source)
    times = interleave(variants, repeats, 3, device=device)
    for name in _KINDS:
        rates = [2 * side**3 / (1e9 * ms) for ms in times[name]]
        yield row("ceiling", name, rates, metric="rate of a product", unit="Tops/s",
                        x=f"{side}^3", device=device)  # fmt: skip
    rates = [8 * words / (1e6 * ms) for ms in times["copy"]]
    yield row("ceiling", "copy", rates, metric="rate of a copy", unit="GB/s",
                    x=f"{8 * words / 1e9:.2f} GB", device=device)  # fmt: skip


def highest(rows: Sequence[Row], kind: str) -> float:
    """Operations per second of the product of this number format."""
    return next(1e12 * r.median for r in rows if r.name == "ceiling" and r.variant == kind)


def step_operations(step: Callable[[], object]) -> int:
    """Operations of the convolutions and products of one call: two for a multiplication and sum."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def synthetic(options: Options) -> Batch:
    """Random images and labels; every fourth sample is to be forgotten."""
    torch.manual_seed(0)
    n = options.batch
    images = torch.randn(n, 3, options.size, options.size).to(memory_format=torch.channels_last)
    index = torch.arange(n)
    labels = torch.randint(0, 100, (n,))
    return Batch(images, labels, index % 4 == 0, index, n).to(torch.device(options.device))


def masks_of(model: Classifier) -> list[Tensor]:
    """Half of the weights, at random: which ones does not matter for the time."""
    torch.manual_seed(1)
    return [torch.rand_like(p) < 0.5 for p in model.parameters()]


def our_step(
    model: Classifier,
    batch: Batch,
    kind: Kind,
    masks: list[Tensor],
    precision: Precision,
    products: bool = True,
) -> tuple[Callable[[], object], Callable[[], float]]:
    """The engine's step on its own copy of the model, and the seconds it has compiled for.

    Without `products` every convolution is torch's, those of small images too.
    """
    methods: dict[Kind, Method] = {
        "plain": Finetune(RECIPE),
        "salun": SalUn(RandomLabel(RECIPE)),
        "spkd": Spkd(RECIPE, ce_weight=10.0, sp_weight=10.0),
    }
    method = methods[kind]
    run = Run(
        copy.deepcopy(model), cast(Any, None), RECIPE, Ranks(device=batch.images.device), 0,
        batch.forget, (), precision,
    )  # fmt: skip
    run.epoch = run.epoch.to(run.ranks.device)
    precision.apply(run.model, run.ranks.device)
    for module in run.model.modules():
        if not products and type(module) is SmallConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    if isinstance(method, SalUn):  # the mask is given, not made of gradients
        by_name = dict(zip(run.named_parameters, masks, strict=True))
        start = {name: p.detach().clone() for name, p in run.named_parameters.items()}
        state: State = SalunState(method.inner.prepare(run) or State(), by_name, start)
    elif kind == "spkd":  # a teacher of its own, with the convolutions of this rung
        state = SpkdState(frozen_copy(run.model, precision))
    else:
        state = method.prepare(run) or State()
    phase = method.phases(run, state, 0)[-1]
    step = assemble(method, run, state)
    run.model.train()

    def take() -> None:
        # Another tensor each time, so that the teacher does not know the batch again.
        step.take(phase, batch._replace(images=batch.images.view_as(batch.images)), LR)

    return take, lambda: step.compile_seconds


def ladder(options: Options, kind: Kind, limits: Sequence[Row]) -> list[Row]:
    """Time, rate and share of the ceiling of each rung, and the ratios."""
    model, batch = build(options.model, 100, seed=0), synthetic(options)
    model.to(batch.images.device)
    masks = masks_of(model)
    variants: dict[str, Callable[[], object]] = {}
    for name, last, bf16 in (
        ("field: fp32 NCHW, loss read back", False, False),
        ("field, channels-last", True, False),
        ("field, channels-last, bf16", True, True),
    ):
        variants[name] = plain_step(model, batch, kind, masks, Format(last, bf16))
    compiling = {}
    for name, precision in (
        ("our step, fp32, small images by torch", Precision("fp32")),
        ("our step, fp32", Precision("fp32")),
        ("our step, bf16, small images by torch", Precision("bf16")),
        ("our step, bf16", Precision("bf16")),
        ("our step, bf16, compiled", Precision("bf16", compile="default")),
    ):
        if "by torch" in name and options.size > 96:
            continue  # nothing is small there
        if precision.compile == "off" or options.compile:
            variants[name], compiling[name] = our_step(
                model, batch, kind, masks, precision, "by torch" not in name
            )
    x = f"{options.model} {options.size}px b{options.batch}"

    def entry(variant: str, values: list[float], metric: str, unit: str) -> Row:
        return row(f"step {kind}", variant, values, metric=metric, unit=unit, mode="step", x=x,
                   device=options.device)  # fmt: skip

    count = step_operations(next(iter(variants.values())))
    times = interleave(variants, options.repeats, 2, device=options.device)
    of = {v: entry(v, t, "time", "ms") for v, t in times.items()}
    rows = list(of.values())
    for variant, each in times.items():
        kind_of = "bf16" if "bf16" in variant else "fp32"
        top = highest(limits, kind_of)
        rows.append(entry(variant, [1e3 * options.batch / t for t in each], "rate", "images/s"))
        shares = [100 * count / (1e-3 * t * top) for t in each]
        rows.append(entry(variant, shares, f"share of a {kind_of} product's rate", "%"))
    fp32 = min((v for v in times if "bf16" not in v), key=lambda v: of[v].median)
    for over, name in ((next(iter(times)), "the plain loop"), (fp32, "the fastest fp32")):
        for variant, ours in times.items():
            each = [base / mine for base, mine in zip(times[over], ours, strict=True)]
            ratio = entry(variant, each, f"ratio over {name}", "x")
            rows.append(replace(ratio, median=round(of[over].median / of[variant].median, 3)))
    for variant, seconds in compiling.items():
        if seconds():
            rows.append(entry(variant, [seconds()], "compile", "s"))
    return rows


def main(options: Options) -> None:
    """Run what is asked for and write after each."""
    set_threads(options)
    results = Results(options.out, options.append)
    limits = results.add(ceilings(options.device, options.repeats))
    for name in options.only:
        with ProcessPoolExecutor(1, get_context("spawn"), set_threads, (options,)) as own:
            results.add(own.submit(ladder, options, name, limits).result())


def set_threads(options: Options) -> None:
    """As asked for, before anything is computed."""
    torch.set_num_threads(options.threads or torch.get_num_threads())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
