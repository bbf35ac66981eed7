"""The outputs of named modules during a forward pass, averaged over positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from letheon.engine.models.classifier import Classifier
from letheon.errors import InputError, suggest


def pool(activation: Tensor) -> Tensor:
    """Pool to (B, width) float32: the mean over positions of a layer's output.

    Reads (B, C, H, W) maps, (B, T, C) tokens and (B, H, W, C) maps; which two sizes are equal tells
    the last from the first, since every preset's input is square.
    """
    if activation.ndim == 4:
        _, first, second, third = activation.shape
        channels_end = first == second and second != third
        return activation.float().mean(dim=(1, 2) if channels_end else (2, 3))
    if activation.ndim == 3:
        return activation.float().mean(dim=1)
    return activation.float().flatten(1)


@contextmanager
def record_taps(model: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds, after each forward pass, the pooled output of each named module.

    Raises:
        InputError: a tap that is no module of the model, or a list of modules.
    """
    modules = dict(model.named_modules())
    known = [name for name, part in modules.items() if name and not isinstance(part, nn.ModuleList)]
    unknown = [name for name in taps if name not in known]
    if unknown:
        raise InputError(
            f"got tap {unknown[0]!r}; expected a module of the model such as "
            f"{', '.join(known[:4])}{suggest(unknown[0], known)}"
        )
    activations: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            activations[name] = pool(output)

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in taps]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def stages(model: Classifier) -> tuple[str, ...]:
    """List the names of the network's stages, in order, without the head: taps for `extract`.

    They are its children but for batch norms; where there are fewer than four, the largest one is
    replaced by its own children (ConvNeXt, Swin and ViT keep their stages in one container).
    """
    parts = _children("net", model.net, model.head_path)
    while len(parts) < 4:
        sizes = [sum(p.numel() for p in part.parameters()) for _, part in parts]
        largest = sizes.index(max(sizes))
        inner = _children(*parts[largest], model.head_path)
        if not inner:
            break
        parts[largest : largest + 1] = inner
    return tuple(name for name, _ in parts)


def _children(name: str, module: nn.Module, head: str) -> list[tuple[str, nn.Module]]:
    """Children with parameters, by full name, but for the one that is or holds the head."""
    parts: list[tuple[str, nn.Module]] = []
    for child, part in module.named_children():
        inner = f"{name}.{child}"
        plain = isinstance(part, nn.BatchNorm2d) or not any(True for _ in part.parameters())
        if plain or f"net.{head}.".startswith(f"{inner}."):
            continue
        # A ModuleList is not called itself, so it has no output to read.
        listed = isinstance(part, nn.ModuleList)
        parts += _children(inner, part, head) if listed else [(inner, part)]
    return parts
