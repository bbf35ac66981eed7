"""Reusable gloo ranks on this machine, for tests: a function run on each, its results by rank."""

from __future__ import annotations

import atexit
import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from letheon.engine.distributed import Ranks, join_ranks
from tests.patience import showing_stacks
from tests.ports import free_port


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with join_ranks("cpu") as ranks:
        while (job := pipe.recv()) is not None:
            work, args = job
            try:
                with showing_stacks():
                    result = work(ranks, *args)
                pipe.send((result, None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


@cache
def _forks() -> Any:
    """A process that has imported what ranks need and run nothing: each rank is a fork of it."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["letheon.launch.evaluate", "letheon.launch.forget", "torch.distributed.fsdp",
         "torch._dynamo", "torchvision", "scipy.stats", "sklearn.manifold", "sklearn.svm"]
    )  # fmt: skip
    return context


@cache
def _pool(world: int) -> list[Connection]:
    context = _forks()
    port = free_port()
    ends = []
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, port, there), daemon=True)
        process.start()
        ends.append(here)
    atexit.register(lambda: [end.send(None) for end in ends])
    return ends


def _act(work: Callable[..., Any], args: tuple[Any, ...], err: str) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    work(*args)


def start_process(work: Callable[..., Any], *args: Any, err: Path) -> Any:
    """Start `work(*args)` in a process that has imported the scripts; its errors go to `err`."""
    process = _forks().Process(target=_act, args=(work, args, str(err)), daemon=True)
    process.start()
    return process


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(ranks, *args)` on each of `world` processes; results in rank order.

    `work` is a function at the top of a test module; arguments and results are picklable. The
    processes stay for the next call. With one rank it runs here.
    """
    if world == 1:
        return [work(Ranks(), *args)]
    ends = _pool(world)
    for end in ends:
        end.send((work, args))
    answers = [end.recv() for end in ends]
    failed = [(rank, text) for rank, (_, text) in enumerate(answers) if text is not None]
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed)
    return [result for result, _ in answers]
