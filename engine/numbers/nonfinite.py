"""Losses and gradients that are not finite: found on the device, left out or reported by sample.

`stop` ends the run as soon as one is seen. `skip` takes back such a step on the device. `rollback`
takes the whole pass back and repeats it without the step. No step waits for the host.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.checkpoints.method_state import State, state_dict
from letheon.engine.distributed import sum_over_ranks
from letheon.engine.memory.shards import own_part
from letheon.engine.method import Run
from letheon.engine.runs.progress import HostCopy
from letheon.errors import RunFailed, join_few

if TYPE_CHECKING:
    from collections.abc import Callable

    from letheon.engine.numbers.tally import Tally

Nonfinite = dict[int, list[int]]
"""Steps, counted from zero, by the number of their phase in a pass: 0, or 1 for the one beside."""
MOST = 8
"""Times that a pass is repeated; a run that diverges is not helped by more."""


class Source(Protocol):
    """A pass, as far as reports need it."""

    run: Run
    epoch: int
    log: Callable[..., None]

    def samples(self, number: int, position: int) -> list[int]:
        """Numbers of the samples of a step."""
        ...


def find_bad(run: Run, loss: Tensor, scaled: bool) -> Tensor:
    """Say whether a step's loss or gradient is not finite, on any rank; nothing waits.

    Args:
        run: its gradients are unscaled, and equal on every rank or this rank's parts.
        loss: 0-dim, this rank's.
        scaled: the loss was scaled; a gradient that overflows is then the scaler's to skip.

    Returns:
        0-dim bool on the device, equal on every rank.
    """
    bad = ~loss.detach().isfinite()
    grads = [p.grad for p in run.parameters if p.grad is not None and p.grad.numel()]
    grads += [one for part in run.grad_parts.values() for one in part]
    if grads and not scaled:
        bad = bad | ~torch.stack(torch._foreach_norm(grads, float("inf"))).isfinite().all()
    if run.ranks.world > 1:
        flag = bad.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        bad = flag > 0
    return bad


class Undo:
    """A copy of all that a step moves, to take the step back on the device."""

    def __init__(
        self, run: Run, state: State, optimizer: torch.optim.Optimizer, averages: Sequence[Tensor]
    ) -> None:
        """Copy weights, buffers, the optimizer's and the method's tensors."""
        self._optimizer = optimizer
        self._moving = [
            *map(own_part, run.model.parameters()), *run.model.buffers(),
            *state_dict(state)[0].values(), *averages, *self._slots(),
        ]  # fmt: skip
        self._copies = [tensor.clone() for tensor in self._moving]

    @torch.no_grad()
    def take_back(self, bad: Tensor | None) -> None:
        """Put everything back where `bad`, 0-dim bool, is true."""
        assert bad is not None
        for tensor, copy in zip(self._moving, self._copies, strict=True):
            tensor.copy_(torch.where(bad.to(tensor.device), copy, tensor))
        old = {id(tensor) for tensor in self._moving}
        for tensor in self._slots():
            if id(tensor) not in old:  # made by this step, from zeros
                tensor.copy_(torch.where(bad.to(tensor.device), torch.zeros_like(tensor), tensor))

    def _slots(self) -> list[Tensor]:
        slots = self._optimizer.state.values()
        return [one for slot in slots for one in slot.values() if isinstance(one, Tensor)]


def copy_for_undo(
    run: Run, state: State, optimizer: torch.optim.Optimizer, averages: Sequence[Tensor]
) -> Undo | None:
    """Copy what a step moves, where the recipe skips bad steps; else None."""
    skips = run.recipe.on_nonfinite == "skip"
    return Undo(run, state, optimizer, averages) if skips else None


def leave_out(
    known: Mapping[int, Sequence[int]], steps: Sequence[Sequence[int]], skip: int
) -> Nonfinite:
    """Add the first bad step of a pass, which the later ones may follow from, to those known.

    Raises:
        RunFailed: too many, or the step lies before the state that the run went on from.
    """
    first = min(((bad[0], number) for number, bad in enumerate(steps) if bad), default=None)
    wanted = {number: list(bad) for number, bad in known.items()}
    if first is None:
        return wanted
    position, number = first
    wanted.setdefault(number, []).append(position)
    if sum(map(len, wanted.values())) > MOST or (not number and position < skip):
        raise RunFailed(
            f"got numbers that are not finite at step {position + 1} of a pass that was rolled "
            f"back {sum(map(len, wanted.values())) - 1} times; expected finite numbers; lower lr "
            "or epochs"
        )
    return wanted


def report(one: Source, number: int, phase: str, steps: Sequence[int]) -> None:
    """Record the steps of a phase that were left out, with their samples."""
    if not steps:
        return
    samples = [one.samples(number, position) for position in steps]
    one.log(
        "nonfinite", epoch=one.epoch, phase=phase, steps=[k + 1 for k in steps], samples=samples
    )
    one.run.warnings.append(
        f"{len(steps)} steps of phase {phase} in epoch {one.epoch} were left out for numbers that "
        f"are not finite, step {steps[0] + 1} first, of samples {join_few(samples[0], 5)}"
    )


def report_first(one: Source, number: int, tally: Tally, mean: float) -> NoReturn:
    """Record the first step of a phase whose loss was not finite, with its samples.

    Raises:
        RunFailed: on every rank.
    """
    position, phase = tally.first_broken(one.run), tally.phase.name
    if position >= tally.steps:
        raise RunFailed(
            f"got no finite loss in the {tally.steps} steps of phase {phase} of epoch {one.epoch}, "
            f"at rate {tally.rate:g}; expected finite numbers; lower lr or epochs"
        )
    samples = one.samples(number, position)
    one.log("nonfinite", epoch=one.epoch, phase=phase, steps=[position + 1], samples=[samples])
    raise RunFailed(
        f"got a mean loss of {mean} in phase {phase} of epoch {one.epoch}, at rate "
        f"{tally.rate:g}; the first loss that is not finite was that of step {position + 1} of "
        f"{tally.steps}, of samples {join_few(samples, 5)}; expected finite numbers; "
        "lower lr or epochs"
    )


class LossWatch:
    """Looks for a loss that is not finite while a pass runs, where such a loss ends the run."""

    def __init__(self, one: Source, tallies: Sequence[Tally]) -> None:
        """Look at the tallies of a pass, which may not have begun yet."""
        self._one, self._tallies = one, tallies
        self._copy = HostCopy()

    def broken(self) -> bool:
        """Whether one of this rank was not finite when this was asked before; never waits."""
        begun = [tally for tally in self._tallies if tally.ready]
        if self._copy.sent and not self._copy.ready:
            return False
        first = self._copy.read() if self._copy.sent else []
        if begun:
            self._copy.send(torch.stack([tally.broken for tally in begun]))
        return any(map(operator.lt, first, [tally.steps for tally in begun]))

    def refuse(self) -> None:
        """End the run if one was not finite, before the end of the pass; waits.

        Every rank must call.

        Raises:
            RunFailed: on every rank, with the first such step and its samples.
        """
        for number, tally in enumerate(self._tallies):
            if tally.ready and tally.first_broken(self._one.run) < tally.steps:
                sums = tally.sums.clone()
                sum_over_ranks([sums], self._one.run.ranks)
                report_first(self._one, number, tally, float(sums[0] / sums[1]))
