"""Models, images and forget requests that a Python caller holds, as the engine takes them."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, get_args

import numpy as np
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from letheon.choices import check_choices, check_type, field_types
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.method import Method
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.plan import JobOptions
from letheon.errors import InputError, suggest
from letheon.loaders.canaries import Canaries, CanaryOptions
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.forget_request import Request, request_samples, resolve
from letheon.loaders.preset import Preset, check_fields
from letheon.loaders.views import divide_data
from letheon.methods import catalogue, inner_fields
from letheon.methods.random_label import RandomLabel
from letheon.methods.train import Train

if TYPE_CHECKING:
    from letheon.eval.evaluate import Extent

Model: TypeAlias = "str | Path | nn.Module | Result"
"""A run folder or checkpoint, a network (a Classifier or any nn.Module), or an earlier result."""
Images: TypeAlias = Any
"""A path as --data takes, an ImageSet, a map-style dataset of (image, label) pairs or of mappings
with image and label, or a DataLoader of one, whose order and batches are left aside."""
Forget: TypeAlias = str | int | Sequence[str | int] | Mapping[str, Sequence[str | int]]
"""A request as --forget takes ("class:3,8"); class numbers and names; or {"samples": numbers}."""


class Options(TypedDict, total=False):
    """What every function takes besides; each is the option of that name of the scripts."""

    preset: Preset | Mapping[str, Any]
    """Size, mean, std and geometry of a plain network's images. A dataset that gives tensors needs
    none: they are used as they are."""
    seed: int
    device: str
    loader: str
    workers: int
    unreadable: str
    holdout: float
    """Share of each class of `train` held out as test images, where `test` is not given."""
    holdout_seed: int
    precision: Precision
    planting: CanaryOptions
    """Of `train`: canaries, see `CanaryOptions`."""
    accept_chance: bool
    """Go on though the network is sure of its answers and right by chance alone."""
    relearn_earlier: bool
    """Read as retain images what the model was made to forget earlier, in place of leaving such
    images out."""
    overwrite: bool
    saving: SaveOptions
    batch_size: int
    """Images at a time; of `forget` and `train` it is the method's."""
    extent: Extent
    """Of `evaluate`: how much is measured, such as `Extent(depth="full")`."""
    random_control: bool
    """Of `evaluate`: add a row for an untrained network of the same architecture; ZRF needs it."""


@dataclass(frozen=True, repr=False)
class Result:
    """What a run leaves: the network and its record; printed, one line of what was done."""

    model: nn.Module
    """A copy of the network handed in, of its own class, with the new weights; a Classifier where a
    path, a name or a Classifier was handed in."""
    record: dict[str, Any]
    """What the run's run.json says: digest of the weights, seconds, sets."""
    metrics: list[dict[str, Any]]
    """The lines of the run's metrics.jsonl."""
    request: Request | None
    """What was forgotten, as numbers; None after `train`."""
    out: Path | None
    """The run folder, where one was asked for."""
    name: str
    """The method's name, or the run folder's."""
    seed: int
    preset: Preset
    """How the network wants its images."""
    requests: tuple[Request, ...] = ()
    """All that the network was made to forget, the oldest first."""
    canaries: Canaries | None = None
    """What was planted in the training images of the original."""

    def __repr__(self) -> str:
        work = "trained" if self.request is None else f"forgot {self.request.text}"
        kept = "" if self.out is None else f", in {self.out}"
        return f"Result({self.name}: {work}, seed {self.seed}, {type(self.model).__name__}{kept})"


@dataclass(frozen=True, kw_only=True)
class Call(JobOptions):
    """The settings of a run called from Python, as its settings.json has them."""

    weights: str = ""
    forget: str = ""
    method: Method = field(default_factory=Train)
    planting: CanaryOptions = field(default_factory=CanaryOptions)
    out: Path = Path()
    accept_chance: bool = False
    relearn_earlier: bool = False
    overwrite: bool = False
    saving: SaveOptions = field(default_factory=SaveOptions)


def open_images(job: JobOptions, train: Images, test: Images = None) -> Data:
    """Open training and held-out images; without the latter the training images stand in."""
    if test is not None and job.holdout:
        raise InputError(
            f"got test images and a share of {job.holdout} to hold out, expected one of them; "
            "leave one out",
            option="holdout",
        )
    if isinstance(train, str | Path):
        data = replace(job, data=str(train)).open_data()
        if test is None:
            return data
        return replace(data, test=_image_set(job, test, "test", data.classes))
    images = _image_set(job, train, "train", None)
    held = images if test is None else _image_set(job, test, "test", images.classes)
    data = Data(images, held, tuple((name,) for name in images.classes))
    return divide_data(data, job.holdout, job.holdout_seed) if job.holdout else data


