"""CUDA without CUDA, with numbers: tensors that say cuda and are computed on the host.

Fake tensors have no numbers, so that code which reads a result stops there. Here whole jobs run:
loaders, evaluation, attacks. What a GPU would refuse is an error, a tensor of the host among those
of the device, `.numpy()`; where the host would wait for the device is counted in the `Ledger`, by
the function that asked. A copy is whole at once: reading it too early is not found. Autocast and
Triton's kernels are left out: operations run in the formats they are given, kernels in plain forms.
"""

from __future__ import annotations

import concurrent.futures
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from letheon.loaders.transforms.normalize import moments
from step_budget.fake_cuda import ANSWERS, CUDA, INDEXING, Ledger

TRANSFERS = ("aten::_to_copy", "aten::copy_")
"""What takes tensors of both sides."""


class CudaTensor(Tensor):
    """A tensor of the device; `numbers` has its numbers, on the host."""

    numbers: Tensor

    @staticmethod
    def __new__(cls: type[CudaTensor], numbers: Tensor) -> CudaTensor:
        """Wrap a tensor of the host; to C++ it is on meta, whose backward needs no driver."""
        made = Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=torch.device("meta"),
        )  # fmt: skip
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation where no mode is active, in a thread."""
        return run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def _set_data(self, value: CudaTensor) -> None:
        self.numbers = value.numbers
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]

    data = property(lambda self: self.detach(), _set_data)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as a tensor of a GPU."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        """Read all numbers."""
        return self.cpu().tolist()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_send_lists(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_send_lists(key), value)

    def new_tensor(self, data: Any, *args: Any, **options: Any) -> Tensor:
        """Make a tensor of numbers beside this one."""
        chosen: dict[str, Any] = {"dtype": self.dtype, "device": CUDA, **options}
        return torch.tensor(data, *args, **chosen)

    def untyped_storage(self) -> Any:
        """Return the memory of its numbers, by which shared tensors are known."""
        return self.numbers.untyped_storage()

    def data_ptr(self) -> int:
        """Return the address of its numbers."""
        return self.numbers.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            copied = CudaTensor(self.numbers.clone()).requires_grad_(self.requires_grad)
            vars(copied).update({k: v for k, v in vars(self).items() if k != "numbers"})
            memo[id(self)] = copied
        return cast(CudaTensor, memo[id(self)])

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"cuda({self.numbers!r})"


def _send_lists(key: Any) -> Any:
    """Send lists and arrays of places to the device, as torch does where Python cannot look."""
    if isinstance(key, tuple):
        return tuple(map(_send_lists, key))
    return torch.tensor(key, device=CUDA) if isinstance(key, (list, np.ndarray)) else key


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on the numbers, and give the result the device that it would have."""
    leaves = tree_leaves((args, kwargs))
    meta = any(type(leaf) is Tensor and leaf.is_meta for leaf in leaves)
    skeleton = getattr(torch.utils._device.CURRENT_DEVICE, "type", "") == "meta"
    if (meta or skeleton) and not any(isinstance(leaf, CudaTensor) for leaf in leaves):
        return func(*args, **kwargs)  # of a network that is built without numbers
    if meta:
        raise NotImplementedError(f"{func} of a tensor that was made where Python cannot look")
    known = {id(leaf.numbers): leaf for leaf in leaves if isinstance(leaf, CudaTensor)}
    device = kwargs.get("device")
    on_device = bool(known) if device is None else torch.device(device).type != "cpu"
    if known:
        _check_places(func, leaves)
    if kwargs.pop("pin_memory", None):
        return pin(func(*args, **kwargs))
    if not known and not on_device:
        return func(*args, **kwargs)
    args, kwargs = tree_map_only(CudaTensor, lambda one: one.numbers, (args, kwargs))
    if on_device and device is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if on_device:

        def place(one: Tensor) -> Tensor:
            return known[id(one)] if id(one) in known else CudaTensor(one)

        out = tree_map_only(Tensor, place, out)
    for numbers, tensor in ((one.numbers, one) for one in known.values()):
        if numbers.shape != tensor.shape:
            raise NotImplementedError(f"{func} changes the shape of its operand")
    return out


