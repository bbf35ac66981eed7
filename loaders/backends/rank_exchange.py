"""Rows made by the rank that keeps their images, given to the rank whose batch they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from letheon.loaders.backends.memory import to_device


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """(n, ...) for this rank, from the rows that every rank made; every rank must call.

    Args:
        rows: (m, ...) made here, those for rank 0 first; trailing sizes equal on every rank.
        sent: how many of them are for each rank.
        received: how many come from each rank; the result holds those of rank 0 first.
    """
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
    return out


def gather_objects(mine: Any, world: int) -> list[Any]:
    """What each rank tells, on every rank; every rank must call."""
    told: list[Any] = [None] * world
    dist.all_gather_object(told, mine)
    return told


def answer_requests(
    requests: Sequence[Sequence[NDArray[Any]]],
    owners: NDArray[np.int64],
    rank: int,
    make: Callable[..., Tensor],
) -> Tensor:
    """Give every rank the rows it asks for, made by the ranks that own them; every rank must call.

    Args:
        requests: by rank, the columns of its rows, (b,) each: the samples, and what else `make`
            needs to know of a row. Equal on every rank.
        owners: (N,) the rank that owns each sample, equal on every rank.
        rank: this one.
        make: makes (m, ...) rows of this rank's own samples, from their columns.

    Returns:
        (b, ...) the rows of this rank's request, in its order.
    """
    own = [owners[columns[0]] == rank for columns in requests]
    mine = [
        np.concatenate([columns[k][rows] for columns, rows in zip(requests, own, strict=True)])
        for k in range(len(requests[rank]))
    ]
    sources = owners[requests[rank][0]]
    received = np.bincount(sources, minlength=len(requests)).tolist()
    rows = exchange_rows(make(*mine), [int(rows.sum()) for rows in own], received)
    return restore_order(rows, sources)


def restore_order(rows: Tensor, owners: NDArray[np.int64]) -> Tensor:
    """`rows` sorted by owner, as `exchange_rows` gives them, in the order of `owners` (n,)."""
    out = torch.empty_like(rows)
    places = torch.from_numpy(np.argsort(owners, kind="stable"))
    out[to_device(places, rows.device)] = rows
    return out
