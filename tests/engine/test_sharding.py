"""Networks split over the ranks: the same losses and weights, and a part of everything a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from letheon.engine.checkpoints.model_file import load_model, weights_digest
from letheon.engine.distributed import Ranks
from letheon.engine.health import check_finite
from letheon.engine.loop import Seconds, passes, run_method
from letheon.engine.memory.products import kth_smallest
from letheon.engine.memory.sharding import check_sharding, count_parts, find_units, shard_run
from letheon.engine.memory.shards import cut, host_state
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.stop import Poll
from letheon.engine.statistics import absolute_gradient_sum, squared_gradient_sum
from letheon.errors import InputError, RunFailed
from letheon.launch import mask, train
from letheon.methods.bad_teacher import BadTeacher
from letheon.methods.boundary_expanding import BoundaryExpanding
from letheon.methods.cf_k import CfK
from letheon.methods.finetune import Finetune, cross_entropy
from letheon.methods.grad_ascent import GradAscent
from letheon.methods.influence import Influence
from letheon.methods.l1_sparse import L1Sparse
from letheon.methods.lotus import Lotus
from letheon.methods.random_label import RandomLabel
from letheon.methods.retrain import Retrain
from letheon.methods.salun import SalUn
from letheon.methods.scrub import Scrub
from letheon.methods.spkd import Spkd
from letheon.methods.task_vectors import TaskVector
from letheon.methods.train import Train
from tests.engine.resume_tools import BreakAt, attempt, differing
from tests.methods.cases import cases
from tests.pool import on_ranks
from tests.world import PRESET, run_of

# Batches of 7 over 41 images: uneven on 2 and on 3 ranks. Of the 4 classes of the head three ranks
# have 2, 2 and 0; of the 5 channels they have 2, 2 and 1.
FROZEN = Recipe(epochs=1, lr=0.05, batch_size=7, batch_norm="frozen")
GENTLE = replace(FROZEN, lr=0.005)
GROUPS = Recipe(epochs=1, lr=0.02, batch_size=8, batch_norm_group=2, grad_accum_steps=3)
TOLERANCE = 2e-5  # as between any two numbers of ranks; observed up to 1e-6
METHODS: dict[str, Method] = {
    "new weights, average": Retrain(replace(FROZEN, ema=0.7)),
    "penalty, adamw, micro-batches": L1Sparse(
        replace(FROZEN, optimizer="adamw", lr=1e-3, grad_accum_steps=4), alpha=1e-2
    ),
    "two halves, groups, blocks computed again": RandomLabel(
        replace(GROUPS, activation_checkpoint=True), order="paired"
    ),
    "mask in the step": SalUn(RandomLabel(FROZEN), density=0.3),
    "mask after the step": SalUn(RandomLabel(replace(FROZEN, optimizer="adamw", lr=1e-3))),
    "teacher, gathered rows": Spkd(GENTLE, ce_weight=1.0, sp_weight=100.0),
    "two teachers": BadTeacher(replace(FROZEN, on_nonfinite="skip")),
    "accuracies after epochs": Lotus(replace(FROZEN, on_nonfinite="rollback")),
    "frozen layers": CfK(FROZEN, k=1),
    "goes back": Scrub(replace(GENTLE, epochs=3), rewind=True, max_epochs=1, forget_batch_size=5),
}
METHODS |= {
    f"every {name}": method
    for name, method in cases(replace(FROZEN, epochs=2), replace(GENTLE, epochs=2)).items()
}
FEW = [
    "penalty, adamw, micro-batches", "two halves, groups, blocks computed again", "two teachers",
    "accuracies after epochs",
]  # fmt: skip
SPLIT = Precision("fp32", reduce="shard")


class Block(nn.Sequential):
    """A unit: two layers with weights."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())


def network() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        blocks = nn.Sequential(Block(3), Block(5))
        net = nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        return Classifier(net, "blocks", PRESET)


def make_run(method: Method, ranks: Ranks, forgotten: Sequence[int] = ()) -> Run:
    run = run_of(method, ranks, forgotten=forgotten)
    run.model, run.precision = network(), SPLIT
    run.held_out = lambda: run.loader
    return run


