"""Parts of a network whose weights are split over the ranks: each rank's own, and the whole again.

A weight is split along its first dimension into contiguous parts, those of the last ranks smaller
or empty, as torch's FSDP2 does (`fully_shard`; Zhao et al. 2023, "PyTorch FSDP"). What is made of
weights element by element (gradients, slots, masks, averages) is split alike by itself, since it
is made of this rank's part alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Alone
from letheon.errors import RunFailed
from letheon.loaders.batch import Batch

if TYPE_CHECKING:
    from letheon.engine.models.classifier import Classifier

T = TypeVar("T")


def is_split(model: nn.Module) -> bool:
    """Whether a network's weights are split over the ranks."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a weight, detached, in the weight's memory; else all of it."""
    detached = tensor.detach()
    to_local: Callable[[], Tensor] | None = getattr(detached, "to_local", None)
    return detached if to_local is None else to_local()


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of every tensor of a state dict."""
    return {name: own_part(tensor) for name, tensor in tensors.items()}


def whole_copy(tensor: Tensor) -> Tensor:
    """Copy a weight whole to every rank's device, such as a head's; every rank must call."""
    detached = tensor.detach()
    full: Callable[[], Tensor] | None = getattr(detached, "full_tensor", None)
    return detached.clone() if full is None else full().clone()


def cut(whole: Tensor, ranks: Ranks) -> Tensor:
    """Cut this rank's part out of what fits a whole weight, such as a mask."""
    rows = part_rows(len(whole), ranks.world)
    start = sum(rows[: ranks.rank])
    return whole[start : start + rows[ranks.rank]]