def _image_set(
    job: JobOptions, source: Images, name: str, classes: tuple[str, ...] | None
) -> ImageSet:
    if isinstance(source, str | Path):
        return replace(job, data=str(source)).open_data().test
    if isinstance(source, ImageSet):
        images = source
    elif isinstance(source, DataLoader):
        return _image_set(job, _dataset_of(source, name), name, classes)
    elif isinstance(source, Mapping):
        raise InputError(
            f"got a {type(source).__name__} of {', '.join(map(str, list(source)[:5]))} for {name} "
            "images; expected one dataset; give one of them",
            option=name,
        )
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        images = MapStyleImages(source, name)
        widen_classes(images, classes or ())
    else:
        raise InputError(
            f"got a {type(source).__name__} for {name} images; expected a path, an ImageSet or a "
            "dataset with len and [i]; of one that can only be iterated give list(dataset)",
            option=name,
        )
    if classes is not None and images.classes != classes:
        raise InputError(
            f"got {name} images of {_list_classes(images.classes)}; expected those of the training "
            f"images, {_list_classes(classes)}; give both the same classes",
            option=name,
        )
    return images


def _list_classes(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _dataset_of(loader: DataLoader[Any], name: str) -> Any:
    """Return the dataset of a loader that gives each of its items once, as it is.

    Order, batch size and workers are the method's and the call's own.

    Raises:
        InputError: a sampler that leaves out, repeats or weights items, or a collate function,
            which may change them.
    """
    odd: list[str] = []
    if type(loader.sampler) not in (SequentialSampler, RandomSampler) or (
        isinstance(loader.sampler, RandomSampler)
        and (loader.sampler.replacement or len(loader.sampler) != len(loader.sampler.data_source))
    ):
        odd.append(f"a {type(loader.sampler).__name__} of its own choice")
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        odd.append(f"a {type(loader.batch_sampler).__name__}")
    if loader.collate_fn not in (default_collate, default_convert):
        odd.append("a collate function")
    if odd:
        raise InputError(
            f"got a DataLoader with {' and '.join(odd)} for {name} images; expected one that gives "
            "each image of its dataset once and unchanged; give the dataset, or a Subset of it",
            option=name,
        )
    return loader.dataset


def widen_classes(images: ImageSet, classes: tuple[str, ...]) -> None:
    """Give a dataset that only numbers its classes their names, and those it has no image of."""
    own = images.classes
    if own == tuple(map(str, range(len(own)))) and len(classes) >= len(own):
        images.classes = classes


def resolve_request(forget: Forget, data: Data, seed: int) -> Request:
    """Resolve what is to be forgotten, in whichever form, on the training images."""
    if isinstance(forget, str):
        return resolve(forget, data, seed)
    if isinstance(forget, Integral) and not isinstance(forget, bool):
        forget = [int(forget)]
    kind = "classes"
    if isinstance(forget, Mapping):
        if set(forget) not in ({"classes"}, {"samples"}):
            raise InputError(
                f'got a forget request of {", ".join(map(str, forget))}; expected {{"classes": '
                '...} or {"samples": ...}',
                option="forget",
            )
        [(kind, forget)] = forget.items()
    elif not isinstance(forget, list | tuple | set | frozenset | range):
        raise InputError(
            f"got a {type(forget).__name__} to forget; expected a list of classes, or "
            '{"classes": ...} or {"samples": ...}, which say what the numbers mean',
            option="forget",
        )
    if not isinstance(forget, Integral | str) and not len(forget):
        raise InputError(
            f"got no {kind} to forget; expected at least one; name some", option="forget"
        )
    if kind == "samples":
        numbers = _whole_numbers(forget)
        return request_samples(f"samples:{len(numbers)} numbers", numbers, data)
    words = [  # a name as it stands in the set, else as the command line takes it
        f"id={data.classes.index(c)}"
        if c in data.classes
        else c
        if isinstance(c, str)
        else f"id={_whole_numbers([c])[0]}"
        for c in forget
    ]
    return resolve("class:" + ",".join(words), data, seed)


def split_settings(options: Options) -> dict[str, Any]:
    """Remove and return what is no option of a call: settings of the method."""
    known = Options.__annotations__.keys() - {"batch_size", "extent", "random_control"}
    values: dict[str, Any] = dict(options)
    for name in (extra := values.keys() - known):
        options.pop(name)  # type: ignore[misc]
    return {name: values[name] for name in values if name in extra}


def replace_fields(of: Sequence[Any], settings: Mapping[str, Any]) -> list[Any]:
    """Return these dataclasses with the fields that `settings` names.

    Raises:
        InputError: a name that none of them has, or a value that is none of the field's.
    """
    found = []
    names = {name for one in of for name in field_types(one.__class__)}
    if extra := sorted(settings.keys() - names):
        known = sorted({*names, *Options.__annotations__})
        raise InputError(
            f"got option {extra[0]}; expected one of {', '.join(known)}{suggest(extra[0], known)}"
        )
    for one in of:
        kinds = field_types(one.__class__)
        own = {name: value for name, value in settings.items() if name in kinds}
        for name, value in own.items():
            if isinstance(value, str) and Path in get_args(kinds[name]):
                own[name] = Path(value)
            check_type(own[name], kinds[name], name)
        try:
            found.append(replace(one, **own))
        except TypeError as error:
            raise InputError(f"got {own} ({error}); expected the fields' types") from error
        check_choices(found[-1])
    return found


def _whole_numbers(values: Iterable[Any]) -> list[int]:
    """The numbers of classes or samples; a fraction is none, and neither is an entry of a mask."""
    mask = str(getattr(values, "dtype", "")).endswith("bool")
    if mask or (
        isinstance(values, Iterable) and any(isinstance(one, bool | np.bool_) for one in values)
    ):
        raise InputError(
            "got True and False to forget; expected numbers; of a mask give mask.nonzero()[0] "
            "(NumPy) or mask.nonzero().flatten() (torch)",
            option="forget",
        )
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        text = textwrap.shorten(repr(values), 200, placeholder=" ...")
        raise InputError(
            f"got {text} to forget ({error}); expected names, or whole numbers", option="forget"
        ) from error


def build_call(train: Images, options: Options, **settings: Any) -> Call:
    """Make the settings of a call."""
    if not isinstance(train, str | Path):
        settings.setdefault("workers", 0)
    data = str(train) if isinstance(train, str | Path) else name_of(train)
    call = Call(data=data, **{**settings, **options})
    check_choices(call)
    return call


def build_method(method: str | Method, **settings: Any) -> Method:
    """Make the method of this name, around random-label where it wraps one.

    Args:
        method: a name, or an instance, which is returned.
        **settings: fields of the method, of its recipe, or of the method that it wraps, by name; a
            field that is a method may be its name.

    Raises:
        InputError: no such method or setting, or settings beside an instance.
    """
    if isinstance(method, Method):
        if settings:
            raise InputError(
                f"got option {next(iter(settings))} beside an instance of {method.name}; expected "
                "the method's name, or the option in the instance"
            )
        return method
    known: dict[str, type[Method]] = {"train": Train, **catalogue()}
    if isinstance(method, type) and issubclass(method, Method):
        raise InputError(
            f"got the class {method.__name__}; expected an instance, such as {method.__name__}(), "
            "or a name",
            option="method",
        )
    if not isinstance(method, str) or method not in known:
        hint = suggest(str(method), known)
        raise InputError(
            f"got method {method!r}; expected one of {', '.join(catalogue())}, or a Method{hint}",
            option="method",
        )
    plain = known[method](**{name: RandomLabel() for name in inner_fields(known[method])})
    names: set[str] = set()
    built: Method = _replace_fields(plain, settings, names)
    if extra := sorted(settings.keys() - names):
        raise InputError(
            f"got option {extra[0]} of {method}; expected one of {', '.join(sorted(names))}"
            f"{suggest(extra[0], {*names, *Options.__annotations__} - {extra[0]})}"
        )
    return built


def _replace_fields(of: Any, settings: Mapping[str, Any], names: set[str]) -> Any:
    """Replace fields, those of a recipe and of a wrapped method too; adds all names there are."""
    own = {one.name for one in fields(of) if one.init}
    changes: dict[str, Any] = {}
    rest = {name: value for name, value in settings.items() if name not in own}
    for name in own:
        before = getattr(of, name)
        after = settings.get(name, before)
        if isinstance(before, Method):
            after = build_method(after)
        if isinstance(after, Method | Recipe):
            after = _replace_fields(after, rest, names)
        if after is not before:
            changes[name] = after
    names |= own
    for name, value in changes.items():
        check_type(value, field_types(of.__class__).get(name, Any), name)
    try:
        return replace(of, **changes)
    except TypeError as error:
        raise InputError(
            f"got {settings} ({error}); expected values of the fields' types"
        ) from error


def name_of(value: Any) -> str:
    """Name what was handed in, for the record: a path as it is, an object by its class."""
    return str(value) if isinstance(value, str | Path) else type(value).__name__


def build_preset(preset: Preset | Mapping[str, Any]) -> Preset:
    """Make a preset of the fields given by name; `resize_to` is `size` where it is not said."""
    if isinstance(preset, Preset):
        return preset
    check_fields(preset)
    try:
        known = Preset(**preset)
    except TypeError as error:
        raise InputError(
            f"got preset {dict(preset)} ({error}); expected size, mean, std and, where they differ "
            "from the usual ones, resize, resize_to, interpolation and augment",
            option="preset",
        ) from error
    check_choices(known)
    return known if "resize_to" in preset else replace(known, resize_to=known.size)
