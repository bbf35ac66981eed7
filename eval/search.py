"""The k nearest database rows of each query, exactly, whatever proposes the candidates.

A fast search (float32 or bfloat16 GEMM, or FAISS) proposes more candidates than asked. These are
scored again in float64, and the answer stands only where the worst kept score is farther above the
worst proposed one than the fast search can err. The other queries are scored against everything in
float64. Scores are inner products plus a bias of the database row: for cosine, of unit rows; for
l2, -|q - x|^2 / 2 = q.x - |x|^2 / 2 - |q|^2 / 2, whose last term no ranking needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
from letheon.eval import search_faiss
from letheon.kernels.keyed import permutation

Metric = Literal["cosine", "l2"]
Proposer = Literal["auto", "torch", "torch-bf16", "torch-fp64", "faiss", "faiss-ivf"]
"""What proposes candidates.

- ``torch``, ``torch-bf16``: tiled GEMM with a running top-k, in float32 or bfloat16.
- ``torch-fp64``: no proposal, every score in float64: the specification.
- ``auto``: torch-fp64 for a small database, for which scoring candidates again costs more than it
  saves, else torch.
- ``faiss``: a flat index on the CPU, or on the GPUs where the installed FAISS has them.
- ``faiss-ivf``: inverted lists: misses neighbours, and says what share it finds.
"""

_GRID = 2.0**36  # scores closer than 2^-36 of the largest possible one are equal
_INDEX_BITS = 26  # beside 37 bits of score and a sign
_LEAST = torch.iinfo(torch.int64).min
_SPARE = 32  # candidates beyond k
_TILE = {"cpu": (1024, 8192), "cuda": (4096, 65536)}  # queries x database rows of one GEMM
_WORTH = 128  # database rows a candidate, below which proposing costs more than it saves
_SAMPLED = 256  # queries on which recall is measured


class Nearest(NamedTuple):
    """Positions in the database, nearest first."""

    places: Tensor  # (Q, k) int64
    similarity: Tensor  # (Q, k) float64: the cosine, or -d^2 / 2 for l2
    recall: float = 1.0  # share of the true neighbours found; below 1 for faiss-ivf only


class _Scores:
    """score(q, x_i) = q . (x_i - centre) scale_i + bias_i, at most about 1 in size.

    `database` holds this rank's rows, wherever they lie; `queries` and all arithmetic are on
    `ranks.device`. What scores are relative to is the same on every rank.
    """

    def __init__(self, database: Tensor, queries: Tensor, metric: Metric, ranks: Ranks) -> None:
        self.database, self.device = database, ranks.device
        self.tile = _TILE.get(self.device.type, _TILE["cpu"])
        self.centre: Tensor | None = None
        wide = queries.to(self.device).double()
        if metric == "cosine":
            norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            self.queries = wide / torch.where(norms > 0, norms, 1.0)  # (Q, D) float64
            lengths = self._lengths()
            self.scale = 1 / torch.where(lengths > 0, lengths, 1.0).sqrt()  # (N,) float64
            self.bias = torch.zeros_like(lengths)  # (N,) float64
            self.unit, self.offset = 1.0, torch.zeros_like(norms)
            return
        # Distances do not change when both sides move: the smaller the vectors, the less is lost.
        sums = [torch.zeros_like(wide[0]), wide.new_tensor(len(database))]
        for rows in self._tiles():
            sums[0] += rows.sum(dim=0)
        sum_over_ranks(sums, ranks)
        self.centre = sums[0] / sums[1]
        self.queries = wide - self.centre
        lengths, asked = self._lengths(), self.queries.square().sum(dim=1, keepdim=True)
        far = float(gather_rows(torch.cat([lengths, lengths.new_zeros(1)]), ranks).max())
        self.unit = max(float(asked.max()) ** 0.5 * far**0.5 + far / 2, 1e-300)
        self.scale = torch.full_like(lengths, 1 / self.unit)
        self.bias = lengths / (-2 * self.unit)
        self.offset = asked / 2

    def moved(self, rows: Tensor) -> Tensor:
        """(..., D) float64 on the device, about the centre, from raw database rows."""
        wide = rows.to(self.device).double()
        return wide if self.centre is None else wide - self.centre

    def _tiles(self) -> Iterator[Tensor]:
        for rows in self.database.split(self.tile[1]):
            yield self.moved(rows)

    def _lengths(self) -> Tensor:
        """(N,) float64: |x - centre|^2."""
        return torch.cat([rows.square().sum(dim=1) for rows in self._tiles()])

    def prepared(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Tiles: the first position, (n, D) float64 moved and scaled rows, (n,) their biases."""
        start = 0
        for rows in self._tiles():
            here = slice(start, start + len(rows))
            yield start, rows * self.scale[here, None], self.bias[here]
            start += len(rows)