def copy_to_first(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; one that is split is whole on the first rank, empty elsewhere.

    No device holds more than its part. Every rank must call where the weight is split.
    """
    own = own_part(tensor).cpu()
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return own
    return _gather(own, len(tensor), Ranks(mesh.get_local_rank(), mesh.size()))


def from_first(value: T) -> T:
    """Return the first rank's small object, which can be pickled, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


def host_state(model: Classifier, ranks: Ranks) -> dict[str, Tensor]:
    """Copy the whole state dict to the first rank's host, a tensor at a time; elsewhere nothing.

    Every rank must call.
    """
    if not ranks.main and not is_split(model):
        return {}
    copies = {}
    for key, value in model.net.state_dict().items():
        host = copy_to_first(value)
        if ranks.main:
            own = own_part(value).untyped_storage().data_ptr()
            copies[key] = host.clone() if host.untyped_storage().data_ptr() == own else host
    return copies


class Shards(Alone):
    """A network split over the ranks by FSDP2, each of its units and the rest gathered when used.

    What a rank trains are ordinary parameters of its own part's shape, in the memory of the split
    weights: optimizers, masks and averages need to know nothing of it.
    """

    def __init__(self, model: Classifier, units: Sequence[str], ranks: Ranks) -> None:
        """`units` are the paths of the blocks that are gathered one at a time."""
        self.net: Classifier = model
        self.ranks = ranks
        self._units = units
        self._empty = copy_on_meta(model)
        split(model, units, ranks)
        self._pairs = {
            name: (weight, nn.Parameter(own_part(weight)))
            for name, weight in model.named_parameters()
        }

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """This rank's part of every weight that is trained, by its name in the model."""
        return {name: own for name, (weight, own) in self._pairs.items() if weight.requires_grad}

    def own(self, weight: Tensor) -> nn.Parameter:
        """This rank's part of a weight of the network, whatever its names are."""
        return next(own for one, own in self._pairs.values() if one is weight)

    def whole_shape(self, own: Tensor) -> torch.Size:
        """Shape of the weight of which `own`, one of `weights`, is this rank's part."""
        return next(weight.shape for weight, part in self._pairs.values() if part is own)

    def average(self) -> None:
        """Hand the gradients, which the backward pass has averaged and split, to the parts."""
        for weight, own in self._pairs.values():
            own.grad = None if weight.grad is None else own_part(weight.grad)

    def part_gradients(self, value: Tensor, keep: bool) -> list[Tensor | None]:
        """As `Alone`; the backward pass has averaged and split them."""
        value.backward(retain_graph=keep)
        weights = [weight for weight, _ in self._pairs.values() if weight.requires_grad]
        found = [None if weight.grad is None else own_part(weight.grad) for weight in weights]
        self.clear()
        return found

    def clear(self) -> None:
        """After the step."""
        for weight, own in self._pairs.values():
            weight.grad = own.grad = None

    def load_gradients(self, parts: Sequence[Tensor]) -> None:
        """Set the gradients, to which the next backward pass adds, one part per trained weight."""
        weights = [weight for weight, _ in self._pairs.values() if weight.requires_grad]
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = torch.zeros_like(weight)
            own_part(weight.grad).copy_(part)

    @contextmanager
    def change_gradients(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within, each whole gradient of a weight is changed on its rank, before it is averaged
        over the ranks and split. Every rank must call."""  # noqa: D205, D209
        from torch.distributed.fsdp import FSDPModule

        with torch.no_grad():
            blank_pass(self.net)  # the first pass is where torch sets the blocks up
        handles = []
        for unit in self.net.modules():
            if not isinstance(unit, FSDPModule):
                continue
            unit.unshard()  # a gathered weight is the same tensor each time it is gathered
            handles += [
                weight.register_hook(change)
                for weight in cast(nn.Module, unit).parameters()
                if weight.requires_grad and not hasattr(weight, "device_mesh")
            ]
            unit.reshard()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def copy(self, of: Classifier | None = None) -> Classifier:
        """Make a frozen copy of the network as it is now, in evaluation mode, split alike.

        Or of another of the same architecture, `of`, which every rank has whole.
        """
        return fill_parts(copy.deepcopy(self._empty), of or self.net, self._units, self.ranks)

    @torch.no_grad()
    def host_copy(self) -> Classifier:
        """Copy the whole network to every rank's host, a tensor at a time; every rank must call."""
        net, twin = self.net, copy.deepcopy(self._empty).to_empty(device="cpu")
        twin.class_names, twin.requests = net.class_names, net.requests
        twin.canaries = net.canaries
        weights, buffers = dict(net.named_parameters()), dict(net.named_buffers())
        for name, whole in twin.named_parameters():
            found = copy_to_first(weights[name])
            if self.ranks.main:
                whole.copy_(found)
            dist.broadcast(whole.detach().view(-1).view(torch.uint8), 0)
        for name, buffer in twin.named_buffers():
            buffer.copy_(buffers[name])
        return twin.train(net.training)

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join what is split as the weights of these names are: whole on the first rank's host,
        empty elsewhere."""  # noqa: D205, D209
        rows = {key.removeprefix("net."): len(weight) for key, (weight, _) in self._pairs.items()}
        return {name: _gather(part.cpu(), rows[name], self.ranks) for name, part in parts.items()}

    def choose(
        self, scores: Sequence[Tensor], choice: Callable[[list[Tensor]], list[list[Tensor]]]
    ) -> list[list[Tensor]]:
        """Choose among all weights by what is split like them: whole on the first rank's host.

        Args:
            scores: one tensor per parameter of `weights`, this rank's part.
            choice: groups of one tensor per parameter, from the whole scores.

        Returns:
            The groups, this rank's part, on its device.

        Raises:
            RunFailed: on every rank: `choice` raised a ValueError.
        """
        shapes = [self._pairs[name][0].shape for name in self.weights]
        whole = [
            _gather(score.cpu(), shape[0], self.ranks)
            for score, shape in zip(scores, shapes, strict=True)
        ]
        groups: list[list[Tensor]] = []
        problem = ""
        if self.ranks.main:
            try:
                groups = choice(whole)
            except ValueError as error:
                problem = str(error)
        problem, dtypes = from_first((problem, [[one.dtype for one in g] for g in groups]))
        if problem:
            raise RunFailed(problem)
        return [
            [
                _scatter(groups[k][n] if groups else None, shape, dtype, self.ranks)
                for n, (shape, dtype) in enumerate(zip(shapes, kinds, strict=True))
            ]
            for k, kinds in enumerate(dtypes)
        ]


def split(model: nn.Module, units: Sequence[str], ranks: Ranks) -> None:
    """Split a network's weights over the ranks, in place, and move each part to its device."""
    from torch.distributed.device_mesh import init_device_mesh  # here: a second to import
    from torch.distributed.fsdp import fully_shard

    # Of features, which a classifier returns beside its logits; no loss writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for path in units:
        fully_shard(model.get_submodule(path), mesh=mesh, reshard_after_forward=True)
    # The rest, too, is let go after each pass: a step moves the parts alone.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def fill_parts(twin: Classifier, of: Classifier, units: Sequence[str], ranks: Ranks) -> Classifier:
    """Split a network without numbers over the ranks and fill it: frozen, in evaluation mode.

    Args:
        twin: from `copy_on_meta`; it is what is returned.
        of: has the numbers; whole on every rank, or split alike.
        units: paths of the blocks that are gathered one at a time.
        ranks: the job.
    """
    twin.eval().requires_grad_(False)
    split(twin, units, ranks)
    twin.to_empty(device=ranks.device)
    weights = dict(of.named_parameters())
    for name, tensor in twin.named_parameters():
        weight = weights[name]
        whole = not hasattr(weight, "device_mesh")
        own_part(tensor).copy_(cut(weight, ranks) if whole else own_part(weight))
    buffers = dict(of.named_buffers())
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    return twin


def even_rounds(own: Iterator[Batch], rounds: int) -> Iterator[Batch | None]:
    """Yield a rank's batches, then None until there were as many rounds as on any rank.

    Where reading fails, the error comes after the last round: the other ranks wait in each.
    """
    failure: Exception | None = None
    for _ in range(rounds):
        batch = None
        try:
            batch = next(own, None) if failure is None else None
        except Exception as error:  # whatever reading raises
            failure = error
        yield batch
    if failure is not None:
        raise failure


def keep_pace(
    models: Sequence[Classifier], own: Iterator[Batch], passes: int = 1
) -> Iterator[Batch]:
    """Yield a rank's batches of a sweep; where weights are split, all ranks pass as often.

    Before each batch the ranks ask each other whether one has another; a rank that has none, or
    could not read one, shows a blank image until none has. Its error comes after that.

    Args:
        models: what each batch is shown to, in this order.
        own: this rank's batches.
        passes: how often each model is shown a batch.
    """
    if not any(map(is_split, models)):
        yield from own
        return
    failure: Exception | None = None
    while True:
        batch = None
        try:
            batch = next(own, None) if failure is None else None
        except Exception as error:  # whatever reading raises
            failure = error
        left = torch.tensor(int(batch is not None))
        dist.all_reduce(left)
        if not left:
            break
        if batch is not None:
            yield batch
            continue
        for model in models:
            for _ in range(passes):
                blank_pass(model)
    if failure is not None:
        raise failure


def blank_batch(model: Classifier) -> Batch:
    """Make a batch of one blank image, which is no forget sample and counts for nothing."""
    weight, size = next(model.parameters()), model.preset.size
    image = torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype)
    zero = torch.zeros(1, dtype=torch.int64, device=weight.device)
    return Batch(image, zero, zero.bool(), zero, 0)


def blank_pass(model: Classifier) -> None:
    """Take part in the other ranks' pass, with an image that counts for nothing."""
    logits = model(blank_batch(model).images).logits
    if logits.requires_grad:
        (logits.sum() * 0).backward()


def part_rows(total: int, world: int) -> list[int]:
    """First dimensions of the ranks' parts of a tensor of `total` rows."""
    step = -(-total // world)
    return [max(0, min(step, total - rank * step)) for rank in range(world)]


def _gather(own: Tensor, total: int, ranks: Ranks) -> Tensor:
    """Join the ranks' parts, on the host, on the first rank; empty elsewhere."""
    rows = part_rows(total, ranks.world)
    own = own.contiguous()
    if not ranks.main:
        if rows[ranks.rank]:
            dist.send(own.view(-1).view(torch.uint8), 0)
        return own.new_empty(0)
    whole = own.new_empty(total, *own.shape[1:])
    whole[: rows[0]] = own
    for rank in range(1, ranks.world):
        if rows[rank]:
            start = sum(rows[:rank])
            dist.recv(whole[start : start + rows[rank]].view(-1).view(torch.uint8), rank)
    return whole


def _scatter(
    whole: Tensor | None, shape: Sequence[int], dtype: torch.dtype, ranks: Ranks
) -> Tensor:
    """Give each rank its part of the first rank's host tensor, on its device."""
    rows = part_rows(shape[0], ranks.world)
    if whole is None:
        own = torch.empty(rows[ranks.rank], *shape[1:], dtype=dtype)
        if rows[ranks.rank]:
            dist.recv(own.view(-1).view(torch.uint8), 0)
        return own.to(ranks.device)
    whole = whole.contiguous()
    for rank in range(1, ranks.world):
        if rows[rank]:
            start = sum(rows[:rank])
            dist.send(whole[start : start + rows[rank]].view(-1).view(torch.uint8), rank)
    return whole[: rows[0]].clone().to(ranks.device)


def copy_on_meta(model: Classifier) -> Classifier:
    """Copy a network without its numbers; weights lie in torch's own order."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta", memory_format=torch.contiguous_format)
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
