"""Kernels, bytes, waits and graph breaks of one step of every method, counted without a GPU.

    cd benchmarks && python -m step_budget --out results/step_budget.csv

The step of each phase runs on fake tensors of a cuda device, in float32 and uncompiled. `kernels`
are operations with a kernel (one over a list of tensors counts once); `bytes` are those of all
their operands and results, as if nothing stayed in a cache; `waits` are moments at which the host
would wait for the device; `graphs` and `graph breaks` are those of the phase's loss, compiled as
the loop does. A plain step reads a weight's gradient once; what a method adds is in its own row.

What is around the steps reads numbers, so it is counted on tensors that have some, of small images
(`cuda_on_host.py`): `prepare` is what a method does before its first step, `pass` what an
evaluation runs, twice: `half` is the same with half as many images in a batch, so that its waits
are more where one waits each batch. Waits by functions that `host_reads.py` does not name go to
standard error.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from harness import Results, Row, row

from letheon.engine.method import Method
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.methods import catalogue
from step_budget.cuda_on_host import cuda_on_host
from step_budget.fake_cuda import CUDA, Ledger
from step_budget.host_reads import find_undeclared
from step_budget.passes import PASSES, Scene
from step_budget.stands import (
    CLASSES,
    Stand,
    build_method,
    build_run,
    build_stand,
    count_graphs,
    fake_stand,
)

SMALL = 32  # pixels of what is prepared for real


Part = Literal["step", "prepare", "pass"]


@dataclass(frozen=True)
class Options:
    """Which methods, at which shapes."""

    out: Path = Path("results/step_budget.csv")
    """CSV file"""
    append: bool = False
    """add to the file"""
    only: tuple[str, ...] = ()
    """methods; all, if not given"""
    model: str = "resnet50"
    size: int = 224
    """pixels"""
    batch: int = 256
    """images of a step"""
    parts: tuple[Part, ...] = get_args(Part)
    """what is counted"""


def count_step(stand: Stand, rows: int, x: str) -> Iterator[Row]:
    """Rows of the second step of each phase: the first builds optimizers."""
    name = f"step {stand.method.name}"
    for number, phase in enumerate(stand.phases()):
        with fake_stand(stand) as (fake, ledger):
            step = fake.step()
            phase_of_fake = fake.phases()[number]
            one = fake.begin(step, phase_of_fake)
            batch = fake.batch(rows, phase_of_fake)
            beside = phase_of_fake.beside
            other = None if beside is None else fake.batch(rows, beside)
            for _ in range(2):
                ledger.clear()
                one.take(batch, other)
        graphs, reason = count_graphs(stand, phase)
        values: list[tuple[str, float, str]] = [
            ("kernels", ledger.launches, ""),
            ("bytes", ledger.bytes / 1e9, "GB"),
            ("waits", ledger.waits.total(), ""),
            ("graphs", graphs, ""),
            ("graph breaks", int(bool(reason)), ""),
        ]
        for metric, value, unit in values:
            yield row(name, phase.name, [value], metric=metric, unit=unit, mode="step", x=x,
                      device="cpu")  # fmt: skip
        for problem in [*ledger.waits, reason]:
            if problem:
                print(f"{name}, {phase.name}: {problem}", file=sys.stderr)


def count_waits(ledger: Ledger, name: str, mode: str, variant: str, x: str) -> Iterator[Row]:
    """Rows of what was computed with numbers."""
    values: list[tuple[str, float, str]] = [
        ("kernels", ledger.launches, ""),
        ("bytes", ledger.bytes / 1e9, "GB"),
        ("waits", ledger.waits.total(), ""),
    ]
    for metric, value, unit in values:
        yield row(name, variant, [value], metric=metric, unit=unit, mode=mode, x=x, device="cpu")
    for problem in find_undeclared(ledger.waits):
        print(f"{name}: {problem}", file=sys.stderr)


def count_prepare(method: Method, model: Classifier, x: str) -> Iterator[Row]:
    """Rows of what a method does before its first step, on 40 images, 20 in a batch."""
    with cuda_on_host() as ledger:
        run = build_run(method, model, CUDA, Precision("fp32"))
        ledger.clear()
        method.prepare(run)
    yield from count_waits(ledger, f"prepare {method.name}", "prepare", "", x)


def count_pass(name: str) -> Iterator[Row]:
    """Rows of a pass of the evaluation, in whole and in half batches."""
    for variant, batch in (("whole", 10), ("half", 5)):
        scene = Scene(CUDA, batch=batch)
        with cuda_on_host() as ledger:
            PASSES[name](scene)
        x = f"{scene.model} {scene.count} images b{batch}"
        yield from count_waits(ledger, f"pass {name}", "pass", variant, x)


def main(options: Options) -> None:
    """Count one method after the other, and write after each."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    results = Results(options.out, options.append)
    model = build(options.model, CLASSES, seed=0)
    small = dataclasses.replace(
        model.preset, size=SMALL, resize="none", resize_to=SMALL, augment="flip"
    )
    model = build(options.model, CLASSES, 0, small)
    x = f"{options.model} {options.size}px b{options.batch}"
    for name, kind in catalogue().items():
        if options.only and name not in options.only:
            continue
        method = build_method(kind, options.batch)
        if "prepare" in options.parts:
            results.add(count_prepare(method, model, f"{options.model} {SMALL}px b20"))
        if not method.recipe.epochs or "step" not in options.parts:
            continue  # it may have no steps
        stand = build_stand(method, model, options.size, torch.device("cpu"), Precision("fp32"))
        results.add(count_step(stand, options.batch, x))
    for name in PASSES if "pass" in options.parts else ():
        results.add(count_pass(name))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
