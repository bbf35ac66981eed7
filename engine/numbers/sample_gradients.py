"""Gradients of single samples, held as products with them; of a network whole or split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vjp

from letheon.engine.checkpoints.sweep_state import SplitGradients
from letheon.engine.distributed import gather_rows, sum_over_ranks
from letheon.engine.memory.shards import blank_pass
from letheon.engine.memory.tangents import derive
from letheon.engine.method import Loss, Run
from letheon.engine.models.small_convolutions import library_convolutions
from letheon.engine.numbers.sweep import Part, batches
from letheon.engine.statistics import evaluating, weights_by_name
from letheon.loaders.batch import Batch


class SampleGradients:
    """G (m, P): the gradient of each of m samples' own loss, held as its products alone.

    The samples' images stay in memory, each rank's share on its own device. Computed without
    autocast, at the weights the model has when a product is asked for. Of a network that is split
    over the ranks P counts this rank's part, and the vector's blocks are gathered beside its own.
    """

    def __init__(self, run: Run, part: Part, losses: Loss, samples: int | None = None):
        """`losses`: (net, batch) -> (B,), one for each sample; `samples`: at most so many."""
        self.run, self.losses = run, losses
        self.batches = list(batches(run, part, samples=samples, blank=lambda net: None))
        own = [batch.index for batch in self.batches]
        mine = torch.cat(own) if own else run.forget.new_empty(0, dtype=torch.int64)
        self.index, _ = gather_rows(mine, run.ranks).sort()  # (m,) int64, equal on every rank
        self.place = torch.searchsorted(self.index, mine)  # of this rank's samples among all
        self._along = None if run.shards is None else run.shards.copy()
        self._rounds = len(self.batches)  # batches of the rank that has the most
        if run.shards is not None:
            most = torch.tensor(self._rounds)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            self._rounds = int(most)

    def times(self, vector: Sequence[Tensor]) -> Tensor:
        """Multiply G by a vector, one tensor per parameter: (m,) float64, equal on every rank."""
        product = torch.zeros(len(self.index), dtype=torch.float64, device=self.index.device)
        split = self.run.shards is not None
        rows = self._split_times(vector) if split else self._whole_times(vector)
        if rows:
            product[self.place] = torch.cat(rows).double()
        sum_over_ranks([product], self.run.ranks)
        return product

    def transposed_times(self, coefficients: Tensor) -> list[Tensor]:
        """Multiply the transposed G by (m,) coefficients: one tensor per parameter, as `times`."""
        sizes = [len(batch.labels) for batch in self.batches]
        pieces = coefficients[self.place].split(sizes or [0])
        if self.run.shards is not None:
            return self._split_transposed_times(pieces)
        own, other = weights_by_name(self.run.model)
        sums = [torch.zeros_like(weight) for weight in own.values()]
        for batch, piece in zip(self.batches, pieces, strict=False):
            values, back, *_ = vjp(self._of(batch, other), own)
            grads = back(piece.to(values.dtype))[0]
            for total, one in zip(sums, grads.values(), strict=True):
                total += one.detach()
        sum_over_ranks(sums, self.run.ranks)
        return sums

    def _whole_times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        own, other = weights_by_name(self.run.model)
        tangent = dict(zip(own, vector, strict=True))
        return [
            jvp(self._of(batch, other), (own,), (tangent,))[1].detach() for batch in self.batches
        ]

    def _split_times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """A forward derivative, whose tangents are gathered block by block as the weights are."""
        shards, model, rows = self.run.shards, self.run.model, []
        assert shards is not None and self._along is not None
        with _plain(model), torch.no_grad(), derive(shards, self._along, vector):
            for number in range(self._rounds):
                with forward_ad.dual_level():
                    if number < len(self.batches):
                        losses = self.losses(model, self.batches[number])
                        value, slope = forward_ad.unpack_dual(losses)
                        rows.append(torch.zeros_like(value) if slope is None else slope.clone())
                    else:
                        blank_pass(model)
        return rows

    def _split_transposed_times(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Backward passes, which add up and split what they give."""
        shards, model, world = self.run.shards, self.run.model, self.run.ranks.world
        assert shards is not None
        model.zero_grad(set_to_none=True)
        sums = SplitGradients(shards)
        with _plain(model):
            for number in range(self._rounds):
                if number < len(self.batches):
                    losses = self.losses(model, self.batches[number])
                    (losses @ pieces[number].to(losses.dtype) * world).backward()
                else:
                    blank_pass(model)
        found = [tensor.clone() for tensor in sums.tensors()]
        model.zero_grad(set_to_none=True)
        shards.clear()
        return found

    def _of(self, batch: Batch, other: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        """The samples' losses as a function of the weights."""
        model = self.run.model

        def losses(weights: dict[str, Tensor]) -> Tensor:
            def net(images: Tensor) -> Any:
                return functional_call(model, {**weights, **other}, (images,))

            with _plain(model):
                return self.losses(cast(nn.Module, net), batch)

        return losses


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, by products alone within: torch's fused forms of attention and our small
    convolutions have no forward derivative."""  # noqa: D205, D209
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here: it takes time to import

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), library_convolutions(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
