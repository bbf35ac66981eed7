"""Save and load classifiers: strict, whole or absent, never a pickle, every error by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from letheon import __version__
from letheon.choices import check_choices
from letheon.engine.checkpoints.hub_config import config_preset
from letheon.engine.checkpoints.key_names import load
from letheon.engine.checkpoints.state_dict_match import (
    Match,
    class_count,
    fill_model,
    find_network,
    hint,
    input_size,
)
from letheon.engine.checkpoints.weights_file import (
    Weights,
    read_weights,
    weights_path,
    write_weights,
)
from letheon.engine.memory.shards import copy_to_first, from_first, is_split
from letheon.engine.models import timm_model
from letheon.engine.models.classifier import Classifier, build, names, preset_of
from letheon.errors import InputError, join_few
from letheon.loaders.canaries import Canaries
from letheon.loaders.forget_request import Request
from letheon.loaders.preset import Preset, check_fields
from letheon.sealed import parse_json
from letheon.spans import span

_FORMAT = "1"


def note(line: str) -> None:
    """Print a line to stderr, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


@span("saving")
def save_model(
    path: Path,
    model: Classifier,
    extra: Mapping[str, str] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> str:
    """Save the weights as safetensors, all or nothing, even if the machine stops.

    The file's metadata say the architecture, the class names (null where unknown), the preset, the
    digest, what the model was made to forget, its canaries and what `extra` adds; the keys are
    the architecture's own. Call it on one rank.

    Args:
        path: a `.safetensors` file, or a folder that gets `weights.safetensors`.
        model: the classifier; it may be on any device.
        extra: further metadata, such as the method.
        state: the weights that are saved, on the host; None: the model's own.

    Returns:
        The digest of the weights, as `weights_digest`.

    Raises:
        InputError: the folder cannot be made.
        RunFailed: writing failed; nothing of ours is left there.
    """
    path = weights_path(path)
    own = model.net.state_dict() if state is None else state
    digest = tensors_digest(own)
    facts = {
        "letheon_format": _FORMAT,
        "letheon_version": __version__,
        "architecture": model.name,
        "classes": json.dumps(model.class_names),
        "preset": json.dumps(dataclasses.asdict(model.preset)),
        "digest": digest,
    }
    if not model.head_is_last:
        facts["head"] = model.head_path
    if model.requests:
        facts["requests"] = json.dumps([dataclasses.asdict(one) for one in model.requests])
    if model.canaries is not None:
        facts["canaries"] = json.dumps(dataclasses.asdict(model.canaries))
    extra = extra or {}
    assert not facts.keys() & extra.keys()
    tensors = {key: value.detach().cpu().contiguous() for key, value in own.items()}
    write_weights(path, tensors, {**facts, **extra})
    return digest


@span("loading")
def load_model(
    path: Path,
    classes: int | None = None,
    name: str | None = None,
    preset: Preset | Mapping[str, Any] | None = None,
    part: str | None = None,
    tell: Callable[[str], object] = note,
    module: nn.Module | None = None,
) -> Classifier:
    """Load a classifier in evaluation mode, on the CPU in float32, from our file or another's.

    Every weight must be there, of the right shape and finite, and none too many; only batch norm's
    `num_batches_tracked`, which old files lack and nothing here reads, may be missing. A file of
    ours must still have the digest it was saved with. docs/bring-your-own.md lists the kinds of
    files; what such a file does not say and is assumed instead is told in one line.

    Args:
        path: a run folder, a Hugging Face folder, or a safetensors or torch file.
        classes: the number of classes expected; by default the file's own.
        name: the architecture, where neither the file nor its keys say it.
        preset: replaces the file's preset or the architecture's own; a mapping replaces single
            fields, of a file from elsewhere alone. Mean and std of a `normalize` submodule still
            win over it: they are part of the network that was trained.
        part: which network of a file with several: ``plain``, ``ema`` (a running average of the
            weights) or its place in the file; by default the plain one.
        tell: takes the line on what was assumed; by default it goes to stderr.
        module: the network whose weights a file of ours has, where its class is the caller's own;
            a copy of it is filled, and `name` and `part` are left aside.

    Raises:
        InputError: anything amiss, in one line with the keys' names.
    """
    weights = read_weights(path)
    ours = bool(weights.facts)
    if module is not None:
        return _fill_module(path, weights, module, preset, classes)
    if ours:
        name = _architecture(path, weights, name)
        if "." in name and not name.startswith(timm_model.PREFIX):
            raise InputError(
                f"got {path}, weights of {name}, handed in from Python; expected a network "
                "with a name of ours; in Python letheon.load_model(path, module=net) fills a copy",
                option="model",
            )
        _check_digest(path, weights)
        network = Match(name, "", weights.parts[""], None, [], False, [])
    else:
        network = _find_network(path, weights, name, part)
    default = preset_of(network.name).with_size(input_size(network.state))
    stored = _stored_preset(path, weights.facts) or config_preset(path, weights.config, default)
    known = _choose_preset(path, stored or default, preset, ours)
    if network.normalize is not None:
        (r, g, b), (red, green, blue) = network.normalize
        known = dataclasses.replace(known, mean=(r, g, b), std=(red, green, blue))
    count = class_count(network.state, network.name)
    _check_classes(path, network.name, count, classes)
    model = build(network.name, count or classes or 2, preset=known)
    fill_model(model, path, network.state)
    model.class_names = _stored_names(path, weights.facts, model.classes)
    model.requests = _stored_requests(path, weights.facts)
    model.canaries = _stored_canaries(path, weights.facts)
    if not ours:
        fixed = {"mean", "std"} if network.normalize is not None else set()
        fixed |= {"size"} if input_size(network.state) else set()
        if isinstance(preset, Preset) or stored:
            fixed |= _SHOWN.keys()
        else:
            fixed |= set(preset or ())
        tell(_assumptions(path, network, name is None, model, fixed))
    return model.eval()


def _check_classes(path: Path, name: str, count: int | None, classes: int | None) -> None:
    """Refuse a network of another number of classes than expected; None: not known, or any."""
    if classes is not None and count is not None and count != classes:
        raise InputError(
            f"got {path}, a {name} of {count} classes; expected {classes}; "
            "give weights and data of the same classes"
        )


def _choose_preset(
    path: Path, known: Preset, preset: Preset | Mapping[str, Any] | None, ours: bool
) -> Preset:
    """Replace what the file says by the caller's preset, or single fields of it."""
    if isinstance(preset, Preset):
        return preset
    if preset is None:
        return known
    if ours:
        raise InputError(
            f"got {', '.join(preset)} for {path}, whose file says it; leave it out",
            option=next(iter(preset), ""),
        )
    return _change_preset(known, preset)


def _fill_module(
    path: Path,
    weights: Weights,
    module: nn.Module,
    preset: Preset | Mapping[str, Any] | None,
    classes: int | None,
) -> Classifier:
    """Fill a copy of a caller's own network from a file of ours."""
    stored = _stored_preset(path, weights.facts)
    if stored is None:
        raise InputError(
            f"got {path}, which no run of ours wrote; expected a run folder; give a module the "
            "weights of other files by its own load_state_dict"
        )
    _check_digest(path, weights)
    name, head = weights.facts["architecture"], weights.facts.get("head")
    if head is not None and head not in dict(module.named_modules(remove_duplicate=False)):
        raise InputError(
            f"got a {type(module).__name__} without the layer {head}, the last one of the network "
            f"in {path}; expected a network like it; give one of its class",
            option="model",
        )
    known = _choose_preset(path, stored, preset, ours=True)
    model = Classifier(module, name, known, head).float()
    _check_classes(path, name, model.classes, classes)
    fill_model(model, path, weights.parts[""])
    model.class_names = _stored_names(path, weights.facts, model.classes)
    model.requests = _stored_requests(path, weights.facts)
    model.canaries = _stored_canaries(path, weights.facts)
    return model.eval()


def _change_preset(preset: Preset, changes: Mapping[str, Any]) -> Preset:
    """Replace fields; the resize follows the size where it is not given."""
    check_fields(changes)
    if any(not 0 < value < 100_000 for k, value in changes.items() if k in ("size", "resize_to")):
        raise InputError(f"got {dict(changes)}; expected pixels above 0", option="size")
    for key in ("mean", "std"):
        least = 0 if key == "mean" else 1e-6
        if not all(least <= value <= 1 for value in changes.get(key, ())):
            raise InputError(
                f"got {key} {changes[key]}; expected 3 numbers on the 0..1 scale; divide them by "
                "255 if they are for 0..255",
                option=key,
            )
    preset = dataclasses.replace(preset.with_size(changes.get("size")), **changes)
    check_choices(preset)
    return preset


def _assumptions(
    path: Path, network: Match, by_keys: bool, model: Classifier, fixed: set[str]
) -> str:
    """Say in one line what a file of others was taken for; `fixed` needs no assumption."""
    text = f"{path}: {network.name} of {model.classes} classes{' by its keys' if by_keys else ''}"
    if network.place:
        text += f", {'a running average, ' if network.average else ''}part {network.place}"
    if network.others:
        text += f" (instead of {join_few(network.others)}, which the option part chooses)"
    if network.head:
        text += f"; the layer {network.head} taken for its last one"
    if network.left_out:
        text += f"; left out: {join_few(network.left_out)}"
    assumed = [
        f"{field} {show(getattr(model.preset, field))}"
        for field, show in _SHOWN.items()
        if field not in fixed
    ]
    if assumed:
        text += f"; the file does not say how its images were made, assumed: {', '.join(assumed)}"
    return text


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


_SHOWN: dict[str, Callable[[Any], str]] = {
    "size": str,
    "resize": str,
    "resize_to": str,
    "interpolation": str,
    "mean": _numbers,
    "std": _numbers,
}
"""The fields of a preset that a checkpoint may leave open, and how a message prints them."""


@span("statistics")
def weights_digest(model: Classifier) -> str:
    """SHA-256 over the sorted (key, dtype, shape, bytes) of all weights and buffers.

    Equal on every device and rank that holds the same weights, in any memory format; waits for the
    device. Every rank must call where the weights are split over the ranks.
    """
    digest = tensors_digest(model.net.state_dict())
    return from_first(digest) if is_split(model) else digest


def stored_digest(path: Path) -> str:
    """Compute the same of a file of ours, whatever network its weights are of.

    Raises:
        InputError: no such file, or one whose content is not what it was saved with.
    """
    return tensors_digest(_own_state(read_weights(path)))


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """The same of a state dict; where weights are split over the ranks, on the first rank alone."""
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = copy_to_first(value).contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _check_digest(path: Path, weights: Weights) -> None:
    saved = weights.facts.get("digest")
    if saved is not None and saved != (digest := tensors_digest(_own_state(weights))):
        raise InputError(
            f"got {path}; its weights have the digest {digest[:12]}; expected {saved[:12]}, with "
            "which they were saved; copy the file again"
        )


def _own_state(weights: Weights) -> dict[str, Tensor]:
    """Return the tensors of a file of ours."""
    return {key: load(value) for key, value in weights.parts[""].items()}


def _config_architecture(config: dict[str, Any]) -> str | None:
    """Return the architecture that a Hugging Face folder names, where we know it by that name."""
    name = config.get("architecture")
    return name if name in names() else None


def _find_network(path: Path, weights: Weights, name: str | None, part: str | None) -> Match:
    """Find a network of others: by the name, else by the keys, else timm's that a folder names."""
    known = name or _config_architecture(weights.config)
    try:
        return find_network(path, weights, known, part)
    except InputError:
        kind = weights.config.get("architecture")
        if known or "pretrained_cfg" not in weights.config or not timm_model.is_installed():
            raise
        return find_network(path, weights, f"{timm_model.PREFIX}{kind}", part)


def _architecture(path: Path, weights: Weights, name: str | None) -> str:
    """Find the architecture's name, in the file or from the caller; they must not differ."""
    stored = weights.facts.get("architecture")
    number = weights.facts.get("letheon_format")
    if number not in (None, _FORMAT):
        raise InputError(
            f"got {path} of format {number}; expected format {_FORMAT}; "
            "read it with the version of letheon that wrote it"
        )
    if name is None and stored is None:
        raise InputError(
            f"got {path}, which does not say its architecture; {hint(_own_state(weights))}",
            option="model",
        )
    if name is not None and stored is not None and name != stored:
        raise InputError(
            f"got {path}, a {stored}; expected {name}; leave the model out or give {stored}",
            option="model",
        )
    return name or stored or ""


def _stored_preset(path: Path, facts: dict[str, str]) -> Preset | None:
    if "preset" not in facts:
        return None
    try:
        stored = parse_json(facts["preset"]).items()
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored}
        return Preset(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"got {path} whose preset cannot be read ({error}); expected the fields of Preset; "
            "save the model again"
        ) from error


def _stored_requests(path: Path, facts: dict[str, str]) -> tuple[Request, ...]:
    """Read what the model of a file was made to forget."""
    try:
        stored = parse_json(facts.get("requests", "[]"))
    except ValueError:
        stored = None
    return tuple(
        Request.from_facts(one, path) for one in (stored if isinstance(stored, list) else [{}])
    )


def _stored_canaries(path: Path, facts: dict[str, str]) -> Canaries | None:
    """Read what was planted in the training images of a file's model, or of its original."""
    try:
        stored = parse_json(facts.get("canaries", "null"))
    except ValueError:
        stored = {}
    return None if stored is None else Canaries.from_facts(stored, path)


def _stored_names(path: Path, facts: dict[str, str], classes: int) -> tuple[str, ...] | None:
    try:
        stored = parse_json(facts.get("classes", "null"))
    except ValueError:
        stored = ()
    if not (
        stored is None or (isinstance(stored, list) and all(isinstance(n, str) for n in stored))
    ):
        stored = ()
    if stored is not None and len(stored) != classes:
        raise InputError(
            f"got {path} that names {len(stored)} classes; expected {classes}, as its last layer "
            "has; save the model again"
        )
    return None if stored is None else tuple(stored)
