"""WebDataset shards and the folders and files of the Hugging Face datasets library."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from letheon.errors import InputError
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.open import open_data, open_domains
from letheon.loaders.views import list_notes
from tests.loaders.test_downloads import tar

Label = Callable[[int], tuple[str, str]]  # a sample's number to its extension and text


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 2 * number, 99)).save(out, "PNG")
    return out.getvalue()


def write_shards(root: Path, names: dict[str, range], label: Label) -> Path:
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


def test_a_split_that_is_not_read_is_noted(tmp_path: Path) -> None:
    names = {"train": range(9), "val": range(9, 12), "test": range(12, 15)}
    data = open_data(str(write_shards(tmp_path / "set", names, FORMS["cls"])))
    (note,) = list_notes({"train": data.train})
    assert "is there too and is not read" in note
    prepare(data, tmp_path / "out", 8)
    assert note in list_notes({"train": open_data(str(tmp_path / "out")).train})


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


@pytest.mark.parametrize("label", ["999999999", "9" * 5000])
def test_a_label_beyond_all_classes_is_refused(tmp_path: Path, label: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar([("a.png", png(1)), ("a.cls", label.encode())]))
    with pytest.raises(InputError, match=r"x\.tar: got a label of 1048576 or more"):
        open_domains(str(path))


def test_names_of_classes_in_another_encoding(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set", {"x": range(6)}, FORMS["cls"])
    (root / "classes.txt").write_bytes("ant\nbär\ncat\n".encode("latin-1"))
    assert open_domains(str(root))["set"].classes[::2] == ("ant", "cat")


# ------------------------------------------------------------------- Hugging Face datasets

WORDS = ["cat", "dog", "owl"]


def info(label: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"features": {"image": {"_type": "Image"}, "label": label, **more}}


def table(numbers: range, features: dict[str, Any], **columns: Any) -> Any:
    """A table as the datasets library writes it: features in the schema's metadata."""
    pa = pytest.importorskip("pyarrow")
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    made = pa.table({
        "image": pa.array(images, kind), "label": pa.array([n % 3 for n in numbers], pa.int64()),
        **columns,
    })  # fmt: skip
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": features})})


def save_to_disk(folder: Path, made: Any, features: dict[str, Any]) -> None:
    """As Dataset.save_to_disk lays out a folder: an Arrow stream and two pages about it."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, \
            pa.ipc.new_stream(file, made.schema) as stream:  # fmt: skip
        stream.write_table(made, max_chunksize=4)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text(json.dumps(features))


CLASS_LABEL = {"names": WORDS, "_type": "ClassLabel"}


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_hugging_face_sets(tmp_path: Path, form: str) -> None:
    features = info(CLASS_LABEL)
    train, test = table(range(20), features), table(range(20, 26), features)
    if form == "disk":
        save_to_disk(tmp_path / "set/train", train, features)
        save_to_disk(tmp_path / "set/test", test, features)
        (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    else:
        import pyarrow.parquet as pq

        (tmp_path / "set/data").mkdir(parents=True)
        for name, part in (("train-00000-of-00002-ab12", train[:9]),
                           ("train-00001-of-00002-cd34", train[9:]),
                           ("test-00000-of-00001-ef56", test)):  # fmt: skip
            pq.write_table(part, tmp_path / f"set/data/{name}.parquet", row_group_size=2)
    data = open_data(str(tmp_path / "set"))
    assert data.classes == data.test.classes == tuple(WORDS)
    assert data.train.labels.tolist() == [n % 3 for n in range(20)]
    back = pickle.loads(pickle.dumps(data.train))
    order = np.random.default_rng(0).permutation(20)
    assert [int(back.read(i)[0, 0, 0]) for i in order] == order.tolist()
    assert int(data.test.encoded_image(2).pixels()[0, 0, 0]) == 22
    assert data.train.digest == back.digest != data.test.digest


def test_domains_a_holdout_and_splits_without_labels(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    features = info({"dtype": "int64", "_type": "Value"}, domain={"dtype": "string"})
    made = table(range(12), features, domain=["Real World" if n % 2 else "Art" for n in range(12)])
    (tmp_path / "set").mkdir()
    pq.write_table(made, tmp_path / "set/0000.parquet")
    domains = open_domains(str(tmp_path / "set"))
    assert list(domains) == ["Art", "Real_World"] and domains["Art"].classes == ("0", "1", "2")
    assert [int(domains["Real_World"].read(i)[0, 0, 0]) for i in range(3)] == [1, 3, 5]
    pq.write_table(made.drop_columns("domain"), tmp_path / "set/0000.parquet")
    assert len(open_data(str(tmp_path / "set/0000.parquet"), holdout=0.25).test) == 3
    two = made.drop_columns("domain").append_column("picture", made["image"])
    pq.write_table(two, tmp_path / "set/0000.parquet")
    with pytest.raises(InputError, match="columns image, label, picture, expected one of images"):
        open_data(str(tmp_path / "set"))
    import pyarrow as pa

    (tmp_path / "set/0000.parquet").unlink()
    none = pa.array([-1] * 12, pa.int64())
    plain = made.drop_columns("domain")
    for name, part in (("train", plain), ("validation", plain),
                       ("test", plain.set_column(1, "label", none))):  # fmt: skip
        pq.write_table(part, tmp_path / f"set/{name}-00000-of-00001.parquet")
    data = open_data(str(tmp_path / "set"))
    assert data.test.name == "set/validation" and "test has no labels" in data.train.notes[0]


def test_splits_whose_labels_are_numbers_may_lack_the_last_class(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    features = info({"dtype": "int64", "_type": "Value"})
    for split, numbers in (("train", range(6)), ("test", range(2))):
        pq.write_table(table(numbers, features), tmp_path / f"{split}-00000-of-00001.parquet")
    data = open_data(str(tmp_path))
    assert data.test.classes == data.classes == ("0", "1", "2")
    before = data.train.digest
    new = table(range(10, 16), features)
    pq.write_table(new.set_column(1, "label", table(range(6), features)["label"]),
                   tmp_path / "train-00000-of-00001.parquet")  # fmt: skip
    changed = open_data(str(tmp_path))
    assert changed.train.labels.tolist() == data.train.labels.tolist()
    assert changed.train.digest != before


def test_a_broken_folder_of_splits_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    features = info(CLASS_LABEL)
    save_to_disk(tmp_path / "train", table(range(6), features), features)
    page = tmp_path / "dataset_dict.json"
    for text in ('{"splits": ["train", "gone"]}', '{"splits": ["../x"]}', "{", "[]", "{}"):
        page.write_text(text)
        with pytest.raises(InputError, match="got a broken file"):
            open_data(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="no datasets library")
def test_what_the_library_itself_writes(tmp_path: Path) -> None:
    datasets = importlib.import_module("datasets")
    rows = datasets.table.InMemoryTable(table(range(9), info(CLASS_LABEL)))
    made = datasets.Dataset(rows, fingerprint="0")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "disk"))
    made.to_parquet(str(tmp_path / "one.parquet"))
    for data in (open_data(str(tmp_path / "disk")), open_data(str(tmp_path / "one.parquet"), 0.4)):
        assert data.classes == tuple(WORDS)
        for i in range(len(data.train)):
            assert int(data.train.read(i)[0, 0, 0]) % 3 == data.train.labels[i]


def test_without_pyarrow_the_mend_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="expected pyarrow"):
        open_data(str(tmp_path))
