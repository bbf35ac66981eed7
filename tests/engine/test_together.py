"""Several runs in one process end bitwise as each does alone, whatever the others draw or do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.distributed import Ranks
from letheon.engine.loop import Seconds, run_method
from letheon.engine.method import Method, Phase, Run
from letheon.engine.models.teacher import Teachers
from letheon.engine.passes.one_pass import Log
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.stop import check
from letheon.engine.runs.together import Member, run_together
from letheon.errors import RunFailed
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.methods.finetune import Finetune
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import PRESET, images, run_of, weights

RECIPE = Recipe(epochs=3, lr=0.01, batch_size=7)
METHODS: dict[str, Method] = {
    **cases(RECIPE),
    "small-batches": Finetune(replace(RECIPE, batch_size=5, epochs=2)),
    "adamw": Finetune(replace(RECIPE, optimizer="adamw", ema=0.5)),
}
DATA = images()
Lines = list[dict[str, object]]


def made(method: Method, ranks: Ranks, precision: Precision) -> Run:
    """A run with dropout, so that every step draws; all runs read one image set."""
    torch.manual_seed(100 + ranks.rank)
    run = run_of(method, ranks)
    run.precision = precision
    layers = list(run.model.net.children())
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda m, i, out: nn.functional.dropout(out, 0.2))
    forget = run.forget.numpy()
    run.loader = TorchLoader(
        DATA, forget, PRESET, method.recipe.batch_size, Reader(0, ranks.rank, ranks.world)
    )
    return run


def alone(method: Method, ranks: Ranks, precision: Precision) -> tuple[dict[str, Tensor], Lines]:
    run, lines = made(method, ranks, precision), []  # type: tuple[Run, Lines]
    run_method(method, run, lambda kind, **facts: lines.append({"kind": kind, **facts}))
    return weights(run), lines


def together(
    methods: Mapping[str, Method], ranks: Ranks, precision: Precision
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Lines], dict[str, Exception]]:
    ended: dict[str, dict[str, Tensor]] = {}
    lines: dict[str, Lines] = {name: [] for name in methods}
    teachers = Teachers()

    def member(name: str, method: Method) -> Member:
        def log(kind: str, **facts: object) -> None:
            lines[name].append({"kind": kind, **facts})

        def start() -> tuple[Run, Log, None]:
            return replace(made(method, ranks, precision), teachers=teachers), log, None

        def end(run: Run, seconds: Seconds) -> None:
            ended[name] = weights(run)

        return Member(name, method, start, end)

    failed = run_together([member(*item) for item in methods.items()], ranks)
    return ended, lines, failed


def losses(lines: Lines) -> list[tuple[object, ...]]:
    return [
        tuple(line[key] for key in ("epoch", "phase", "loss", "forget_read", "retain_read", "lr"))
        for line in lines
        if line["kind"] == "phase"
    ]


def differing(ranks: Ranks, reduce: str) -> list[str]:
    precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
    ended, lines, failed = together(METHODS, ranks, precision)
    assert not failed
    wrong = []
    for name, method in METHODS.items():
        theirs, told = alone(method, ranks, precision)
        equal = all(torch.equal(ended[name][key], value) for key, value in theirs.items())
        if not equal or losses(lines[name]) != losses(told):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("world", "reduce"),
    [
        (1, "auto"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [(2, "auto"), (1, "flat"), (2, "flat")]
        ),
    ],
)
def test_as_alone(world: int, reduce: str) -> None:
    assert on_ranks(world, differing, reduce) == [[]] * world


def test_the_test_can_tell() -> None:
    """Dropout draws: from other random numbers a run ends elsewhere."""
    first, _ = alone(METHODS["finetune"], Ranks(), Precision("fp32"))
    run = made(METHODS["finetune"], Ranks(), Precision("fp32"))
    torch.manual_seed(7)
    run_method(METHODS["finetune"], run)
    assert any(not torch.equal(first[key], value) for key, value in weights(run).items())


def test_passes_meet_at_the_end_of_the_epoch() -> None:
    """SPKD ascends first, with whoever reads the forget set, then restores beside the others."""
    methods = {name: METHODS[name] for name in ("finetune", "spkd", "grad-ascent", "salun")}
    _, lines, _ = together(methods, Ranks(), Precision("fp32"))
    shared = {
        name: [(line["phase"], line.get("together", 1)) for line in of if "phase" in line][:2]
        for name, of in lines.items()
    }
    assert shared["spkd"] == [("ascend", 2), ("restore", 3)]
    assert shared["grad-ascent"] == [("ascend", 2)] * 2
    assert shared["finetune"] == [("retain", 3)] * 2
    assert shared["salun"] == [("relabelled", 3)] * 2


@dataclass
class Steps(State):
    taken: int = 0


class Breaks(Finetune):
    """Fails at its fourth step."""

    def prepare(self, run: Run) -> Steps:
        return Steps()

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        assert isinstance(state, Steps)
        state.taken += 1
        if state.taken == 4:
            raise RuntimeError("broken on purpose")


def test_what_goes_wrong_stays_with_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"a": METHODS["finetune"], "b": Breaks(RECIPE), "c": METHODS["spkd"]}
    ended, _, failed = together(methods, Ranks(), Precision("fp32"))
    assert list(failed) == ["b"] and str(failed["b"]) == "broken on purpose"
    assert "broken on purpose" in capsys.readouterr().err
    for name in ("a", "c"):
        theirs, _ = alone(methods[name], Ranks(), Precision("fp32"))
        assert all(torch.equal(ended[name][key], value) for key, value in theirs.items())


class DiskIsFull(Finetune):
    """Fails on the second rank alone, as a disk does."""

    def prepare(self, run: Run) -> State:
        if run.ranks.rank == 1:
            raise RunFailed("got no space left") from OSError("no space")
        return State()


def disk_is_full(ranks: Ranks) -> str:
    if ranks.rank == 0:  # would wait in a later collective for the second rank
        check(ranks)
        return ""
    try:
        together({"a": DiskIsFull(RECIPE)}, ranks, Precision("fp32"))
    except RunFailed as error:
        return str(error)
    return "survived"


def test_a_full_disk_of_one_rank_ends_the_job() -> None:
    assert on_ranks(2, disk_is_full) == ["", "got no space left"]