def _keys(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 that order by score on the grid, then by the lower position."""
    return ((scores * _GRID).round().to(torch.int64) << _INDEX_BITS) - positions


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and scores on the grid: the position is what misses to the next multiple."""
    positions = (-keys) & ((1 << _INDEX_BITS) - 1)
    return positions, ((keys + positions) >> _INDEX_BITS).double() / _GRID


@contextmanager
def _full_float32() -> Iterator[None]:
    """No tf32 inside: the error bound is float32's."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _product(queries: Tensor, rows: Tensor) -> Tensor:
    """(q, n) float32 from operands of one dtype; bfloat16 is summed in float32."""
    if queries.dtype == torch.bfloat16:
        if queries.is_cuda:
            return torch.mm(queries, rows.T, out_dtype=torch.float32)
        return queries.float() @ rows.float().T
    return queries @ rows.T


def _propose(scores: _Scores, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Q, m) fast scores and positions of the best m rows, by tiles with a running top-m."""
    parts = scores.queries.to(dtype).split(scores.tile[0])
    best: list[tuple[Tensor, Tensor]] = []
    for start, rows, bias in scores.prepared():
        tile = rows.to(dtype)
        for number, part in enumerate(parts):
            fast = _product(part, tile)
            fast += bias.to(fast.dtype)
            values, places = fast.topk(min(m, fast.shape[1]), dim=1, sorted=False)
            places = places + start
            if start:
                values = torch.cat([best[number][0], values], dim=1)
                places = torch.cat([best[number][1], places], dim=1)
                values, kept = values.topk(min(m, values.shape[1]), dim=1, sorted=False)
                best[number] = (values, places.gather(1, kept))
            else:
                best.append((values, places))
    return torch.cat([a for a, _ in best]), torch.cat([b for _, b in best])


def _propose_faiss(scores: _Scores, m: int, lists: bool) -> tuple[Tensor, Tensor]:
    queries = search_faiss.packed(scores.queries, torch.ones_like(scores.queries[:, 0]))
    tiles = (search_faiss.packed(rows, bias) for _, rows, bias in scores.prepared())
    if lists:
        values, places = search_faiss.inverted_lists(list(tiles), queries, m)
    else:
        values, places = search_faiss.flat(tiles, queries, m)
    return values.to(scores.device), places.to(scores.device)


def _rescored(scores: _Scores, places: Tensor) -> Tensor:
    """(Q, m) float64 exact scores of the proposed rows; -2 where there is none."""
    # On a CPU a part stays in the cache between its gathering and its product.
    held = 2**25 if scores.device.type == "cuda" else 2**19
    step = max(1, held // (scores.queries.shape[1] * places.shape[1]))
    parts = []
    for start in range(0, len(places), step):
        chosen = places[start : start + step].clamp(min=0)
        rows = scores.moved(scores.database[chosen.to(scores.database.device)])  # (q, m, D)
        products = torch.bmm(rows, scores.queries[start : start + step, :, None])[:, :, 0]
        parts.append(products * scores.scale[chosen] + scores.bias[chosen])
    return torch.where(places < 0, -2.0, torch.cat(parts))


def _exhaustive(scores: _Scores, chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(q, k) positions and float64 scores of the chosen queries, from every score."""
    parts = scores.queries[chosen].split(max(1, scores.tile[0] // 2))
    best: list[Tensor] = []
    for start, rows, bias in scores.prepared():
        positions = torch.arange(start, start + len(rows), device=rows.device)
        for number, part in enumerate(parts):
            found = _keys(part @ rows.T + bias, positions)
            if start:
                found = torch.cat([best[number], found], dim=1)
            found = found.topk(min(k, found.shape[1]), dim=1).values
            best[number : number + 1] = [found]
    return _decoded(torch.cat(best))


def _local(scores: _Scores, k: int, backend: Proposer) -> tuple[Tensor, Tensor]:
    """(Q, k) positions and float64 scores among this rank's rows, nearest first."""
    everything = torch.arange(len(scores.queries), device=scores.device)
    n, width = scores.database.shape
    m = min(n, 2 * k + 4 * _SPARE if backend == "torch-bf16" else k + _SPARE)
    if backend == "torch-fp64" or (backend == "auto" and n <= _WORTH * m):
        return _exhaustive(scores, everything, k)
    with _full_float32():
        if backend in ("faiss", "faiss-ivf"):
            fast, places = _propose_faiss(scores, m, backend == "faiss-ivf")
        else:
            dtype = torch.bfloat16 if backend == "torch-bf16" else torch.float32
            fast, places = _propose(scores, m, dtype)
    exact = _rescored(scores, places)
    order = _keys(exact, places).topk(k, dim=1).indices  # (Q, k)
    places, values = places.gather(1, order), exact.gather(1, order)
    if backend == "faiss-ivf":
        unproven = values[:, -1] <= -2  # the lists read held fewer than k rows
    elif m == n:
        return places, values
    else:
        error = (width + 4) * 2.0**-24
        if backend == "torch-bf16":
            error = 4 * float((fast.double() - exact).abs().max())
        unproven = values[:, -1] <= fast.amin(dim=1).double() + error
    again = unproven.nonzero()[:, 0]
    if len(again):
        places[again], values[again] = _exhaustive(scores, again, k)
    return places, values


def nearest(
    database: Tensor,
    queries: Tensor,
    k: int,
    metric: Metric = "cosine",
    backend: Proposer = "auto",
    ranks: Ranks | None = None,
) -> Nearest:
    """The k nearest database rows of each query, nearest first, ties to the lower position.

    Args:
        database: (N, D) floating point and finite, N below 2^26, the same on every rank; it may
            lie in host memory or a memory-mapped file whatever the device.
        queries: (Q, D), Q > 0, the same on every rank.
        k: in 1..N.
        metric: cosine or l2.
        backend: what proposes candidates. With float32 the proof is by the bound (D + 4) 2^-24 on
            the error of an inner product of unit vectors; with bfloat16 by four times the largest
            error seen among the rescored pairs; faiss-ivf has none.
        ranks: each rank searches its share of the database on its device, and all get the whole
            answer; default: this process alone, on the database's device.

    Returns:
        On the device, the same on every rank.
    """
    n = len(database)
    assert n < 2**_INDEX_BITS, "positions do not fit the key"
    ranks = ranks or Ranks(device=database.device)
    start = ranks.rank * n // ranks.world
    own = database[start : (ranks.rank + 1) * n // ranks.world]
    scores = _Scores(own, queries, metric, ranks)
    if len(own):
        places, values = _local(scores, min(k, len(own)), backend)
        keys = _keys(values, places + start)
    else:
        keys = torch.zeros(len(queries), 0, dtype=torch.int64, device=ranks.device)
    if ranks.world > 1:
        padded = torch.full((1, len(queries), k), _LEAST, device=ranks.device)
        padded[0, :, : keys.shape[1]] = keys
        keys = gather_rows(padded, ranks).movedim(0, 1).flatten(1).topk(k, dim=1).values
    places, values = _decoded(keys)
    found = Nearest(places, values * scores.unit - scores.offset)
    if backend == "faiss-ivf":
        return found._replace(recall=_recall(database, queries, found, metric, ranks))
    return found


def _recall(
    database: Tensor, queries: Tensor, found: Nearest, metric: Metric, ranks: Ranks
) -> float:
    """Share of the true neighbours that were found, over a fixed sample of the queries."""
    k = found.places.shape[1]
    sample = permutation(0, "recall", 0, len(queries))[:_SAMPLED]
    exact = nearest(database, queries[sample.to(queries.device)], k, metric, "torch", ranks)
    ours = found.places[sample.to(found.places.device)]
    return float((ours[:, :, None] == exact.places[:, None, :]).any(dim=2).double().mean())
