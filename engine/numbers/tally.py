"""What the batches of one phase add up to, on the device, read once a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.memory.sample_rows import Samples
from letheon.engine.method import Phase, Run
from letheon.errors import RunFailed
from letheon.loaders.batch import Batch, Loader, Stream


class Tally:
    """What the batches of one phase of a pass add up to, on the device."""

    def __init__(self, phase: Phase, steps: int):
        self.phase, self.steps = phase, steps
        self.flags: Tensor | None = None  # (steps,) bool: numbers that are not finite
        self.requests: list[list[Samples]] | None = None  # by step and rank, of `Phase.rows`

    def start(self, run: Run) -> None:
        """Begin with zeros on the run's device."""
        device = run.ranks.device
        # Loss, samples, forget, retain.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.broken = torch.full((), self.steps, dtype=torch.int64, device=device)
        if run.recipe.on_nonfinite != "stop":
            self.flags = torch.zeros(self.steps, dtype=torch.bool, device=device)
        self.position, self.rate = 0, 0.0
        self.parts = 0  # batches of which this rank had samples
        # Reads of each training sample; samples of other sources have numbers of their own.
        self.counts = []
        if self.phase.source == "train":
            self.counts.append(torch.zeros(len(run.forget), dtype=torch.int32, device=device))

    def ask_for_rows(self, loader: Loader, stream: Stream, epoch: int) -> None:
        """Exchange which samples' rows each rank will want, if the phase has some; every rank must
        call."""  # noqa: D205, D209
        if self.phase.rows is not None:
            self.requests = self.phase.rows.list_requests(loader, stream, epoch)

    def attach_rows(self, batch: Batch) -> Batch:
        """Return the next step's batch with the phase's rows, if it has some; every rank must call,
        with an empty part, too."""  # noqa: D205, D209
        if self.phase.rows is None:
            return batch
        requests = None if self.requests is None else self.requests[self.position]
        return self.phase.rows.attach(batch, requests)

    def add(
        self, loss: Tensor, batch: Batch, forget: Tensor | None, bad: Tensor | None = None
    ) -> None:
        """Count one step.

        Args:
            loss: 0-dim.
            batch: this rank's part.
            forget: how many of its samples are to be forgotten; None where that is not known.
            bad: 0-dim bool, that the step is not to count in the mean loss; None: it counts.
        """
        rows = torch.full((), len(batch.labels), dtype=torch.float64, device=self.sums.device)
        of_forget = torch.zeros_like(rows) if forget is None else forget.double()
        weight = rows
        if bad is not None:
            assert self.flags is not None
            self.flags[self.position] = bad
            loss, weight = torch.where(bad, 0.0, loss), torch.where(bad, 0.0, rows)
        self.sums += torch.stack([loss.double() * weight, weight, of_forget, rows - of_forget])
        for count in self.counts:
            count.index_add_(0, batch.index, torch.ones_like(batch.index, dtype=torch.int32))
        here = torch.where(loss.isfinite(), self.steps, self.position)
        self.broken = torch.minimum(self.broken, here)
        self.position += 1
        self.parts += len(batch.labels) > 0

    def record(self, run: Run) -> None:
        """Add the pass's reads of each sample to those of its phase, once summed over ranks."""
        name = f"{self.phase.reads}/{self.phase.name}"
        for count in self.counts if run.ranks.main else ():
            reads = count.cpu()
            run.reads[name] = run.reads[name] + reads if name in run.reads else reads

    def state_dict(self, place: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's tensors under names that begin with `place`, and what is equal on all."""
        tensors = {f"{place}{name}": tensor for name, tensor in self._tensors()}
        tensors[f"{place}parts"] = torch.tensor(self.parts)
        return tensors, {"position": self.position, "rate": self.rate}

    def load_state_dict(
        self, tensors: dict[str, Tensor], values: dict[str, Any], place: str
    ) -> None:
        """Fill a tally that has started with what `state_dict` gave."""
        for name, tensor in self._tensors():
            tensor.copy_(tensors[f"{place}{name}"])
        self.position, self.rate = values["position"], values["rate"]
        self.parts = int(tensors[f"{place}parts"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            tensors = value if isinstance(value, list) else [value]
            for k, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor):
                    yield f"{name}.{k}", tensor

    @property
    def ready(self) -> bool:
        """Whether its pass has begun."""
        return hasattr(self, "broken")

    def first_broken(self, run: Run) -> int:
        """The first step, counted from zero, whose loss was not finite on some rank."""
        if run.ranks.world > 1:
            dist.all_reduce(self.broken, dist.ReduceOp.MIN)
        return int(self.broken)

    def list_bad(self) -> list[int]:
        """The steps that `add` was told are bad, counted from zero; waits for the device."""
        return [] if self.flags is None else self.flags.nonzero().flatten().tolist()


def redistribute(
    shares: Sequence[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add up what `Tally.state_dict` gave on several ranks, for another number of ranks.

    Returns:
        What the first of them goes on with, and what each other one does.
    """
    first, other = {}, {}
    for name in shares[0]:
        rows = torch.stack([share[name] for share in shares])
        entry = name.split(".")[1]
        if entry in ("broken", "flags"):  # the earliest; equal on all ranks
            first[name] = other[name] = rows.amin(dim=0)
            continue
        other[name] = torch.zeros_like(rows[0])
        # Of running statistics that are equal now, only what moves from here on has a weight.
        first[name] = other[name] if entry == "parts" else rows.sum(dim=0, dtype=rows.dtype)
    return first, other


def audit(phase: Phase, forget: int, retain: int) -> None:
    """By index, not by the loader's flag: a phase read only what it says it reads."""
    if phase.reads == "retain" and forget:
        raise RunFailed(f"phase {phase.name} reads retain but met {forget} forget samples")
    if phase.reads == "forget" and retain:
        raise RunFailed(f"phase {phase.name} reads forget but met {retain} retain samples")
