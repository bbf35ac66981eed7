"""Every method and every loader backend, stopped at random steps, against the undisturbed run."""

from __future__ import annotations

from pathlib import Path

import torch

from letheon.engine.distributed import Ranks
from letheon.engine.method import Run
from letheon.loaders.batch import Reader
from letheon.loaders.factory import make_loader
from tests.engine.resume_tools import differing
from tests.engine.test_resume import KINDS, METHODS, run_with
from tests.world import PRESET, images, run_of

LOADERS = {f"loader {kind}": kind for kind in KINDS}
NAMES = (*METHODS, *LOADERS)
"""The kinds of this row."""


def differing_after(name: str, folder: Path, stops: list[int], every: int) -> list[str]:
    """Name what differs, of a method or a ``loader KIND``, after it was stopped and went on."""
    torch.set_num_threads(1)
    if name in METHODS:
        method = METHODS[name]
        return differing(method, run_with(method, Ranks()), folder, stops, every)
    method, data = METHODS["random-label-paired"], images()

    def make() -> Run:
        run = run_of(method)
        run.loader = make_loader(
            LOADERS[name], data, run.forget.numpy(), PRESET, method.recipe.batch_size, Reader(0)
        )
        return run

    return differing(method, make, folder, stops, every)
