"""Every method with single samples to forget, and in micro-batches: it runs, or says why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from letheon.engine.loop import run_method
from letheon.errors import InputError
from tests.methods.cases import cases
from tests.methods.plain import RECIPE, assert_same, run_in_doubles, train_in_doubles
from tests.world import run_of

METHODS = cases(replace(RECIPE, lr=0.005))
BY_CLASS = {"head-distillation", "unsir"}
WHOLE_BATCHES = {"spkd", "pl-spkd", "rkd", "cola", "cu", "gdr-gma", "sfron", "spotter"}
PIECES = cases(replace(RECIPE, lr=0.005, grad_accum_steps=2))


@pytest.mark.parametrize("name", METHODS)
def test_single_samples_are_forgotten_or_refused(name: str) -> None:
    method = METHODS[name]
    run = run_of(method)
    run.forget = torch.arange(41) % 5 == 0
    run.loader.forget = run.forget.numpy()  # type: ignore[attr-defined]
    run.forget_classes, run.held_out = (), lambda: run.loader
    if name in BY_CLASS:
        with pytest.raises(InputError, match="got single samples"):
            method.check(run)
        return
    method.check(run)
    run_method(method, run)
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"retrain", "salun", "salun-soft"}))
def test_micro_batches_are_the_same_steps_or_refused(name: str) -> None:
    method = PIECES[name]
    if name in WHOLE_BATCHES:
        with pytest.raises(InputError, match="micro-batches"):
            method.check(run_of(method))
        return
    whole, _ = train_in_doubles(METHODS[name])
    pieces, _ = train_in_doubles(method, run_in_doubles(method))
    assert_same(pieces, whole.model)
