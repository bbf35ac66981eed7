"""Match a state dict with an architecture, and fill a model with it strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from letheon.engine.checkpoints.key_names import (
    clean_keys,
    find_head,
    load,
    pop_normalize,
    prefixes,
    strip_prefixes,
    translate,
)
from letheon.engine.checkpoints.weights_file import Value, Weights
from letheon.engine.models.classifier import Classifier, build, names, preset_of, without_memory
from letheon.engine.models.timm_model import PREFIX
from letheon.errors import InputError, join_few, suggest

T = TypeVar("T")

_COMPUTED = ("num_batches_tracked", "relative_position_index")
_AVERAGE = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averag|shadow", re.IGNORECASE)


class BrokenWeights(InputError):
    """A checkpoint whose weights fit but are not finite."""


@dataclass(frozen=True)
class Match:
    """A network in a file that fits an architecture, or comes nearest to it."""

    name: str
    place: str  # where in the file, with the wrapper's prefix; empty for the whole file
    state: dict[str, Value]  # by the architecture's own keys
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None  # mean, std of such a submodule
    left_out: list[str]  # keys beside the network
    average: bool  # a running average of the weights
    others: list[str]  # places of further networks that fit
    head: str = ""  # the last layer's name in the file, where it is another than the architecture's


def find_network(path: Path, weights: Weights, name: str | None, part: str | None) -> Match:
    """Find the one network in a file that fits an architecture; without a name, any one known.

    Args:
        path: for messages.
        weights: what the file holds.
        name: the architecture, where it is known.
        part: ``plain`` or ``ema`` (a running average), or a place in the file, where several fit.

    Raises:
        InputError: several architectures or networks fit, none does and no name says which was
            meant, or no such part.
    """
    fits = list(_find_fits(path, weights, [name] if name else names()))
    known = list(dict.fromkeys(fit.place for fit in fits))
    plain = [fit for fit in fits if not fit.average]
    if part in ("plain", "ema"):
        chosen = plain if part == "plain" else [fit for fit in fits if fit.average]
    elif part is not None:
        chosen = [fit for fit in fits if fit.place == part]
    else:
        chosen = plain or fits
    if part is not None and not chosen:
        raise InputError(
            f"got part {part} of {path}, where no network that fits is; expected plain, ema or one "
            f"of {join_few(known or sorted(weights.parts))}"
            f"{suggest(part, ['plain', 'ema', *(known or weights.parts)])}",
            option="part",
        )
    if len({fit.name for fit in chosen}) > 1:
        raise InputError(
            f"got {path}, whose keys fit {' and '.join(fit.name for fit in chosen)}; name one",
            option="model",
        )
    if len(chosen) > 1:
        raise InputError(
            f"got {path}, which holds several networks: {join_few([fit.place for fit in chosen])}; "
            "name the part that is meant",
            option="part",
        )
    if chosen:
        [fit] = chosen
        return replace(fit, others=[place for place in known if place != fit.place])
    return _nearest(path, weights, name)


def _find_fits(path: Path, weights: Weights, known: Sequence[str]) -> Iterator[Match]:
    for place, content in weights.parts.items():
        averaged = any(key.endswith("n_averaged") for key in content)
        try:
            cleaned = _rename(content, known)
        except (ValueError, RuntimeError):  # tensors that cannot be read: of no network we know
            continue
        state = {k: v for k, v in cleaned.items() if not k.endswith((".mean", ".std"))}
        for name in known:
            empty = skeleton(name)
            keys = expected_state(name)
            for prefix in list(prefixes(state, next(iter(keys)))):
                cut = len(prefix)
                inside = {k[cut:]: v for k, v in state.items() if k.startswith(prefix)}
                beside = {k: v for k, v in state.items() if not k.startswith(prefix)}
                inside, head = find_head(inside, beside, empty.head_path, keys)
                if not _fits(name, inside):
                    continue
                where = ".".join(word for word in (place, prefix.rstrip(".")) if word)
                left_out = [key for key in beside if key.rpartition(".")[0] != head]
                average = averaged or bool(_AVERAGE.search(where))
                statistics = {k: v for k, v in cleaned.items() if k not in state}
                own = {k: v for k, v in statistics.items() if k.startswith(prefix)}
                normalize = pop_normalize(own or statistics, path)
                yield Match(name, where, inside, normalize, left_out, average, [], head)


def _rename(content: Mapping[str, Value], known: Sequence[str]) -> dict[str, Value]:
    """Clean the keys, and give them torchvision's names unless a network of timm is meant."""
    cleaned = clean_keys(content)
    return cleaned if any(name.startswith(PREFIX) for name in known) else translate(cleaned)


def _nearest(path: Path, weights: Weights, name: str | None) -> Match:
    """Return the largest dict of tensors, for an error that names what differs."""
    content = max(weights.parts.values(), key=len)
    state = _rename(content, [name or ""])
    normalize = pop_normalize(state, path)
    state = strip_prefixes(state)
    if name is None:
        raise InputError(
            f"got {path}, which does not say its architecture; {hint(state)}", option="model"
        )
    head = skeleton(name).head_path
    layers = sorted({k.rpartition(".")[0] for k in state if k.startswith(f"{head}.")} - {head})
    if len(layers) > 1:
        raise InputError(
            f"got {path}, whose head has the layers {join_few(layers)}; expected one linear layer "
            f"{head}; hand the network itself over from Python, or fold the head into one layer",
            option="model",
        )
    return Match(name, "", state, normalize, [], False, [])


