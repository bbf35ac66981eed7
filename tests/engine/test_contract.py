"""What the contract of a method promises, each by two small methods and a reference in autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from letheon.engine.checkpoints.method_state import State, state_dict
from letheon.engine.distributed import Ranks
from letheon.engine.health import collapse_warning, measure_accuracies
from letheon.engine.loop import run_method
from letheon.engine.method import Accuracies, BackTo, Decision, Method, Phase, Run
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError, RunFailed
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Batch, Reader, Stream
from letheon.loaders.datasets.image_set import ImageSet
from letheon.methods import METHODS, inner_fields
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.grad_ascent import ascent
from letheon.methods.random_label import RandomLabel
from letheon.methods.salun import SalUn
from tests.pool import on_ranks
from tests.world import PRESET, images, network, run_of, trained, weights

RECIPE = Recipe(
    epochs=2, lr=0.02, batch_size=8, momentum=0.0, weight_decay=0.0, batch_norm="frozen"
)
TOLERANCE = 2e-5  # float32 sums in another order, as in tests/methods/test_ranks.py


def ce(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.images).logits, batch.labels)


def descend(model: nn.Module, grads: Sequence[Tensor], lr: float = RECIPE.lr) -> None:
    with torch.no_grad():
        for weight, grad in zip(model.parameters(), grads, strict=True):
            weight -= lr * grad


def gradient(model: nn.Module, loss: Tensor, again: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=again))


def assert_weights(run: Run, model: nn.Module) -> None:
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# Phases: pure, and all that one can say.


@pytest.mark.parametrize("name", METHODS)
def test_planning_changes_nothing(name: str) -> None:
    kind = METHODS[name]
    inner = {field: RandomLabel(order="sequential") for field in inner_fields(kind)}
    method = kind(**inner)
    run = run_of(method)
    state = method.prepare(run)
    preset, before = run.model.preset, state_dict(state)[1]
    names = [[p.name for p in method.phases(run, state, epoch)] for epoch in (0, 2, 0, 1, 2)]
    assert names[0] == names[2] and names[1] == names[4]
    assert state_dict(state)[1] == before
    assert run.loader.preset == run.model.preset == preset  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Small(Method):
    """Phases of another size of image and of batch."""

    recipe: Recipe = RECIPE
    name: ClassVar[str] = "small"

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        return [Phase("few", "retain", cross_entropy, batch_size=5, image_size=16, share=0.5)]


@dataclass(frozen=True)
class Counted(Method):
    """Exactly eleven steps on a forget set of two batches."""

    recipe: Recipe = RECIPE
    name: ClassVar[str] = "counted"

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        return [Phase("some", "forget", ascent, steps=11, slot="slow")]

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        return run.recipe.lr * (0.1 if slot == "slow" else 1.0)


@pytest.mark.parametrize("method", [Small(), Counted()], ids=["small", "counted"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_phase_reads_what_it_says(method: Method, world: int) -> None:
    model = network().eval()
    run = run_of(method)
    for epoch in range(2):
        [phase] = method.phases(run, State(), epoch)
        batches = list(run.loader.train(phase.stream, epoch))
        assert len(batches) == run.loader.steps(phase.stream) == (4 if phase.share < 1 else 11)
        for batch in batches:
            if phase.image_size:
                assert batch.images.shape[-1] == 16 and batch.total in (5, 4, 3)
            loss = ce(model, batch) if phase.reads == "retain" else -ce(model, batch)
            descend(model, gradient(model, loss), method.rate(run, phase.slot, 0))
    for result in on_ranks(world, end_of, method):
        for ours, theirs in zip(result, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=TOLERANCE, rtol=0)


def end_of(ranks: Ranks, method: Method) -> list[Tensor]:
    run, _ = trained(method, ranks)
    return [parameter.detach().clone() for parameter in run.model.net.parameters()]


@dataclass(frozen=True)
class Interleaved(Method):
    """A forget step after each retain step, at a rate and with a momentum of its own."""

    recipe: Recipe = RECIPE
    name: ClassVar[str] = "interleaved"
    swapped: bool = False

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        retain = Phase("repair", "retain", cross_entropy)
        forget = Phase("climb", "forget", ascent, slot="forget", batch_size=4)
        return [replace(forget, beside=retain) if self.swapped else replace(retain, beside=forget)]

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        return 0.005 if slot == "forget" else 0.02


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_interleaved_phases_step_in_turn(swapped: bool, world: int) -> None:
    model, run = network().eval(), run_of(Interleaved())
    retain, forget = Stream("retain"), Stream("forget", batch_size=4)
    for epoch in range(2):
        steps = run.loader.steps(forget if swapped else retain)
        order = (forget, retain) if swapped else (retain, forget)
        streams = [stream._replace(steps=steps) for stream in order]
        for pair in zip(*(run.loader.train(s, epoch) for s in streams), strict=True):
            for stream, batch in zip(streams, pair, strict=True):
                up = stream.reads == "forget"
                loss = -ce(model, batch) if up else ce(model, batch)
                descend(model, gradient(model, loss), 0.005 if up else 0.02)
    for result in on_ranks(world, end_of, Interleaved(swapped=swapped)):
        for ours, theirs in zip(result, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=TOLERANCE, rtol=0)


def test_phases_that_make_no_sense_are_refused() -> None:
    plain = Phase("a", "retain", cross_entropy)
    with pytest.raises(InputError, match="two interleaved phases named a"):
        replace(plain, beside=plain)
    with pytest.raises(InputError, match="three interleaved"):
        replace(plain, name="c", beside=replace(plain, name="b", beside=plain))
    with pytest.raises(InputError, match="expected mixed"):
        replace(plain, source="noise")


# Losses in parts, whose gradients stay apart.


def halves(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of a paired batch: minus the loss of its forget half, and the loss of its retain half."""
    losses = F.cross_entropy(net(batch.images).logits, batch.labels, reduction="none")
    weight = 2.0 / len(batch.labels)  # each half is half of the batch
    forget, retain = losses * batch.forget, losses * ~batch.forget
    return {"forget": -forget.sum() * weight, "retain": retain.sum() * weight}


