"""Checkpoints as strangers write them, and the one line that refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from letheon.engine.checkpoints.model_file import load_model
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError


def state_of(model: Classifier) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.net.state_dict().items()}


def saved(tmp_path: Path, content: Any, name: str = "foreign.pth", **how: Any) -> Path:
    path = tmp_path / name
    torch.save(content, path, **how)
    return path


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text
