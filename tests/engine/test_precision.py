"""Number formats are what they say, and no step of any method waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Phase, Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, RunFailed
from letheon.loaders.batch import Batch, Loader, Reads
from letheon.methods.duck import Duck
from letheon.methods.finetune import Finetune
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from tests.methods.cases import cases
from tests.world import run_of

RECIPE = Recipe(epochs=1, lr=0.005, batch_size=7)


def methods(recipe: Recipe) -> dict[str, Method]:
    """Each method, and between them each optimiser, an average, progress and micro-batches."""
    adam = replace(recipe, optimizer="adamw")
    trained = {name: method for name, method in cases(recipe).items() if method.recipe.epochs}
    return trained | {
        "finetune": Finetune(replace(recipe, optimizer="lars", ema=0.9)),
        "grad-ascent": GradAscent(replace(recipe, log_every=1)),
        "random-label-paired": RandomLabel(replace(recipe, grad_accum_steps=2), order="paired"),
        "batch-norm groups": Finetune(replace(recipe, batch_size=8, batch_norm_group=4)),
        "salun-adamw": SalUn(RandomLabel(adam), density=0.3),
    }


METHODS = {name: method for name, method in methods(RECIPE).items() if method.recipe.epochs}
"""Those that take steps."""


class Steps(Loader):
    """Batches made beforehand; between one and the next `inside` is true: that is the step."""

    def __init__(self, run: Run):
        self.loader, self.device = run.loader, run.ranks.device
        self.inside = False
        self.taken = 0

    def train(self, reads: Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        batches = [batch.to(self.device) for batch in self.loader.train(reads, epoch, skip)]
        for batch in batches:
            self.enter()
            yield batch
            self.leave()
            self.taken += 1

    def enter(self) -> None:
        self.inside = True

    def leave(self) -> None:
        self.inside = False

    def steps(self, reads: Reads) -> int:
        return self.loader.steps(reads)

    def sweep(self, indices: Any = None, skip: int = 0) -> Iterator[Batch]:
        return self.loader.sweep(indices, skip)


class Reading(TorchDispatchMode):
    """Counts what makes the host wait for a value of the device, while `steps` is inside a step."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2")

    def __init__(self, steps: Steps):
        super().__init__()
        self.steps = steps
        self.met: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.steps.inside:
            self.seen += 1
            if func.overloadpacket.__name__ in self.WAITS:
                self.met.append(str(func))
        return func(*args, **(kwargs or {}))


def watched(method: Method, ranks: Ranks | None = None) -> tuple[Run, Steps]:
    run = run_of(method, ranks)
    steps = Steps(run)
    run.loader = steps
    return run, steps


@pytest.mark.parametrize("name", METHODS)
def test_no_step_reads_a_value_back(name: str) -> None:
    run, steps = watched(METHODS[name])
    with Reading(steps) as reading:
        run_method(METHODS[name], run)
    assert steps.taken >= 2 and reading.seen > 30 * steps.taken
    assert reading.met == []


class ReadsBack(Finetune):
    """Prints its loss at every step, as many a script does."""

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        float(cast(Tensor, run.parameters[0].grad).sum())


def test_a_value_read_back_is_noticed() -> None:
    run, steps = watched(ReadsBack(RECIPE))
    with Reading(steps) as reading:
        run_method(ReadsBack(RECIPE), run)
    assert reading.met == ["aten._local_scalar_dense.default"] * steps.taken


class Guarded(Steps):
    """On CUDA torch itself refuses to wait inside a step, from the epoch `first` on.

    Making a graph may wait; what counts is the step once it is made.
    """

    def __init__(self, run: Run, first: int):
        super().__init__(run)
        self.run, self.first = run, first

    def enter(self) -> None:
        if self.run.epoch_number >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def leave(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compile", "dtype"), [("off", "fp16"), ("off", "bf16"), ("default", "bf16"), ("max", "bf16")]
)
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name: str, compile: str, dtype: str) -> None:
    method = methods(replace(RECIPE, epochs=4))[name]
    if isinstance(method, Duck):
        method = replace(method, second_epochs=2)  # its graph is made before the guarded epoch
    run = run_of(method, Ranks(device=torch.device("cuda")))
    run.forget = run.forget.cuda()
    run.precision = Precision(dtype, compile=compile)  # type: ignore[arg-type]
    steps = Guarded(run, first=0 if compile == "off" else 3)
    run.loader = steps
    try:
        run_method(method, run)
    except RunFailed as error:
        # Seen on an H100 with torch 2.11, and not understood: two sizes of batch in turn.
        assert (name, compile) == ("random-label-paired", "max") and "use compile default" in str(
            error
        )
        pytest.xfail("CUDA graphs and batches of two sizes in turn")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.taken >= 2


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_formats_of_another_device_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match=f"dtype {dtype} on cpu"):
        Precision(dtype).resolve(torch.device("cpu"))  # type: ignore[arg-type]


class Formats(Finetune):
    """Keeps the types a step meets."""

    types: ClassVar[dict[str, Any]] = {}

    def phases(self, run: Run, state: State, epoch: int) -> Any:
        [phase] = super().phases(run, state, epoch)

        def watched(net: nn.Module, batch: Batch) -> Any:
            self.types["logits"] = net(batch.images).logits.dtype
            return phase.loss(net, batch)

        return [replace(phase, loss=watched)]

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        self.types["grads"] = {p.grad.dtype for p in run.parameters if p.grad is not None}


@pytest.mark.parametrize(("dtype", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_and_gradients_stay_float32(dtype: str, inside: torch.dtype) -> None:
    run = run_of(Formats(RECIPE))
    run.precision = Precision(dtype)  # type: ignore[arg-type]
    run_method(Formats(RECIPE), run)
    assert Formats.types["logits"] == inside
    assert Formats.types["grads"] == {torch.float32}
    assert {p.dtype for p in run.parameters} == {torch.float32}
    conv = next(p for p in run.parameters if p.dim() == 4)
    assert conv.is_contiguous(memory_format=torch.channels_last)
