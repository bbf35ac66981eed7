"""Compile a phase's loss as one graph, with a cache on disk that makes the next run start warm."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from letheon.engine.method import Loss, PartsLoss
from letheon.kernels import keyed
from letheon.loaders.batch import Batch

BACKEND = "inductor"
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

Start = Literal["", "cold", "warm"]


def compile_loss(loss: Loss | PartsLoss, mode: Literal["default", "max"]) -> Loss | PartsLoss:
    """The loss and its backward pass as one graph for each shape of batch it meets.

    `max` also searches kernels and, on CUDA, replays the graph with CUDA graphs. Shapes are static:
    an epoch has at most three sizes of batch, so nothing is compiled after the first epoch.

    Raises:
        torch._dynamo.exc.Unsupported: at the first call, where the loss is not one whole graph.
    """
    keep_cache()
    torch.compiler.assume_constant_result(keyed.stream_number)

    def whole(net: nn.Module, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        return loss(net, batch)

    # torch counts recompilations by code object; a copy keeps other phases and runs out of it.
    own = FunctionType(
        whole.__code__.replace(), whole.__globals__, "whole", None, whole.__closure__
    )
    kind = "max-autotune" if mode == "max" and BACKEND == "inductor" else None
    graph: Loss | PartsLoss = torch.compile(
        own, fullgraph=True, dynamic=False, mode=kind, backend=BACKEND
    )
    if kind is None:
        return graph
    return _mark_steps(graph)


def _mark_steps(graph: Loss | PartsLoss) -> Loss | PartsLoss:
    """Mark where a step begins, so that CUDA graphs may reuse the outputs of the last one."""

    def step(net: nn.Module, batch: Batch) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(net, batch)

    return step


def keep_cache() -> Path:
    """The folder of compiled code: as TORCHINDUCTOR_CACHE_DIR says, else the user's cache folder.

    torch's own default lies in the temporary folder and is lost when the machine restarts.
    """
    temporary = str(Path(tempfile.gettempdir()) / "torchinductor_")  # torch may have set it already
    if os.environ.get(_VARIABLE, temporary).startswith(temporary):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[_VARIABLE] = str(home / "letheon" / "inductor")
    return Path(os.environ[_VARIABLE])


def cache_watch() -> Callable[[], Start]:
    """Start watching torch's cache of graphs; call it before the first graph.

    Returns:
        A function that says "warm" if every graph since came from the cache, "cold" if one was
        compiled, "" if there was none.
    """
    before = _lookups()

    def start() -> Start:
        found, missed = (now - then for now, then in zip(_lookups(), before, strict=True))
        if missed:
            return "cold"
        return "warm" if found else ""

    return start


def _lookups() -> tuple[int, int]:
    """Hits and misses of torch's caches of whole graphs so far in this process."""
    from torch._dynamo.utils import counters

    joint, single = counters["aot_autograd"], counters["inductor"]
    found = joint["autograd_cache_hit"] + single["fxgraph_cache_hit"]
    return found, single["fxgraph_cache_miss"] + single["fxgraph_cache_bypass"]
