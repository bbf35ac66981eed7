"""Everything that a training loop keeps between two steps, as tensors and facts, and back.

What is equal on every rank (weights, optimizers, the method's state) is saved once. What is each
rank's own in the middle of a pass (torch's random state, running statistics of batch-norm, the sums
of the pass) is gathered on the first rank, so that one file holds a whole job. Where the network is
split over the ranks, each one's part of the weights and of what is made of them stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.checkpoints.method_state import State, load_state_dict, state_dict
from letheon.engine.checkpoints.run_state import RunState, copy_from_host, copy_to_host
from letheon.engine.distributed import Ranks, gather_tensors
from letheon.engine.gradient_sync import Buckets, Flat
from letheon.engine.memory.part_files import PART, cut_whole, whole_rows
from letheon.engine.memory.shards import own_parts
from letheon.engine.method import Phase, Run
from letheon.engine.numbers.nonfinite import LossWatch
from letheon.engine.step import Step, rehearse
from letheon.errors import RunFailed
from letheon.loaders.batch import Loader
from letheon.loaders.factory import kind_of

if TYPE_CHECKING:
    from letheon.engine.loop import Seconds

Tensors = dict[str, Tensor]


class Part(Protocol):
    """A pass under way, as far as its state goes."""

    watch: LossWatch

    @property
    def position(self) -> int:
        """Steps taken."""
        ...

    @property
    def doomed(self) -> bool:
        """Whether it will be rolled back and repeated; equal on every rank."""
        ...

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """This rank's tensors, and values that are equal on every rank."""
        ...


@dataclass
class Course:
    """How far a run has come, and all that its loop holds."""

    run: Run
    step: Step
    state: State
    seconds: Seconds
    sources: Mapping[str, Loader]
    epoch: int = 0
    phase: int = 0
    """Passes of the epoch that are over."""
    steps: int = 0
    """Steps of all passes that are over."""
    snapshots: list[Tensors] = field(default_factory=list)
    """Weights at the ends of epochs, for a method that may go back to one."""
    now: Part | None = None
    """The pass under way; None between two."""
    origin: RunState | None = None
    """What the first pass goes on from, where the run was stopped before; it takes it."""
    anchor: RunState | None = None
    """Where a pass that is rolled back is repeated from, if such passes are; on every rank."""

    @property
    def position(self) -> int:
        """Steps, those of the pass under way among them."""
        return self.steps + (self.now.position if self.now is not None else 0)

    @property
    def between(self) -> bool:
        """True where nothing of a pass has been done: any number of ranks may go on from here."""
        return self.now is None or self.now.position == 0


def collect(course: Course) -> RunState | None:
    """Copy the whole state to the host; None on all ranks but the first. Every rank must call.

    Of a network that is split over the ranks each has its own part, below `PART`.

    Raises:
        RunFailed: the ranks' weights are not bitwise equal.
    """
    run, ranks = course.run, course.run.ranks
    own, facts = _own(course)
    shared, more = _step_state(course)
    facts |= more
    part: Tensors = {}
    if run.shards is not None:
        facts["rows"] = whole_rows(run, course.step, shared)
        part = {f"{PART}.{k}": copy_to_host(v)[0] for k, v in shared.items()}
        shared = {}
    else:
        _check_equal(run)
    everyone = gather_tensors(own, ranks)
    if not ranks.main:
        return RunState(part, {}) if part else None
    shared |= {f"reads.{k}": v for k, v in run.reads.items()}
    copies = {f"rank.{r}.{k}": v for r, mine in enumerate(everyone) for k, v in mine.items()}
    strides: dict[str, list[int]] = {}
    for name, tensor in shared.items():
        copies[name], order = copy_to_host(tensor)
        if order is not None:
            strides[name] = order
    facts |= {
        "epoch": course.epoch,
        "phase": course.phase,
        "steps": course.steps,
        "between": course.between,
        "snapshots": len(course.snapshots),
        "seconds": asdict(course.seconds),
        "scaler": course.step.scaler.state_dict(),
        "choices": choices(run, course.step),
        "split": run.shards is not None,
        "notes": {"warnings": run.warnings},
        "strides": strides,
    }
    return RunState(copies | part, facts)


def _step_state(course: Course) -> tuple[Tensors, dict[str, Any]]:
    """What steps move: tensors, not copied, and facts."""
    facts: dict[str, Any] = {}
    tensors = {f"model.{k}": v for k, v in own_parts(course.run.model.state_dict()).items()}
    for epoch, weights in enumerate(course.snapshots):
        tensors |= {f"snapshot.{epoch}.{k}": v for k, v in weights.items()}
    tensors |= {f"average.{k}": v for k, v in enumerate(course.step.averages)}
    of_method, facts["method"] = state_dict(course.state)
    tensors |= {f"method.{k}": v for k, v in of_method.items()}
    slots, facts["optimizers"] = _optimizers(course.step)
    return tensors | slots, facts


