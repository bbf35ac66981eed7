"""A run whose input has been checked, from its options to the saved weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.distributed import Ranks
from letheon.engine.health import collapse_warning
from letheon.engine.loop import Seconds, run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.errors import InputError, RunFailed
from letheon.loaders.batch import Loader
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request, forget_mask
from letheon.loaders.options import DataOptions
from letheon.loaders.preset import Preset
from letheon.loaders.views import align_labels, list_notes, model_classes


@dataclass(frozen=True, kw_only=True)
class JobOptions(DataOptions):
    """Options of every script that runs a network: its images, and how it computes."""

    precision: Precision = field(default_factory=Precision)

    def loader_of(
        self,
        images: ImageSet,
        forget: NDArray[np.bool_],
        preset: Preset,
        batch_size: int,
        ranks: Ranks,
        tell: Callable[[str], object] = lambda text: None,
        like: Loader | None = None,
    ) -> Loader:
        """`open_loader` on this rank."""
        place = (ranks.rank, ranks.world, ranks.device)
        return self.open_loader(images, forget, preset, batch_size, place, tell, like)

    def upstream(self, model: Classifier) -> Data:
        """The upstream set with its labels in the model's numbering; names the model's classes."""
        data = self.open_data()
        names = model_classes(model.class_names, model.classes, data.classes)
        data = align_labels(data, names, assumed=model.class_names is None)
        model.class_names = names
        return data


@dataclass(frozen=True)
class Plan:
    """A run whose input has been checked: nothing is written yet, and nothing should go wrong."""

    job: JobOptions
    recipe: Recipe
    model: Classifier
    data: Data
    forget: NDArray[np.bool_]  # over the training set
    request: Request | None = None
    stream: int | None = None  # seed of the random numbers; None for the job's

    @property
    def seed(self) -> int:
        """Seed of first weights, order and augmentation."""
        return self.job.seed if self.stream is None else self.stream

    @property
    def reading(self) -> JobOptions:
        """The job's options, with the seed of the random numbers."""
        return dataclasses.replace(self.job, seed=self.seed)

    def run(self, ranks: Ranks, like: Loader | None = None) -> Run:
        """The run on this rank's device; refuses a batch that the ranks cannot share."""
        recipe = self.recipe
        if recipe.batch_norm == "sync" and ranks.world > 1 and ranks.device.type != "cuda":
            raise InputError(
                "got batch-norm sync on cpu; it needs CUDA; use local or frozen",
                option="batch_norm",
            )
        if ranks.main:  # asks for the size of every file: one that is gone is found before training
            self.set_digests()
        preset = self.model.preset
        notes = list_notes({"train": self.data.train})

        def open_images(images: ImageSet) -> Loader:
            none = np.zeros(len(images), dtype=np.bool_)
            return self.reading.loader_of(images, none, preset, recipe.batch_size, ranks)

        return Run(
            model=self.model,
            loader=self.reading.loader_of(
                self.data.train, self.forget, preset, recipe.batch_size, ranks, notes.append, like
            ),
            recipe=recipe,
            ranks=ranks,
            seed=self.seed,
            forget=torch.from_numpy(self.forget).to(ranks.device),
            forget_classes=self.request.classes if self.request is not None else (),
            request=self.request.digest if self.request is not None else "",
            precision=self.job.precision.resolve(ranks.device),
            notes=notes,
            held_out=lambda: self._held_out(ranks),
            open_images=open_images,
        )

    def set_digests(self) -> dict[str, str]:
        """Digests of the images by split; computed once a set."""
        return {"train": self.data.train.digest, "test": self.data.test.digest}

    def _held_out(self, ranks: Ranks) -> Loader:
        """The held-out images; a request of single samples names none of them."""
        labels = self.data.test.labels
        forget = np.zeros(len(labels), dtype=np.bool_)
        if self.request is not None and self.request.samples is None:
            forget = forget_mask(self.request, labels)
        preset, batch_size = self.model.preset, self.recipe.batch_size
        return self.reading.loader_of(self.data.test, forget, preset, batch_size, ranks)


def train_and_save(plan: Plan, method: Method, run: Run, out: Path) -> None:
    """Make the run folder, train in place, save the weights and close the record.

    Raises:
        RunFailed: as `run_method`; the folder then holds the reason and no weights.
    """
    for note in run.notes:
        print(note, file=sys.stderr)
    record = start_run(plan, run, out)
    try:
        seconds = run_method(method, run, record.log)
        finish_run(record, plan, method, run, seconds)
    except RunFailed as error:
        record.fail(str(error))
        raise


def start_run(plan: Plan, run: Run, out: Path) -> Record:
    """Make the run's folder with what is known before it starts; seed torch's random numbers."""
    record = Record(out, run.ranks, dataclasses.asdict(plan.job))
    if plan.request is not None:
        record.write("request.json", dataclasses.asdict(plan.request))
    for note in run.notes:
        record.log("note", text=note)
    # For what torch itself draws in training mode: dropout and stochastic depth, by rank.
    torch.manual_seed(plan.seed * 4096 + run.ranks.rank)
    return record


def finish_run(record: Record, plan: Plan, method: Method, run: Run, seconds: Seconds) -> None:
    """Save the trained weights, close the record and print the warnings."""
    facts: dict[str, Any] = {
        "method": method.name,
        "kind": method.kind,
        "model": run.model.name,
        "dtype": run.precision.dtype,
        "seconds": dataclasses.asdict(seconds),
        "left_out": list(plan.data.train.left_out),
        "warnings": run.warnings,
    }
    if run.ranks.main:
        facts["weights"] = save_model(record.folder, run.model, {"method": facts["method"]})
        facts["data"] = plan.set_digests()  # known since the start; the weights are safe first
    if (collapse := collapse_warning(run)) is not None:  # every rank reads its share
        run.warnings.append(collapse)
        record.log("warning", text=collapse)
    if run.ranks.main:
        for warning in run.warnings:
            print(f"warning: {record.folder}: {warning}", file=sys.stderr)
    record.finish(**facts)
