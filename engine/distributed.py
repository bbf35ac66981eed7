"""Ranks of a distributed job: join them, sum and gather over them, agree on errors.

torchrun, srun or mpirun say who is who through the environment; plain `python` is one rank and
needs no process group; one that exists already is used. gloo carries CPU tensors, nccl CUDA
tensors.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.rendezvous import rendezvous

from letheon.engine.ranks.flight import record_collectives
from letheon.engine.ranks.launchers import adopt_launcher, find_device, is_launched
from letheon.engine.ranks.meeting import meet
from letheon.engine.ranks.store import ask, hangs, holder
from letheon.engine.ranks.watch import Watch, end_when_deaf
from letheon.errors import InputError, LetheonError, RunFailed
from letheon.loaders.order import share
from letheon.processes import end_with_launcher

T = TypeVar("T")
K = TypeVar("K")


ANSWER = 5.0
"""Seconds that the ranks' store has to answer one question."""
START = 300.0
"""Seconds that the ranks wait for each other at the start, at least: hosts import at their pace."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job; `world` is the same on every rank."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    nodes: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)
    """Which ranks are on which host, with its versions; filled in before a run starts."""

    @property
    def main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0


@contextmanager
def join_ranks(device: str = "auto", timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the process group of the launcher (or be the only rank); leave it at the end.

    A rank that another waits for longer than `timeout` seconds ends the job.

    A process group that exists already (Ray Train, Lightning, a notebook) is used and left as it
    is; it must carry CPU tensors.
    """
    if dist.is_initialized():
        yield _existing_ranks(device)
        return
    adopt_launcher()
    end_with_launcher(is_launched())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = find_device(device, local_rank)
    ranks = Ranks(int(os.environ.get("RANK", "0")), world, local_rank, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    with ExitStack() as stack:
        if world > 1:
            stack.enter_context(end_when_deaf())
            stack.enter_context(_join_group(ranks, timeout))
        yield ranks


@contextmanager
def _join_group(ranks: Ranks, timeout: float) -> Iterator[None]:
    """Make the process group, over a part of the launcher's store that no dead rank has used."""
    global _watch
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    rank, world = ranks.rank, ranks.world
    longer = timedelta(seconds=max(timeout, START))
    store, _, _ = next(iter(rendezvous("env://", rank, world, timeout=longer)))
    store.set_timeout(limit)
    record_collectives(ranks.device)
    _import_holders()
    store = _meet(store, rank, world, max(timeout, START))
    _watch = Watch(store, rank, world, timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        yield
    finally:
        _watch.close()
        _watch = None
        if dist.is_initialized() and not hangs():
            dist.destroy_process_group()


def _import_holders() -> None:
    """Import, while there is no process group, the modules that would keep the one that there is.

    Default arguments of their functions are the group at the time of the import, which DDP, FSDP
    and torch.compile bring about. Gloo's threads would then outlive `destroy_process_group`, and
    run into the end of the interpreter.
    """
    for name in ("nn.functional", "optim.zero_redundancy_optimizer", "fsdp.sharded_grad_scaler"):
        importlib.import_module(f"torch.distributed.{name}")


def _meet(store: Store, rank: int, world: int, timeout: float) -> Store:
    """As `meet`, where the store may never answer."""
    try:
        return ask(lambda: meet(store, rank, world, timeout), timeout + ANSWER)
    except TimeoutError as error:
        raise RunFailed(
            f"got no answer of {holder()} in {timeout:g} s; expected {world} ranks; start them all "
            "at about the same time, or raise the timeout"
        ) from error


_watch: Watch | None = None


def explain_timeout(error: Exception, stack: str) -> str:
    """Say who was waited for, where `error` is a timeout of the ranks' exchange; else nothing.

    Every rank that can then writes its stack to the run folder; `stack` is this one's.
    """
    if _watch is None or isinstance(error, LetheonError):
        return ""
    late = re.search("timed? ?out", str(error), re.IGNORECASE)
    return _watch.explain(stack) if late else ""


def explain_loss(error: Exception, stack: str, speaks: bool, hurry: Callable[[], object]) -> str:
    """Name the ranks, or the process that held their store, that `error` shows to be lost.

    A rank that does not speak says nothing, and stays until the one that does has asked. `hurry`
    says whether a signal has come.
    """
    if _watch is None or isinstance(error, LetheonError):
        return ""
    if not re.search("connection|broken pipe|socket|recv|send", str(error), re.IGNORECASE):
        return ""
    if not speaks:
        _watch.stay(hurry)
        return ""
    return _watch.explain_loss(stack, hurry)


def _existing_ranks(device: str) -> Ranks:
    """This process's place in a process group that somebody else made."""
    carried = dist.get_backend_config()
    local_rank = os.environ.get("LOCAL_RANK", "")
    if not local_rank.isdecimal():  # started without a launcher: whoever did has set the device
        local_rank = str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    place = find_device(device, int(local_rank))
    missing = [kind for kind in sorted({"cpu", place.type}) if f"{kind}:" not in carried]
    if missing:
        raise InputError(
            f"got a process group that carries {carried}; expected one for {' and '.join(missing)} "
            "tensors, too; make it with backend cpu:gloo,cuda:nccl"
        )
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(local_rank), place)


def sum_over_ranks(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace each tensor by its sum over the ranks, in place: one collective per dtype.

    All ranks pass the same shapes and dtypes, on the same kind of device. The result is bitwise
    equal on every rank.
    """
    if ranks.world == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = _flatten_dense_tensors([tensor.contiguous() for tensor in group])
        dist.all_reduce(flat)
        contiguous = [torch.empty(tensor.shape, device="meta") for tensor in group]
        for tensor, part in zip(group, _unflatten_dense_tensors(flat, contiguous), strict=True):
            tensor.copy_(part)


def copy_from_first(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Broadcast rank 0's numbers into a tensor that each rank computed: rounding may differ."""
    if ranks.world > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather_rows(tensor: Tensor, ranks: Ranks, total: int | None = None, group: int = 0) -> Tensor:
    """Gather the rows of all ranks, in rank order, on every rank; row counts may differ.

    Args:
        tensor: (n_rank, ...) any dtype; trailing sizes equal on all ranks. No gradient flows.
        ranks: the job.
        total: rows over all ranks where they are shared out as a training batch's; without it the
            ranks exchange their counts first, which waits for the device.
        group: that of `order.share`, by which such a batch was shared out.

    Returns:
        (sum of n_rank, ...), bitwise equal on every rank.
    """
    if ranks.world == 1:
        return tensor
    if total is None:
        counts = torch.tensor([len(tensor)], device=tensor.device)
        all_counts = [torch.zeros_like(counts) for _ in range(ranks.world)]
        dist.all_gather(all_counts, counts)
        sizes = [int(count) for count in all_counts]
    else:
        parts_of = (share(total, rank, ranks.world, group) for rank in range(ranks.world))
        sizes = [part.stop - part.start for part in parts_of]
    plain = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    padded = plain.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = plain
    parts = [torch.empty_like(padded) for _ in range(ranks.world)]
    dist.all_gather(parts, padded)
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows.to(tensor.dtype)


def gather_objects(own: T, ranks: Ranks) -> list[T]:
    """Gather one small object of each rank, which can be pickled, in rank order, on every rank."""
    if ranks.world == 1:
        return [own]
    objects: list[Any] = [None] * ranks.world
    dist.all_gather_object(objects, own)
    return objects


def gather_tensors(own: dict[str, Tensor], ranks: Ranks) -> list[dict[str, Tensor]]:
    """Copy every rank's own tensors, by rank, to the host of the first; elsewhere nothing.

    A tensor at a time, so that the copies are all that the first rank needs room for.
    """
    heads = gather_objects({k: (tuple(v.shape), v.dtype) for k, v in own.items()}, ranks)
    if not ranks.main:
        for name, tensor in own.items():
            _send({name: tensor.detach().cpu()}, 0)
        return []
    everyone = [{name: tensor.detach().to("cpu", copy=True) for name, tensor in own.items()}]
    return everyone + [_receive(head, rank) for rank, head in enumerate(heads[1:], 1)]


def gather_in_turn(
    own: dict[str, Tensor], ranks: Ranks
) -> Generator[dict[str, Tensor], None, None]:
    """Copy the other ranks' own tensors, on the host, to the first one's: one rank's at a time.

    On the first rank yields those of rank 1, 2, ..., which the caller clears; the next rank sends
    once it is done with one, and no collective waits meanwhile. Elsewhere yields nothing, and is
    over once the first rank is. Every rank must exhaust it, and the first close it where it fails.

    Raises:
        RunFailed: on the other ranks: the first one failed.
    """
    heads = gather_objects({k: (tuple(v.shape), v.dtype) for k, v in own.items()}, ranks)
    turns = _Turns(ranks)
    if not ranks.main:
        turns.wait()
        _send(own, 0)
        turns.wait_for_end()
        return
    with turns:
        for rank, head in enumerate(heads[1:], 1):
            turns.give(rank)
            yield _receive(head, rank)


def scatter_in_turn(parts: Iterable[dict[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Give each other rank its tensors, on the host, of those that the first rank makes in turn.

    Args:
        parts: those of rank 1, 2, ...; asked for on the first rank alone, and cleared, one at a
            time.
        ranks: the job.

    Returns:
        This rank's; nothing on the first.

    Raises:
        RunFailed: on the other ranks: the first one failed.
    """
    turns = _Turns(ranks)
    if not ranks.main:
        turns.wait()
        head: list[Any] = [None]
        dist.recv_object_list(head, 0, device=torch.device("cpu"))
        own = _receive(head[0], 0)
        turns.wait_for_end()
        return own
    with turns:
        for rank, part in enumerate(parts, 1):
            turns.give(rank)
            head = [{k: (tuple(v.shape), v.dtype) for k, v in part.items()}]
            dist.send_object_list(head, rank, device=torch.device("cpu"))
            _send(part, rank)
            part.clear()
    return {}


def _send(tensors: dict[str, Tensor], rank: int) -> None:
    for tensor in tensors.values():
        if tensor.numel():
            dist.send(tensor.reshape(-1).view(torch.uint8), rank)


def _receive(head: dict[str, Any], rank: int) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in head.items()}
    for tensor in tensors.values():
        if tensor.numel():
            dist.recv(tensor.view(-1).view(torch.uint8), rank)
    return tensors


class _Turns:
    """The ranks' turns, which the first rank gives; by the store, as `wait_for_ranks`.

    The first rank enters it: the others learn of its end, or that it failed.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._place, self._rank = f"letheon/turn/{next(_MEETINGS)}", ranks.rank
        self._store = dist.distributed_c10d._get_default_store()

    def __enter__(self) -> None:
        """The first rank begins."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._store.add(f"{self._place}/{'end' if kind is None else 'failed'}", 1)

    def give(self, rank: int) -> None:
        self._store.add(f"{self._place}/{rank}", 1)

    def wait(self) -> None:
        self._wait_for(str(self._rank))

    def wait_for_end(self) -> None:
        self._wait_for("end")

    def _wait_for(self, sign: str) -> None:
        seconds = 0.001
        while not self._store.add(f"{self._place}/{sign}", 0):
            if self._store.add(f"{self._place}/failed", 0):
                raise RunFailed(
                    "the first rank failed as the ranks took turns; its own message says why"
                )
            time.sleep(seconds)
            seconds = min(1.0, 1.1 * seconds)


def scatter_objects(parts: Sequence[T], ranks: Ranks) -> T:
    """Give each rank its part, which can be pickled, of those that the first rank has."""
    if ranks.world == 1:
        return parts[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, list(parts) if ranks.main else None, 0)
    part: T = own[0]
    return part


def is_first_to_fail(ranks: Ranks) -> bool:
    """Whether no other rank has said yet why it ends; asked while this one's error is on its way.

    By the store that the ranks met through: it needs no rank to wait for another.
    """
    if ranks.world == 1 or not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        own = str(ranks.rank)
        first = ask(lambda: store.compare_set("letheon/first to fail", "", own), ANSWER)
    except Exception:  # the store has gone with its host: better twice than never
        return True
    return bool(first == str(ranks.rank).encode())


def wait_for_ranks(ranks: Ranks) -> None:
    """Wait until every rank has come here, however long the work of one takes.

    No collective is pending meanwhile, so none of the others runs into its timeout: the ranks ask
    the process group's store, ever more rarely. Every rank must call, in the same order.
    """
    if ranks.world == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    place = f"letheon/wait/{next(_MEETINGS)}"
    store.add(place, 1)
    seconds = 0.01
    while store.add(place, 0) < ranks.world:
        time.sleep(seconds)
        seconds = min(1.0, 1.1 * seconds)


_MEETINGS = itertools.count()


def own_items(count: int, ranks: Ranks) -> range:
    """Which of so many items this rank computes in `share_out`, by their numbers."""
    return range(ranks.rank, count, ranks.world)


def share_out(items: Sequence[K], compute: Callable[[K], T], ranks: Ranks) -> list[T]:
    """Compute something of each item on one rank, in turn; the results in the items' order, on all.

    No collective waits for the work of one rank.

    Raises:
        LetheonError: the problem of the first item that has one, on every rank.
    """
    own: dict[int, T] = {}
    problem: tuple[int, LetheonError] | None = None
    for number in own_items(len(items), ranks):
        try:
            own[number] = compute(items[number])
        except LetheonError as error:
            problem = (number, error)
            break
    wait_for_ranks(ranks)
    found: dict[int, T] = {}
    problems: list[tuple[int, LetheonError]] = []
    for part, one in gather_objects((own, problem), ranks):
        found |= part
        problems += [one] if one is not None else []
    if problems:
        raise min(problems, key=lambda one: one[0])[1]
    return [found[number] for number in range(len(items))]


def agree(ranks: Ranks, problem: str | None = None, option: str = "") -> None:
    """Meet the other ranks; if any has a problem, raise the first one as InputError on all.

    `option` is the name of the setting in question, as an InputError has it.
    """
    first = next((text for text in gather_objects(problem, ranks) if text is not None), None)
    if first is not None:
        refusal = InputError(first, option)
        refusal.everywhere = True
        raise refusal


def require_equal(ranks: Ranks, what: str, value: str) -> None:
    """Check that `value` is the same on every rank.

    Raises:
        RunFailed: on all ranks, naming those that differ from the first.
    """
    if ranks.world == 1:
        return
    values = [""] * ranks.world
    dist.all_gather_object(values, value)
    odd = [rank for rank, other in enumerate(values) if other != values[0]]
    if odd:
        raise RunFailed(
            f"got {what} that differ between rank 0 and ranks {odd}; expected the same on all; "
            "check that all run the same code and data, and start again"
        )
