"""Candidates from FAISS, which is optional: a flat index, or approximate ones for huge sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from letheon.errors import InputError, install_extra
from letheon.kernels.keyed import permutation

_TRAINED = 64  # rows a list that the clustering sees


def is_installed() -> bool:
    """True where `import faiss` would find a package."""
    return importlib.util.find_spec("faiss") is not None


def _faiss() -> Any:
    if not is_installed():
        raise InputError(
            f"got backend faiss, which is not installed; expected it; {install_extra('faiss')}"
        )
    import faiss

    return faiss


def pack_rows(rows: Tensor, last: Tensor) -> NDArray[np.float32]:
    """(n, D + 1) on the host: the rows with one more column, so that a bias is a product too."""
    return torch.cat([rows, last[:, None]], dim=1).float().cpu().contiguous().numpy()


def flat(
    tiles: Iterable[NDArray[np.float32]], queries: NDArray[np.float32], m: int
) -> tuple[Tensor, Tensor]:
    """(Q, m) inner products and positions of the best rows, by brute force in float32.

    On the GPUs where the installed FAISS has them, else on the CPU.
    """
    faiss = _faiss()
    index = faiss.IndexFlatIP(queries.shape[1])
    if getattr(faiss, "get_num_gpus", int)():
        index = faiss.index_cpu_to_all_gpus(index)
    for tile in tiles:
        index.add(tile)
    values, places = index.search(queries, m)
    return torch.from_numpy(values), torch.from_numpy(places)


def inverted_lists(
    tiles: list[NDArray[np.float32]], queries: NDArray[np.float32], m: int
) -> tuple[Tensor, Tensor]:
    """As `flat`, but of the nearest 1/16 of 4 sqrt(N) clusters only: some neighbours are missed.

    A position is -1 where the clusters read hold fewer than m rows.
    """
    faiss = _faiss()
    n, width = sum(map(len, tiles)), queries.shape[1]
    lists = max(1, min(round(4 * n**0.5), n // 39))  # FAISS wants 39 rows a list
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(1, min(lists, max(8, lists // 16)))
    sample = permutation(0, "ivf-training", 0, n)[: _TRAINED * lists].numpy()
    starts = np.cumsum([0, *map(len, tiles)])
    parts = [
        tile[sample[(sample >= start) & (sample < start + len(tile))] - start]
        for tile, start in zip(tiles, starts, strict=False)
    ]
    index.train(np.concatenate(parts))
    for tile in tiles:
        index.add(tile)
    values, places = index.search(queries, m)
    return torch.from_numpy(values), torch.from_numpy(places)


def cagra(
    tiles: list[NDArray[np.float32]], queries: NDArray[np.float32], m: int
) -> tuple[Tensor, Tensor]:
    """As `flat`, by walking a graph of near rows on a GPU (Ootomo et al. 2023): some are missed.

    Never run on a GPU here: no such machine was at hand.

    Raises:
        InputError: no GPU, or a FAISS built without cuVS.
    """
    faiss = _faiss()
    if not getattr(faiss, "get_num_gpus", int)() or not hasattr(faiss, "GpuIndexCagra"):
        raise InputError(
            "got backend faiss-cagra; expected a GPU and a FAISS built with cuVS; "
            "use faiss-ivf or auto"
        )
    index = faiss.GpuIndexCagra(
        faiss.StandardGpuResources(), queries.shape[1], faiss.METRIC_INNER_PRODUCT,
        faiss.GpuIndexCagraConfig(),
    )  # fmt: skip
    index.train(np.concatenate(tiles))
    parameters = faiss.SearchParametersCagra()
    parameters.itopk_size = 64 * -(-2 * m // 64)  # kept while walking: more than is asked for
    values, places = index.search(queries, m, params=parameters)
    return torch.from_numpy(values), torch.from_numpy(places)
