"""What the tests share: the scripts, and a small model trained on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch_tools import Scripts


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Scripts:
    """The scripts, run in this process."""
    return Scripts(monkeypatch, capsys)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the small network after twelve epochs on the digits."""
    from letheon.engine.distributed import Ranks
    from letheon.engine.recipe import Recipe
    from letheon.launch import train
    from letheon.methods.train import Train

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("digits") / "original"
    settings = train.Settings(out=out, method=Train(Recipe(epochs=12, lr=0.1, schedule="cosine")))
    train.main(settings, Ranks())
    return out
