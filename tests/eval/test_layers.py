"""The stages of a network, whose outputs the layer-wise metrics read."""

from __future__ import annotations

import pytest
import torch

from letheon.engine.models.classifier import build, names
from letheon.eval.inference.taps import record_taps, stages

LARGE = ("vit_b_16", "vit_h_14", "resnet44")


@pytest.mark.parametrize("name", [n for n in names() if n not in LARGE])
@torch.no_grad()
def test_stages_are_run_before_the_head(name: str) -> None:
    model = build(name, 4).eval()
    found = stages(model)
    assert 4 <= len(found) <= 20
    assert f"net.{model.head_path}" not in found
    with record_taps(model, found) as seen:
        model(torch.zeros(2, 3, model.preset.size, model.preset.size))
    assert list(seen) == list(found)
    assert all(values.ndim == 2 and len(values) == 2 for values in seen.values())


def test_resnet50_has_its_usual_stages() -> None:
    assert stages(build("resnet50", 4))[-4:] == tuple(f"net.layer{i}" for i in (1, 2, 3, 4))
