"""Rows that a method keeps of samples, such as images of its own: each on the rank that made it.

A batch's rows come from the ranks that own them, by the exchange of the sharded resident loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_objects, gather_rows
from letheon.loaders.backends.base import Backend
from letheon.loaders.backends.memory import to_device
from letheon.loaders.backends.rank_exchange import answer_requests
from letheon.loaders.batch import Batch, Loader, Stream

Samples = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SampleRows:
    """Rows of some samples of a set, shared out over the ranks.

    Attributes:
        place: (N,) int64 on the device: a sample's row among those of all ranks, in rank order; 0
            for a sample without one. Equal on every rank.
        own: (n_rank, ...) this rank's rows, on the device; trailing sizes equal on every rank.
        ranks: the job.
        owners: (N,) int64 on the host: the rank that has a sample's row.
        slots: (N,) int64 on the host: where it lies in `own` there.
        columns: (c,) int64 on the device: which entries along the second dimension of `own` a batch
            gets; None: the whole row.
    """

    place: Tensor
    own: Tensor
    ranks: Ranks
    owners: Samples
    slots: Samples
    columns: Tensor | None = None

    @staticmethod
    def share(index: Tensor, own: Tensor, count: int, ranks: Ranks) -> SampleRows:
        """Tell all ranks which samples' rows lie where; every rank must call.

        Args:
            index: (n_rank,) int64 on the device, the sample of each row of `own`.
            own: (n_rank, ...) as the attribute.
            count: N, samples of the set.
            ranks: the job.
        """
        everyone = gather_rows(index, ranks)
        sizes = gather_objects(len(index), ranks)
        place = torch.zeros(count, dtype=torch.int64, device=index.device)
        place[everyone] = torch.arange(len(everyone), device=index.device)
        samples = everyone.cpu().numpy()
        owners, slots = np.zeros(count, np.int64), np.zeros(count, np.int64)
        owners[samples] = np.repeat(np.arange(len(sizes)), sizes)
        slots[samples] = np.concatenate([np.arange(size) for size in sizes])
        return SampleRows(place, own, ranks, owners, slots)

    def of_columns(self, columns: Tensor) -> SampleRows:
        """Return the same rows, of which a batch gets these entries of the second dimension."""
        return replace(self, columns=columns)

    def list_requests(
        self, loader: Loader, stream: Stream, epoch: int
    ) -> list[list[Samples]] | None:
        """List, for each batch of an epoch, the samples of each rank's part; every rank must call.

        None where nothing need be asked, or the loader does not say what it will read.
        """
        if self.ranks.world == 1 or not isinstance(loader, Backend):
            return None
        own = [part.samples for part in loader.parts(stream, epoch)]
        return [[*parts] for parts in zip(*gather_objects(own, self.ranks), strict=True)]

    def attach(self, batch: Batch, requests: Sequence[Samples] | None = None) -> Batch:
        """Return the batch with the rows of its samples; every rank must call, with its own part.

        Args:
            batch: on the device.
            requests: the samples of each rank's part; None: the ranks tell each other, which waits
                for the device.
        """
        if self.ranks.world == 1:
            return batch._replace(rows=self._pick(self.place[batch.index]))
        if requests is None:
            own = batch.index.cpu().numpy()
            requests = gather_objects(own, self.ranks)

        def make(samples: Samples) -> Tensor:
            slots = to_device(torch.from_numpy(self.slots[samples]), self.own.device)
            return self._pick(slots)

        columns = [(samples,) for samples in requests]
        return batch._replace(rows=answer_requests(columns, self.owners, self.ranks.rank, make))

    def _pick(self, slots: Tensor) -> Tensor:
        """(b, ...) or (b, c, ...): rows of this rank."""
        if self.columns is None:
            return self.own[slots]
        return self.own[slots[None], self.columns[:, None]].transpose(0, 1)