class End(NamedTuple):
    weights: dict[str, Tensor]  # whole, on the first rank
    losses: list[float]
    held: int  # numbers that the rank holds after the last step


def end(ranks: Ranks, name: str) -> End:
    method, losses = METHODS[name], list[float]()

    def log(kind: str, **of: float) -> None:
        losses.extend([of["loss"]] if kind == "phase" else [])

    run = make_run(method, ranks)
    run_method(method, run, log)
    held = sum(part.numel() for part in run.weights.values())
    whole = host_state(run.model, ranks)
    assert not whole or [tuple(v.shape) for v in whole.values()] == [
        tuple(v.shape) for v in network().net.state_dict().values()
    ]
    return End(whole, losses, held)


def ends(ranks: Ranks, names: list[str]) -> dict[str, End]:
    return {name: end(ranks, name) for name in names}


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, FEW),
        pytest.param(2, [*METHODS], marks=pytest.mark.slow),
        pytest.param(3, [*METHODS], marks=pytest.mark.slow),
    ],
)
def test_the_end_is_that_of_one_rank(world: int, names: list[str]) -> None:
    """A run of one rank is not split: its network is whole."""
    alone = ends(Ranks(), names)
    split = on_ranks(world, ends, names)
    for name, (expected, losses, whole) in alone.items():
        first = split[0][name]
        for key, value in expected.items():
            torch.testing.assert_close(
                first.weights[key], value, atol=TOLERANCE, rtol=0, msg=f"{name}: {key}"
            )
        torch.testing.assert_close(
            torch.tensor(first.losses), torch.tensor(losses), atol=TOLERANCE, rtol=TOLERANCE
        )
        held = [one[name].held for one in split]
        assert sum(held) == whole and max(held) < 1.3 * whole / world


def begin(ranks: Ranks, name: str) -> tuple[Run, list[Tensor], dict[str, Tensor]]:
    """A run in its first pass: what its optimizer and average hold, and its masks by name."""
    method = METHODS[name]
    run = make_run(method, ranks)
    one = next(passes(method, run, Seconds(), lambda *_, **__: None))
    one.begin()
    one.take(next(iter(one.batches()))[0])
    slots = [
        value
        for slot in one.step.optimizers["main"].state.values()
        for value in slot.values()
        if isinstance(value, Tensor)
    ]
    return run, [*slots, *one.step.averages], getattr(one.step.state, "masks", {})


def parts(ranks: Ranks) -> tuple[int, list[tuple[int, ...]], dict[str, Tensor]]:
    """Numbers of slots and averages, shapes of the masks that differ from the weights', masks."""
    run, held, _ = begin(ranks, "new weights, average")
    masked, _, masks = begin(ranks, "mask in the step")
    odd = [tuple(m.shape) for k, m in masks.items() if m.shape != masked.weights[k].shape]
    assert not any(p.grad is not None for p in run.model.parameters())
    if run.shards is not None:
        run.model.class_names = tuple("abcd")
        whole, mine = run.shards.host_copy(), run.weights["0.0.0.weight"]
        first = whole.net.state_dict()["0.0.0.weight"]
        assert torch.equal(cut(first, ranks), mine) and first.shape == (5, 3, 3, 3)
        assert whole.class_names == run.model.class_names
    return sum(value.numel() for value in held), odd, masks


def test_slots_averages_and_masks_are_split_as_the_weights_are() -> None:
    whole, _, expected = parts(Ranks())
    weights = sum(p.numel() for p in network().parameters())
    assert whole == 2 * weights  # momentum and average
    split = on_ranks(3, parts)
    assert sum(count for count, _, _ in split) == whole
    assert max(count for count, _, _ in split) < 0.5 * whole
    assert not any(odd for _, odd, _ in split)
    for name, bits in expected.items():
        assert torch.equal(torch.cat([masks[name] for _, _, masks in split]), bits), name


