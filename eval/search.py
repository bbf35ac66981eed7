"""The k nearest database rows of each query, exactly, whatever proposes the candidates.

A fast search (float32 or bfloat16 GEMM, or FAISS) proposes more candidates than asked. These are
scored again in float64, and the answer stands only where the worst kept score is farther above the
worst proposed one than the fast search can err. The other queries are scored against everything in
float64. Scores are inner products plus a bias of the database row: for cosine, of unit rows; for
l2, -|q - x|^2 / 2 = q.x - |x|^2 / 2 - |q|^2 / 2, whose last term no ranking needs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from letheon.loaders.errors import InputError

Metric = Literal["cosine", "l2"]
Proposer = Literal["auto", "torch", "torch-bf16", "torch-fp64", "faiss"]
"""What proposes candidates.

- ``torch``, ``torch-bf16``: tiled GEMM with a running top-k, in float32 or bfloat16; auto is torch.
- ``torch-fp64``: no proposal, every score in float64: the specification.
- ``faiss``: a flat index on the CPU, or on the GPUs where the installed FAISS has them.
"""

_GRID = 2.0**36  # scores closer than 2^-36 of the largest possible one are equal
_INDEX_BITS = 26  # beside 37 bits of score and a sign
_SPARE = 32  # candidates beyond k
_TILE = {"cpu": (1024, 8192), "cuda": (4096, 65536)}  # queries x database rows of one GEMM


class Nearest(NamedTuple):
    """Positions in the database, nearest first."""

    places: Tensor  # (Q, k) int64
    similarity: Tensor  # (Q, k) float64: the cosine, or -d^2 / 2 for l2


class _Scores:
    """score(q, x) = q . prepared(x) + bias(x), at most about 1 in size, for both metrics."""

    def __init__(self, database: Tensor, queries: Tensor, metric: Metric) -> None:
        self.database, self.metric = database, metric
        wide = queries.double()
        if metric == "cosine":
            self.queries = _unit(wide)  # (Q, D) float64
            self.unit, self.offset = 1.0, torch.zeros(len(queries), 1).to(wide)
            return
        # Distances do not change when both sides move: the smaller the vectors, the less is lost.
        self.centre = torch.zeros_like(wide[0])
        for rows in database.split(_TILE["cpu"][1]):
            self.centre += rows.double().sum(0) / len(database)
        self.queries = wide - self.centre
        lengths = self.queries.square().sum(1, keepdim=True)
        far = max(
            float((rows.double() - self.centre).square().sum(1).max())
            for rows in database.split(_TILE["cpu"][1])
        )
        self.unit = max(float(lengths.max()) ** 0.5 * far**0.5 + far / 2, 1e-300)
        self.offset = lengths / 2

    def prepared(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) float64 and (n,) float64 from raw database rows of any leading shape."""
        wide = rows.double()
        if self.metric == "cosine":
            return _unit(wide), torch.zeros_like(wide[..., 0])
        moved = wide - self.centre
        return moved / self.unit, moved.square().sum(-1) / (-2 * self.unit)


def _unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def _keys(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 that order by score on the grid, then by the lower position."""
    return ((scores * _GRID).round().to(torch.int64) << _INDEX_BITS) - positions


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
    """(q, n) float32 or float64 from operands of one dtype; bfloat16 is summed in float32."""
    if queries.dtype == torch.bfloat16:
        if queries.is_cuda:
            return torch.mm(queries, rows.T, out_dtype=torch.float32)
        return queries.float() @ rows.float().T
    return queries @ rows.T


def _propose(scores: _Scores, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Q, m) fast scores and positions of the best m rows, by tiles with a running top-m."""
    per_query, per_row = _TILE.get(scores.queries.device.type, _TILE["cpu"])
    parts = scores.queries.to(dtype).split(per_query)
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(scores.database), per_row):
        rows, bias = scores.prepared(scores.database[start : start + per_row])
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


