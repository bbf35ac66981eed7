"""New weights for a network that exists: an untrained network of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from letheon.engine.models.classifier import Classifier, build, names
from letheon.engine.models.timm_model import PREFIX
from letheon.errors import InputError
from letheon.kernels.keyed import hash_keys


def fresh_seed(seed: int) -> int:
    """Seed of new weights beside an original of the run's own seed: 31 bits, keyed by it.

    A network drawn from the seed itself would be the original's own start, and near the original.
    """
    key = hash_keys(seed, "retrain", 0, torch.zeros(1, dtype=torch.int64), 1)
    return int(key[0, 0]) & (2**31 - 1)


def initial_copy(model: Classifier, seed: int) -> Classifier:
    """Initialize an untrained copy: a function of (architecture, seed), equal on every rank.

    A network that `build` knows is built anew. Of any other each layer is reset by its own
    `reset_parameters`, which may be another start than its author's. On the model's device, in its
    dtype; the global random state is left as it was.

    Raises:
        InputError: a layer of a network of the user's own has no `reset_parameters`.
    """
    if _is_known(model):
        fresh = build(model.name, model.classes, seed, model.preset)
        if _shapes(fresh) == _shapes(model):
            return fresh.to(next(model.parameters()))
    fresh = copy.deepcopy(model).cpu()  # where the numbers are drawn
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for reset in _resets(fresh):
            reset()
    return fresh.to(next(model.parameters()))


def require_resets(model: Classifier) -> None:
    """Refuse a network of which `initial_copy` can make no untrained copy.

    Raises:
        InputError: a layer of a network of the user's own has no `reset_parameters`.
    """
    if not _is_known(model):
        _resets(model)


def _is_known(model: Classifier) -> bool:
    return model.name in names() or model.name.startswith(PREFIX)


def _resets(model: Classifier) -> list[Callable[[], object]]:
    """Return what resets each layer that has weights of its own."""
    resets = []
    for path, layer in model.net.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        reset = getattr(layer, "reset_parameters", None)
        if reset is None:
            raise InputError(
                f"got {path or 'a network'} of kind {type(layer).__name__}, which cannot be "
                "initialized anew; expected a layer with reset_parameters; give it one",
                option="model",
            )
        resets.append(reset)
    return resets


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}
