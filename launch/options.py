"""The options of the scripts that are told what to forget, and what they mean together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from letheon.engine.checkpoints.model_file import load_model
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
    """Options of every script that is told what to forget."""

    weights: Path
    """The original model: a run folder of train.py, or a checkpoint from elsewhere."""
    model: str | None = None
    """Architecture, where the checkpoint does not say."""
    forget: str
    """class:3,8 (ids, names or WordNet ids), file:LIST, random:100, samples:FILE or top:100."""
    downstream: str | None = None
    """For top:K, the set whose nearest classes are meant: `digits`, or <domain>/<class>/ or
    <class>/ folders."""

    def opened(self, ranks: Ranks) -> tuple[Classifier, Data, Request]:
        """The model, the data in its class numbers and the request; the same on every rank."""
        model, data, nearest = self.found(ranks)
        return model, data, resolve(self.forget, data, self.seed, nearest)

    def found(self, ranks: Ranks) -> tuple[Classifier, Data, list[int] | None]:
        """What does not depend on the seed: the model, the data and, for top:K, its ranking."""
        model = load_model(self.weights, name=self.model)
        data = self.upstream(model)
        return model, data, self._nearest(model, ranks) if self.forget.startswith("top:") else None

    def _nearest(self, model: Classifier, ranks: Ranks) -> list[int]:
        """Each rank ranks for itself: it may find bad input, and no other may wait for it."""
        if self.downstream is None:
            raise InputError("got --forget top:K without a downstream set; name one: --downstream")
        alone = Ranks(device=ranks.device)
        model.to(ranks.device)
        outputs = []
        for images in self.open_domains(self.downstream).values():
            nothing = np.zeros(len(images), dtype=bool)
            loader = self.loader_of(images, nothing, model.preset, 256, alone)
            outputs.append(extract(model, loader, alone))
        return rank_classes(outputs)
