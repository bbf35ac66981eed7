"""CIFAR's Python version, and pickles that hold anything else: nothing in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders.datasets.restricted_pickle import load_restricted
from letheon.loaders.open import open_data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batch(number: int, key: str = "labels") -> dict[bytes, Any]:
    rows = np.random.default_rng(number).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [(i + number) % 10 for i in range(20)]
    return {b"data": rows, key.encode(): labels, b"filenames": [b"a.png"] * 20}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_of_torchvision(tmp_path: Path, protocol: int) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (root / name).write_bytes(pickle.dumps(batch(number), protocol))
    names = {b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}
    (root / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    data = open_data(str(root))
    assert (len(data.train), len(data.test)) == (100, 20) and data.classes == tuple(CLASSES)
    assert data.train.labels[40:60].tolist() == batch(2)[b"labels"]
    expected = batch(2)[b"data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(data.train.read(43), expected)
    (root / "data_batch_3").write_bytes(pickle.dumps(batch(2), protocol)[:900])
    with pytest.raises(InputError, match=r"data_batch_3: got a pickle that is not read"):
        open_data(str(root))


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [b"f%d" % i for i in range(10)]}, 2)
    )
    for name in ("train", "test"):
        both = {**batch(0, "fine_labels"), b"coarse_labels": [0] * 20}
        (tmp_path / name).write_bytes(pickle.dumps(both, 2))
    data = open_data(str(tmp_path))
    assert data.train.labels.tolist() == batch(0)[b"labels"] and data.classes[3] == "f3"


class Runs:
    """A pickle that would make a file when it is opened."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_what_runs_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    for bad in (
        Runs(os.system, f"touch {made}"),
        Runs(eval, f"open({str(made)!r}, 'w')"),
        Runs(getattr, "text", "format"),
        [np.zeros(3), {b"x": Runs(os.mkdir, str(made))}],
    ):
        with pytest.raises(InputError, match=r"x: got a pickle that is not read \(it names "):
            load_restricted(pickle.dumps(bad, protocol), "x")
    assert not made.exists()


@pytest.mark.parametrize(
    "bad",
    [
        np.array([1, "a"], dtype=object),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.datetime64("2020-01-01"),
        {1, 2},
        1j,
    ],
    ids=repr,
)
def test_what_is_no_number_is_refused(bad: object) -> None:
    with pytest.raises(InputError, match="x: got a pickle that is not read"):
        load_restricted(pickle.dumps(bad, 2), "x")


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"cos\nsystem\n(S'x'\ntR.", b"\x80\x02\x88b."])
def test_broken_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="x: got a pickle that is not read"):
        load_restricted(data, "x")


def test_arrays_of_another_size_than_their_bytes_are_refused() -> None:
    good = pickle.dumps(np.arange(6, dtype="<i4"), 2)
    assert load_restricted(good, "x").tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="do not fit"):
        load_restricted(good.replace(b"K\x06\x85", b"K\x07\x85"), "x")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_as_numpy_reads_them(protocol: int, order: str) -> None:
    for dtype in ("u1", "<i8", ">i4", "f4", "?"):
        value = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
        read = load_restricted(pickle.dumps({"a": value, "b": value[0, 1]}, protocol), "x")
        assert np.array_equal(read["a"], value) and read["b"] == value[0, 1]