def restore(course: Course, saved: RunState) -> None:
    """Put a saved state back over what `prepare` and `assemble` have made. Every rank must call.

    The pass under way is left to the caller: `pass_state`.

    Raises:
        RunFailed: the state is of another method or network.
    """
    run, step, facts = course.run, course.step, saved.facts
    _regroup_buckets(course, saved)
    if part := saved.below(PART):
        saved = RunState({**saved.tensors, **part}, facts)
    elif run.shards is not None:  # saved of the whole network, whose strides are no part's
        saved = RunState(cut_whole(run, step, saved.tensors), {**facts, "strides": {}})
    tensors = saved.tensors
    own = own_parts(run.model.state_dict())
    before = {k.removeprefix("model.") for k in tensors if k.startswith("model.")}
    if odd := sorted(own.keys() ^ before):
        raise RunFailed(
            f"got a saved state that differs in the weight {odd[0]} ({len(odd)} such); expected "
            "that of this network and method; start a new run in another folder"
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[f"model.{key}"])
        for k, average in enumerate(step.averages):
            average.copy_(tensors[f"average.{k}"])
        load_state_dict(course.state, saved.below("method"), facts["method"])
    _restore_optimizers(step, saved)
    step.scaler.load_state_dict(facts["scaler"])
    course.snapshots = [saved.below(f"snapshot.{k}") for k in range(facts["snapshots"])]
    course.epoch, course.phase, course.steps = facts["epoch"], facts["phase"], facts["steps"]
    for name, value in facts["seconds"].items():
        setattr(course.seconds, name, value)
    if run.ranks.main:
        run.reads.update(saved.below("reads"))
    run.warnings[:] = facts["notes"]["warnings"]
    _restore_own(run, saved.below(f"rank.{run.ranks.rank}"))


def pass_state(saved: RunState, ranks: Ranks) -> tuple[Tensors, dict[str, Any]] | None:
    """Return what `Part.state_dict` gave on this rank; None where the state lies between passes."""
    if saved.facts["between"]:
        return None
    return saved.below(f"rank.{ranks.rank}.pass"), saved.facts["pass"]


def without_weights(saved: RunState, ranks: Ranks) -> RunState:
    """Return what `pass_state` reads of a state, so that all else of it can be let go."""
    place = f"rank.{ranks.rank}.pass"
    own = {f"{place}.{name}": tensor.clone() for name, tensor in saved.below(place).items()}
    return RunState(own, saved.facts)


def choices(run: Run, step: Step) -> dict[str, Any]:
    """What a trial or the free memory may have decided, which a resumed run does not ask again."""
    way = "flat" if isinstance(step.reducer, Flat) else "ddp"
    return {"dtype": run.precision.dtype, "reduce": way, "loader": kind_of(run.loader)}


def repeat_choices(run: Run, facts: Mapping[str, Any]) -> None:
    """Take number format and reduction from a saved state instead of a trial."""
    known = facts["choices"]
    reduce = known["reduce"] if facts["world"] > 1 else run.precision.reduce
    if run.precision.tune_step:
        run.precision = replace(run.precision, dtype=known["dtype"], reduce=reduce, tune_step=False)


def share_state(saved: RunState | None, ranks: Ranks) -> RunState | None:
    """Hand the first rank's state to every rank; None where it has none.

    Of a network that is split over the ranks each keeps its own part.
    """
    if ranks.world == 1:
        return saved
    tensors = {} if saved is None else saved.tensors
    head: list[Any] = [None]
    if ranks.main and saved is not None:
        shared = {k: v for k, v in tensors.items() if not k.startswith(f"{PART}.")}
        head = [(saved.facts, {k: (tuple(v.shape), v.dtype) for k, v in shared.items()})]
    dist.broadcast_object_list(head, 0, device=torch.device("cpu"))
    if head[0] is None:
        return None
    facts, shapes = head[0]
    for name, (shape, dtype) in shapes.items():
        if not ranks.main:
            tensors[name] = torch.empty(shape, dtype=dtype)
        dist.broadcast(_bytes(tensors[name]), 0)
    return RunState(tensors, facts)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _own(course: Course) -> tuple[Tensors, dict[str, Any]]:
    """This rank's tensors, and the facts about the pass under way."""
    run = course.run
    own: Tensors = {"random.cpu": torch.get_rng_state()}
    if run.ranks.device.type == "cuda":
        own["random.cuda"] = torch.cuda.get_rng_state(run.ranks.device)
    if course.between or course.now is None:
        return own, {"world": run.ranks.world}
    tensors, values = course.now.state_dict()
    own |= {f"pass.{name}": tensor for name, tensor in tensors.items()}
    if run.ranks.world > 1:  # local until the end of the pass
        own |= {f"buffer.{name}": buffer for name, buffer in run.model.named_buffers()}
    return own, {"world": run.ranks.world, "pass": values}


