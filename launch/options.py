"""Options of the scripts that forget: the model, the forget request, and opening both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.outputs import Outputs
from letheon.eval.top_classes import rank_classes, rank_samples, rate_hardness, sum_shares
from letheon.loaders.canaries import plant
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request, resolve, score_of
from letheon.loaders.shared_work import share_work, spans

T = TypeVar("T")
BATCH = 256
"""Images of a batch by which the original ranks classes or samples."""


@dataclass(frozen=True, kw_only=True)
class Forgetting(JobOptions):
    """Options of every script that takes a forget request."""

    weights: Path
    """The original model: a run folder of train.py, or a checkpoint from elsewhere."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    forget: str
    """Classes: class:3,8 (ids, names or WordNet ids), file:LIST, random:100 or top:100. Training
    samples: samples:FILE, random-samples:10%, hardest:10% or easiest:500 (by the original's loss;
    hardest:10%,confidence by its confidence); canaries: those that the original learned."""
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
        model, data = self.open_sets()
        return model, data, resolve(self.forget, data, self.seed, self.rank(model, data, ranks))

    def open_sets(self) -> tuple[Classifier, Data]:
        """Load what does not depend on the request and the seed: the model and the data."""
        model = self.checkpoint.load(self.weights)
        if self.relearn_earlier:
            model.requests = ()
        return model, plant(self.upstream(model), model.canaries)

    def rank(self, model: Classifier, data: Data, ranks: Ranks) -> list[int] | None:
        """Rank what the request takes the first of, by the original; None where it is not asked.

        Class ids for top:K; sample numbers for hardest:N and easiest:N, in the order the request
        takes them in.
        """
        if self.forget.startswith("top:"):
            if self.downstream is None:
                raise InputError(
                    f"got forget {self.forget} without a downstream set; name one",
                    option="downstream",
                )
            means = [
                mean
                for images in self.open_domains(self.downstream).values()
                for mean in self._answer(model, images, ranks, sum_shares)
            ]
            return rank_classes(means)
        if (score := score_of(self.forget)) is None:
            return None
        hardness = self._answer(model, data.train, ranks, partial(rate_hardness, score=score))
        ranking = rank_samples(hardness)
        return ranking[::-1] if self.forget.startswith("easiest:") else ranking

    def _answer(
        self, model: Classifier, images: ImageSet, ranks: Ranks, digest: Callable[[Outputs], T]
    ) -> list[T]:
        """Digest the model's outputs on all images, by parts that the ranks share out.

        Each part is of whole batches, so that the numbers are those of one rank, to the bit.
        """
        alone = Ranks(device=ranks.device)
        model.to(ranks.device)
        nothing = np.zeros(len(images), dtype=bool)
        loader = self.loader_of(images, nothing, model.preset, BATCH, alone)

        def compute(span: range) -> T:
            return digest(extract(model, loader, alone, InferenceOptions(tuple(span))))

        parts = spans(len(images), 16 * BATCH)
        return share_work(f"ranking by {images.name}", parts, compute)
