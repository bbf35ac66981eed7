"""The loop: compiled phases end as plain ones, stay whole, and are not compiled a second time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.utils import counters

from letheon.engine import compiled
from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.health import explain_step
from letheon.engine.loop import Seconds, run_method
from letheon.engine.method import Method, Phase, Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import RunFailed
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.saliency import saliency_masks
from letheon.methods.salun import SalUn
from letheon.methods.spkd import Spkd
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import run_of, trained, weights

# Batches of 7 over 41 images: full ones and two sizes of a shared rest.
RECIPE = Recipe(epochs=3, lr=0.01, batch_size=7)
METHODS = {name: method for name, method in cases(RECIPE).items() if method.recipe.epochs}
QUICK = ("grad-ascent", "spkd")


def compiled_run(method: Method, ranks: Ranks | None = None) -> tuple[Run, Seconds, list[int]]:
    """Tracing as it is, without the code generator; graphs made so far after each pass."""
    counters.clear()
    state = method.prepare(run_of(method))
    beside = {p.beside.name for p in method.phases(run_of(method), state, 0) if p.beside}
    run = run_of(method, ranks)
    run.precision = Precision("fp32", compile="default")
    graphs: list[int] = []
    seconds = run_method(
        method,
        run,
        lambda kind, **facts: (
            graphs.append(counters["stats"]["unique_graphs"])
            if kind == "phase" and facts["phase"] not in beside
            else None
        ),
    )
    return run, seconds, graphs


@pytest.mark.parametrize(
    "name", slow_but(QUICK, [name for name, method in METHODS.items() if method.recipe.epochs])
)
def test_compiled_phases_are_whole_and_compiled_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    method = METHODS[name]
    run, seconds, graphs = compiled_run(method)
    state, epochs = method.prepare(run_of(method)), range(method.recipe.epochs)
    phases = [phase for epoch in epochs for phase in method.phases(run, state, epoch)]
    names = [phase.name for phase in phases]
    first = {name: names.index(name) for name in names}  # its pass in its first epoch
    before = 0
    for k, (name, count) in enumerate(zip(names, graphs, strict=True)):
        losses = 2 if phases[k].beside else 1
        # At most three sizes of batch, of each loss.
        fresh = range(1, 3 * losses + 1) if first[name] == k else range(1)
        assert count - before in fresh, (name, k)
        before = count
    assert not counters["graph_break"]
    assert seconds.compile > 0
    plain, _ = trained(method)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_many_runs_in_one_process_do_not_exhaust_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    method = GradAscent(replace(RECIPE, epochs=1))
    # patch, not setattr: the module's own settings must be put back its own way.
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            compiled_run(method)


def spkd_compiled(ranks: Ranks) -> tuple[dict[str, torch.Tensor], int]:
    compiled.BACKEND = "aot_eager"
    method = Spkd(replace(RECIPE, batch_norm="frozen"), ce_weight=1.0, sp_weight=100.0)
    try:
        run, _, _ = compiled_run(method, ranks)
    finally:
        compiled.BACKEND = "inductor"
    return weights(run), len(counters["graph_break"])


@pytest.mark.slow
def test_compiled_ranks_end_as_one() -> None:
    alone, _ = trained(Spkd(replace(RECIPE, batch_norm="frozen"), ce_weight=1.0, sp_weight=100.0))
    results = on_ranks(2, spkd_compiled)
    for theirs, breaks in results:
        assert not breaks
        assert all(torch.equal(theirs[key], results[0][0][key]) for key in theirs)
        for key, value in weights(alone).items():
            torch.testing.assert_close(theirs[key], value, atol=2e-5, rtol=0, msg=key)


@pytest.mark.slow
def test_the_second_run_starts_warm(tmp_path: Path) -> None:
    """In new processes, as a user's next run; with the real code generator."""
    script = (
        "from tests.engine.test_loop import *\n"
        "_, seconds, _ = compiled_run(METHODS['grad-ascent'])\n"
        "print(seconds.start, seconds.compile, compiled.keep_cache())\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    starts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        start, seconds, folder = done.stdout.split()
        starts.append(start)
        assert float(seconds) > 0
        assert folder == str(tmp_path / "letheon" / "inductor")
    assert starts == ["cold", "warm"]


@pytest.mark.slow
def test_a_kernel_search_ends_as_the_plain_run() -> None:
    """`--compile max` with the real code generator, on whatever device the tests have."""
    method = GradAscent(replace(RECIPE, epochs=1))
    run = run_of(method)
    run.precision = Precision("fp32", compile="max")
    seconds = run_method(method, run)
    assert seconds.compile > 0
    plain, _ = trained(method)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[key], value, atol=2e-5, rtol=1e-4, msg=key)


