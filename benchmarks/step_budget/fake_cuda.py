"""CUDA without CUDA: tensors that have a shape and the device cuda, and no numbers.

Under `fake_cuda` code runs as on a GPU, operation by operation, through torch's fake tensors. A
tensor on the wrong device, a look at a value by the host or a shape that depends on values is an
error. `Ledger` counts what the device would have to do.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, cast
from unittest import mock

import torch
import torch._dynamo  # before tensors are patched
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_make_subclass = torch.Tensor._make_subclass


def _make_on_meta(cls: Any, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Make a fake tensor whose backward pass is torch's for meta tensors: it needs no driver."""
    kwargs.pop("dispatch_device", None)
    return cast(Tensor, _make_subclass(cls, data, *args, **kwargs))


def _name_device(device: torch.device) -> torch.device:
    """Take what the backward pass makes on meta for what it would be, a tensor on the GPU."""
    return CUDA if device.type in ("meta", "cuda") else device


@contextmanager
def fake_cuda() -> Iterator[Ledger]:
    """Within it tensors are fake and cuda is there; yields the ledger of what is launched.

    Raises:
        DataDependentOutputException: at ``.item()``, ``.tolist()``, ``bool(tensor)`` of the device.
        DynamicOutputShapeException: at a shape that depends on values.
        FakeTensorDeviceMismatchError: at operands of several devices.
    """
    ledger = Ledger()
    with ExitStack() as stack:
        for name, value in ANSWERS.items():
            stack.enter_context(mock.patch(name, lambda *_, value=value, **__: value))
        stack.enter_context(mock.patch.object(torch.Tensor, "_make_subclass", _make_on_meta))
        naming = mock.patch.object(FakeTensor, "_normalize_fake_device", staticmethod(_name_device))
        stack.enter_context(naming)
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        yield ledger


ANSWERS: dict[str, object] = {
    "torch.cuda.is_available": True,
    "torch.cuda.is_bf16_supported": True,
    "torch.cuda.current_device": 0,
    "torch.cuda.is_current_stream_capturing": False,
    "torch.cuda.get_device_capability": (9, 0),
    "torch.cuda.amp.common.amp_definitely_not_available": False,
    "torch.optim.Optimizer._accelerator_graph_capture_health_check": None,
}
"""What torch asks the driver for, and the answer of a machine with an H100."""

VIEWS = {
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::set_", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::resize_",
}  # fmt: skip
"""Operations without a kernel that have no alias in their schema, or write nothing."""

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""What takes index tensors of the host, and waits for the places of a mask."""
READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero",
    "aten::masked_select", "aten::bincount", "aten::repeat_interleave", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::_linalg_check_errors",
}  # fmt: skip
"""Operations that end when the device has answered: a value, or a shape that depends on values."""

_FLOORS = ("engine", "eval", "kernels", "launch", "letheon", "loaders", "methods")
_ROOT = Path(__file__).resolve().parents[2]


def find_place() -> str:
    """Name the innermost function of ours that is running, as file:function; "" for none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        folders = _folders(frame.f_code.co_filename)
        if folders:
            return f"{folders}:{frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return ""


@functools.cache
def _folders(file: str) -> str:
    place = Path(file)
    if not place.is_relative_to(_ROOT):
        return ""
    inner = place.relative_to(_ROOT)
    return str(inner) if inner.parts[0] in _FLOORS else ""


class Ledger(TorchDispatchMode):
    """Counts kernels, bytes and waits of the host; `kernels` and `waits` are by name."""

    def __init__(self, is_pinned: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        """Take the rule by which memory of the host is pinned; from other memory a copy waits."""
        super().__init__()
        self.is_pinned = is_pinned
        self.clear()

    def clear(self) -> None:
        """Start to count from zero."""
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.bytes = 0

    @property
    def launches(self) -> int:
        """Operations with a kernel; what runs over a list of tensors is one."""
        return self.kernels.total()

    def __enter__(self) -> Self:
        """Begin to see every operation."""
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count it."""
        kwargs = kwargs or {}
        fused = func._schema.name.startswith("aten::_fused_")  # in place, with no form on meta
        skipped = fused and isinstance(tree_leaves(args)[0], FakeTensor)
        out = None if skipped else func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        name = func._schema.name
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*read, *made)}
        if "cuda" not in devices or name in VIEWS:
            return
        indexing = name.startswith(("aten::index", "aten::_index_put", "aten::_fused_"))
        if indexing and any(t.device.type == "cpu" and t.dim() for t in read):
            self._wait(f"{name} with a tensor of the host")
        by_mask = name in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in READS or by_mask:
            self._wait(name)
        if name in ("aten::_to_copy", "aten::copy_", "aten::lift"):
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            loose = read[-1].device.type == "cpu" and not self.is_pinned(read[-1])
            if "cpu" in devices and (blocking or loose):
                self._wait(f"{name} between host and device")
            if name == "aten::_to_copy" and _is_same(read[0], made[0]):
                return
        returns = func._schema.returns
        if returns and all(r.alias_info and not r.alias_info.is_write for r in returns):
            return  # a view
        self.kernels[name] += 1
        tensors = {id(t): t for t in (*read, *made)}.values()
        self.bytes += sum(t.numel() * t.element_size() for t in tensors if t.device.type == "cuda")

    def _wait(self, why: str) -> None:
        self.waits[f"{find_place()} {why}".strip()] += 1


def _is_same(before: Tensor, after: Tensor) -> bool:
    return (before.device, before.dtype, before.stride()) == (
        after.device, after.dtype, after.stride()
    )  # fmt: skip


class Mover:
    """Moves networks, states and runs to the fake device: each tensor once, everything in place."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, object]] = {}

    def move(self, value: Any) -> Any:
        """Return `value` with fake tensors in place of real ones; containers are changed."""
        if id(value) in self._known:
            return self._known[id(value)][1]
        if isinstance(value, (FakeTensor, type)):
            return value
        after: Any = value
        if isinstance(value, Tensor):
            after = self._tensor(value)
        elif isinstance(value, tuple):
            parts = [self.move(part) for part in value]
            after = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        self._known[id(value)] = (value, after)
        if isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, dict):
            for key, part in list(value.items()):
                value[key] = self.move(part)
        elif isinstance(value, list):
            value[:] = [self.move(part) for part in value]
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                part = getattr(value, field.name)
                new = self.move(part)
                if new is not part:
                    object.__setattr__(value, field.name, new)
        return after

    def _tensor(self, value: Tensor) -> Tensor:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(fake, value.requires_grad)
        return fake.requires_grad_(value.requires_grad)

    def _module(self, module: nn.Module) -> None:
        for one in module.modules():
            for tensors in (one._parameters, one._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = None if tensor is None else self.move(tensor)
            for name, value in vars(one).items():
                if isinstance(value, Tensor):
                    setattr(one, name, self.move(value))
