"""Options of the scripts that forget: the model, the forget request, and opening both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.eval.inference.extract import extract
from letheon.eval.top_classes import rank_classes
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.forget_request import Request, resolve


@dataclass(frozen=True, kw_only=True)
class Forgetting(JobOptions):
    """Options of every script that takes a forget request."""

    weights: Path
    """The original model: a run folder of train.py, or a checkpoint from elsewhere."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    forget: str
    """class:3,8 (ids, names or WordNet ids), file:LIST, random:100, samples:FILE or top:100."""
    downstream: str | None = None
    """For top:K, the set whose nearest classes are meant: `digits`, or <domain>/<class>/ or
    <class>/ folders."""

    relearn_earlier: bool = False
    """Read as retain images what the model was made to forget earlier; by default such images are
    left out, since reading them teaches them again."""

    accept_chance: bool = False
    """Go on though the original is sure of its answers and right by chance alone, which mostly
    means another order of the classes or another preset."""

    def open(self, ranks: Ranks) -> tuple[Classifier, Data, Request]:
        """Load the model, the data in its class numbers and the request; equal on every rank."""
        model, data, nearest = self.open_sets(ranks)
        return model, data, resolve(self.forget, data, self.seed, nearest)

    def open_sets(self, ranks: Ranks) -> tuple[Classifier, Data, list[int] | None]:
        """Load what does not depend on the seed: model, data and, for top:K, the class ranking."""
        model = self.checkpoint.load(self.weights)
        if self.relearn_earlier:
            model.requests = ()
        data = self.upstream(model)
        nearest = self._rank_classes(model, ranks) if self.forget.startswith("top:") else None
        return model, data, nearest

    def _rank_classes(self, model: Classifier, ranks: Ranks) -> list[int]:
        """Rank the classes by nearness to the downstream set, on each rank for itself.

        It may find bad input, and no other rank may wait for this one.
        """
        if self.downstream is None:
            raise InputError(
                f"got forget {self.forget} without a downstream set; name one", option="downstream"
            )
        alone = Ranks(device=ranks.device)
        model.to(ranks.device)
        outputs = []
        for images in self.open_domains(self.downstream).values():
            nothing = np.zeros(len(images), dtype=bool)
            loader = self.loader_of(images, nothing, model.preset, 256, alone)
            outputs.append(extract(model, loader, alone))
        return rank_classes(outputs)