class Watched(Finetune):
    """Keeps the weights after each step."""

    path: ClassVar[list[list[torch.Tensor]]] = []

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        self.path.append([p.detach().clone() for p in run.parameters])


@pytest.mark.parametrize("reduce", ["auto", "flat"])
def test_the_average_of_the_weights_is_what_remains(reduce: str) -> None:
    method = Watched(replace(RECIPE, ema=0.75))
    run = run_of(method)
    run.precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
    average = [p.detach().clone() for p in run.parameters]
    Watched.path.clear()
    run_method(method, run)
    for weights_then in Watched.path:
        pairs = zip(average, weights_then, strict=True)
        average = [0.75 * mean + 0.25 * weight for mean, weight in pairs]
    for ours, theirs in zip(run.parameters, average, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(run.parameters[0], Watched.path[-1][0], atol=1e-4)


def test_the_average_keeps_masked_weights() -> None:
    run = run_of(METHODS["salun"])
    with torch.no_grad():
        run.parameters[0][0] = -0.0  # equal to 0 and yet other bits
    before = [p.detach().clone() for p in run.parameters]
    method = SalUn(RandomLabel(replace(RECIPE, ema=0.9)), density=0.3)
    run.recipe = method.recipe
    masks = list(saliency_masks(run, [0.3])[0].values())
    run_method(method, run)
    for now, start, mask in zip(run.parameters, before, masks, strict=True):
        assert torch.equal(now[~mask].view(torch.int32), start[~mask].view(torch.int32))


def progress(ranks: Ranks, every: int) -> list[dict[str, Any]]:
    method = Retrain(replace(RECIPE, epochs=2, log_every=every))
    _, lines = trained(method, ranks)
    return lines


def test_progress_is_the_mean_since_the_last_line() -> None:
    """31 images to retain in batches of 7: sizes 7, 7, 7 and a shared rest."""
    sizes = [len(batch.labels) for batch in run_of(Retrain(RECIPE)).loader.train("retain", 0)]
    single = [line for line in progress(Ranks(), 1) if line["kind"] == "steps"]
    double = [line for line in progress(Ranks(), 2) if line["kind"] == "steps"]
    passes = [line for line in progress(Ranks(), 0) if line["kind"] == "phase"]
    kinds = [line["kind"] for line in progress(Ranks(), 0)]
    assert kinds == ["phase", "phase"]
    steps = len(sizes)
    assert [(line["epoch"], line["step"]) for line in single] == [
        (epoch, step) for epoch in range(2) for step in range(1, steps + 1)
    ]
    for epoch in range(2):
        losses = [line["loss"] for line in single if line["epoch"] == epoch]
        whole = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
        assert whole == pytest.approx(passes[epoch]["loss"], rel=1e-6)
        pairs = [line for line in double if line["epoch"] == epoch]
        assert [line["step"] for line in pairs] == list(range(2, steps + 1, 2))
        for line in pairs:
            last = line["step"]
            mean = sum(losses[i] * sizes[i] for i in (last - 2, last - 1))
            assert line["loss"] == pytest.approx(mean / sum(sizes[last - 2 : last]), rel=1e-6)


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (RuntimeError("accessing tensor output of CUDAGraphs. More."), "compile default"),
        (RuntimeError("finished reduction in the prior iteration"), "reduce flat"),
        (ValueError("Expected more than 1 value per channel"), "batch_norm frozen"),
        (MemoryError("no room"), "grad_accum_steps 2"),
    ],
)
def test_a_step_that_fails_says_what_would_do(error: Exception, mend: str) -> None:
    run = run_of(Finetune())
    batch = next(iter(run.loader.train("retain", 0)))
    with (
        pytest.raises(RunFailed, match=mend),
        explain_step(run, Phase("retain", "retain", cross_entropy), batch),
    ):
        raise error
    with (
        pytest.raises(RuntimeError, match="another"),
        explain_step(run, Phase("retain", "retain", cross_entropy), batch),
    ):
        raise RuntimeError("another")