@dataclass(frozen=True)
class Summed(Method):
    """Joins nothing: the optimizer sees the sum."""

    recipe: Recipe = RECIPE
    name: ClassVar[str] = "summed"

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        return [Phase("both", "paired", halves, parts=("forget", "retain"))]


@dataclass(frozen=True)
class Projected(Summed):
    """Takes from the forget gradient what opposes the retain gradient (Yu et al. 2020)."""

    name: ClassVar[str] = "projected"

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        up, down = (run.grad_parts[k] for k in ("forget", "retain"))
        for parameter, grad in zip(run.parameters, project(up, down), strict=True):
            parameter.grad = grad if run.flat is None else parameter.grad
            if run.flat is not None and parameter.grad is not None:
                parameter.grad.copy_(grad)


def project(forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
    dot = sum((f * r).sum() for f, r in zip(forget, retain, strict=True))
    size = sum(r.square().sum() for r in retain)
    share = torch.where(torch.as_tensor(dot) < 0, dot / size, 0.0)
    return [f - share * r + r for f, r in zip(forget, retain, strict=True)]


@pytest.mark.parametrize("kind", [Summed, Projected])
@pytest.mark.parametrize(
    ("world", "pieces", "reduce"),
    [(1, 1, "auto"), (1, 2, "flat"), (2, 1, "auto"), (3, 1, "flat")],
)
def test_parts_reach_the_method_apart(
    kind: type[Summed], world: int, pieces: int, reduce: str
) -> None:
    method = kind(replace(RECIPE, grad_accum_steps=pieces))
    model, run = network().eval(), run_of(method)
    for epoch in range(2):
        for batch in run.loader.train("paired", epoch):
            parts = halves(model, batch)
            down = gradient(model, parts["retain"], again=True)
            up = gradient(model, parts["forget"])
            joined = [a + b for a, b in zip(up, down, strict=True)]
            descend(model, joined if kind is Summed else project(up, down))
    for result in on_ranks(world, end_with, method, reduce):
        for ours, theirs in zip(result, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=TOLERANCE, rtol=0)


def end_with(ranks: Ranks, method: Method, reduce: str) -> list[Tensor]:
    run = run_of(method, ranks)
    run.precision = Precision("fp32", reduce=reduce)  # type: ignore[arg-type]
    run_method(method, run)
    return [parameter.detach().clone() for parameter in run.model.net.parameters()]


@dataclass(frozen=True)
class OnePart(Summed):
    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        return [Phase("both", "paired", cross_entropy, parts=("forget",))]


def test_a_loss_without_its_parts_is_refused() -> None:
    with pytest.raises(RunFailed, match="got one scalar from the loss of phase both"):
        trained(OnePart())


# After an epoch.


@dataclass(frozen=True)
class Stops(Finetune):
    name: ClassVar[str] = "stops"
    seen: ClassVar[list[Accuracies]] = []

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        self.seen.append(accuracies)
        return "stop" if len(self.seen) == 2 else "go on"


@dataclass(frozen=True)
class GoesBack(Finetune):
    name: ClassVar[str] = "goes-back"
    goes_back: ClassVar[bool] = True

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        return BackTo(0) if run.epoch_number == 2 else "go on"


def test_a_method_may_stop() -> None:
    Stops.seen.clear()
    recipe = replace(RECIPE, epochs=5, batch_norm="local")
    stopped, lines = trained(Stops(recipe))
    shorter, _ = trained(Finetune(replace(recipe, epochs=2)))
    assert [line["epoch"] for line in lines if line["kind"] == "phase"] == [0, 1]
    assert all(torch.equal(weights(stopped)[k], v) for k, v in weights(shorter).items())
    model = shorter.model.eval()
    batches = list(shorter.loader.sweep())
    right = torch.cat([model(b.images).logits.argmax(1) == b.labels for b in batches])
    forget = torch.cat([b.forget for b in batches])
    last = Stops.seen[-1]
    assert last.forget == pytest.approx(right[forget].double().mean().item())
    assert last.retain == pytest.approx(right[~forget].double().mean().item())
    assert last.held_out_forget is None
    assert on_ranks(2, measured) == [measured(Ranks())] * 2


def measured(ranks: Ranks) -> Accuracies:
    run = run_of(Finetune(RECIPE), ranks)
    run.held_out = lambda: run.loader
    return measure_accuracies(run)


def test_a_method_may_go_back() -> None:
    recipe = replace(RECIPE, epochs=5, batch_norm="local")
    back, lines = trained(GoesBack(recipe))
    first, _ = trained(Finetune(replace(recipe, epochs=1)))
    assert [line["epoch"] for line in lines if line["kind"] == "phase"] == [0, 1, 2]
    assert all(torch.equal(weights(back)[k], v) for k, v in weights(first).items())
    wrapped, _ = trained(SalUn(GoesBack(recipe), density=0.3))
    masked, _ = trained(SalUn(Finetune(replace(recipe, epochs=1)), density=0.3))
    assert all(torch.equal(weights(wrapped)[k], v) for k, v in weights(masked).items())


# Added parameters.


@dataclass(frozen=True)
class Shifted(Finetune):
    """Trains a shift of the logits beside the network and merges it into the head's bias."""

    name: ClassVar[str] = "shifted"

    def prepare(self, run: Run) -> State:
        run.model.requires_grad_(False)
        run.add_module("shift", nn.ParameterDict({"by": torch.zeros(run.model.classes)}))
        return State()

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        [shift] = run.model.get_submodule("extra.shift").parameters()

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch.images).logits + shift, batch.labels)

        return [Phase("shift", "retain", loss)]

    def finish(self, run: Run, state: State) -> None:
        [shift] = run.model.get_submodule("extra.shift").parameters()
        with torch.no_grad():
            run.model.head.bias.add_(shift)
        run.model.requires_grad_(True)


