"""Read the tensors of a torch file, of any age, without running what is pickled in it.

A pickle is a program: it imports names and calls them. Here no name is ever imported. The few that
rebuild tensors and dicts have stand-ins of ours; every other name becomes an inert placeholder that
takes whatever it is called with and does nothing. So a file that also holds an argparse namespace,
numpy numbers, an optimizer or a whole network is read, and no code in it is run.
"""

from __future__ import annotations

import math
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch before 1.6 begins
_PROTOCOL = 1001
_LARGEST_PICKLE = 1 << 28
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_FOREIGN = {
    "UntypedStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
}
"""Bytes of a number in storages that are passed over; only the old format must know them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and dtype are known, its numbers are read by `load`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it was saved with."""
        return self.storage.dtype

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def load(self) -> Tensor:
        """Map the tensor on the CPU; raises where it reaches beyond what is stored."""
        return self.storage.read().as_strided(self.shape, self.stride, self.offset)

    def __setstate__(self, state: object) -> None:
        """Take no state from a pickle."""


class Placeholder(dict[Any, Any]):
    """Anything in a pickle that is no tensor, container or number: it holds items and a state."""

    state: Any = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Keep the state as it is: the parameters of a pickled network are in there."""
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def append(self, item: object) -> None:
        """Ignore an item of a list."""

    extend = add = append


@dataclass(eq=False)
class _Storage:
    dtype: torch.dtype
    count: int
    name: str
    path: Path
    where: int = -1  # the first byte in the file; known later in old files
    data: list[Tensor] = field(default_factory=list)

    def read(self) -> Tensor:
        """The numbers, mapped from the file, copied where they are written to."""
        if not self.data:
            size = self.count * self.dtype.itemsize
            whole = torch.UntypedStorage.from_file(
                str(self.path), shared=False, nbytes=self.path.stat().st_size
            )
            if self.where < 0 or self.where + size > whole.nbytes():
                raise ValueError(f"storage {self.name} is cut short")
            part = whole[self.where : self.where + size]
            if self.where % self.dtype.itemsize:
                part = part.clone()
            self.data.append(torch.empty(0, dtype=self.dtype).set_(part))
        return self.data[0]

    def __setstate__(self, state: object) -> None:
        """Take no state from a pickle."""


class _Dict(dict[Any, Any]):
    """An OrderedDict of a pickle; the versions that torch hangs on it are not read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(arg for arg in args if isinstance(arg, list | dict)))

    def __setstate__(self, state: object) -> None:
        """Ignore attributes."""


class _StandIn:
    """A function of ours in place of one that a pickle names."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        """Take no state from a pickle."""


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    if isinstance(storage, tuple):  # a view of another storage, as torch before 0.4 saved
        storage, start = storage
        offset += start
    if isinstance(storage, Placeholder):  # of numbers that no network of ours holds
        return storage
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor of no storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or (math.prod(size) and last >= storage.count):
        raise ValueError(f"a tensor of shape {tuple(size)} in a storage of {storage.count}")
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_subclass(call: Any, kind: Any, args: Any, state: Any) -> Any:
    return call(*args) if isinstance(call, _StandIn) else Placeholder()


def _plain_set(items: Any = ()) -> set[Any]:
    return {item for item in items if isinstance(item, str | int)}


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *rest: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("builtins", "set"): _plain_set,
    ("__builtin__", "set"): _plain_set,
}


class _Unpickler(pickle.Unpickler):
    """Reads a pickle without importing a name."""

    def __init__(self, file: IO[bytes], open_storage: Callable[[tuple[Any, ...]], Any]) -> None:
        super().__init__(file, encoding="latin1")
        self._open_storage = open_storage
        self._kinds: dict[tuple[str, str], type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for the names that rebuild tensors and dicts; a placeholder for all others."""
        if (module, name) in _STAND_INS:
            return _StandIn(_STAND_INS[module, name])
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        key = (module, name)
        if key not in self._kinds:
            self._kinds[key] = type(name.rpartition(".")[2], (Placeholder,), {})
            self._kinds[key].__module__ = module
        return self._kinds[key]

    def persistent_load(self, pid: Any) -> Any:
        """A storage, by its name in the file; a module's source text is passed over."""
        if pid[0] == "module":
            return pid[1]
        return self._open_storage(pid)


def read_torch_file(path: Path) -> Any:
    """Read a torch file's content: dicts, lists, numbers, `StoredTensor`s and `Placeholder`s.

    Raises:
        Exception: nearly anything, where the file is damaged or is of another format.
    """
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    return _read_old(path)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = {info.filename: info for info in archive.infolist()}
        [root] = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != _byte_order():
            raise ValueError("of another byte order")
        stored = [info for name, info in records.items() if name.startswith(f"{root}data")]
        if any(info.compress_type != zipfile.ZIP_STORED for info in stored):
            raise ValueError("compressed again after it was saved; extract it and save it anew")
        storages: dict[str, _Storage] = {}

        def open_storage(pid: tuple[Any, ...]) -> _Storage | Placeholder:
            _, dtype, name, _, count = pid
            if not isinstance(dtype, torch.dtype):
                return Placeholder()
            if name not in storages:
                info = records[f"{root}data/{name}"]
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
                start = info.header_offset + 30
                start += int.from_bytes(lengths[:2], "little")
                start += int.from_bytes(lengths[2:], "little")
                storage = _storage(dtype, count, name, path)
                if count * storage.dtype.itemsize > info.file_size:
                    raise ValueError(f"storage {name} is cut short")
                storage.where = start
                storages[name] = storage
            return storages[name]

        record = records[f"{root}data.pkl"]
        if record.file_size > _LARGEST_PICKLE:
            raise ValueError(f"a pickle of {record.file_size} bytes")
        with archive.open(record) as pickled:
            return _Unpickler(pickled, open_storage).load()


def _byte_order() -> bytes:
    return sys.byteorder.encode()


def _storage(dtype: Any, count: Any, name: Any, path: Path) -> _Storage:
    if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
        raise ValueError(f"storage {name} of an unknown kind")
    return _Storage(dtype, count, str(name), path)


def _read_old(path: Path) -> Any:
    """Read the format of torch before 1.6: five pickles, then the storages one after another."""
    storages: dict[str, _Storage] = {}
    foreign: dict[str, int] = {}

    def open_storage(pid: tuple[Any, ...]) -> Any:
        _, dtype, name, _, count, view = pid
        if not isinstance(dtype, torch.dtype):
            foreign[name] = _FOREIGN[dtype.__name__]
            return Placeholder()
        if name not in storages:
            storages[name] = _storage(dtype, count, name, path)
        return storages[name] if view is None else (storages[name], int(view[1]))

    with path.open("rb") as file:

        def load() -> Any:
            return _Unpickler(file, open_storage).load()

        if load() != _MAGIC or load() != _PROTOCOL:
            raise ValueError("no torch file")
        system = load()
        if system["little_endian"] != (sys.byteorder == "little"):
            raise ValueError("of another byte order")
        content = load()
        for name in load():
            count = int.from_bytes(file.read(8), sys.byteorder)
            if name in foreign:
                file.seek(count * foreign[name], 1)
                continue
            storage = storages[name]
            if count != storage.count:
                raise ValueError(f"storage {name} is cut short")
            storage.where = file.tell()
            file.seek(count * storage.dtype.itemsize, 1)
        if file.tell() > path.stat().st_size:
            raise ValueError("the last storage is cut short")
    return content
