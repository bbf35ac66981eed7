"""From run folders and checkpoints to the rows of the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from letheon.engine.checkpoint import load_model, weights_digest
from letheon.engine.distributed import Ranks
from letheon.engine.model import Classifier
from letheon.engine.record import FINISHED
from letheon.eval.measure import Conditions, Passes, measure, sweep
from letheon.launch.job import Job
from letheon.loaders.batch import Loader
from letheon.loaders.data import open_domains
from letheon.loaders.errors import InputError
from letheon.loaders.images import Data, ImageSet
from letheon.loaders.request import Request, forget_mask, resolve


@dataclass(frozen=True)
class Entry:
    """One model of the comparison."""

    name: str
    model: Classifier
    weights: str  # digest of the weights that were loaded
    seconds: float | None  # of forgetting: preparation and training


@dataclass(frozen=True)
class Comparison:
    """Models and sets that have been found and checked."""

    original: Entry | None
    retrained: Entry | None
    others: list[Entry]
    data: Data
    domains: dict[str, ImageSet]
    request: Request

    def rows(
        self, job: Job, conditions: Conditions, batch_size: int, ranks: Ranks
    ) -> list[dict[str, Any]]:
        """One row per model: original, retrained, then the others in the order given."""
        original = self._passes(self.original, job, batch_size, ranks)
        retrained = self._passes(self.retrained, job, batch_size, ranks)
        rows = []
        for entry in (self.original, self.retrained, *self.others):
            if entry is None:
                continue
            known = {id(self.original): original, id(self.retrained): retrained}
            passes = known.get(id(entry)) or self._passes(entry, job, batch_size, ranks)
            assert passes is not None
            row = measure(passes, original, retrained, conditions)
            rows.append({"name": entry.name, "seconds": entry.seconds, **row})
        return rows

    def _passes(
        self, entry: Entry | None, job: Job, batch_size: int, ranks: Ranks
    ) -> Passes | None:
        if entry is None:
            return None
        model = entry.model.to(ranks.device)
        sets = {"train": self.data.train, "test": self.data.test}
        sets |= {f"domain/{name}": images for name, images in self.domains.items()}
        loaders: dict[str, Loader] = {
            key: job.reader(images, self._told(key, images), model.preset, batch_size, ranks)
            for key, images in sets.items()
        }
        precision = job.precision.resolved(ranks.device)
        passes = sweep(entry.name, model, loaders, ranks, entry.weights, precision)
        model.to("cpu")
        return passes

    def _told(self, key: str, images: ImageSet) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which images of a set belong to what was forgotten."""
        if key == "train" or (key == "test" and self.request.samples is None):
            return forget_mask(self.request, images.labels)
        return np.zeros(len(images), dtype=bool)


def planned(
    job: Job,
    original: Path | None,
    retrained: Path | None,
    runs: Sequence[Path],
    model: str | None,
    forget: str | None,
    downstream: str | None,
) -> Comparison:
    """Load every model and open every set.

    Raises:
        InputError: nothing to measure, an unfinished run, weights that are not the recorded ones,
            or runs that forgot different things.
    """
    paths = [path for path in (original, retrained, *runs) if path is not None]
    if not paths:
        raise InputError("got no model; expected --original, --retrained or --runs")
    first = _entry(original, model), _entry(retrained, model)
    others = [entry for path in runs if (entry := _entry(path, model)) is not None]
    entries = [entry for entry in (*first, *others) if entry is not None]
    data = job.upstream(entries[0].model)
    for entry in entries:
        if entry.model.classes != len(data.classes):
            raise InputError(
                f"got {entry.name} of {entry.model.classes} classes; {entries[0].name} has "
                f"{len(data.classes)}; compare models of one data set"
            )
    request = _request([path for path in paths if path.is_dir()], forget, data, job.seed)
    domains = open_domains(downstream) if downstream is not None else {}
    return Comparison(first[0], first[1], others, data, domains, request)


def _entry(path: Path | None, model: str | None) -> Entry | None:
    if path is None:
        return None
    facts: dict[str, Any] = {}
    if path.is_dir():
        if not (path / FINISHED).is_file():
            raise InputError(
                f"got {path}; it has no {FINISHED}: the run is unfinished; run it again"
            )
        facts = json.loads((path / FINISHED).read_text(encoding="utf-8"))
    loaded = load_model(path, name=model)
    digest = weights_digest(loaded)
    if facts and facts["weights"] != digest:
        raise InputError(
            f"got {path}, whose weights are {digest[:12]}; its record says "
            f"{facts['weights'][:12]}; the file was changed: run it again"
        )
    seconds = facts.get("seconds")
    spent = None if seconds is None else seconds["prepare"] + seconds["train"]
    return Entry(path.name if path.is_dir() else path.stem, loaded, digest, spent)


def _request(folders: Sequence[Path], forget: str | None, data: Data, seed: int) -> Request:
    """What the runs forgot: all of them the same, and the same as --forget where that is given."""
    told: dict[str, Request] = {}
    if forget is not None:
        told["--forget"] = resolve(forget, data, seed)
    for folder in folders:
        file = folder / "request.json"
        if file.is_file():
            facts = json.loads(file.read_text(encoding="utf-8"))
            samples = None if facts["samples"] is None else tuple(facts["samples"])
            told[folder.name] = Request(
                facts["text"], tuple(facts["classes"]), samples, facts["digest"],
                tuple(facts["notes"]),
            )  # fmt: skip
    if not told:
        raise InputError("got no run that tells what was forgotten; say it: --forget class:3")
    (first, request), *rest = told.items()
    for name, other in rest:
        if (other.digest, other.samples is None) != (request.digest, request.samples is None):
            raise InputError(
                f"got {first}, which forgot {request.text}, and {name}, which forgot {other.text}; "
                "compare runs of one request"
            )
    return request
