"""One model's passes over all image sets: the only place where evaluation runs a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.engine.teacher import frozen_copy
from letheon.errors import InputError
from letheon.eval.inference.cache import extract_stored, is_stored
from letheon.eval.inference.extract import Outputs, answers_together, extract
from letheon.eval.metrics import cka
from letheon.eval.metrics.accuracy import Count, forgetting
from letheon.loaders.batch import Loader
from letheon.spans import span


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
    """`sweep_together` of one model: what it says of `name`, `model`, `weights` and `taps`."""
    swept = Swept(name, model, weights, tuple(taps))
    return sweep_together([swept], loaders, ranks, precision, store, parts, flip)[0]


class Swept(NamedTuple):
    """A model to be swept."""

    name: str  # what tables and messages call it
    model: Classifier  # on the ranks' device
    weights: str = ""  # digest of its weights, kept beside what is measured
    taps: tuple[str, ...] = ()
    """Modules whose pooled outputs on the test set are wanted too, as `layers.stages` gives."""


@span("evaluation")
def sweep_together(
    swept: Sequence[Swept],
    loaders: Mapping[str, Loader],
    ranks: Ranks,
    precision: Precision | None = None,
    store: Store | None = None,
    parts: Mapping[str, Sequence[int]] | None = None,
    flip: bool = False,
) -> list[Passes]:
    """One inference pass of each model over each set; every rank must call, and gets the same.

    Each image is read once and shown to every model; the answers are bit for bit those of a sweep
    of each model alone. In float32 a set without taps is shown to a copy with its batch-norms
    folded, equal to the model to rounding.

    Args:
        swept: models of one preset; the outputs of all are held in memory, this rank's part of one
            set twice.
        loaders: "train", "test" and any "domain/<name>".
        ranks: the job.
        precision: default float32.
        store: passes found there are not made again, those made are kept there; needs `weights`.
        parts: sets of which these samples alone are read, with taps.
        flip: each image is seen mirrored too, and the two answers averaged (test-time flip).

    Raises:
        InputError: no train or test set, an unknown tap, or an image that cannot be read.
    """
    missing = {"train", "test"} - set(loaders)
    if missing:
        raise InputError(f"got loaders {', '.join(loaders)}; expected train and test among them")
    precision = (precision or Precision("fp32")).resolve(ranks.device)
    quick: dict[int, Classifier] = {}

    def network(number: int, taps: Sequence[str]) -> Classifier:
        model = swept[number].model
        if taps or precision.dtype not in ("auto", "fp32"):
            return model
        if number not in quick:
            quick[number] = frozen_copy(model, precision)
        return quick[number]

    outputs: list[dict[str, Outputs]] = [{} for _ in swept]
    for key, loader in loaders.items():
        indices = (parts or {}).get(key)
        taps = [each.taps if key == "test" or indices is not None else () for each in swept]
        facts = [_facts(each, store, key) for each in swept]
        new = list(range(len(swept)))
        if store is not None:
            known = [
                is_stored(
                    store.folder, facts[i], store.sets[key][1], ranks, indices, precision, taps[i],
                    flip,
                )
                for i in new
            ]  # fmt: skip
            new = [i for i in new if not known[i]]
        networks = {i: network(i, taps[i]) for i in new}
        made = {}
        if len(new) > 1:
            asked = None if indices is None else sorted({int(i) for i in indices})
            several = answers_together(
                list(networks.values()), loader, ranks.device, asked, precision,
                [taps[i] for i in new], flip,
            )  # fmt: skip
            made = dict(zip(new, several, strict=True))
        for i, each in enumerate(swept):
            net, own = networks.get(i, each.model), made.get(i)
            if store is None:
                outputs[i][key] = extract(
                    net, loader, ranks, indices, None, precision, taps[i], flip, own
                )
            else:
                outputs[i][key] = extract_stored(
                    store.folder, facts[i], net, loader, store.sets[key][1], ranks, indices,
                    precision, taps[i], flip, own,
                )  # fmt: skip
    return [Passes(each.name, outputs[i], each.weights) for i, each in enumerate(swept)]


def _facts(swept: Swept, store: Store | None, key: str) -> dict[str, str]:
    """What outputs depend on, beside what the store adds."""
    if store is None:
        return {}
    assert swept.weights, "a store needs the digest of the weights"
    preset = repr(sorted(asdict(swept.model.preset).items()))
    data = store.sets[key][0]
    return {"weights": swept.weights, "model": swept.model.name, "data": data, "preset": preset}
