"""Activation checkpointing: a block's activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from letheon.engine.models.batch_norm import batch_norms
from letheon.errors import InputError

_USES = {
    "activation_checkpoint": "whose activations could be computed again; take more micro-batches",
    "compile": "each kind of which could be compiled once; use compile default",
}
"""What blocks are for, by the option that asks for them, and what to do without."""


def require_blocks(model: nn.Module, option: str) -> list[nn.Module]:
    """Find the repeated blocks for an option that needs some.

    Raises:
        InputError: there is none, such as in a plain sequence of convolutions.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise InputError(f"got a network without blocks of layers, {_USES[option]}", option=option)
    return blocks


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks of a network: the smallest elements of its sequences that hold more
    than one layer with weights (residual blocks, transformer blocks).
    """  # noqa: D205
    elements = {
        element: None
        for module in model.modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for element in module
        if sum(bool(layer._parameters) for layer in element.modules()) > 1
    }
    return [
        element
        for element in elements
        if not elements.keys() & (set(element.modules()) - {element})
    ]


def checkpoint_blocks(model: nn.Module) -> list[nn.Module]:
    """Let each block keep its inputs alone, and compute the rest again in the backward pass.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". The same bits: dropout draws
    again what it drew, and running statistics move once.

    Returns:
        The blocks, for `restore_blocks`.

    Raises:
        InputError: as `require_blocks`.
    """
    blocks = require_blocks(model, "activation_checkpoint")
    for block in blocks:
        contexts = partial(_contexts, block)
        again = partial(
            checkpoint, type(block).forward, block, use_reentrant=False, context_fn=contexts
        )
        setattr(block, "forward", again)  # noqa: B010
    return blocks


def restore_blocks(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_blocks`."""
    for block in blocks:
        del block.forward


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass, and around the one in the backward pass."""
    return nullcontext(), _Rest(block)


class _Rest(AbstractContextManager[None]):
    """Within it the running statistics of a block are copies, which are dropped.

    Entered once for every backward pass through the same forward pass.
    """

    def __init__(self, block: nn.Module) -> None:
        self._layers = [layer for layer in batch_norms(block) if layer.training]

    def __enter__(self) -> None:
        self._own = [dict(layer._buffers) for layer in self._layers]
        for layer in self._layers:
            for name, buffer in layer._buffers.items():
                layer._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        for layer, buffers in zip(self._layers, self._own, strict=True):
            layer._buffers.update(buffers)
