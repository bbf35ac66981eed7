"""Share a saved state out to another number of ranks, in the middle of a pass, too.

The global batches do not depend on the ranks, so that the next one is the same; what is each rank's
own is what it has added up since the pass began, and its running statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from letheon.engine.checkpoints.run_state import RunState
from letheon.engine.numbers.tally import redistribute


def share_out_state(saved: RunState, world: int) -> RunState:
    """Return a state as `world` ranks go on from it; as it is where as many have saved it.

    Sums and counts go to the first rank, since they are added up at the end of the pass. Buffers
    that differ between the ranks (running statistics of local batch-norm) become their mean, as at
    the end of a pass; others keep their bits. torch's random states are left out: each rank draws
    from its own seed.

    A network that is split over the ranks is cut anew where its parts are read.
    """
    before = saved.facts["world"]
    if before == world:
        return saved
    own = [RunState(saved.below(f"rank.{rank}"), {}) for rank in range(before)]
    tensors = {name: one for name, one in saved.tensors.items() if not name.startswith("rank.")}
    if saved.facts["between"]:
        return replace(saved, tensors=tensors)
    shares = [one.below("pass") for one in own]
    first, other = redistribute(shares)
    parts = sum(
        torch.stack([share[name] for share in shares]) for name in first if name.endswith(".parts")
    )
    assert isinstance(parts, Tensor)
    buffers = [one.below("buffer") for one in own]
    merged = {name: _merge([one[name] for one in buffers], parts) for name in buffers[0]}
    for rank in range(world):
        sums = first if rank == 0 else other
        tensors |= {f"rank.{rank}.pass.{name}": value for name, value in sums.items()}
        tensors |= {f"rank.{rank}.buffer.{name}": value for name, value in merged.items()}
    values: dict[str, Any] = dict(saved.facts["pass"])
    if values["progress"] is not None:  # the next line is of the steps from here on
        values["progress"] = first["0.sums.0"][:2].tolist()
    return RunState(tensors, {**saved.facts, "pass": values})


def _merge(buffers: list[Tensor], parts: Tensor) -> Tensor:
    """The mean of a buffer of several ranks, weighted by the batches that each had a part of."""
    rows = torch.stack(buffers)
    if bool((rows == rows[0]).all()):
        return buffers[0]
    if not rows.is_floating_point():
        return rows.amax(dim=0)  # a count of batches
    weights = (parts / parts.sum()).double()
    return torch.tensordot(weights, rows.double(), dims=1).to(rows.dtype)
