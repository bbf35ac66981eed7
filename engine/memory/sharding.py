"""Split a run over the ranks: what can be, in which units, and what a rank then holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from letheon.engine.distributed import Ranks
from letheon.engine.memory.activations import find_blocks
from letheon.engine.memory.shards import Shards, copy_on_meta, fill_parts
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.recipe import ELEMENTWISE
from letheon.errors import InputError


def check_sharding(method: Method, run: Run) -> None:
    """Refuse a run that is to be split over the ranks and reads more than single weights.

    Raises:
        InputError: the method, its optimizer or its batch-norm needs whole tensors, or a weight is
            a single number, or shared by blocks that are gathered apart.
    """
    if not run.splits:
        return
    recipe = run.recipe
    whole = ""
    if not method.elementwise:
        whole = f"{method.name}, which does not move each weight by itself"
    elif recipe.optimizer not in ELEMENTWISE:
        whole = f"optimizer {recipe.optimizer}, which does not move each weight by itself"
    elif recipe.batch_norm == "sync":
        whole = "batch-norm sync, which is not made for it"
    if whole:
        raise InputError(
            f"got reduce shard with {whole}; expected a method that does (as finetune, "
            "random-label, salun or spkd), optimizer sgd or adamw, and batch-norm local or frozen; "
            "take such ones, or reduce auto with activation_checkpoint and rank_batch",
            option="reduce",
        )
    check_weights(run.model)


def check_weights(model: Classifier) -> None:
    """Refuse a network with a weight that torch cannot split.

    Raises:
        InputError: a weight is a single number, or shared by blocks that are gathered apart.
    """
    if odd := _odd_weight(model):
        raise InputError(
            f"got {model.name} with reduce shard, whose {odd}; expected weights with a first "
            "dimension, each in one block or in none; use reduce auto with activation_checkpoint "
            "and rank_batch",
            option="reduce",
        )


def _odd_weight(model: nn.Module) -> str:
    """Say which weight FSDP2 cannot split; nothing where there is none."""
    units = {id(model.get_submodule(path)) for path in find_units(model)}
    owners: dict[int, set[int]] = {}

    def visit(module: nn.Module, owner: int) -> None:
        owner = id(module) if id(module) in units else owner
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(owner)
        for child in module.children():
            visit(child, owner)

    visit(model, 0)
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            return f"weight {name.removeprefix('net.')} is a single number"
        if len(owners[id(parameter)]) > 1:
            return f"weight {name.removeprefix('net.')} is shared by several blocks"
    return ""


def shard_run(run: Run) -> None:
    """Split a run's network over the ranks, once, and move each part to its device.

    Before that the network is on the host: no device ever holds all of it.
    """
    if run.shards is not None:
        return
    model = run.model
    run.precision.choose_kernels(model, run.ranks.device)
    for parameter in model.parameters():  # torch splits contiguous weights alone: no channels-last
        parameter.data = parameter.data.contiguous()
    run.shards = Shards(model, find_units(model), run.ranks)


@contextmanager
def whole_network(run: Run) -> Iterator[Classifier]:
    """Within, change shapes of weights of the run's network, the same on every rank.

    Where it is split over the ranks it is whole on their hosts within, and split anew afterwards.
    """
    if run.shards is None:
        yield run.model
        return
    run.model, run.shards = run.shards.host_copy(), None
    yield run.model
    shard_run(run)


def whole_copy(model: Classifier, device: torch.device) -> Classifier:
    """Copy a network to a device: frozen, to be evaluated."""
    return copy.deepcopy(model).to(device).eval().requires_grad_(False)


def split_copy(model: Classifier, ranks: Ranks) -> Classifier:
    """Copy a network, whole on every rank's host, split over the ranks: frozen, to be evaluated.

    Each rank's device gets its part alone; every rank must call, there and at each pass.

    Raises:
        InputError: a weight is a single number, or shared by blocks that are gathered apart.
    """
    check_weights(model)
    return fill_parts(copy_on_meta(model), model, find_units(model), ranks)


def find_units(model: nn.Module) -> list[str]:
    """Paths of the blocks that are gathered one at a time; none where there are no blocks."""
    blocks = {id(block) for block in find_blocks(model)}
    return [path for path, module in model.named_modules() if id(module) in blocks]


def count_parts(model: nn.Module, world: int) -> tuple[int, int]:
    """Count bytes of a network split over `world` ranks.

    Returns:
        Those of the largest part, buffers included, which each rank has whole; and those that are
        gathered beside it at most: two blocks (the next one is fetched early), one block's
        gradient and its copy that is sent; and what lies in no block with its gradient, whose copy
        follows when the blocks are let go.
    """
    own = sum(_size(buffer) for buffer in model.buffers())
    for parameter in model.parameters():
        total = parameter.shape[0] if parameter.dim() else 1
        own += -(-total // world) * _size(parameter) // max(1, total)
    blocks = [_weights([model.get_submodule(path)]) for path in find_units(model)]
    rest = _weights([model]) - sum(blocks)
    return own, 2 * rest + max(rest, 4 * max(blocks, default=0))


def _weights(modules: Sequence[nn.Module]) -> int:
    return sum(_size(parameter) for module in modules for parameter in module.parameters())


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
