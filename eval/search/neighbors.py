"""The k nearest database rows of each query, exactly, whatever proposes the candidates.

A fast search (float32 or bfloat16 GEMM, or FAISS) proposes more candidates than asked. Those whose
fast score reaches the k-th best one, or misses it by no more than the fast search can err, are
scored again in float64, and the answer stands only where there were no more such rows than
candidates. The other queries are scored against everything in float64. Where only the sets of the k
nearest are asked for (`nearest_sets`), no more is scored again than what may lie on either side of
the k-th place. Scores are inner products
plus a bias of the database row: for cosine, of unit rows; for l2, -|q - x|^2 / 2 = q.x - |x|^2 / 2
- |q|^2 / 2, whose last term no ranking needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from letheon.engine.distributed import Ranks, gather_rows, sum_over_ranks
from letheon.eval.search import faiss_index
from letheon.eval.search.scores import Metric, Scores
from letheon.kernels.keyed import permutation

Proposer = Literal[
    "auto", "torch", "torch-bf16", "torch-fp64", "faiss", "faiss-ivf", "faiss-cagra"
]  # fmt: skip
"""What proposes candidates.

- ``torch``, ``torch-bf16``: tiled GEMM with a running top-k, in float32 or bfloat16.
- ``torch-fp64``: no proposal, every score in float64: the specification.
- ``auto``: torch-fp64 for a small database, where scoring the candidates again costs more than
  proposing saves; else torch.
- ``faiss``: a flat index on the CPU, or on the GPUs where the installed FAISS has them.
- ``faiss-ivf``: inverted lists: misses neighbors, and says what share it finds.
- ``faiss-cagra``: a graph on a GPU, where FAISS has cuVS: likewise; never run here.
"""

_APPROXIMATE = {"faiss-ivf": faiss_index.inverted_lists, "faiss-cagra": faiss_index.cagra}

_GRID = 2.0**36  # scores closer than 2^-36 of the largest possible one are equal
_INDEX_BITS = 26  # beside 37 bits of score and a sign
_LEAST = torch.iinfo(torch.int64).min
_BELOW_SIGN = torch.iinfo(torch.int32).max
_NONE = -1.5  # the score of no row
_SPARE = 16  # candidates beyond k, at least
_TILE = {"cpu": (512, 32768), "cuda": (4096, 65536)}  # queries x database rows of one GEMM
_WORTH = {"cpu": 40, "cuda": 2}
"""Database rows a candidate, below which proposing costs more than it saves. On a CPU by
`bench_eval.py --only search`: at k of 200 every score in float64 is quicker for 2,000 and 8,000
rows, slower for 32,000. Not measured on a GPU."""
_PARTITIONED = 2**17  # values that are partitioned at once
_SAMPLED = 256  # queries on which recall is measured


class Nearest(NamedTuple):
    """Positions in the database, nearest first."""

    places: Tensor  # (Q, k) int64
    similarity: Tensor  # (Q, k) float64: the cosine, or -d^2 / 2 for l2
    recall: float = 1.0  # share of the true neighbors found; below 1 for faiss-ivf and -cagra only


def _keys(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 that order by score on the grid, then by the lower position."""
    return ((scores * _GRID).round().to(torch.int64) << _INDEX_BITS) - positions


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
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


def _largest(keys: Tensor, k: int) -> Tensor:
    """(q, k) largest of (q, n) int64 keys, the largest first."""
    k = min(k, keys.shape[1])
    if keys.is_cuda:
        return keys.topk(k, dim=1).values
    best = np.partition(keys.numpy(), keys.shape[1] - k, axis=1)[:, -k:]
    return torch.from_numpy(np.sort(best, axis=1)).flip(1)


def _pack(fast: Tensor, places: Tensor) -> NDArray[np.int64]:
    """(q, n) keys of float32 scores in host memory and their positions, that order by the score.

    One number of both, which numpy sorts and partitions several times as fast as it finds an order:
    the bits of a float count upwards, those of a negative one downwards.
    """
    bits = fast.contiguous().numpy().view(np.int32)
    signs = bits >> 31
    signs &= _BELOW_SIGN
    signs ^= bits
    keys = signs.astype(np.int64)
    keys <<= 32
    keys += places.numpy()
    return keys