def _propose_faiss(scores: _Scores, m: int) -> tuple[Tensor, Tensor]:
    """As `_propose`, by a flat inner-product index; the bias is one more column."""
    if importlib.util.find_spec("faiss") is None:
        raise InputError('got backend faiss, which is not installed; pip install "letheon[faiss]"')
    import faiss

    def packed(rows: Tensor, last: Tensor) -> Any:
        return torch.cat([rows, last[:, None]], dim=1).float().cpu().contiguous().numpy()

    queries = packed(scores.queries, torch.ones_like(scores.queries[:, 0]))
    index: Any = faiss.IndexFlatIP(queries.shape[1])
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_all_gpus(index)
    for rows in scores.database.split(_TILE["cpu"][1]):
        index.add(packed(*scores.prepared(rows)))
    values, places = index.search(queries, m)
    device = scores.queries.device
    return torch.from_numpy(values).to(device), torch.from_numpy(places).to(device)


def _rescored(scores: _Scores, places: Tensor) -> Tensor:
    """(Q, m) float64 exact scores of the proposed rows."""
    width = scores.queries.shape[1]
    step = max(1, 2**23 // (width * places.shape[1]))  # 64 MiB of float64 at a time
    parts = []
    for start in range(0, len(places), step):
        chosen = places[start : start + step]
        rows, bias = scores.prepared(scores.database[chosen])  # (q, m, D), (q, m)
        query = scores.queries[start : start + step, :, None]
        parts.append(torch.bmm(rows, query)[:, :, 0] + bias)
    return torch.cat(parts)


def _exhaustive(scores: _Scores, chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(q, k) positions and float64 scores of the chosen queries, from every score."""
    per_query, per_row = (size // 2 for size in _TILE.get(chosen.device.type, _TILE["cpu"]))
    best: Tensor | None = None
    queries = scores.queries[chosen]
    for start in range(0, len(scores.database), per_row):
        rows, bias = scores.prepared(scores.database[start : start + per_row])
        positions = torch.arange(start, start + len(rows), device=rows.device)
        found = torch.cat(
            [
                _keys(part @ rows.T + bias, positions).topk(min(k, len(rows)), dim=1).values
                for part in queries.split(per_query)
            ]
        )
        joined = found if best is None else torch.cat([best, found], dim=1)
        best = joined.topk(min(k, joined.shape[1]), dim=1).values
    assert best is not None, "an empty database"
    # A key is score << bits minus position: the position is what is missing to the next multiple.
    places = (-best) & ((1 << _INDEX_BITS) - 1)
    values = ((best + places) >> _INDEX_BITS).double() / _GRID
    return places, values


def nearest(
    database: Tensor, queries: Tensor, k: int, metric: Metric = "cosine", backend: Proposer = "auto"
) -> Nearest:
    """The k nearest database rows of each query, nearest first, ties to the lower position.

    Args:
        database: (N, D) floating point and finite, N at most 2^26; the search runs on its device.
        queries: (Q, D) on the same device.
        k: in 1..N.
        metric: cosine or l2.
        backend: what proposes candidates. With float32 the proof is by the bound (D + 4) 2^-24 on
            the error of an inner product of unit vectors; with bfloat16 by four times the largest
            error seen among the rescored pairs.
    """
    assert len(database) < 2**_INDEX_BITS, "positions do not fit the key"
    scores = _Scores(database, queries, metric)
    everything = torch.arange(len(queries), device=database.device)
    if backend == "torch-fp64" or len(queries) == 0:
        index, values = _exhaustive(scores, everything, k)
        return Nearest(index, values * scores.unit - scores.offset)
    m = min(len(database), k + _SPARE if backend != "torch-bf16" else 2 * k + 4 * _SPARE)
    with _full_float32():
        if backend == "faiss":
            fast, places = _propose_faiss(scores, m)
        else:
            dtype = torch.bfloat16 if backend == "torch-bf16" else torch.float32
            fast, places = _propose(scores, m, dtype)
    exact = _rescored(scores, places)
    order = _keys(exact, places).topk(k, dim=1).indices  # (Q, k)
    index, values = places.gather(1, order), exact.gather(1, order)
    if m < len(database):
        error = (database.shape[1] + 4) * 2.0**-24
        if backend == "torch-bf16":
            error = 4 * float((fast.double() - exact).abs().max())
        unproven = values[:, -1] <= fast.amin(1).double() + error
        again = unproven.nonzero()[:, 0]
        if len(again):
            index[again], values[again] = _exhaustive(scores, again, k)
    return Nearest(index, values * scores.unit - scores.offset)
