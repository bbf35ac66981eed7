"""One model's passes over all image sets: the only place where evaluation runs a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from letheon.engine.distributed import Ranks
from letheon.engine.memory.shards import is_split
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.teacher import frozen_copy
from letheon.engine.precision import Precision
from letheon.engine.runs.stop import Poll
from letheon.errors import InputError
from letheon.eval.inference.cache import Cache
from letheon.eval.inference.extract import (
    InferenceOptions,
    Rows,
    extract,
    read_answers,
    read_together,
)
from letheon.eval.inference.part_saver import PartSaver
from letheon.eval.outputs import Outputs
from letheon.loaders.batch import Batch, Loader
from letheon.progress import Line
from letheon.spans import span

T = TypeVar("T")


@dataclass(eq=False)
class Passes:
    """One model's outputs on every set, and what several rows compute of them once."""

    name: str
    outputs: dict[str, Outputs]  # "train", "test", "domain/<name>", "balanced": this rank's share
    weights: str = ""  # digest of the weights these were made with
    _results: dict[str, Any] = field(default_factory=dict, repr=False)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Compute something under a name, the first time only."""
        if name not in self._results:
            self._results[name] = compute()
        result: T = self._results[name]
        return result

    def keep(self, name: str, result: object) -> None:
        """Set what `once` will give under a name."""
        self._results[name] = result


@dataclass(frozen=True)
class Store:
    """Where outputs are kept, and what tells one image set from another."""

    folder: Path  # on a file system that all ranks share
    sets: Mapping[str, tuple[str, int]]
    """Set -> digest of its images and of which of them are to be forgotten, and their number."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Set -> digest of its images alone, kept beside its outputs."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What the rounding of outputs depends on, such as the batch size; for passes to go on."""
    interval: tuple[float, int] = (0.0, 0)
    """Seconds and batches after which a pass is saved; 0: never by these. It is also saved when
    64 MiB of answers are held, and when a signal comes."""


class Swept(NamedTuple):
    """A model to be run over the sets."""

    name: str  # what tables and messages call it
    model: Classifier  # on the ranks' device, or split over the ranks
    weights: str = ""  # digest of its weights, kept beside what is measured
    taps: tuple[str, ...] = ()
    """Modules whose pooled outputs on the test set are kept too, as `taps.stages` gives."""


@dataclass(frozen=True)
class SweepOptions:
    """How the models of one sweep are run."""

    precision: Precision = Precision("fp32")
    flip: bool = False
    """Test-time flip: average with the mirror image's answers."""
    shift: bool = False
    """Test-time shift: average with the answers to the image moved by a pixel."""
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Sets of which these samples alone are read, with taps."""
    store: Store | None = None
    """Passes found there are not made again, new ones are kept there; needs `weights`."""

    def of_set(self, key: str, taps: tuple[str, ...]) -> InferenceOptions:
        """Options of one model's pass over one set."""
        rows = self.parts.get(key)
        own = taps if key == "test" or rows is not None else ()
        return InferenceOptions(
            None if rows is None else tuple(rows), self.precision, own, self.flip, self.shift
        )


@span("evaluation")
def sweep_together(
    swept: Sequence[Swept],
    loaders: Mapping[str, Loader],
    ranks: Ranks,
    options: SweepOptions | None = None,
) -> list[Passes]:
    """Run each model over each set once; every rank must call, and holds its share of the rows.

    Each image is read once and shown to every model; the answers are bit for bit those of a sweep
    of each model alone. In float32 a set without taps is shown to a copy with its batch-norms
    folded, equal to the model to rounding, unless the model is split over the ranks.

    Args:
        swept: models of one preset; this rank's share of the outputs of all is held in memory.
        loaders: "train", "test" and any "domain/<name>".
        ranks: the job.
        options: precision, flip, shift, parts of sets, store.

    Raises:
        InputError: no train or test set, an unknown tap, or an image that cannot be read.
    """
    missing = {"train", "test"} - set(loaders)
    if missing:
        raise InputError(f"got loaders {', '.join(loaders)}; expected train and test among them")
    options = options or SweepOptions()
    options = replace(options, precision=options.precision.resolve(ranks.device))
    folded: dict[int, Classifier] = {}

    def network(number: int, taps: Sequence[str]) -> Classifier:
        model = swept[number].model
        if taps or options.precision.dtype not in ("auto", "fp32") or is_split(model):
            return model
        if number not in folded:
            folded[number] = frozen_copy(model, options.precision)
        return folded[number]

    outputs: list[dict[str, Outputs]] = [{} for _ in swept]
    seconds, steps = (0.0, 0) if options.store is None else options.store.interval
    poll = Poll(Ranks(device=ranks.device), seconds, steps)  # the ranks read without each other
    for key, source in loaders.items():
        each = [options.of_set(key, model.taps) for model in swept]
        caches = [cache_of(model, options.store, key) for model in swept]
        new = [
            i for i, cache in enumerate(caches) if not (cache and cache.is_stored(ranks, each[i]))
        ]
        networks = {i: network(i, each[i].taps) for i in new}
        saver = None
        # A rank stops where it is; of a network that is split the others would wait for it.
        if options.store is not None and new and not any(is_split(one.model) for one in swept):
            folders = [cast(Cache, caches[i]).parts_folder(ranks, each[i]) for i in new]
            known = {**options.store.origin, "images": options.store.images.get(key, "")}
            saver = PartSaver(folders, known, ranks, poll)
        loader = _ShownLoader(source, f"{key} through {len(new)} models", ranks)
        rows: dict[int, Rows] = {}
        if len(new) > 1:
            wanted = [each[i] for i in new]
            several = read_together([*networks.values()], loader, ranks, wanted, saver)
            rows = dict(zip(new, several, strict=True))
        for i, cache in enumerate(caches):
            net, own = networks.get(i, swept[i].model), rows.pop(i, None)
            if cache:
                parts = own.replay() if own else None
                if own is None and i in networks:
                    parts = read_answers(net, loader, ranks.device, each[i], saver)
                outputs[i][key] = cache.extract(net, loader, ranks, options=each[i], parts=parts)
            else:
                outputs[i][key] = extract(net, loader, ranks, each[i], own)
    return [Passes(each.name, outputs[i], each.weights) for i, each in enumerate(swept)]


class _ShownLoader:
    """A loader whose sweep is shown as a line of progress on the first rank."""

    def __init__(self, source: Loader, label: str, ranks: Ranks) -> None:
        self._source, self._label, self._ranks = source, label, ranks
        self.train, self.steps = source.train, source.steps

    def sweep(self, indices: Sequence[int] | None = None, skip: int = 0) -> Iterator[Batch]:
        """As the source's; a batch says how many samples the sweep has."""
        line = Line(self._label, 0, self._ranks.main)
        for batch in line.wait_for(self._source.sweep(indices, skip)):
            if not line.total:
                own = line.total = -(-batch.total // self._ranks.world)
                line.skip(min(skip * len(batch.labels), own - len(batch.labels)))
            line.advance(len(batch.labels), len(batch.labels) * self._ranks.world)
            yield batch
        line.close()


def cache_of(swept: Swept, store: Store | None, key: str) -> Cache | None:
    """Find the cache of this model's outputs on the set, under all that they depend on."""
    if store is None:
        return None
    assert swept.weights, "a store needs the digest of the weights"
    preset = repr(sorted(asdict(swept.model.preset).items()))
    data, samples = store.sets[key]
    facts = {"weights": swept.weights, "model": swept.model.name, "data": data, "preset": preset}
    return Cache(store.folder, facts, samples, store.images.get(key, ""))