def _descending(fast: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(q, m) float32 scores and their positions (-1: none), the largest score first."""
    if fast.is_cuda:
        order = fast.argsort(dim=1, descending=True)
        return fast.gather(1, order), places.gather(1, order)
    sorted_keys = _pack(fast, places + 1)
    sorted_keys.sort(axis=1)
    keys = torch.from_numpy(sorted_keys).flip(1)
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _BELOW_SIGN)).view(torch.float32), (keys & 0xFFFFFFFF) - 1


def _columns(values: Tensor, m: int) -> Tensor:
    """(q, m) int64 columns of the largest of (q, n) values, in no order."""
    n = values.shape[1]
    if values.is_cuda or m >= n or not len(values):
        return values.topk(min(m, n), dim=1, sorted=False).indices
    columns, parts = torch.arange(n), []
    for rows in values.split(max(1, _PARTITIONED // n)):  # few enough to stay in a cache
        keys = _pack(rows, columns)
        keys.partition(n - m, axis=1)
        parts.append(keys[:, n - m :] & 0xFFFFFFFF)
    return torch.from_numpy(np.concatenate(parts))


def _top(values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(q, m) largest of (q, n) values and their columns, in no order.

    The m groups of columns with the largest maxima hold them: the value of a column left out is
    reached by each of these maxima.
    """
    n = values.shape[1]
    size = int((n / m) ** 0.5)
    if size < 3:
        columns = _columns(values, m)
        return values.gather(1, columns), columns
    groups = n // size  # group g: columns g, g + groups, ...; the rest stands for itself
    best = _columns(values[:, : groups * size].unflatten(1, (size, groups)).amax(dim=1), m)
    steps = torch.arange(0, groups * size, groups, device=values.device)
    rest = torch.arange(groups * size, n, device=values.device).expand(len(values), -1)
    columns = torch.cat([(best[:, None] + steps[:, None]).flatten(1), rest], dim=1)
    found = values.gather(1, columns)
    inner = _columns(found, m)
    return found.gather(1, inner), columns.gather(1, inner)


def _propose(scores: Scores, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Q, m) fast scores and positions of the best m rows, by tiles with a running top-m."""
    parts = scores.queries.to(dtype).split(scores.tile[0])
    best: list[tuple[Tensor, Tensor]] = []
    for start, rows, scale, bias in scores.fast(dtype):
        for number, part in enumerate(parts):
            fast = _product(part, rows)
            if scale is not None:
                fast *= scale
            if bias is not None:
                fast += bias
            values, places = _top(fast, m)
            places = places + start
            if start:
                values = torch.cat([best[number][0], values], dim=1)
                places = torch.cat([best[number][1], places], dim=1)
                values, order = values.topk(min(m, values.shape[1]), dim=1, sorted=False)
                best[number] = (values, places.gather(1, order))
            else:
                best.append((values, places))
    return torch.cat([a for a, _ in best]), torch.cat([b for _, b in best])


def _propose_faiss(scores: Scores, m: int, backend: Proposer) -> tuple[Tensor, Tensor]:
    queries = faiss_index.pack_rows(scores.queries, torch.ones_like(scores.queries[:, 0]))
    tiles = (faiss_index.pack_rows(rows, bias) for _, rows, bias in scores.tiles())
    if backend in _APPROXIMATE:
        values, places = _APPROXIMATE[backend](list(tiles), queries, m)
    else:
        values, places = faiss_index.flat(tiles, queries, m)
    return values.to(scores.device), places.to(scores.device)


def _rescore(scores: Scores, places: Tensor, counts: Tensor) -> Tensor:
    """(Q, m) float64 exact scores of the first proposed rows of each query, _NONE for the others.

    Args:
        scores: of what.
        places: (Q, m) int64, -1 where there is none.
        counts: (Q,) int64: how many of each query; those beyond may be scored too.
    """
    exact = torch.full(places.shape, _NONE, dtype=torch.float64, device=scores.device)
    width, all_counts = scores.queries.shape[1], counts.tolist()
    step = max(1, scores.held // (width * max(all_counts)))
    for start in range(0, len(places), step):
        m = max(all_counts[start : start + step])
        query = scores.queries[start : start + step, :, None]  # (q, D, 1)
        block = places[start : start + step, :m].clamp(min=0)
        parts = []
        for part in block.split(max(1, scores.held // (width * step)), dim=1):
            rows = scores.database.index_select(0, part.flatten().to(scores.database.device))
            parts.append(
                torch.bmm(scores.center_rows(rows).view(*part.shape, width), query)[:, :, 0]
            )
        found = torch.cat(parts, dim=1) * scores.scale[block] + scores.bias[block]
        exact[start : start + step, :m] = found
    return exact.masked_fill_(places < 0, _NONE)


def _search_all(scores: Scores, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(q, k) positions and float64 scores of some queries, from every score."""
    parts = scores.queries[queries].split(max(1, scores.tile[0] // 2))
    best: list[Tensor] = []
    for start, rows, bias in scores.tiles():
        positions = torch.arange(start, start + len(rows), device=rows.device)
        for number, part in enumerate(parts):
            found = _keys(part @ rows.T + bias, positions)
            if start:
                found = torch.cat([best[number], found], dim=1)
            found = _largest(found, k)
            best[number : number + 1] = [found]
    return _decode(torch.cat(best))


def _doubt(width: int) -> float:
    """How far below the k-th best fast score a row is truly below k others, by more than the grid.

    So far above it, it is truly among the first k.
    """
    terms = (width + 8) * 2.0**-24
    return 2 * terms / (1 - terms) + 2 / _GRID


def _local(scores: Scores, k: int, backend: Proposer) -> tuple[Tensor, Tensor]:
    """(Q, k) positions and float64 scores among this rank's rows, nearest first."""
    everything = torch.arange(len(scores.queries), device=scores.device)
    n, width = scores.database.shape
    m = min(n, 2 * k + 8 * _SPARE if backend == "torch-bf16" else k + k // 8 + _SPARE)
    small = n <= m * _WORTH.get(scores.device.type, _WORTH["cpu"])
    if backend == "torch-fp64" or (backend == "auto" and small):
        return _search_all(scores, everything, k)
    with _full_float32():
        if backend == "faiss" or backend in _APPROXIMATE:
            fast, places = _propose_faiss(scores, m, backend)
        else:
            dtype = torch.bfloat16 if backend == "torch-bf16" else torch.float32
            fast, places = _propose(scores, m, dtype)
    fast, places = _descending(fast, places)
    floor = fast[:, k - 1 : k].double() - _doubt(width)
    counts, unproven = (fast >= floor).sum(dim=1), fast[:, -1:] >= floor
    if backend in _APPROXIMATE or backend == "torch-bf16":
        counts = counts.new_full((len(places),), m)
    exact = _rescore(scores, places, counts)
    if backend == "torch-bf16":
        kth = exact.topk(k, dim=1).values[:, -1:]
        unproven = kth <= fast[:, -1:] + 4 * float((fast - exact).abs().max())
    order = _keys(exact, places).topk(k, dim=1).indices  # (Q, k)
    places, values = places.gather(1, order), exact.gather(1, order)
    if backend in _APPROXIMATE:
        unproven = values[:, -1:] == _NONE  # fewer than k rows were found
    elif m == n:
        return places, values
    again = unproven.nonzero()[:, 0]
    if len(again):
        places[again], values[again] = _search_all(scores, again, k)
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

    Over several ranks database and queries stay where they are: the queries of each rank in turn
    are shown to all, each searches its own rows, and the k best of all ranks' answers are the
    answer. Nothing depends on how rows are shared out.

    Args:
        database: (N, D) floating point and finite, this rank's rows; it may lie in host memory or
            a memory-mapped file whatever the device. Over all ranks below 2^26 rows.
        queries: (Q, D), this rank's; over all ranks at least one.
        k: in 1..N over all ranks.
        metric: cosine or l2.
        backend: what proposes candidates. With float32 the proof is by the bound (D + 8) 2^-24 on
            the error of an inner product of unit vectors; with bfloat16 by four times the largest
            error seen among the rescored pairs; faiss-ivf and faiss-cagra have none.
        ranks: the job, all of whose ranks call; each searches on its device. Default: this process
            alone, on the database's device.

    Returns:
        For this rank's queries, on the device; places are positions over all ranks' rows in rank
        order, `recall` is over all queries.
    """
    ranks = ranks or Ranks(device=database.device)
    sizes = gather_rows(torch.tensor([[len(database), len(queries)]]), ranks)
    start = int(sizes[: ranks.rank, 0].sum())
    assert int(sizes[:, 0].sum()) < 2**_INDEX_BITS, "positions do not fit the key"
    scores = Scores(database, queries, metric, ranks, _TILE.get(ranks.device.type, _TILE["cpu"]))
    answer = torch.zeros(0, k, dtype=torch.int64, device=ranks.device)
    for turn, count in enumerate(sizes[:, 1].tolist()):
        scores.queries = _of_rank(scores.own, turn, count, ranks)
        keys = answer.new_full((count, k), _LEAST)
        if count and len(database):
            places, values = _local(scores, min(k, len(database)), backend)
            keys[:, : places.shape[1]] = _keys(values, places + start)
        if ranks.world > 1:
            keys = gather_rows(keys[None], ranks).movedim(0, 1).flatten(1).topk(k, dim=1).values
        if turn == ranks.rank:
            answer = keys
    places, values = _decode(answer)
    found = Nearest(places, values * scores.unit - scores.offset)
    if backend in _APPROXIMATE:
        return found._replace(recall=_recall(database, queries, found, metric, ranks))
    return found


def nearest_sets(
    database: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    metric: Metric = "cosine",
    backend: Proposer = "auto",
    ranks: Ranks | None = None,
) -> tuple[Tensor, float]:
    """The sets of the k nearest database rows of each query, for each k: those of `nearest`.

    Much less is scored in float64 than for their order, which no unweighted vote needs. On several
    ranks, and with another backend than `auto` or `torch`, by `nearest` itself.

    Args:
        database: as for `nearest`.
        queries: as for `nearest`.
        ks: each in 1..N over all ranks, in increasing order.
        metric: as for `nearest`.
        backend: as for `nearest`.
        ranks: as for `nearest`.

    Returns:
        (Q, largest k) int64 positions of which the first k are the k nearest, for each k of `ks`,
        and in no other order; and the recall.
    """
    ranks = ranks or Ranks(device=database.device)
    if ranks.world > 1 or backend not in ("auto", "torch"):
        near = nearest(database, queries, ks[-1], metric, backend, ranks)
        return near.places, near.recall
    scores = Scores(database, queries, metric, ranks, _TILE.get(ranks.device.type, _TILE["cpu"]))
    (n, width), k = database.shape, ks[-1]
    m = min(n, k + k // 8 + _SPARE)
    with _full_float32():
        fast, places = _propose(scores, m, torch.float32)
    fast, places = _descending(fast, places)
    doubt, column = _doubt(width), torch.arange(m, device=fast.device)
    open_ranges = torch.zeros_like(places, dtype=torch.bool)
    for each in ks:
        kth = fast[:, each - 1 : each].double()
        start = (fast > kth + doubt).sum(dim=1, keepdim=True)
        stop = (fast >= kth - doubt).sum(dim=1, keepdim=True)
        open_ranges |= (column >= start) & (column < stop) & (stop - start > 1)
    _order_ranges(scores, places, open_ranges)
    if m < n:
        again = (fast[:, -1] >= fast[:, k - 1].double() - doubt).nonzero()[:, 0]
        if len(again):
            places[again, :k] = _search_all(scores, again, k)[0]
    return places[:, :k], 1.0


def _order_ranges(scores: Scores, places: Tensor, ranges: Tensor) -> None:
    """Order each run of neighboring columns of (Q, m) `places` by the exact scores, in place.

    Args:
        scores: of what.
        places: (Q, m) int64.
        ranges: (Q, m) bool: the columns that belong to a run.
    """
    rows, columns = ranges.nonzero(as_tuple=True)
    if not len(rows):
        return
    found = places[rows, columns]
    parts = []
    step = max(1, scores.held // scores.queries.shape[1])
    for row, place in zip(rows.split(step), found.split(step), strict=True):
        near = scores.center_rows(scores.database[place.to(scores.database.device)])
        dot = torch.linalg.vecdot(near, scores.queries[row])
        parts.append(dot * scores.scale[place] + scores.bias[place])
    keys = _keys(torch.cat(parts), found)
    starts = ranges & ~ranges.roll(1, dims=1)
    starts[:, 0] = ranges[:, 0]
    run = starts[rows, columns].cumsum(dim=0)
    order = (-keys).argsort(stable=True)
    order = order[run[order].argsort(stable=True)]
    places[rows, columns] = found[order]


def _of_rank(own: Tensor, turn: int, count: int, ranks: Ranks) -> Tensor:
    """(count, D) rows of rank `turn`, on every rank."""
    if ranks.world == 1:
        return own
    rows = own.contiguous() if turn == ranks.rank else own.new_empty(count, own.shape[1])
    dist.broadcast(rows, turn)
    return rows


def _recall(
    database: Tensor, queries: Tensor, result: Nearest, metric: Metric, ranks: Ranks
) -> float:
    """Share of the true neighbors that were found, over a fixed sample of all ranks' queries."""
    k = result.places.shape[1]
    sizes = gather_rows(torch.tensor([len(queries)]), ranks)
    start = int(sizes[: ranks.rank].sum())
    sample = permutation(0, "recall", 0, int(sizes.sum()))[:_SAMPLED] - start
    sample = sample[(sample >= 0) & (sample < len(queries))]
    exact = nearest(database, queries[sample.to(queries.device)], k, metric, "torch", ranks)
    ours = result.places[sample.to(result.places.device)]
    hits = (ours[:, :, None] == exact.places[:, None, :]).any(dim=2).double()
    both = torch.tensor([float(hits.sum()), float(hits.numel())], dtype=torch.float64)
    sum_over_ranks([both], ranks)
    return float(both[0] / both[1])
