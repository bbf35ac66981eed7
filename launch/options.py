"""Options of the scripts that forget: the model, the forget request, and opening both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.checkpoints.sweep_state import Sweeps
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.agreement import ranking_facts
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import source_facts
from letheon.engine.runs.stop import Poll
from letheon.errors import InputError, name_option
from letheon.eval.top_classes import BATCH, Ranker
from letheon.folders import ranking_folder
from letheon.launch.command import together
from letheon.loaders.batch import Loader
from letheon.loaders.canaries import plant
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request, resolve, score_of
from letheon.progress import note

OF_REQUEST = ("checkpoint", "downstream", "relearn_earlier", "accept_chance")
"""Names of the options beside --weights and --forget that say which request is meant."""


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

    def open_sets(self) -> tuple[Classifier, Data]:
        """Load what does not depend on the request and the seed: the model and the data."""
        with name_option("weights"):
            model = self.checkpoint.load(self.weights)
        if self.relearn_earlier:
            model.requests = ()
        return model, plant(self.upstream(model), model.canaries)

    @property
    def ranking(self) -> str:
        """What ranks what the request takes the first of: classes, or a score; empty: nothing."""
        return "classes" if self.forget.startswith("top:") else score_of(self.forget) or ""

    def open_downstream(self) -> dict[str, ImageSet]:
        """Open the domains of the downstream set that `top:K` is near to."""
        if self.downstream is None:
            raise InputError(
                f"got forget {self.forget} without a downstream set; name one", option="downstream"
            )
        return self.open_domains(self.downstream)


@dataclass(frozen=True)
class Opened:
    """What the requests of several runs are resolved from; equal on every rank."""

    model: Classifier
    data: Data
    rankings: Mapping[str, list[int]]
    """Class ids or sample numbers by `Forgetting.ranking`."""

    def resolve(self, settings: Forgetting) -> Request:
        """Resolve the request of one of the runs."""
        ranking = self.rankings.get(settings.ranking)
        if ranking is not None and settings.forget.startswith("easiest:"):
            ranking = ranking[::-1]
        return resolve(settings.forget, self.data, settings.seed, ranking)


def open_together(
    runs: Sequence[Forgetting],
    ranks: Ranks,
    check: Callable[[], object],
    sweeps: Sweeps | None = None,
) -> Opened:
    """Load the model and the data, and rank what the requests ask for; every rank must call.

    Args:
        runs: which may differ in request, seed and method.
        ranks: the job; each ranks its share of the images.
        check: what else can be wrong with the input; comes first.
        sweeps: saves the ranking, and finds what was saved; None does not.

    Raises:
        InputError: on every rank.
    """
    job, domains, kinds = runs[0], dict[str, ImageSet](), list[str]()

    def load() -> tuple[Classifier, Data]:
        check()
        kinds.extend(dict.fromkeys(kind for kind in (one.ranking for one in runs) if kind))
        opened = job.open_sets()
        if "classes" in kinds:
            domains.update(next(o for o in runs if o.ranking == "classes").open_downstream())
        return opened

    model, data = together(
        ranks, load, lambda opened: ranking_facts(kinds, *opened, domains, ranks)
    )
    if not kinds:
        return Opened(model, data, {})

    def loader_of(images: ImageSet) -> Loader:
        nothing, alone = np.zeros(len(images), dtype=bool), Ranks(device=ranks.device)
        return job.loader_of(images, nothing, model.preset, BATCH, alone)

    if sweeps is not None:
        images = [one.digest for one in (data.train, *domains.values())] if ranks.main else []
        known = {"images": images, "loader": job.loader, **source_facts()}
        if sweeps.load(known) and ranks.main:
            note(f"{sweeps.out}: goes on with the ranking of its request")
    ranker = Ranker(model.to(ranks.device), ranks, sweeps)
    rankings = {}
    for kind in kinds:
        if kind == "classes":
            each = [(loader_of(one), len(one), len(one.classes)) for one in domains.values()]
            rankings[kind] = ranker.rank_classes(each)
        else:
            count = len(data.train)
            rankings[kind] = ranker.rank_samples(loader_of(data.train), count, kind)
    if sweeps is not None:
        sweeps.close()
    return Opened(model, data, rankings)


def open_ranking(out: Path, ranks: Ranks, saving: SaveOptions) -> Sweeps:
    """Open the folder in which the ranking of a request is saved, beside the output."""
    return Sweeps(ranking_folder(out), Poll(ranks, *saving.interval), out)
