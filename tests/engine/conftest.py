"""A small trained-looking network for the tests of checkpoints."""

from __future__ import annotations

import pytest
import torch

from letheon.engine.models.classifier import Classifier, build


@pytest.fixture
def model() -> Classifier:
    """A ResNet-20 whose batch norms have seen something."""
    made = build("resnet20", 4, seed=1)
    with torch.no_grad():
        made.train()(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    made.class_names = ("a", "b", "c", "d")
    return made.eval()
