"""Networks that a Python caller holds, as the engine takes them."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from letheon.engine.checkpoints import model_file
from letheon.engine.models.classifier import Classifier, Output, names
from letheon.errors import InputError, LetheonError
from letheon.launch.inputs import Model, Result, build_preset, widen_classes
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.datasets.map_style import MapStyleImages
from letheon.loaders.preset import Preset
from letheon.loaders.views import align_labels, model_classes, unwrap


def open_model(
    model: Model,
    data: Data,
    preset: Preset | Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = model_file.note,
) -> Classifier:
    """Load, or copy, a model as the classifier that the engine works on, in float32.

    `tell` takes the line on what is assumed of a file from elsewhere.

    Raises:
        InputError: no such file, no preset for a plain network, one that cannot be copied or whose
            output is not that of a linear layer, or images that it does not take.
    """
    given = None if preset is None else build_preset(preset)
    if isinstance(model, Result):
        own = open_model(model.model, data, given or model.preset, tell)
        own.requests, own.canaries = model.requests, model.canaries
        return own
    if isinstance(model, str | Path):
        own = model_file.load_model(Path(model), preset=given, tell=tell)
    elif isinstance(model, Classifier):
        own = copy.deepcopy(model)
        own.preset = given or own.preset
    elif isinstance(model, nn.Module):
        return _open_network(model, _tensor_shape(data.train), given)
    else:
        raise InputError(
            f"got a {type(model).__name__} for a model; expected a path or an nn.Module",
            option="model",
        )
    check_images(own, data)
    return own


def check_images(model: Classifier, data: Data) -> None:
    """Refuse tensors that the network cannot take, such as grey ones before one of colour."""
    if (shape := _tensor_shape(data.train)) is not None:
        _check_output(model, shape, "its tensors must be what the network takes")


def check_trainable(model: Classifier, data: Data, trains: bool) -> None:
    """Refuse a network that has no weight to change, or training one that then has two outputs.

    `trains` is whether the method does; the outputs are those of a copy, of a network that is none
    of ours.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError(
            f"got {model.name}, all of whose weights are frozen; expected some with requires_grad; "
            "call requires_grad_() of what may change",
            option="model",
        )
    if not trains or model.name in names():
        return
    shape = _tensor_shape(data.train) or (3, model.preset.size, model.preset.size)
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            copy.deepcopy(model).train()(torch.zeros(2, *shape, device=device))
        except LetheonError:
            raise
        except Exception:  # whatever a network's own code raises on so small a batch
            return


def _open_network(
    model: nn.Module, shape: tuple[int, ...] | None, preset: Preset | None
) -> Classifier:
    """Copy a plain network; `shape` is that of its images where they are tensors."""
    if preset is None and shape is None:
        raise InputError(
            f"got a plain {type(model).__name__} without a preset for images that are not yet "
            "tensors; expected its size, mean and std; give preset={'size': 224, 'mean': ..., "
            "'std': ...}, or a dataset whose transform makes tensors",
            option="preset",
        )
    side = shape[-1] if shape else 0
    known = preset or Preset(side, (0.0,) * 3, (1.0,) * 3, "none", side, augment="none")
    mend = "its tensors must be what the network takes"
    if shape is None:
        shape, mend = (3, known.size, known.size), (
            "images that are no tensors come as RGB; for others give a dataset whose transform "
            "makes tensors"
        )  # fmt: skip
    _check_weights(model)
    own = _wrap(model, known)
    try:
        _check_output(own, shape, mend)
    except InputError:
        head = _find_head(model, shape)
        if head in (None, own.head_path):
            raise
        own = _wrap(model, known, head)
        _check_output(own, shape, mend)
    return own


def _wrap(model: nn.Module, preset: Preset, head: str | None = None) -> Classifier:
    kind = type(model)
    try:
        return Classifier(model, f"{kind.__module__}.{kind.__qualname__}", preset, head).float()
    except LetheonError:
        raise
    except Exception as error:  # whatever a network's own copying raises
        raise InputError(
            f"got a {kind.__name__} that cannot be copied ({_shorten(error)}); expected one that "
            "copy.deepcopy copies, since no network is changed in place; make tensors it holds "
            "buffers, and use parametrizations.weight_norm for the older weight_norm",
            option="model",
        ) from error


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that hold no numbers yet, or none that are finite; a mask may be infinite."""
    for kind, entries in (("", model.named_parameters()), ("buffer ", model.named_buffers())):
        for key, value in entries:
            if is_lazy(value) or value.is_meta:
                raise InputError(
                    f"got {type(model).__name__}, whose {kind}{key} has no numbers yet; expected "
                    "weights; load them, or show a lazy network one batch",
                    option="model",
                )
            numbers = value.detach()
            broken = numbers.isnan() if kind else ~numbers.isfinite()
            if value.is_floating_point() and bool(broken.any()):
                raise InputError(
                    f"got {type(model).__name__}, whose {kind}{key} holds NaN or infinity; "
                    "expected finite weights; give those from before the training diverged",
                    option="model",
                )


def _find_head(model: nn.Module, shape: Sequence[int]) -> str | None:
    """Find the linear layer whose output a network returns; None where there is none."""
    net = copy.deepcopy(model).float().eval()
    outputs: dict[str, Any] = {}

    def keep(path: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *call: outputs.update({path: call[-1]}))

    for path, module in net.named_modules():
        if type(module) is nn.Linear:
            keep(path, module)
    try:
        with torch.no_grad():
            output = net(torch.zeros(2, *shape, device=next(net.parameters()).device))
    except Exception:  # whatever a network's own code raises; said with its last layer
        return None
    return next((path for path, own in outputs.items() if own is output), None)


def _tensor_shape(images: ImageSet) -> tuple[int, ...] | None:
    """Return the (C, H, W) of images that are a network's input already; None of all others."""
    source, _ = unwrap(images)
    if isinstance(source, MapStyleImages) and source.tensors:
        return tuple(source.item(0)[0].shape)
    return None


def _check_output(model: Classifier, shape: Sequence[int], mend: str) -> None:
    """Refuse a network that does not return the output of its head on images of this shape."""
    training = model.training
    weight = next(model.parameters())
    try:
        with torch.no_grad():
            output = model.eval().net(torch.zeros(2, *shape, device=weight.device))
    except Exception as error:  # whatever a network's own code raises on an output of two parts
        raise InputError(
            f"got {model.name}, which fails on images of shape {tuple(shape)} with its last linear "
            f"layer, {model.head_path}, as the end ({_shorten(error)}); expected a network that "
            f"takes them and returns that layer's output; {mend}",
            option="model",
        ) from error
    finally:
        model.train(training)
    if not isinstance(output, Output):
        raise InputError(
            f"got {model.name}, which returns a {type(output).__name__} that is not the output of "
            f"its last linear layer, {model.head_path}; expected the logits as a layer gives "
            "them; return these",
            option="model",
        )


def _shorten(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def align(model: Classifier, data: Data) -> Data:
    """Name the model's classes, and return the data with labels as the model numbers them."""
    counted = isinstance(unwrap(data.train)[0], MapStyleImages)  # its labels are the model's
    for images in (data.train, data.test):
        if isinstance(unwrap(images)[0], MapStyleImages):
            widen_classes(images, model.class_names or tuple(map(str, range(model.classes))))
            data = replace(data, names=tuple((name,) for name in images.classes))
    names = model_classes(model.class_names, model.classes, data.classes)
    data = align_labels(data, names, assumed=model.class_names is None and not counted)
    model.class_names = names
    return data
