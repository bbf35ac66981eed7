"""Forward derivatives of a network split over the ranks, block by block as it is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from letheon.engine.memory.shards import Shards, blank_pass, own_part
from letheon.engine.models.classifier import Classifier


@contextmanager
def derive(shards: Shards, along: Classifier, vector: Sequence[Tensor]) -> Iterator[None]:
    """Within, a pass without gradient at a dual level carries its derivative along a vector.

    Every rank must call, there and at each pass.

    Args:
        shards: the split network.
        along: from its `copy`; gets the vector's numbers, and is gathered block by block as the
            network is.
        vector: one tensor per trained weight, this rank's part.
    """
    from torch.distributed.fsdp import FSDPModule  # here: a second to import

    parts = dict(zip(shards.weights, vector, strict=True))
    with torch.no_grad():
        blank_pass(along)  # the first pass is where torch sets the blocks up
        for name, tensor in along.named_parameters():
            own_part(tensor).copy_(parts[name]) if name in parts else own_part(tensor).zero_()
    handles, others = [], dict(along.named_modules())

    def gather(unit: FSDPModule, modules: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        unit.unshard()
        for module, other in modules:
            for key, weight in module._parameters.items():
                tangent = other._parameters[key]
                if weight is not None and tangent is not None:
                    # What takes its place is itself replaced when the block is let go.
                    module._parameters[key] = forward_ad.make_dual(weight, tangent)

    for path, unit in shards.net.named_modules():
        if not isinstance(unit, FSDPModule):
            continue
        twin = others[path]
        assert isinstance(twin, FSDPModule)
        pairs = list(_own_modules(cast(nn.Module, unit), cast(nn.Module, twin)))
        handles += [
            cast(nn.Module, unit).register_forward_pre_hook(
                lambda *_, twin=twin, pairs=pairs: gather(twin, pairs)
            ),
            cast(nn.Module, unit).register_forward_hook(lambda *_, twin=twin: twin.reshard()),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_modules(unit: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules that are gathered with a unit, each with that of a copy."""
    from torch.distributed.fsdp import FSDPModule

    yield unit, twin
    for (_, module), (_, other) in zip(unit.named_children(), twin.named_children(), strict=True):
        if not isinstance(module, FSDPModule):
            yield from _own_modules(module, other)
