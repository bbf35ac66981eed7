"""One model's passes over all image sets: the only place where evaluation runs a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.model import Classifier
from letheon.engine.precision import Precision
from letheon.eval import cka
from letheon.eval.accuracy import Count, forgetting
from letheon.eval.features import Outputs, extract
from letheon.eval.store import extract_stored
from letheon.loaders.batch import Loader
from letheon.loaders.errors import InputError


@dataclass
class Passes:
    """One model's outputs on every set, and what comparisons with it compute once."""

    name: str
    outputs: dict[str, Outputs]  # "train", "test", "domain/<name>"
    weights: str = ""  # digest of the weights these were made with
    information: dict[str, float] = field(default_factory=dict, repr=False)  # by layer, in nats
    _sides: dict[str, cka.Centred] = field(default_factory=dict, repr=False)

    @cached_property
    def accuracies(self) -> dict[str, Count]:
        """FA, RA, TFA, TRA as counts."""
        return forgetting(self.outputs["train"], self.outputs["test"])

    def side(self, part: str, device: torch.device) -> cka.Centred:
        """The test features of "all", the "forget" or the "retain" samples, ready for CKA."""
        label = f"the pooled features of {self.name} on the test set ({part})"
        test = self.outputs["test"]
        rows = test.features if part == "all" else test.features[_rows(test, part)]
        return self._centred(label, rows, device)

    def layer(self, tap: str, device: torch.device) -> cka.Centred:
        """The pooled output of a layer on the test set, ready for CKA."""
        label = f"layer {tap} of {self.name} on the test set"
        return self._centred(label, self.outputs["test"].taps[tap], device)

    def _centred(self, label: str, rows: Tensor, device: torch.device) -> cka.Centred:
        if label not in self._sides:
            self._sides[label] = cka.centred(label, rows, device)
        return self._sides[label]


def _rows(outputs: Outputs, part: str) -> Tensor:
    return outputs.forget if part == "forget" else ~outputs.forget


@dataclass(frozen=True)
class Store:
    """Where outputs are kept, and what tells one image set from another."""

    folder: Path  # on a file system that all ranks share
    sets: Mapping[str, tuple[str, int]]
    """Set -> digest of its images and of which of them are to be forgotten, and their number."""


def sweep(
    name: str,
    model: Classifier,
    loaders: Mapping[str, Loader],
    ranks: Ranks,
    weights: str = "",
    precision: Precision | None = None,
    taps: Sequence[str] = (),
    store: Store | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    flip: bool = False,
) -> Passes:
    """One inference pass of `model` over each set; every rank must call, and gets the same.

    Args:
        name: what tables and messages call the model.
        model: on `ranks.device`.
        loaders: "train", "test" and any "domain/<name>".
        ranks: the job.
        weights: digest of the model's weights, kept beside what is measured.
        precision: default float32.
        taps: modules whose pooled outputs on the test set are wanted too, as `layers.stages` gives.
        store: passes found there are not made again, those made are kept there; needs `weights`.
        parts: sets of which these samples alone are read, with taps.
        flip: each image is seen mirrored too, and the two answers averaged (test-time flip).

    Raises:
        InputError: no train or test set, an unknown tap, or an image that cannot be read.
    """
    missing = {"train", "test"} - set(loaders)
    if missing:
        raise InputError(f"got loaders {', '.join(loaders)}; expected train and test among them")
    outputs = {}
    for key, loader in loaders.items():
        indices = (parts or {}).get(key)
        wanted = tuple(taps) if key == "test" or indices is not None else ()
        if store is None:
            outputs[key] = extract(
                model, loader, ranks, indices, precision=precision, taps=wanted, flip=flip
            )
            continue
        assert weights, "a store needs the digest of the weights"
        digest, samples = store.sets[key]
        facts = {"weights": weights, "model": model.name, "data": digest}
        facts["preset"] = repr(sorted(asdict(model.preset).items()))
        outputs[key] = extract_stored(
            store.folder,
            facts,
            model,
            loader,
            samples,
            ranks,
            indices,
            precision,
            wanted,
            flip,
        )
    return Passes(name, outputs, weights)
