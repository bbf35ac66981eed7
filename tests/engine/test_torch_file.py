"""Torch files are read without running what is pickled in them, whatever the pickle says."""

from __future__ import annotations

import collections
import enum
import io
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from letheon.engine.checkpoints.torch_file import Placeholder, StoredTensor, read_torch_file
from tests.engine.files import refusal, saved


class Color(enum.Enum):
    RED = 1


class Named(dict[str, int]):
    pass


class Items(list[int]):
    pass


def archive(path: Path, pickled: bytes, numbers: bytes = bytes(16)) -> Path:
    """A torch file around a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", numbers)
    return path


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor(offset: int, size: bytes, stride: bytes) -> bytes:
    """Pickle of _rebuild_tensor(a storage of 4, offset, (size,), (stride,))."""
    where = b"ctorch._utils\n_rebuild_tensor\n"
    return where + b"(" + STORAGE + b"K" + bytes([offset]) + size + b"\x85" + stride + b"\x85tR."


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "bfloat16", "int8", "uint8", "int64", "bool"]
)
def test_tensors_are_those_of_torch(tmp_path: Path, zipped: bool, dtype: str) -> None:
    whole = (torch.arange(24).reshape(4, 6) % 5).to(getattr(torch, dtype))
    content = {
        "a": whole, "t": whole.t(), "part": whole[1:3, ::2],
        "empty": whole[:0], "scalar": whole[1, 1],
        "parameter": torch.nn.Parameter(whole, requires_grad=False) if dtype != "bool" else whole,
        "list": [1, 2.5, "x", None, True, (whole[0],)], "set": {1, 2},
        "counts": collections.Counter("aab"), "color": Color.RED, "by_color": {Color.RED: 1},
        "named": Named(x=1), "items": Items([1, 2]), "size": whole.shape, "kind": whole.dtype,
    }  # fmt: skip
    read = read_torch_file(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    for key in ("a", "t", "part", "empty", "scalar", "parameter"):
        assert torch.equal(read[key].load(), content[key])
        assert (read[key].shape, read[key].dtype) == (tuple(content[key].shape), content[key].dtype)
    assert read["list"][:5] == content["list"][:5]
    assert torch.equal(read["list"][5][0].load(), whole[0])
    assert isinstance(read["color"], Placeholder)
    assert read["named"] == {"x": 1} or isinstance(read["named"], Placeholder)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["complex64", "uint16", "float8_e5m2"])
def test_numbers_of_other_kinds_are_passed_over(tmp_path: Path, zipped: bool, dtype: str) -> None:
    content = {
        "other": torch.ones(5).to(getattr(torch, dtype)), "bytes": torch.ones(3).untyped_storage(),
        "a": torch.arange(7.0),
    }  # fmt: skip
    read = read_torch_file(saved(tmp_path, content, _use_new_zipfile_serialization=zipped))
    assert isinstance(read["other"], Placeholder) and isinstance(read["bytes"], Placeholder)
    assert torch.equal(read["a"].load(), content["a"])


def test_the_numbers_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    read = read_torch_file(archive(tmp_path / "x.pt", tensor(0, b"K\x04", b"K\x01")))
    assert isinstance(read, StoredTensor)
    assert read.shape == (4,)
    assert torch.equal(read.load(), torch.zeros(4))
    read.load().add_(1)  # a copy of ours, not the file
    again = read_torch_file(tmp_path / "x.pt")
    assert torch.equal(again.load(), torch.zeros(4))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, b"K\x05", b"K\x01"),
        (1, b"K\x04", b"K\x01"),
        (0, b"K\x02", b"K\x04"),
        (0, b"J\xff\xff\xff\xff", b"K\x01"),
        (0, b"K\x04", b"J\xff\xff\xff\xff"),
        (0, b"J\x00\x00\x00\x7f", b"K\x00"),
        (0, b"G\x3f\xf0\x00\x00\x00\x00\x00\x00", b"K\x01"),
    ],
    ids=["long", "late", "wide", "negative", "backward", "broadcast", "fraction"],
)
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, offset: int, size: bytes, stride: bytes
) -> None:
    assert "cut short" in refusal(archive(tmp_path / "x.pt", tensor(offset, size, stride)))


def spring(path: Path) -> list[bytes]:
    """Pickles that would make a folder when run, by every opcode that calls something."""
    text = pickle.dumps(str(path), 0)[:-1].partition(b"\np0")[0] + b"\n"
    word = b"\x8c" + bytes([len(str(path))]) + str(path).encode()
    return [
        b"cos\nmkdir\n(" + text + b"tR.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + word + b"\x85R.",  # STACK_GLOBAL
        b"(" + text + b"ios\nmkdir\n.",  # INST
        b"(cos\nmkdir\n" + text + b"o.",  # OBJ
        b"\x80\x02cos\nmkdir\n" + word.replace(b"\x8c", b"U", 1) + b"\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x12os.mkdir('sprung')\x85R.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x08os.mkdir\x93" + word + b"\x85R.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nN" + text + b"\x85NtR.",
        b"ctorch._utils\n_rebuild_tensor\n}(X\x08\x00\x00\x00__call__cos\nmkdir\nubK\x01\x85R.",
        b"ccollections\nOrderedDict\n)R}(X\x0c\x00\x00\x00__setstate__cos\nmkdir\nub"
        + text
        + b"b.",
    ]


@pytest.mark.parametrize("which", range(10))
def test_no_opcode_runs_what_the_pickle_names(
    tmp_path: Path, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = spring(tmp_path / "sprung")[which]
    path = archive(tmp_path / "trap.pt", pickled)
    assert str(path) in refusal(path)
    old = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(head, old, protocol=2)
    (tmp_path / "old.pt").write_bytes(old.getvalue() + pickled + pickle.dumps([], protocol=2))
    assert str(tmp_path / "old.pt") in refusal(tmp_path / "old.pt")
    assert not (tmp_path / "sprung").exists()


def test_the_traps_are_real(tmp_path: Path) -> None:
    """Some of these pickles do make the folder where they are run as Python runs them."""
    made = 0
    for number, pickled in enumerate(spring(tmp_path / "sprung")):
        pickletools.dis(pickled, io.StringIO())  # each is a whole pickle
        if number in (0, 1, 2, 3):
            pickle.loads(pickled)
            os.rmdir(tmp_path / "sprung")
            made += 1
    assert made == 4


def test_a_content_that_holds_itself_or_grows_without_end_is_read(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert "no tensors" in refusal(saved(tmp_path, loop))
    deep: dict[str, Any] = {"x": 1}
    for _ in range(60):
        deep = {"a": deep, "b": deep}  # 2^60 paths, 61 dicts
    assert "no tensors" in refusal(saved(tmp_path, deep))
