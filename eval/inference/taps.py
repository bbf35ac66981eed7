"""The outputs of named modules during a forward pass, averaged over positions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from letheon.errors import InputError


def pooled(activation: Tensor) -> Tensor:
    """(B, width) float32: the mean over positions of a layer's output.

    Reads (B, C, H, W) maps, (B, T, C) tokens and (B, H, W, C) maps; the last are told from the
    first by which two sizes are equal, since every preset's input is square.
    """
    if activation.ndim == 4:
        _, first, second, third = activation.shape
        channels_end = first == second and second != third
        return activation.float().mean(dim=(1, 2) if channels_end else (2, 3))
    if activation.ndim == 3:
        return activation.float().mean(dim=1)
    return activation.float().flatten(1)


@contextmanager
def tapped(model: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward pass, the pooled output of each named module.

    Raises:
        InputError: a tap that is no module of the model, or a list of modules.
    """
    modules = dict(model.named_modules())
    known = [name for name, part in modules.items() if name and not isinstance(part, nn.ModuleList)]
    unknown = [name for name in taps if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=4, cutoff=0) or known[:4]
        raise InputError(
            f"got tap {unknown[0]!r}; expected a module of the model such as {', '.join(near)}"
        )
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = pooled(output)

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