@pytest.mark.parametrize("name", ["mask in the step", "mask after the step"])
def test_masked_weights_keep_their_bits(name: str) -> None:
    first, start = on_ranks(2, end, name)[0].weights, network().net.state_dict()
    _, _, mask = begin(Ranks(), name)
    for key, moves in mask.items():
        assert torch.equal(first[key][~moves], start[key][~moves])
    assert any(not torch.equal(first[key], start[key]) for key in mask)


def resumed(ranks: Ranks, folder: str) -> list[str]:
    return differing(RESUMED, lambda: make_run(RESUMED, ranks), Path(folder), [1, 1, 3])


RESUMED = SalUn(Spkd(replace(GENTLE, ema=0.7), ce_weight=1.0), density=0.3)


def test_a_split_run_that_was_stopped_goes_on_to_the_bit(tmp_path: Path) -> None:
    assert on_ranks(2, resumed, str(tmp_path)) == [[], []]


# Masks, momentum, the average, sums of a pass; snapshots; lists by parameter, AdamW's counts.
ELASTIC: dict[str, Method] = {
    "masks": RESUMED,
    "snapshots": METHODS["goes back"],
    "lists, adamw": TaskVector(replace(FROZEN, epochs=4, optimizer="adamw", lr=1e-3)),
    "a wider head": BoundaryExpanding(replace(FROZEN, epochs=4)),
    "rolled back": Finetune(replace(GROUPS, epochs=2, on_nonfinite="rollback")),
}


def stop_after(ranks: Ranks, folder: str, stop: int, resume: bool) -> None:
    for name, method in ELASTIC.items():
        before = 2 if isinstance(method, SalUn) else 0  # batches that its mask is made of
        poll = BreakAt(ranks, 1, stop + before)
        make = partial(make_run, method, ranks)
        assert attempt(method, make, Path(folder) / name, poll, resume) is None


def finish(ranks: Ranks, folder: str) -> dict[str, dict[str, Tensor]]:
    ends = {}
    for name, method in ELASTIC.items():
        runs = [make_run(method, ranks)]
        ended = attempt(method, lambda run=runs[0]: run, Path(folder) / name, Poll(ranks), True)  # type: ignore[misc]
        assert ended is not None
        ends[name] = host_state(runs[0].model, ranks)
    return ends


