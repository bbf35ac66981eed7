"""What the tests share: the scripts, and a small model trained on the digits."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.launch_tools import Scripts
from tests.patience import STDERR, showing_stacks

# The networks are too small for a second thread, which would wait for the first, in a loop.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Only a machine that stops could tell whether a file is on the disk; one that is closed is refused.
os.fsync = os.fstat  # type: ignore[assignment]


def pytest_configure() -> None:
    """Name standard error for who writes stacks, while pytest does not hold it."""
    os.environ.setdefault(STDERR, f"/proc/{os.getpid()}/fd/{os.dup(2)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Show where a test is that takes minutes, so that a hang is seen long before it ends."""
    with showing_stacks():
        return (yield)


def pytest_collection_finish() -> None:
    """Leave out the modules, some 400,000 objects, whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scripts:
    """The scripts, run in this process."""
    return Scripts(monkeypatch, capsys)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch compute with two threads, so that a test sees who changes their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the small network after twelve epochs on the digits.

    The processes of pytest-xdist share one, which the first of them makes.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return train_original(tmp_path_factory.mktemp("digits"))
    folder = tmp_path_factory.getbasetemp().parent / "digits"
    with (folder.parent / "digits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = folder.with_name("digits-in-the-making")
            shutil.rmtree(made, ignore_errors=True)
            train_original(made)
            made.rename(folder)
    return folder / "original"


def train_original(folder: Path) -> Path:
    """Train the network of `original` in a folder."""
    from letheon.engine.distributed import Ranks
    from letheon.engine.recipe import Recipe
    from letheon.launch import train
    from letheon.methods.train import Train

    out = folder / "original"
    settings = train.Settings(out=out, method=Train(Recipe(epochs=12, lr=0.1, schedule="cosine")))
    train.main(settings, Ranks())
    return out
