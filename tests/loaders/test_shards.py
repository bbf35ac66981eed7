"""WebDataset shards and the folders and files of the Hugging Face datasets library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.open import open_data, open_domains
from tests.loaders.test_downloads import tar

Drawn = Callable[..., Path]


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 2 * number, 99)).save(out, "PNG")
    return out.getvalue()


def write_shards(
    root: Path, names: dict[str, range], label: Callable[[int], tuple[str, str]]
) -> Path:
    for shard, numbers in names.items():
        files = []
        for n in numbers:
            ext, text = label(n)
            files += [(f"{n:04}.png", png(n)), (f"{n:04}.{ext}", text.encode())]
        path = root / f"{shard}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar(files))
    return root


FORMS: dict[str, Label] = {
    "cls": lambda n: ("cls", f"{n % 3}\n"),
    "json": lambda n: ("json", json.dumps({"label": n % 3, "caption": "x"})),
    "names": lambda n: ("cls", "abc"[n % 3]),
}
PLACES = {
    "names": ("set-train-000000", "set-train-000001", "set-val-000000"),
    "folders": ("train/0", "train/1", "test/0"),
    "hub": ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_webdataset_shards(tmp_path: Path, form: str, place: str) -> None:
    a, b, c = PLACES[place]
    names = {a: range(5), b: range(5, 9), c: range(9, 12)}
    data = open_data(str(write_shards(tmp_path / "set", names, FORMS[form])))
    assert data.train.labels.tolist() == [n % 3 for n in range(9)]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert [int(data.train.read(i)[0, 0, 0]) for i in range(9)] == list(range(9))
    assert data.classes == (("a", "b", "c") if form == "names" else ("0", "1", "2"))


def test_a_single_shard_is_divided_and_named_by_its_list(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set", {"x": range(30)}, FORMS["cls"])
    (root / "classnames.txt").write_text("cat\ndog\nowl\n")
    (domain,) = open_domains(str(root)).values()
    assert len(domain) == 30 and domain.classes == ("cat", "dog", "owl")
    data = open_data(str(root), holdout=0.2)
    assert (len(data.train), len(data.test)) == (24, 6) and data.classes[0] == "cat"
    assert len(open_domains(str(root / "x.tar"))["x"]) == 30


def test_broken_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar([("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2))]))
    with pytest.raises(InputError, match=r"x\.tar/b\.png: got a sample without its \.cls"):
        open_domains(str(path))
    path.write_bytes(tar([("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"")]))
    with pytest.raises(InputError, match=r"b\.cls: got no label"):
        open_domains(str(path))
