"""What the scripts share: the options of every job, and a planned run, trained and saved."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.engine.checkpoint import save_model
from letheon.engine.distributed import Ranks
from letheon.engine.loop import Seconds, run_method
from letheon.engine.method import Method, Run
from letheon.engine.model import Classifier
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.record import Record
from letheon.loaders.batch import Loader
from letheon.loaders.choose import Keeping, Kind, make_loader
from letheon.loaders.data import open_data, open_domains
from letheon.loaders.errors import InputError
from letheon.loaders.images import ArrayImages, Data, ImageSet
from letheon.loaders.preset import Preset
from letheon.loaders.readable import readable, told_left_out
from letheon.loaders.relabel import aligned, model_classes
from letheon.loaders.request import Request
from letheon.loaders.resident_loader import ResidentLoader


@dataclass(frozen=True, kw_only=True)
class Job:
    """Options of every script that shows images to a network."""

    data: str = "digits"
    """Upstream set: `digits`, or a folder or archive with train/<class>/ and val/<class>/."""
    seed: int = 1
    """Order, augmentation, drawn labels and new weights follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: Kind = "auto"
    """Backend that reads the images; auto takes what suits the set and says so."""
    workers: int = 2
    """Loader processes or threads per rank for sets read from files; sets in memory need none."""
    keeping: Keeping = field(default_factory=Keeping)
    block: int = 0
    """For sets larger than memory: so many neighbouring images are one block, and an epoch shuffles
    the images of 64 blocks at a time, in place of all; 0: a full shuffle."""
    unreadable: Literal["error", "drop"] = "error"
    """error: an image that cannot be read ends the job, which names it; drop: all are read once
    before the start, and what cannot be read is left out, counted and named."""
    precision: Precision = field(default_factory=Precision)

    def reader(
        self,
        images: ImageSet,
        forget: NDArray[np.bool_],
        preset: Preset,
        batch_size: int,
        ranks: Ranks,
        tell: Callable[[str], object] = lambda text: None,
        like: Loader | None = None,
    ) -> Loader:
        """One image set as this rank reads it; `tell` hears why `auto` chose as it did.

        `like` is another loader of the set, whose images in memory are used as they are.
        """
        if isinstance(like, ResidentLoader):
            return like.resplit(forget, batch_size, self.seed)
        workers = 0 if isinstance(images, ArrayImages) else self.workers
        return make_loader(
            self.loader, images, forget, preset, batch_size, self.seed,
            ranks.rank, ranks.world, workers, ranks.device, tell if ranks.main else lambda _: None,
            self.keeping, self.block,
        )  # fmt: skip

    def opened_data(self) -> Data:
        """The upstream set, without what is unreadable where that is to be dropped."""
        data = open_data(self.data)
        if self.unreadable == "error":
            return data
        train = readable(data.train)
        test = train if data.test is data.train else readable(data.test)
        return dataclasses.replace(data, train=train, test=test)

    def opened_domains(self, path: str) -> dict[str, ImageSet]:
        """The domains at `path`, without what is unreadable where that is to be dropped."""
        domains = open_domains(path)
        if self.unreadable == "error":
            return domains
        return {name: readable(images) for name, images in domains.items()}

    def upstream(self, model: Classifier) -> Data:
        """The upstream set with its labels in the model's numbering; names the model's classes."""
        data = self.opened_data()
        names = model_classes(model.class_names, model.classes, data.classes)
        model.class_names = names
        return aligned(data, names)


@dataclass(frozen=True)
class Plan:
    """A run whose input has been checked: nothing is written yet, and nothing should go wrong."""

    job: Job
    recipe: Recipe
    model: Classifier
    data: Data
    forget: NDArray[np.bool_]  # over the training set
    request: Request | None = None

    def run(self, ranks: Ranks, like: Loader | None = None) -> Run:
        """The run on this rank's device; refuses a batch that the ranks cannot share."""
        recipe = self.recipe
        if recipe.batch_norm == "sync" and ranks.world > 1 and ranks.device.type != "cuda":
            raise InputError("got --batch-norm sync on cpu; it needs CUDA; use local or frozen")
        preset = self.model.preset
        told = told_left_out({"train": self.data.train})
        return Run(
            model=self.model,
            loader=self.job.reader(
                self.data.train, self.forget, preset, recipe.batch_size, ranks, told.append, like
            ),
            recipe=recipe,
            ranks=ranks,
            seed=self.job.seed,
            forget=torch.from_numpy(self.forget).to(ranks.device),
            forget_classes=self.request.classes if self.request is not None else (),
            precision=self.job.precision.resolved(ranks.device),
            notes=told,
        )


def train_and_save(plan: Plan, method: Method, run: Run, out: Path) -> None:
    """Make the run folder, train in place, save the weights and close the record."""
    for note in run.notes:
        print(note, file=sys.stderr)
    record = begun(plan, run, out)
    seconds = run_method(method, run, record.log)
    ended(record, plan, method, run, seconds)


def begun(plan: Plan, run: Run, out: Path) -> Record:
    """The run's folder with what is known before it starts; torch's random numbers are seeded."""
    record = Record(out, run.ranks, dataclasses.asdict(plan.job))
    if plan.request is not None:
        record.write("request.json", dataclasses.asdict(plan.request))
    for note in run.notes:
        record.log("note", text=note)
    # For what torch itself draws in training mode: dropout and stochastic depth, by rank.
    torch.manual_seed(plan.job.seed * 4096 + run.ranks.rank)
    return record


def ended(record: Record, plan: Plan, method: Method, run: Run, seconds: Seconds) -> None:
    """Save the trained weights and close the record."""
    facts: dict[str, Any] = {
        "method": type(method).__name__,
        "model": run.model.name,
        "seconds": dataclasses.asdict(seconds),
        "data": {"train": plan.data.train.digest, "test": plan.data.test.digest},
        "left_out": list(plan.data.train.left_out),
    }
    if run.ranks.main:
        facts["weights"] = save_model(record.folder, run.model, {"method": facts["method"]})
    record.finish(**facts)
