"""Load run folders and checkpoints as the models and sets of a comparison."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from letheon.engine.checkpoints.model_file import load_model, note, weights_digest
from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.checkpoints.state_dict_match import BrokenWeights
from letheon.engine.checkpoints.weights_file import hub_weights
from letheon.engine.memory.shards import copy_on_meta
from letheon.engine.models.classifier import Classifier, build
from letheon.engine.runs.manifest import verify_records
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import FINISHED, ORIGIN, failure_reason
from letheon.errors import InputError, name_option
from letheon.eval.case import DOMAIN, EARLIER
from letheon.eval.inference.networks import Shelf, Source
from letheon.eval.references import (
    FORGETTING,
    check_references,
    list_doubts,
    read_recipe,
    read_start,
)
from letheon.loaders.canaries import plant
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request, leave_out_earlier, resolve
from letheon.loaders.forget_request import forget_mask as mask_of
from letheon.loaders.views import SubsetImages, unwrap
from letheon.regular import read_text
from letheon.sealed import expect_shape, read_sealed

RANDOM = "random"
"""Name of the untrained network's row."""
_FIRST_EDITION = {
    "Retrain": ("retrain", "reference"),
    "Finetune": ("finetune", "control"),
    "HeadDistillation": ("head-distillation", "control"),
    "GradAscent": ("grad-ascent", "unlearning"),
    "L1Sparse": ("l1-sparse", "unlearning"),
    "RandomLabel": ("random-label", "unlearning"),
    "SalUn": ("salun", "unlearning"),
    "Spkd": ("spkd", "unlearning"),
}
"""The class names that run.json held before it had a kind -> name and kind of the method."""
_NOT_THE_METHOD = (
    "seed", "out", "overwrite", "device", "workers", "loader", "caches", "unreadable",
    "keeping",  # the first edition's name of caches
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model of the comparison."""

    name: str
    role: str  # original, retrained, control, unlearned
    model: Classifier
    """Without its numbers where `source` gives the network."""
    weights: str  # digest of the weights that were loaded
    seconds: float | None = None  # of forgetting: preparation and training
    together: int = 1  # runs that this clock counts, where one pass fed several
    seed: int | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    """Digests of the images that a run folder's record names, by split."""
    counts: Mapping[str, int] = field(default_factory=dict)  # of these images
    settings: str = ""  # of the run but for its seed; equal for runs that differ by the seed alone
    own_stream: bool = False  # random numbers are not those of training with the same seed
    start: str = ""  # digest of the weights that forgetting began with, where a record names it
    kind: str = ""  # of the run, where a record names it: training, reference, unlearning, control
    recipe: Mapping[str, Any] = field(default_factory=dict)  # of training, where settings name it
    source: Callable[[], Classifier] | None = field(default=None, compare=False)

    def open(self) -> Classifier:
        """Open the network with its numbers, on the host; let it go as soon as its turn is over.

        Raises:
            InputError: its file cannot be read any more, or was changed.
        """
        if self.source is None:
            return self.model
        found, known = self.source(), self.model
        found.class_names, found.requests = known.class_names, known.requests
        found.canaries = known.canaries
        return found


@dataclass(frozen=True)
class Comparison:
    """The models and sets of a table, opened and checked."""

    entries: list[Entry]  # original, retrained, random network, then the others as given
    data: Data
    domains: dict[str, ImageSet]
    request: Request
    left_out: dict[str, str] = field(default_factory=dict)  # model -> why it cannot be measured
    opened: Data | None = None  # `data` before images forgotten earlier were taken out
    forget: NDArray[np.bool_] | None = None  # over the training images, where some are left out
    earlier: dict[str, ImageSet] = field(default_factory=dict)
    """Training images of each earlier request, by its text; they are no retain images."""

    def of_role(self, role: str) -> list[Entry]:
        """Select entries in this role, in order."""
        return [entry for entry in self.entries if entry.role == role]

    def find_original(self, left_out: Container[str] = ()) -> Entry | None:
        """Find the original that models are compared with: the first, of these names aside."""
        return next((one for one in self.of_role("original") if one.name not in left_out), None)

    @property
    def nothing_held_out(self) -> bool:
        """Whether the test images are the training images, so that no number is of others."""
        return unwrap(self.data.train)[0] is unwrap(self.data.test)[0]

    def read_groups(self, file: Path) -> tuple[str, ...]:
        """Read the group of each training image: one name a line, in the images' order.

        Raises:
            InputError: the file cannot be read, or has another number of lines.
        """
        try:
            lines = read_text(file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"got the groups {file}, which cannot be read ({error}); expected a text file",
                option="groups",
            ) from error
        whole = (self.opened or self.data).train
        if len(lines) != len(whole):
            raise InputError(
                f"got {len(lines)} lines in {file}; expected one a training image, {len(whole)}",
                option="groups",
            )
        train = self.data.train
        kept = train.numbers.tolist() if train is not whole else range(len(whole))  # type: ignore[attr-defined]
        return tuple(lines[number].strip() for number in kept)

    @property
    def canaries(self) -> dict[int, int]:
        """Number of each training image under a planted label -> its true label."""
        labels, true = self.data.train.labels, self.data.train.true_labels
        return {number: int(true[number]) for number in np.flatnonzero(labels != true).tolist()}

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers of this comparison worth less than they look."""
        warnings = [doubt.text for doubt in list_doubts(self)]
        if self.nothing_held_out:
            warnings.append(
                "nothing is held out: test is the same as train; what needs test images is not "
                "measured; name a set with test images"
            )
        return warnings

    @property
    def sets(self) -> dict[str, ImageSet]:
        """Every image set by its key in a model's passes."""
        named = {f"{DOMAIN}{name}": images for name, images in self.domains.items()}
        named |= {f"{EARLIER}{text}": images for text, images in self.earlier.items()}
        return {"train": self.data.train, "test": self.data.test, **named}

    def forget_mask(self, key: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(n,) bool: which images of a set belong to what was forgotten."""
        if key == "train" and self.forget is not None:
            return self.forget
        labels = self.sets[key].true_labels
        if key == "train" or (key == "test" and self.request.samples is None):
            return mask_of(self.request, labels)
        return np.zeros(len(labels), dtype=bool)


def open_comparison(
    job: JobOptions,
    originals: Sequence[Path],
    retrained: Sequence[Path],
    runs: Sequence[Path],
    checkpoint: CheckpointOptions,
    forget: str | None,
    downstream: str | None,
    other_images: bool = False,
) -> Comparison:
    """Check every model and open every set; canaries are planted unless these are other images.

    Each network is read, verified and let go: `Entry.open` reads it again when its turn comes.
    Of several originals the others are compared with the first, or with the one that all runs were
    made from.

    Raises:
        InputError: nothing to measure, an unfinished run, weights that are not the recorded ones,
            runs that forgot different things, or two of one name. A run that failed, or a model
            whose weights are not finite, is left out, unless there is no other.
    """
    first = ((path, "original") for path in originals)
    paths = [*first, *((path, "retrained") for path in retrained), *((path, "") for path in runs)]
    if not paths:
        raise InputError("got no model; expected original, retrained or runs", option="runs")
    unused = sorted({*checkpoint.changes, *(["part"] if checkpoint.part else [])})
    if unused and all((path / "settings.json").is_file() for path, _ in paths):
        raise InputError(
            f"got {', '.join(unused)} for run folders, whose files say it; leave it out, or name "
            "a checkpoint from elsewhere",
            option=unused[0],
        )
    names = _names([path for path, _ in paths])
    entries, left_out, shelf = [], {}, Shelf()
    for (path, role), name in zip(paths, names, strict=True):
        try:
            with name_option(role or "runs"):
                entries.append(_entry(path, name, role, checkpoint, shelf))
        except _Broken as error:
            left_out[name] = str(error)
    if not entries:
        raise InputError("; ".join(left_out.values()))
    data = job.upstream(entries[0].model)
    for entry in entries:
        if entry.model.classes != len(data.classes):
            raise InputError(
                f"got {entry.name} of {entry.model.classes} classes; {entries[0].name} has "
                f"{len(data.classes)}; compare models of one data set"
            )
    data = plant_canaries(entries, data, other_images)
    request = _request([path for path, _ in paths if path.is_dir()], forget, data, job.seed)
    domains = job.open_domains(downstream) if downstream is not None else {}
    return assemble_comparison(entries, data, domains, request, left_out)


def add_random_control(of: Comparison, seed: int) -> Comparison:
    """Add an untrained network behind the original and the retrained models.

    Raises:
        InputError: a model has its name.
    """
    before = sum(entry.role in ("original", "retrained") for entry in of.entries)
    first, rest = of.entries[:before], of.entries[before:]
    return replace(of, entries=[*first, _random(of.entries, seed), *rest])


def plant_canaries(entries: Sequence[Entry], data: Data, other_images: bool = False) -> Data:
    """Give the training images the wrong labels that the models' original was trained with.

    Other images than those it was trained on keep their labels, and a note says so.

    Raises:
        InputError: models of other canaries, or images that these were not planted in.
    """
    found = {e.model.canaries: e.name for e in entries if e.model.canaries is not None}
    if len(found) > 1:
        first, second, *_ = found.values()
        raise InputError(
            f"got {first} and {second} with other canaries; compare models of one original"
        )
    if found and other_images:
        note = (
            "the canaries of the original are not planted: these are other images than it was "
            "trained on"
        )
        data.train.notes = (*data.train.notes, note)
        return data
    return plant(data, next(iter(found), None))


def assemble_comparison(
    entries: list[Entry],
    data: Data,
    domains: dict[str, ImageSet],
    request: Request,
    left_out: dict[str, str] | None = None,
) -> Comparison:
    """Make the comparison; what a model forgot before `request` is a set of its own.

    The one of several originals that all runs were made from, by their records, comes first.

    Raises:
        InputError: sample numbers of other images were forgotten earlier, or `check_references`
            refuses a model.
    """
    check_references(entries, request)
    starts = {e.start for e in entries if e.role in FORGETTING and e.start}
    if len(starts) == 1:  # sorting is stable
        entries = sorted(entries, key=lambda e: e.role != "original" or e.weights not in starts)
    every = [one for entry in entries for one in entry.model.requests]
    earlier = {one.numbers: one for one in every if one.numbers != request.numbers}
    found = Comparison(entries, data, domains, request, left_out or {}, data)
    if not earlier:
        return found
    rest, forget = leave_out_earlier(data, request, list(earlier.values()))
    labels = data.train.true_labels
    now = mask_of(request, labels)
    sets: dict[str, ImageSet] = {
        one.text: SubsetImages(data.train, np.flatnonzero(mask_of(one, labels) & ~now))
        for one in earlier.values()
    }
    named = {text: images for text, images in sets.items() if len(images)}
    return replace(found, data=rest, forget=forget, earlier=named)


def check_images(entries: Sequence[Entry], data: Data | None) -> None:
    """Compare the images opened now with those that the run folders' records name, by digest.

    Asks the size of every file, so one rank is enough.

    Raises:
        InputError: they differ; the text says which run, which split, and by how many images.
    """
    if data is None or not any(entry.data for entry in entries):
        return
    now = {"train": data.train, "test": data.test}
    for entry in entries:
        for split, images in now.items():
            known = entry.data.get(split)
            if known is None or known == images.digest:
                continue
            before = entry.counts.get(split)
            count = f"{before} then, {len(images)} now" if before else f"{len(images)} now"
            raise InputError(
                f"got other {split} images than {entry.name} was made with: {count}, digest "
                f"{known[:12]} then, {images.digest[:12]} now; give the images of the run, or "
                "allow other images where that is meant",
                option="other_images",
            )


def _random(entries: Sequence[Entry], seed: int) -> Entry:
    """Build a network of the first entry's architecture with new weights."""
    known = entries[0].model

    def make() -> Classifier:
        return build(known.name, known.classes, seed, known.preset).eval()

    try:
        model = make()
    except InputError as error:
        raise InputError(
            f"got {known.name}, of which no untrained network can be built; expected an "
            "architecture that goes by a name; leave the random control out",
            option="random_control",
        ) from error
    model.class_names = known.class_names
    if any(entry.name == RANDOM for entry in entries):
        raise InputError(
            f"got a run named {RANDOM} beside the random control; rename the run's folder",
            option="random_control",
        )
    return Entry(
        RANDOM, "control", copy_on_meta(model), weights_digest(model), seed=seed, source=make
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each model: its own, with the folder above where several have the same."""
    short = [path.name if path.is_dir() else path.stem for path in paths]
    many = Counter(short)
    names = [
        name if many[name] == 1 else f"{path.absolute().parent.name}/{name}"
        for path, name in zip(paths, short, strict=True)
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"got several models named {twice[0]}; give each once, or rename one")
    return names


def _content(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "nothing"


class _Broken(InputError):
    """A model that cannot be measured, though nothing is wrong with the others."""


def _entry(path: Path, name: str, role: str, checkpoint: CheckpointOptions, shelf: Shelf) -> Entry:
    facts: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    run = path.is_dir() and hub_weights(path) is None
    if run:
        if (reason := failure_reason(path)) is not None:
            raise _Broken(f"got {path}, a run that failed: {reason}")
        if not any((path / file).is_file() for file in (FINISHED, "settings.json")):
            raise InputError(
                f"got {path}; it is no run folder (it holds {_content(path)}); expected one of "
                "train or forget, or a checkpoint; name that"
            )
        if not (path / FINISHED).is_file():
            raise InputError(
                f"got {path}; it has no {FINISHED}: the run is unfinished; run it again"
            )
        verify_records(path, FINISHED, "settings.json", ORIGIN)
        facts = read_sealed(path / FINISHED)
        settings = read_sealed(path / "settings.json")

    def load(tell: Callable[[str], object]) -> Classifier:
        if run:
            return load_model(path, name=checkpoint.model, tell=tell)
        return checkpoint.load(path, tell)

    source = Source(name, partial(load, lambda line: None), shelf)
    try:
        loaded = replace(source, read=partial(load, note))()
    except BrokenWeights as error:
        raise _Broken(str(error)) from error
    digest = weights_digest(loaded)
    if facts and (recorded := str(facts.get("weights"))) != digest:
        raise InputError(
            f"got {path}, whose weights are {digest[:12]}; its record says "
            f"{recorded[:12]}; the file was changed: run it again"
        )
    with expect_shape(path / FINISHED):
        seconds = facts.get("seconds")
        spent = None if seconds is None else float(seconds["prepare"]) + float(seconds["train"])
        runs = 1 if seconds is None else int(seconds.get("together", 1))
    recorded = str(facts.get("method", path))
    method, kind = _FIRST_EDITION.get(recorded, (recorded, "unlearning"))
    kind = facts.get("kind", kind)
    known = "control" if kind == "control" else "unlearned"
    seed = settings.get("seed")
    of_method = settings.get("method")
    own_stream = isinstance(of_method, dict) and of_method.get("share_seed") is False
    alike = {k: v for k, v in settings.items() if k not in _NOT_THE_METHOD} | {"run": method}
    return Entry(
        name, role or known, copy_on_meta(loaded), digest, spent if runs == 1 else None, runs, seed,
        facts.get("data", {}), facts.get("images", {}), json.dumps(alike, sort_keys=True),
        own_stream, read_start(path), kind if facts else "", read_recipe(settings),
        replace(source, weights=digest),
    )  # fmt: skip


def _request(folders: Sequence[Path], forget: str | None, data: Data, seed: int) -> Request:
    """Read what the runs forgot: all of them the same, and `forget` too where it is named."""
    requests: dict[str, Request] = {}
    if forget is not None:
        requests["forget"] = resolve(forget, data, seed)
    earlier: set[tuple[str, str]] = set()
    for folder in folders:
        file = folder / "request.json"
        if file.is_file():
            facts = read_sealed(file)
            requests[str(folder)] = Request.from_facts(facts, file)
            before = (Request.from_facts(one, file) for one in facts.get("earlier", ()))
            earlier |= {one.numbers for one in before}
    # The original of a second request is a run that forgot the first.
    requests = {name: one for name, one in requests.items() if one.numbers not in earlier}
    if not requests:
        raise InputError(
            "got no run that says what was forgotten; name it, such as class:3", option="forget"
        )
    (first, request), *rest = requests.items()
    for name, other in rest:
        if other.numbers != request.numbers:
            raise InputError(
                f"got {first}, which forgot {request.text}, and {name}, which forgot {other.text}; "
                "compare runs of one request"
            )
    return request
