"""Which layers of a network a method means: by name, or so many from the end."""

from __future__ import annotations

from collections.abc import Sequence

from letheon.engine.method import Run
from letheon.errors import InputError


def split_layers(run: Run) -> list[list[str]]:
    """List the parameters' names layer by layer, in the order the network registers them.

    A layer is a weight of two or more dimensions with the vectors (bias, batch-norm) after it, up
    to the next such weight.
    """
    layers: list[list[str]] = []
    for name, parameter in run.named_parameters.items():
        if parameter.dim() > 1 or not layers:
            layers.append([])
        layers[-1].append(name)
    return layers


def last_layers(run: Run, k: int) -> list[str]:
    """List the parameters of the last k layers, the head included.

    Raises:
        InputError: the network has fewer layers, or k is below 1.
    """
    layers = split_layers(run)
    if not 1 <= k <= len(layers):
        raise InputError(
            f"got k {k}; expected 1 to {len(layers)}, the layers of this network with weights",
            option="k",
        )
    return [name for layer in layers[-k:] for name in layer]


def layers_by_name(run: Run, paths: Sequence[str]) -> list[str]:
    """List the parameters under these dotted paths, such as ``layer4`` or ``layer4.1.conv2``.

    Raises:
        InputError: a path holds no parameter.
    """
    names = list(run.named_parameters)
    for path in paths:
        if not any(_under(name, path) for name in names):
            tops = sorted({name.partition(".")[0] for name in names})
            raise InputError(
                f"got layer {path!r}, which holds no weight of this network; expected dotted paths "
                f"under {', '.join(tops)}",
                option="layers",
            )
    return [name for name in names if any(_under(name, path) for path in paths)]


def choose_layers(run: Run, paths: Sequence[str], k: int) -> list[str]:
    """List the parameters under the paths, or of the last k layers where there are none."""
    return layers_by_name(run, paths) if paths else last_layers(run, k)


def freeze_others(run: Run, names: Sequence[str]) -> None:
    """Let only these parameters train."""
    trained = run.named_parameters
    for name, parameter in run.model.named_parameters():
        own = name.removeprefix("net.")
        if own in trained:
            parameter.requires_grad_(own in names)


def _under(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")