def compare(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for name, weights in expected.items():
        for key, value in weights.items():
            torch.testing.assert_close(
                found[name][key], value, atol=TOLERANCE, rtol=0, msg=f"{name} {key}"
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return finish(Ranks(), str(tmp_path_factory.mktemp("alone")))


@pytest.mark.slow
def test_a_split_run_goes_on_on_any_ranks_and_whole(
    tmp_path: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    """Split over 3 ranks, over 2, whole on one, split over 3 again; always within a pass."""
    on_ranks(3, stop_after, str(tmp_path), 2, False)
    on_ranks(2, stop_after, str(tmp_path), 1, True)
    stop_after(Ranks(), str(tmp_path), 1, True)
    ends = on_ranks(3, finish, str(tmp_path))
    compare(ends[0], alone)
    assert not any(ends[1].values())
    assert not [*tmp_path.glob("*/state")]


@pytest.mark.slow
def test_a_state_without_one_of_its_parts_is_left_out(
    tmp_path: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    """One part is damaged, one was not written any more: the state before is whole."""
    on_ranks(2, stop_after, str(tmp_path), 3, False)
    for place in tmp_path.glob("*/state"):
        newest = max((place / "part-0001").glob("*.safetensors"))
        if place.parent.name == "masks":
            newest.write_bytes(newest.read_bytes()[:-1] + b"x")
        else:
            newest.with_suffix(".json").unlink()
        for file in place.glob("*.safetensors"):
            assert not any(name.startswith("model.") for name in load_file(file))
    compare(on_ranks(2, finish, str(tmp_path))[0], alone)


def magnitudes(ranks: Ranks, by: Literal["sample", "batch"]) -> bool:
    """Whether this rank's part is that of the sum of the whole network on as many ranks."""
    found = []
    for precision in (Precision("fp32"), SPLIT):
        run = make_run(Finetune(FROZEN), ranks)
        run.precision = precision
        if run.splits:
            shard_run(run)
        sums = squared_gradient_sum(run, "all", cross_entropy, by)
        found.append([*sums, *absolute_gradient_sum(run, "forget", cross_entropy, by)])
        assert not any(p.grad is not None for p in run.model.parameters())
    pairs = zip(*found, strict=True)
    return all(torch.allclose(cut(whole, ranks), part, rtol=1e-5) for whole, part in pairs)


def test_squares_of_gradients_are_those_of_the_whole_network() -> None:
    assert on_ranks(3, magnitudes, "sample") == on_ranks(3, magnitudes, "batch") == [True] * 3


def selects(ranks: Ranks) -> bool:
    """Whether the numbers selected over the ranks' parts are those of the whole, ties included."""
    run = make_run(Finetune(FROZEN), ranks)
    shard_run(run)
    torch.manual_seed(1)
    for kind in (torch.float32, torch.float64):
        whole = [torch.randn(run.whole_shape(p), dtype=kind).abs() for p in run.parameters]
        whole[0][:2] = 0.0
        whole[1][:] = 0.25
        numbers = torch.cat([one.flatten() for one in whole]).sort().values
        parts = [cut(one, ranks) for one in whole]
        for rank in (1, 2, 55, 60, len(numbers) // 2, len(numbers)):
            if not torch.equal(kth_smallest(run, parts, rank), numbers[rank - 1]):
                return False
    return True


def test_a_number_is_selected_over_all_parts() -> None:
    assert on_ranks(3, selects) == [True] * 3


def job(ranks: Ranks, folder: str) -> None:
    train.main(
        train.Settings(
            out=Path(folder), data="digits", device="cpu", precision=SPLIT, seed=0,
            method=Train(Recipe(epochs=1, lr=0.05, batch_size=512, batch_norm="frozen")),
        ),
        ranks,
    )  # fmt: skip


def make_masks(ranks: Ranks, weights: str, out: str, reduce: Literal["flat", "shard"]) -> None:
    settings = mask.Settings(
        weights=Path(weights), forget="class:3", out=Path(out), data="digits", device="cpu",
        precision=replace(SPLIT, reduce=reduce), densities=(0.3,),
    )  # fmt: skip
    mask.main(settings, ranks)


def test_the_run_folder_and_a_mask_are_those_of_any_run(tmp_path: Path) -> None:
    """With the looks at the original and for a collapse, whose batches the ranks cannot share."""
    job(Ranks(), str(tmp_path / "alone"))
    on_ranks(2, job, str(tmp_path / "split"))
    for reduce in ("flat", "shard"):
        out = str(tmp_path / f"{reduce}.safetensors")
        on_ranks(2, make_masks, str(tmp_path / "alone"), out, reduce)
    whole, cut_up = (load_file(tmp_path / f"{reduce}.safetensors") for reduce in ("flat", "shard"))
    differ = sum(int((whole[key] != cut_up[key]).sum()) for key in whole)
    assert whole.keys() == cut_up.keys() and differ <= 2  # bytes; where two scores nearly meet
    alone, split = (load_model(tmp_path / name) for name in ("alone", "split"))
    assert weights_digest(split) in (tmp_path / "split" / "run.json").read_text()
    for (key, value), other in zip(
        alone.net.state_dict().items(), split.net.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, value, atol=TOLERANCE, rtol=0, msg=key)
    start = build(alone.name, alone.classes, 0, alone.preset).named_parameters()
    for (key, value), (_, before) in zip(alone.named_parameters(), start, strict=True):
        moved = float((value - before).detach().abs().max())
        assert 50 * TOLERANCE < moved < 0.1, key


def refusals(ranks: Ranks) -> list[str]:
    found = []
    for method in (SalUn(RandomLabel(replace(FROZEN, optimizer="muon"))), Own(FROZEN)):
        try:
            check_sharding(method, make_run(method, ranks))
        except InputError as error:
            found.append(str(error))
    for odd in (single_number, tied_blocks):
        run = make_run(Finetune(FROZEN), ranks)
        odd(run.model)
        try:
            check_sharding(Finetune(FROZEN), run)
        except InputError as error:
            found.append(str(error))
    broken = make_run(Finetune(FROZEN), ranks)
    shard_run(broken)
    broken.model.get_buffer("net.0.0.1.running_mean")[1] = float("nan")
    if not ranks.main:
        broken.weights["0.1.0.weight"][0, 0, 0, 0] = float("inf")
    try:
        check_finite(broken, "now")
    except RunFailed as error:
        found.append(str(error))
    few = GradAscent(GENTLE)
    try:
        run_method(few, make_run(few, ranks, range(1)))
    except RunFailed as error:
        found.append(str(error))
    return found


class Own(Finetune):
    """A subclass says nothing of itself: its edits may read whole tensors."""


def single_number(model: Classifier) -> None:
    model.net.register_parameter("scale", nn.Parameter(torch.ones(())))


def tied_blocks(model: Classifier) -> None:
    first, second = (model.get_submodule(f"net.0.{number}.1") for number in (0, 1))
    second.weight = first.weight


def test_what_cannot_be_split_is_refused() -> None:
    words = (
        "optimizer muon", "with finetune", "weight scale is a single number",
        "weight 0.0.1.weight is shared by several blocks",
        "got 2 numbers that are not finite now", "fewer samples",
    )  # fmt: skip
    for lines in on_ranks(2, refusals):
        assert all(word in line for word, line in zip(words, lines, strict=True))
    for wrong in ({"compile": "default"}, {"dtype": "fp16"}, {"wire": "bf16"}):
        with pytest.raises(InputError, match="got reduce shard with"):
            replace(SPLIT, **wrong)  # type: ignore[arg-type]


def test_every_method_can_be_split() -> None:
    """As docs/cluster.md says."""
    assert all(method.elementwise for method in [*cases(FROZEN).values(), Train(FROZEN)])


def test_parts_are_counted_without_making_them() -> None:
    assert find_units(network()) == ["net.0.0", "net.0.1"]
    net = network()
    tensors = [*net.parameters(), *net.buffers()]
    assert count_parts(net, 1)[0] == sum(t.numel() * t.element_size() for t in tensors)
    buffers = sum(t.numel() * t.element_size() for t in net.buffers())
    # Kernels of 5 x 3 x 9 and 5 x 5 x 9 weights with 3 vectors of 5 each, a head of 4 x 5 and 4.
    own, gathered = count_parts(net, 2)
    assert own - buffers == 4 * (3 * 27 + 3 * 45 + 6 * 3 + 2 * 5 + 2)
    assert gathered == 4 * (2 * 24 + 4 * (225 + 15))
    head = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), "head", PRESET)
    assert count_parts(head, 2)[1] == 4 * 3 * (48 + 4)  # weights, gradient, and what is sent of it
    single_number(head)
    assert count_parts(head, 2)[0] == 4 * (24 + 2 + 1)


def transformer(ranks: Ranks, split: bool) -> dict[str, Tensor]:
    """Weights after `influence`, a long step, of two transformer blocks in float64."""
    method = Influence(Recipe(epochs=0, batch_size=7), alpha=5.0, samples=20)
    run = run_of(method, ranks)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=4)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    net.double().register_forward_pre_hook(lambda module, given: (given[0].double(),))
    run.model, run.precision = Classifier(net, "vit", PRESET), SPLIT if split else Precision("fp32")
    run_method(method, run, lambda kind, **of: None)
    return host_state(run.model, ranks)


def test_influence_of_a_transformer_differs_by_rounding_alone() -> None:
    """In float32 its solver turns rounding into 2e-7 to 2e-5; in float64 a fault would be seen."""
    whole, split = transformer(Ranks(), False), on_ranks(2, transformer, True)[0]
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        torch.testing.assert_close(split[key], value, atol=1e-12, rtol=0, msg=key)
