"""A run whose input has been checked, from its options to the saved weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.checkpoints.saver import SaveOptions, Saver, open_saver
from letheon.engine.compiled import check_code_file
from letheon.engine.distributed import Ranks, agree, wait_for_ranks
from letheon.engine.health import collapse_warning
from letheon.engine.loop import Seconds, run_method
from letheon.engine.memory.activations import require_blocks
from letheon.engine.memory.sharding import shard_run
from letheon.engine.memory.shards import host_state
from letheon.engine.method import Method, Run
from letheon.engine.models.batch_norm import check_kinds
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.original_check import Look, check_original
from letheon.engine.precision import Precision, say_slower
from letheon.engine.ranks.flight import write_flights_to
from letheon.engine.ranks.watch import PLACE, STACKS
from letheon.engine.recipe import Recipe
from letheon.engine.runs.origin import Start, plan_start
from letheon.engine.runs.reads import write_reads
from letheon.engine.runs.run_folder import ORIGIN, Record
from letheon.engine.runs.stop import Poll, defer
from letheon.errors import InputError, RunFailed
from letheon.loaders.backends.memory import free_bytes
from letheon.loaders.batch import Loader
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.factory import kind_of
from letheon.loaders.forget_request import Request, forget_mask, leave_out_earlier
from letheon.loaders.options import DataOptions
from letheon.loaders.preset import Preset
from letheon.loaders.views import SubsetImages, align_labels, list_notes, model_classes, unwrap
from letheon.progress import note, say


@dataclass(frozen=True, kw_only=True)
class JobOptions(DataOptions):
    """Options of every script that runs a network: its images, and how it computes."""

    precision: Precision = field(default_factory=Precision)
    timeout: float = 1800.0
    """Seconds that a rank waits for another before the job ends; more where one rank works long
    alone."""

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
    request: Request | None = None
    accept_chance: bool = False
    """Whether an original that is right by chance alone may forget."""
    stream: int | None = None  # seed of the random numbers; None for the job's
    label: str = ""
    """Name of the run in messages, where its folder is not to stay."""

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
        recipe = self.recipe.divide_batch(ranks.world)
        if recipe.batch_norm == "sync" and ranks.world > 1 and ranks.device.type != "cuda":
            raise InputError(
                "got batch-norm sync on cpu; it needs CUDA; use local or frozen",
                option="batch_norm",
            )
        if recipe.batch_norm_group:
            check_kinds(self.model)
        if recipe.activation_checkpoint:
            require_blocks(self.model, "activation_checkpoint")
        if self.job.precision.compile == "blocks":
            require_blocks(self.model, "compile")
        if self.job.precision.compile_file is not None:
            check_code_file(self.job.precision.compile_file, ranks.main)
        # Asks for the size of every file: one that is gone is found before training.
        digest = self.set_digests()["train"] if ranks.main else ""
        preset = self.model.preset
        data, forget = self.split
        notes = list_notes({"train": data.train})
        precision = self.job.precision.resolve(ranks.device)
        if ranks.main and (slower := say_slower(precision, ranks.device)):
            notes.append(slower)
        if like is not None and not _same_images(like, data.train):
            like = None

        def open_images(images: ImageSet) -> Loader:
            none = np.zeros(len(images), dtype=np.bool_)
            return self.reading.loader_of(images, none, preset, recipe.batch_size, ranks)

        return Run(
            model=self.model,
            loader=self.reading.loader_of(
                data.train, forget, preset, recipe.batch_size, ranks, notes.append, like
            ),
            recipe=recipe,
            ranks=ranks,
            seed=self.seed,
            forget=torch.from_numpy(forget).to(ranks.device),
            forget_classes=self.request.classes if self.request is not None else (),
            request=self.request.digest if self.request is not None else "",
            images=digest,
            precision=precision,
            notes=notes,
            held_out=lambda: self._held_out(ranks),
            open_images=open_images,
        )

    def seed_torch(self, ranks: Ranks) -> None:
        """Seed what torch itself draws in training mode: dropout and stochastic depth, by rank."""
        torch.manual_seed(self.seed * 4096 + ranks.rank)

    @cached_property
    def split(self) -> tuple[Data, NDArray[np.bool_]]:
        """The images without those forgotten earlier, and which training images to forget."""
        return leave_out_earlier(self.data, self.request, self.model.requests)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """(n,), the number in the training set of each image that the run may read."""
        train = self.split[0].train
        if train is not self.data.train and isinstance(train, SubsetImages):
            return train.numbers
        return np.arange(len(train))

    def set_digests(self) -> dict[str, str]:
        """Digests of the images by split, as they were opened; computed once a set."""
        return {"train": self.data.train.digest, "test": self.data.test.digest}

    def _held_out(self, ranks: Ranks) -> Loader:
        """The held-out images; a request of single samples names none of them."""
        images = self.split[0].test
        labels = images.true_labels
        forget = np.zeros(len(labels), dtype=np.bool_)
        if self.request is not None and self.request.samples is None:
            forget = forget_mask(self.request, labels)
        preset, batch_size = self.model.preset, self.recipe.batch_size
        return self.reading.loader_of(images, forget, preset, batch_size, ranks)

    @property
    def dated_request(self) -> Request | None:
        """The request; of samples, with the digest of the images that its numbers are of."""
        if self.request is None or self.request.samples is None:
            return self.request
        return dataclasses.replace(self.request, data=self.data.train.digest)


def _same_images(loader: Loader, images: ImageSet) -> bool:
    """Whether a loader reads these images, which may be a choice of a set's."""
    other = getattr(loader, "images", images)
    return np.array_equal(unwrap(other)[1], unwrap(images)[1])