@dataclass(frozen=True)
class Transposed(Finetune):
    """Hands the optimizer equal gradients in another memory layout."""

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone(memory_format=torch.contiguous_format)


def test_a_gradient_in_another_layout_is_the_same_step() -> None:
    ours, _ = trained(Transposed(RECIPE))
    theirs, _ = trained(Finetune(RECIPE))
    assert all(torch.equal(weights(ours)[k], v) for k, v in weights(theirs).items())


class Widens(Finetune):
    """Forgets to make the head as narrow as it was."""

    def prepare(self, run: Run) -> State:
        head = run.model.head
        head.weight = nn.Parameter(torch.cat([head.weight.detach()] * 2))
        head.bias = nn.Parameter(torch.cat([head.bias.detach()] * 2))
        head.out_features *= 2
        return State()


@pytest.mark.parametrize("world", [1, 2])
def test_added_parameters_are_trained_and_merged(world: int) -> None:
    model, run = network().eval(), run_of(Shifted(RECIPE))
    shift = torch.zeros(4, requires_grad=True)
    for epoch in range(2):
        for batch in run.loader.train("retain", epoch):
            loss = F.cross_entropy(model(batch.images).logits + shift, batch.labels)
            [grad] = torch.autograd.grad(loss, [shift])
            with torch.no_grad():
                shift -= RECIPE.lr * grad
    for result in on_ranks(world, end_of, Shifted(RECIPE)):
        *rest, bias = result
        for ours, theirs in zip(rest, list(model.parameters())[:-1], strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(bias, model.head.bias + shift, atol=1e-6, rtol=0)


def test_a_changed_architecture_is_refused() -> None:
    with pytest.raises(RunFailed, match=r"got 5.bias of shape \(8,\)"):
        trained(Widens(RECIPE))


# Further images.


@dataclass(frozen=True)
class WithNoise(Finetune):
    """Learns other images beside the retain set."""

    name: ClassVar[str] = "with-noise"

    def sources(self, run: Run) -> Mapping[str, ImageSet]:
        return {"noise": images(13)}

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        noise = Phase("noise", "mixed", cross_entropy, source="noise")
        return [*super().phases(run, state, epoch), noise]


@dataclass(frozen=True)
class NoiseBeside(WithNoise):
    name: ClassVar[str] = "noise-beside"

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        retain, noise = super().phases(run, state, epoch)
        return [replace(retain, beside=noise)]


def open_noise(data: ImageSet, ranks: Ranks) -> TorchLoader:
    forget = torch.zeros(len(data), dtype=torch.bool).numpy()
    return TorchLoader(data, forget, PRESET, 8, Reader(0, ranks.rank, ranks.world))


@pytest.mark.parametrize("kind", [WithNoise, NoiseBeside])
def test_further_images_are_a_stream_of_their_own(kind: type[WithNoise]) -> None:
    method = kind(RECIPE)
    run = run_of(method)
    run.open_images = lambda data: open_noise(data, Ranks())
    lines: list[dict[str, Any]] = []
    run_method(method, run, lambda kind, **n: lines.append({"kind": kind, **n}))
    model, noise = network().eval(), open_noise(images(13), Ranks())
    for epoch in range(2):
        steps = run.loader.steps("retain")
        mine = list(run.loader.train("retain", epoch))
        stream = Stream("mixed", steps=steps if kind is NoiseBeside else None)
        other = list(noise.train(stream, epoch))
        order = mine + other
        if kind is NoiseBeside:
            order = [batch for pair in zip(mine, other, strict=True) for batch in pair]
        for batch in order:
            descend(model, gradient(model, ce(model, batch)))
    assert_weights(run, model)
    named = [line.get("source") for line in lines if line["kind"] == "phase"]
    assert named == [None, "noise"] * 2
    with pytest.raises(RunFailed, match="no way to read them"):
        trained(method)


# The network at the end.


@pytest.mark.parametrize("lr", [1e8, 1e30])
def test_broken_numbers_end_the_run_with_their_step(lr: float) -> None:
    with pytest.raises(RunFailed, match=r"not finite.*lower lr"):
        trained(Finetune(replace(RECIPE, lr=lr, epochs=4)))


def test_weights_broken_after_the_last_step_are_found() -> None:
    class Breaks(Finetune):
        def finish(self, run: Run, state: State) -> None:
            with torch.no_grad():
                run.model.head.weight[0, 0] = torch.nan

    with pytest.raises(
        RunFailed, match="got 1 numbers that are not finite at the end, in the weights 5"
    ):
        trained(Breaks(RECIPE))


def test_a_collapsed_network_is_named() -> None:
    run = run_of(Finetune(RECIPE))
    with torch.no_grad():
        run.model.head.weight.zero_()
    warning = collapse_warning(run)
    assert warning is not None and "the network collapsed" in warning
    assert warning.endswith("lower lr or epochs")
    stepless = collapse_warning(replace(run, recipe=replace(RECIPE, epochs=0)))
    assert stepless is not None and stepless.endswith("choose weaker settings of the method")
    assert all(text == warning for text in on_ranks(2, warned))
    healthy, _ = trained(Finetune(replace(RECIPE, epochs=40, lr=0.3, batch_norm="local")))
    assert measure_accuracies(healthy).retain > 0.6  # type: ignore[operator]
    assert healthy.warnings == [] and collapse_warning(healthy) is None


def warned(ranks: Ranks) -> str | None:
    run = run_of(Finetune(RECIPE), ranks)
    with torch.no_grad():
        run.model.head.weight.zero_()
    return collapse_warning(run)
