"""One model over all sets, for tests of what is made of its outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError
from letheon.eval.inference.passes import Passes, SweepOptions, Swept, sweep_together
from letheon.loaders.batch import Loader


def sweep(
    swept: Swept, loaders: Mapping[str, Loader], ranks: Ranks, options: SweepOptions | None = None
) -> Passes:
    return sweep_together([swept], loaders, ranks, options)[0]


def still(model: Classifier) -> Classifier:
    """A copy on the host, as attacks and relearning are given one of a network that is whole."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def refuse_image(loader: Loader, number: int) -> None:
    """Let an image of the loader be one that cannot be read."""
    inner = loader.images.read_many

    def read(indices: Any) -> Any:
        if number in indices:
            raise InputError(f"got image {number}, which cannot be read")
        return inner(indices)

    loader.images.read_many = read  # type: ignore[method-assign]