def fill_model(model: Classifier, path: Path, values: Mapping[str, Value]) -> None:
    """Copy the values into the model, strictly; the model is untouched where that fails.

    Raises:
        InputError: keys missing or unexpected, other shapes, or numbers that are not finite.
    """
    expected = model.net.state_dict()
    counters = _counters(expected)
    if difference := _difference(expected, values):
        raise InputError(
            f"got {path} with keys {difference}; expected those of {model.name} with "
            f"{model.classes} classes; {hint(values, model.name)}",
            option="model",
        )
    try:
        state = {key: load(value) for key, value in values.items()}
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"got {path}, whose tensors cannot be read ({error}); it may be cut short; "
            "copy the file again"
        ) from error
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BrokenWeights(
                f"got {path}; {key} holds NaN or infinity; expected finite weights; "
                "give a checkpoint from before the training diverged"
            )
    model.net.load_state_dict({**counters, **state}, strict=True)


def _counters(expected: Mapping[str, T]) -> dict[str, T]:
    """Find the keys that a file may lack: batches that batch-norms counted, places in windows."""
    return {k: v for k, v in expected.items() if k.endswith(_COMPUTED)}


def _kind(value: Value) -> str:
    """What must agree: the shape, and numbers of the same nature; half precision is widened."""
    nature = "" if value.dtype.is_floating_point else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{nature}"


def _difference(expected: Mapping[str, Value], values: Mapping[str, Value]) -> str:
    """Say which keys are missing, unexpected and of another shape; empty where none is."""
    counters = _counters(expected)
    missing = [key for key in expected if key not in values and key not in counters]
    extra = [key for key in values if key not in expected]
    other = [
        f"{key} {_kind(value)} not {_kind(expected[key])}"
        for key, value in values.items()
        if key in expected and _kind(value) != _kind(expected[key])
    ]
    return ", ".join(
        f"{len(keys)} {what} ({join_few(keys)})"
        for keys, what in ((missing, "missing"), (extra, "unexpected"), (other, "differing"))
        if keys
    )


def hint(state: Mapping[str, Value], name: str = "") -> str:
    """Say how to mend a wrong or missing architecture, or that the network is another.

    Args:
        state: the file's tensors.
        name: the architecture that was tried.
    """
    fitting = [known for known in names() if _fits(known, state)]
    if fitting:
        return f"its keys fit model {' or '.join(fitting)}"
    shared, nearest = max((_share(known, state), known) for known in names())
    if shared < 0.5:
        return f"give its model; known are {', '.join(names())}"
    mend = "save the network under its keys, or hand the network itself over from Python"
    if nearest == name:
        return mend
    empty = skeleton(nearest, input_size(state))
    head = {f"{empty.head_path}.{part}" for part in ("weight", "bias")}
    classes = head & state.keys()  # of any number
    template = expected_state(nearest, input_size(state))
    expected = {k: v for k, v in template.items() if k not in classes}
    actual = {k: v for k, v in state.items() if k not in classes}
    return f"the nearest is {nearest}, with keys {_difference(expected, actual)}; {mend}"


def _share(name: str, state: Mapping[str, Value]) -> float:
    """Return the share of an architecture's keys that `state` has in the same shape."""
    expected = expected_state(name, input_size(state))
    same = [k for k, v in expected.items() if k in state and _kind(state[k]) == _kind(v)]
    return len(same) / len(expected)


def _fits(name: str, state: Mapping[str, Value]) -> bool:
    """Compare keys and shapes, whatever the number of classes."""
    empty = skeleton(name, input_size(state))
    head = {f"{empty.head_path}.weight", f"{empty.head_path}.bias"}
    rows = class_count(state, name)
    if rows is None or any(key in state and state[key].shape[:1] != (rows,) for key in head):
        return False
    template = expected_state(name, input_size(state))
    expected = {k: _kind(v) for k, v in template.items()}
    actual = {k: _kind(v) for k, v in state.items()}
    for key in head & actual.keys():
        width = "".join(f", {n}" for n in state[key].shape[1:])
        actual[key] = actual[key].replace(f"({rows}{width or ','})", f"(2{width or ','})")
    return {**_counters(expected), **actual} == expected


def class_count(state: Mapping[str, Value], name: str) -> int | None:
    """Count the rows of the last layer's weight; None where `state` has no such key."""
    weight = state.get(skeleton(name).head_path + ".weight")
    return weight.shape[0] if weight is not None and weight.dim() else None


def input_size(state: Mapping[str, Value]) -> int | None:
    """Read a vision transformer's input size, in pixels, off its positions; None of all others."""
    ours = "encoder.pos_embedding" in state
    positions = state.get("encoder.pos_embedding" if ours else "pos_embed")
    patches = state.get("conv_proj.weight" if ours else "patch_embed.proj.weight")
    if positions is None or patches is None or positions.dim() != 3 or patches.dim() != 4:
        return None
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    return side * patches.shape[3] or None


@cache
def skeleton(name: str, size: int | None = None) -> Classifier:
    """Build the architecture, of two classes, without memory for its weights."""
    try:
        with without_memory():
            return build(name, 2, preset=preset_of(name).with_size(size))
    except InputError:
        if size is None:
            raise
        return skeleton(name)  # it cannot take this size, so nothing of this size fits


@cache
def expected_state(name: str, size: int | None = None) -> Mapping[str, Tensor]:
    """Return the architecture's keys with tensors of the right shape that hold nothing."""
    return skeleton(name, size).net.state_dict()