def _restore_own(run: Run, own: Tensors) -> None:
    buffers = RunState(own, {}).below("buffer")
    with torch.no_grad():
        for name, buffer in run.model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    if "random.cpu" in own:  # not from another number of ranks
        torch.set_rng_state(own["random.cpu"])
    if run.ranks.device.type == "cuda" and "random.cuda" in own:
        torch.cuda.set_rng_state(own["random.cuda"], run.ranks.device)


def _check_equal(run: Run) -> None:
    """Compare the trainable weights of all ranks by the sums of their bits.

    Raises:
        RunFailed: on every rank, with the ranks that differ from the first.
    """
    if run.ranks.world == 1 or not run.parameters:
        return
    words = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    sums = torch.stack(
        [p.detach().view(words[p.element_size()]).sum(dtype=torch.int64) for p in run.parameters]
    ).cpu()
    all_sums = [torch.empty_like(sums) for _ in range(run.ranks.world)]
    dist.all_gather(all_sums, sums)
    odd = [rank for rank, other in enumerate(all_sums) if not torch.equal(other, all_sums[0])]
    if odd:
        name = next(
            key
            for key, first, other in zip(
                run.named_parameters, all_sums[0], all_sums[odd[0]], strict=True
            )
            if first != other
        )
        raise RunFailed(
            f"got weights that differ between rank 0 and ranks {odd}, {name} first; expected the "
            "same on all; check that all run the same code and data, and start again"
        )


def _optimizers(step: Step) -> tuple[Tensors, dict[str, Any]]:
    """Every optimizer's tensors by slot, parameter and name, and its plain values."""
    tensors: Tensors = {}
    facts: dict[str, Any] = {}
    for slot, optimizer in step.optimizers.items():
        host, values = [], {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        entries = [
            (f"{number}.{name}", value)
            for number, parameter in enumerate(parameters)
            for name, value in optimizer.state.get(parameter, {}).items()
        ]
        for entry, value in entries:
            key = f"optimizer.{slot}.{entry}"
            if isinstance(value, Tensor):
                tensors[key] = value
                if value.device.type == "cpu":
                    host.append(key)
            elif value is None or isinstance(value, bool | int | float | str):
                values[entry] = value
        groups = [
            {k: v for k, v in group.items() if isinstance(v, bool | int | float)}
            for group in optimizer.param_groups
        ]
        facts[slot] = {"host": host, "values": values, "groups": groups}
    return tensors, facts


def _restore_optimizers(step: Step, saved: RunState) -> None:
    strides = saved.facts["strides"]
    for slot, facts in saved.facts["optimizers"].items():
        optimizer = step.slot_optimizer(slot)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, host in saved.below(f"optimizer.{slot}").items():
            number, _, entry = name.partition(".")
            parameter = parameters[int(number)]
            kept = optimizer.state[parameter].get(entry)
            key = f"optimizer.{slot}.{name}"
            if isinstance(kept, Tensor):
                kept.copy_(host)
                continue
            device = "cpu" if key in facts["host"] else parameter.device
            order = strides.get(key)
            if saved.facts.get("rows") and host.shape == parameter.shape:  # laid out as its part
                order = list(parameter.stride())
            optimizer.state[parameter][entry] = copy_from_host(host, order, device)
        for name, value in facts["values"].items():
            number, _, entry = name.partition(".")
            optimizer.state[parameters[int(number)]][entry] = value
        for group, values in zip(optimizer.param_groups, facts["groups"], strict=True):
            group.update(values)


def _regroup_buckets(course: Course, saved: RunState) -> None:
    """Let DDP order its buckets as they were: it does so after a backward pass or two.

    The order in which from three ranks on gradients are added up depends on the buckets. The passes
    are those of the run's first batch; all that they move is overwritten by the saved state.
    """
    step, run = course.step, course.run
    if not isinstance(step.reducer, Buckets):
        return
    number, phase = _first_reduced(course)
    facts = saved.facts
    taken = saved.position - facts["steps"]
    if phase is None or (facts["epoch"], facts["phase"], taken) <= (0, number, 0):
        return
    loader = course.sources.get(phase.source, run.loader)
    batch = next(iter(loader.train(run.stream(phase), 0))).to(run.ranks.device)
    if phase.rows is not None:
        batch = phase.rows.attach(batch)
    for _ in range(min(saved.position, step.reducer.warmup)):
        rehearse(step, phase, batch)


def _first_reduced(course: Course) -> tuple[int, Phase | None]:
    """The first phase of the run whose gradients go through the buckets, and its number."""
    for number, phase in enumerate(course.step.method.phases(course.run, course.state, 0)):
        for one in (phase, phase.beside):
            if one is not None and not one.parts:
                return number, one
    return 0, None