def check_knowledge(plan: Plan, method: Method, run: Run) -> None:
    """Refuse an original that does not know the images it is to forget; see `check_original`."""
    if method.kind == "training" or method.from_scratch or plan.accept_chance:
        return

    def open_as(preset: Preset) -> Loader:
        data, forget = plan.split
        return plan.reading.loader_of(data.train, forget, preset, plan.recipe.batch_size, run.ranks)

    check_original(Look(run.model, run.loader, run.forget, run.precision, run.ranks, open_as))


def row_bytes(method: Method, run: Run, world: int) -> int:
    """Count the bytes that a method keeps of a rank's share of the forget samples, at most."""
    return -(-int(run.forget.sum()) // world) * method.sample_bytes(run)


def check_rows(method: Method, run: Run) -> None:
    """Refuse a method that keeps more of the forget samples than is free; every rank must call.

    Raises:
        InputError: on every rank.
    """
    ranks = run.ranks
    needed, free = row_bytes(method, run, ranks.world), free_bytes(ranks.device)
    problem = (
        f"got {needed / 2**30:.2f} GiB that {method.name} keeps of a rank's share of the forget "
        f"samples; expected at most {free / 2**30:.2f} GiB, which is free on {ranks.device}; start "
        "more ranks, or forget fewer samples"
    )
    agree(ranks, problem if needed > free else None)


def train_and_save(
    plan: Plan,
    method: Method,
    run: Run,
    out: Path,
    saving: SaveOptions | None = None,
    overwrite: bool = False,
) -> None:
    """Make the run folder, train in place, save the weights and close the record.

    An unfinished run in the folder goes on, where it is of the same settings, data and code.

    Raises:
        RunFailed: as `run_method`; the folder then holds the reason and no weights.
        InputError: the folder holds an unfinished run of something else.
        Stopped: a signal came, and the state is saved.
    """
    if run.splits:  # before anything runs: no device holds the whole network
        shard_run(run)
    check_rows(method, run)
    check_knowledge(plan, method, run)
    saving = saving or SaveOptions()
    start = plan_start(plan, method, run, out, saving, overwrite)
    if start.finished:
        if run.ranks.main:
            note(f"{out}: already done by the same command")
        return
    for text in run.notes:
        note(text)
    saver = start_run(plan, run, out, start, Poll(run.ranks, *saving.interval))
    record = saver.record
    try:
        seconds = run_method(method, run, record.log, saver)
        finish_run(saver, plan, method, run, seconds)
    except RunFailed as error:
        saver.fail(error)
        raise
    finally:
        defer(False)


def describe(value: Any) -> Any:
    """Return settings as nested dicts, each method with its name, as `--config` reads them."""
    if isinstance(value, list | tuple):
        return [describe(part) for part in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    name = {"name": value.name} if isinstance(value, Method) else {}
    return name | {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}


def start_run(plan: Plan, run: Run, out: Path, start: Start, poll: Poll) -> Saver:
    """Make the run's folder with what is known before it starts; seed torch's random numbers."""
    record = Record(out, run.ranks, describe(plan.job), start.resume)
    PLACE.folder = record.folder
    record.write(ORIGIN, start.origin)
    saver = open_saver(record, poll, start.resume, start.overrides)
    if run.ranks.world > 1:
        write_flights_to(record.folder / STACKS, run.ranks.device)
    if saver.previous is not None:
        _reopen_loader(plan, run, saver.previous.facts["choices"]["loader"])
    if plan.request is not None and run.ranks.main:
        request = plan.dated_request
        assert request is not None
        earlier = [dataclasses.asdict(one) for one in plan.model.requests]
        record.write("request.json", {**dataclasses.asdict(request), "earlier": earlier})
    for text in run.notes:
        record.log("note", text=text)
    plan.seed_torch(run.ranks)
    return saver


def _reopen_loader(plan: Plan, run: Run, kind: Any) -> None:
    """Read the images by the backend that the run was begun with, whatever `auto` takes now."""
    if kind == kind_of(run.loader) or plan.job.loader != "auto":
        return
    job = dataclasses.replace(plan.reading, loader=kind)
    data, forget = plan.split
    preset, size = plan.model.preset, plan.recipe.batch_size
    run.loader = job.loader_of(data.train, forget, preset, size, run.ranks)


def finish_run(saver: Saver, plan: Plan, method: Method, run: Run, seconds: Seconds) -> None:
    """Save the trained weights, close the record and print the warnings."""
    record = saver.record
    facts: dict[str, Any] = {
        "method": method.name,
        "kind": method.kind,
        "model": run.model.name,
        "dtype": run.precision.dtype,
        "seconds": dataclasses.asdict(seconds),
        "left_out": list(plan.data.train.left_out),
        "warnings": run.warnings,
        **({"resumed": saver.history} if saver.history else {}),
    }
    if run.model.canaries is not None:
        facts["canaries"] = run.model.canaries.facts
    request = plan.dated_request if run.ranks.main else plan.request
    if request is not None:
        run.model.requests = (*run.model.requests, request)
    weights = host_state(run.model, run.ranks) if run.shards is not None else None
    if run.ranks.main:
        facts["images"] = {"train": len(plan.data.train), "test": len(plan.data.test)}
        facts["weights"] = save_model(
            record.folder, run.model, {"method": facts["method"]}, weights
        )
        facts["data"] = plan.set_digests()  # known since the start; the weights are safe first
        numbers, size = torch.from_numpy(plan.numbers), len(plan.data.train)
        facts["reads"] = write_reads(record.folder, run.reads, run.forget, numbers, size)
    wait_for_ranks(run.ranks)  # a slow disk is no timeout
    untrained = method.from_scratch and not method.recipe.epochs  # a control, meant to know nothing
    # every rank reads its share
    if not untrained and (collapse := collapse_warning(run)) is not None:
        run.warnings.append(collapse)
        record.log("warning", text=collapse)
    if run.ranks.main:
        for warning in run.warnings:
            say(f"warning: {plan.label or record.folder}: {warning}")
    saver.finish()
    record.finish(**facts)