def _check_places(func: Any, leaves: list[Any]) -> None:
    """Raise torch's error for a tensor of the host among those of the device."""
    name = func._schema.name
    if name in TRANSFERS:
        return
    host = [one for one in leaves if isinstance(one, Tensor) and not isinstance(one, CudaTensor)]
    if name in INDEXING and isinstance(leaves[0], CudaTensor):
        host = [one for one in host if one.dtype not in (torch.int64, torch.bool)]
    wrong = [one for one in host if one.dim()]
    if func._schema.is_mutable and leaves and any(leaves[0] is one for one in host):
        wrong.append(leaves[0])
    if wrong:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, got cuda:0 and cpu, "
            f"{tuple(wrong[0].shape)}"
        )


class _OnHost(TorchDispatchMode):
    """Runs what is made on the device without an operand there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, dict(kwargs or {}))


_pinned: dict[int, Tensor] = {}


def pin(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory, which is known by its address while the device is there."""
    copied = torch.empty_like(tensor).copy_(tensor)
    _pinned[copied.untyped_storage().data_ptr()] = copied
    return copied


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor of the host lies in pinned memory."""
    return not tensor.is_cuda and tensor.untyped_storage().data_ptr() in _pinned


class _Event:
    """A mark in the device's queue, which is always reached."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: object = None) -> None:
        """Set the mark."""

    def query(self) -> bool:
        """Whether the device is past it."""
        return True

    def synchronize(self) -> None:
        """Wait for it."""


_CARD = types.SimpleNamespace(
    name="no card at all", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=132
)
_MORE: dict[str, object] = {
    "torch.cuda._lazy_init": None,
    "torch.cuda.device_count": 1,
    "torch.cuda.set_device": None,
    "torch.cuda.synchronize": None,
    "torch.cuda.mem_get_info": (60 * 2**30, 80 * 2**30),
    "torch.cuda.get_device_properties": _CARD,
    "torch.cuda.get_device_name": _CARD.name,
    "torch.cuda._exchange_device": 0,
    "torch.cuda._maybe_exchange_device": 0,
    "letheon.kernels._triton_installed": False,
}


@contextmanager
def cuda_on_host() -> Iterator[Ledger]:
    """Within it cuda is there, and computes; yields the ledger of launches and waits.

    Threads of pools see it, too; what they wait for is their own affair and not counted.
    """
    ledger = Ledger(is_pinned)
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def submit_here(self: Any, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        @functools.wraps(call)
        def on_host(*args: Any, **kwargs: Any) -> Any:
            with _OnHost():
                return call(*args, **kwargs)

        return submit(self, on_host, *args, **kwargs)

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = [(cudnn, "allow_tf32"), (cudnn, "benchmark"), (matmul, "allow_tf32")]
    before = [(place, name, getattr(place, name)) for place, name in switches]
    lifting = torch._C._only_lift_cpu_tensors()
    random = torch.get_rng_state
    moments.cache_clear()
    with ExitStack() as stack:
        for name, value in (ANSWERS | _MORE).items():
            stack.enter_context(mock.patch(name, lambda *_, value=value, **__: value))
        for name, form in (
            ("torch.cuda.Event", _Event),
            ("torch.cuda.get_rng_state", lambda *_: random()),
            ("torch.cuda.set_rng_state", lambda *_: None),
            ("torch.Tensor.pin_memory", pin),
            ("torch.Tensor.is_pinned", is_pinned),
            ("concurrent.futures.ThreadPoolExecutor.submit", submit_here),
        ):
            stack.enter_context(mock.patch(name, form))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifting)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_OnHost())
        stack.enter_context(ledger)
        try:
            yield ledger
        finally:
            moments.cache_clear()
            _pinned.clear()
            for place, name, value in before:
                setattr(place, name, value)
