"""Scores of database rows, in float64 as they are defined and in float32 as they are searched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks

Metric = Literal["cosine", "l2"]

# Numbers in float64 at once: on one core what its cache holds; on several, where each operation
# waits for them all, more; on a GPU.
_CACHED, _SHARED, _HELD = 2**16, 2**18, 2**25
_PREPARED = 2**23  # the same, for whole tiles
_RANGE = 2.0**60  # norms within 1/_RANGE.._RANGE cannot leave float32's range in a product


class Scores:
    """score(q, x_i) = q . (x_i - center) scale_i + bias_i, at most about 1 in size.

    `database` holds this rank's rows, wherever they lie, and `own` its queries, on `ranks.device`
    as all arithmetic; `queries` are those being asked, of any rank. What scores are relative to is
    the same on every rank, all of which must make theirs at the same time.
    """

    def __init__(
        self, database: Tensor, queries: Tensor, metric: Metric, ranks: Ranks, tile: tuple[int, int]
    ) -> None:
        self.database, self.device = database, ranks.device
        self.tile = tile
        cores = torch.get_num_threads()
        self.held = _CACHED if cores == 1 else _SHARED * cores
        if self.device.type == "cuda":
            self.held = _HELD
        self.center: Tensor | None = None
        wide = queries.to(self.device).double()
        if metric == "cosine":
            norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            self.own = self.queries = wide / torch.where(norms > 0, norms, 1.0)  # (q, D) float64
            lengths = self._lengths()
            filled = torch.where(lengths > 0, lengths, 1.0).sqrt()
            self.scale = 1 / filled  # (N,) float64
            self.bias = torch.zeros_like(lengths)  # (N,) float64
            self.unit, self.offset = 1.0, torch.zeros_like(norms)
            self.plain = bool(((filled < _RANGE) & (filled > 1 / _RANGE)).all())
            return
        # Distances do not change when both sides move: the smaller the vectors, the less is lost.
        sums = [wide.new_zeros(wide.shape[1]), wide.new_tensor(len(database))]
        for rows in self._tiles():
            sums[0] += rows.sum(dim=0)
        sum_over_ranks(sums, ranks)
        self.center = sums[0] / sums[1]
        if database.dtype != torch.float64:
            self.center = self.center.float().double()  # any center will do: one float32 can hold
        self.own = self.queries = wide - self.center
        lengths, query_lengths = self._lengths(), self.own.square().sum(dim=1, keepdim=True)
        ends = [torch.cat([each.flatten(), lengths.new_zeros(1)]).max()
                for each in (lengths, query_lengths)]  # fmt: skip
        far, long = gather_rows(torch.stack(ends)[None], ranks).amax(dim=0).tolist()
        self.unit = max(long**0.5 * far**0.5 + far / 2, 1e-300)
        self.scale = torch.full_like(lengths, 1 / self.unit)
        self.bias = lengths / (-2 * self.unit)
        self.offset = query_lengths / 2
        self.plain = 1 / _RANGE < self.unit < _RANGE and long < _RANGE

    def center_rows(self, rows: Tensor) -> Tensor:
        """Center raw database rows: (..., D) float64 on the device."""
        wide = rows.to(self.device).double()
        return wide if self.center is None else wide - self.center

    def _tiles(self) -> Iterator[Tensor]:
        """Yield all rows by (n, D) float64, few at once."""
        if not len(self.database):
            return
        for rows in self.database.split(max(1, self.held // self.database.shape[1])):
            yield self.center_rows(rows)

    def _lengths(self) -> Tensor:
        """(N,) float64: |x - center|^2."""
        none = torch.zeros(0, dtype=torch.float64, device=self.device)
        return torch.cat([none, *(rows.square().sum(dim=1) for rows in self._tiles())])

    def tiles(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield tiles: the first position, (n, D) float64 centered, scaled rows, (n,) biases."""
        step = max(1, min(self.tile[1], _PREPARED // self.database.shape[1]))
        for start in range(0, len(self.database), step):
            part = slice(start, start + step)
            yield (
                start,
                self.center_rows(self.database[part]) * self.scale[part, None],
                self.bias[part],
            )

    def fast(
        self, dtype: torch.dtype
    ) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
        """Tiles: the first position, (n, D) rows in `dtype`, (n,) float32 factors and biases.

        Where a factor or a bias is None it is 1 or 0. Rows are in float32 what they are in memory,
        or rounded once; only numbers that could leave its range are scaled in float64 first.
        """
        for start in range(0, len(self.database), self.tile[1]):
            part = slice(start, start + self.tile[1])
            rows, scale = self.database[part], self.scale[part].float()
            bias = None if self.center is None else self.bias[part].float()
            if not self.plain:
                yield start, (self.center_rows(rows) * self.scale[part, None]).to(dtype), None, bias
                continue
            if self.center is None:
                near = rows.to(self.device)
            elif rows.dtype == torch.float64:
                near = self.center_rows(rows)
            else:
                near = rows.to(self.device).float() - self.center.float()
            yield start, near.to(dtype), scale, bias
