"""Save and load classifiers: strict, whole or absent, never a pickle, every error by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from letheon import __version__
from letheon.engine.checkpoints.state_dict_match import class_count, fill_model, hint, skeleton
from letheon.engine.checkpoints.weights_file import (
    Weights,
    read_weights,
    weights_path,
    write_weights,
)
from letheon.engine.models.classifier import Classifier, build
from letheon.errors import InputError
from letheon.loaders.preset import Preset
from letheon.spans import span

_FORMAT = "1"


@span("saving")
def save_model(path: Path, model: Classifier, extra: Mapping[str, str] | None = None) -> str:
    """Save the weights as safetensors, all or nothing, even if the machine stops.

    The file's metadata say the architecture, the class names (null where unknown), the preset, the
    digest and what `extra` adds; the keys are the architecture's own. Call it on one rank.

    Args:
        path: a `.safetensors` file, or a folder that gets `weights.safetensors`.
        model: the classifier; it may be on any device.
        extra: further metadata, such as the method.

    Returns:
        `weights_digest(model)`.

    Raises:
        InputError: the folder cannot be made.
        RunFailed: writing failed; nothing of ours is left there.
    """
    path = weights_path(path)
    digest = weights_digest(model)
    facts = {
        "letheon_format": _FORMAT,
        "letheon_version": __version__,
        "architecture": model.name,
        "classes": json.dumps(model.class_names),
        "preset": json.dumps(dataclasses.asdict(model.preset)),
        "digest": digest,
    }
    extra = extra or {}
    assert not facts.keys() & extra.keys()
    state = {k: v.detach().cpu().contiguous() for k, v in model.net.state_dict().items()}
    write_weights(path, state, {**facts, **extra})
    return digest


@span("loading")
def load_model(
    path: Path, classes: int | None = None, name: str | None = None, preset: Preset | None = None
) -> Classifier:
    """Load a classifier in evaluation mode, on the CPU in float32, from our file or another's.

    Every weight must be there, of the right shape and finite, and none too many; only batch norm's
    `num_batches_tracked`, which old files lack and nothing here reads, may be missing. A file of
    ours must still have the digest it was saved with.

    Args:
        path: a run folder, or a safetensors or torch file (see `weights_file`).
        classes: the number of classes expected; by default the file's own.
        name: the architecture, needed where the file does not say it.
        preset: replaces the file's preset or the architecture's own. Mean and std of a `normalize`
            submodule still win over it: they are part of the network that was trained.

    Raises:
        InputError: anything amiss, in one line with the keys' names.
    """
    weights = read_weights(path)
    name = _architecture(path, weights, name)
    _check_digest(path, weights)
    preset = preset or _stored_preset(path, weights.facts) or skeleton(name).preset
    if weights.normalize is not None:
        (r, g, b), (red, green, blue) = weights.normalize
        preset = dataclasses.replace(preset, mean=(r, g, b), std=(red, green, blue))
    count = class_count(weights.state, name)
    if classes is not None and count is not None and count != classes:
        raise InputError(
            f"got {path}, a {name} of {count} classes; expected {classes}; "
            "give weights and data of the same classes"
        )
    model = build(name, count or classes or 2, preset=preset)
    fill_model(model, path, weights.state)
    model.class_names = _stored_names(path, weights.facts, model.classes)
    return model.eval()


@span("statistics")
def weights_digest(model: Classifier) -> str:
    """SHA-256 over the sorted (key, dtype, shape, bytes) of all weights and buffers.

    Equal on every device and rank that holds the same weights, in any memory format; waits for the
    device.
    """
    return _digest(model.net.state_dict())


def _digest(state: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key, value in sorted(state.items()):
        total.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _check_digest(path: Path, weights: Weights) -> None:
    saved = weights.facts.get("digest")
    if saved is not None and saved != (digest := _digest(weights.state)):
        raise InputError(
            f"got {path}; its weights have the digest {digest[:12]}; expected {saved[:12]}, with "
            "which they were saved; copy the file again"
        )


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
            f"got {path}, which does not say its architecture; {hint(weights.state)}",
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
        stored = json.loads(facts["preset"]).items()
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored}
        return Preset(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"got {path} whose preset cannot be read ({error}); expected the fields of Preset; "
            "save the model again"
        ) from error


def _stored_names(path: Path, facts: dict[str, str], classes: int) -> tuple[str, ...] | None:
    try:
        stored = json.loads(facts.get("classes", "null"))
    except ValueError:
        stored = ()
    if stored is not None and len(stored) != classes:
        raise InputError(
            f"got {path} that names {len(stored)} classes; expected {classes}, as its last layer "
            "has; save the model again"
        )
    return None if stored is None else tuple(stored)
