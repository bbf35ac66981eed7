"""The order of the classes, where a checkpoint from elsewhere has another than the folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from letheon.errors import InputError
from letheon.loaders.datasets import imagenet
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import resolve
from letheon.loaders.open import open_data
from letheon.loaders.options import DataOptions
from letheon.loaders.views import align_labels, drop_unreadable, list_notes, model_classes

Drawn = Callable[..., Path]


def by_words(draw: Drawn, words: tuple[str, ...]) -> Data:
    return open_data(str(draw([f"{s}/{w}/0.jpg" for s in ("train", "val") for w in words])))


def folder_labels(images: ImageSet) -> dict[str, int]:
    return {images.path(i).split("/")[-2]: int(images.labels[i]) for i in range(len(images))}


def test_imagenets_words_are_put_in_its_order_and_it_is_said(draw: Drawn) -> None:
    data = by_words(
        draw, ("tench", "Great White-Shark", "crane", "crane_2", "cardigan", "Cardigan")
    )
    names = model_classes(None, 1000, data.classes)
    aligned = align_labels(data, names, assumed=True)
    assert folder_labels(aligned.train) == {
        "tench": 0, "Great White-Shark": 2, "crane": 134, "crane_2": 517, "Cardigan": 264,
        "cardigan": 474,
    }  # fmt: skip
    assert resolve("class:tench", aligned).classes == (0,)
    assert resolve("class:great white shark", aligned).classes == (2,)
    assert any("ImageNet's order" in note for note in list_notes({"train": aligned.train}))
    assert model_classes(names, 1000, data.classes) == names  # a model that names its classes


def test_all_thousand_words_are_found_and_a_strange_one_is_not() -> None:
    names, seen = [], dict[str, int]()
    for word in imagenet.words().values():
        seen[word] = seen.get(word, 0) + 1
        names.append(word if seen[word] == 1 else f"{word}_{seen[word]}")
    found = imagenet.find_ids(names)
    assert found is not None and list(found.values()) == list(imagenet.words())
    assert imagenet.find_ids([*names[:5], "gizmo"]) is None
    assert imagenet.find_ids(["tench", "n01440764"]) is None
    assert imagenet.find_ids(["tench_2"]) is None


def test_a_model_without_names_gets_the_folders_order_and_it_is_said(draw: Drawn) -> None:
    data = by_words(draw, ("b", "a"))
    aligned = align_labels(data, model_classes(None, 2, data.classes), assumed=True)
    assert aligned.classes == ("a", "b")
    assert any("in the order of the class folders (a, b, ...)" in n for n in aligned.train.notes)
    assert align_labels(by_words(draw, ("b", "a")), ("a", "b")).train.notes == ()


def test_the_order_can_be_given(draw: Drawn, tmp_path: Path) -> None:
    root = draw([f"{s}/{c}/0.jpg" for s in ("train", "val") for c in ("a", "b b", "10", "9")])
    order = tmp_path / "classes.txt"
    order.write_text("b b\n10 ten\n\nz\na\n9, nine\n")
    data = DataOptions(data=str(root), classes=str(order)).open_data()
    assert data.classes == data.test.classes == ("b b", "10", "z", "a", "9")
    assert folder_labels(data.train) == {"b b": 0, "10": 1, "a": 3, "9": 4}
    for text, match in (("a\nb b\n10\n", "no line for '9'"), ("a\na\nb b\n9\n10", "'a' twice")):
        order.write_text(text)
        with pytest.raises(InputError, match=match) as error:
            DataOptions(data=str(root), classes=str(order)).open_data()
        assert error.value.option == "classes"
    with pytest.raises(InputError, match="cannot be read"):
        DataOptions(data=str(root), classes=str(tmp_path / "none")).open_data()


def test_lines_of_a_list_may_go_on_after_the_class(draw: Drawn, tmp_path: Path) -> None:
    data = by_words(draw, ("n01440764", "n01443537", "n02084071"))
    file = tmp_path / "list.txt"
    for lines in (
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        "n01440764,tench\nn01443537,goldfish\n",
        "n01440764\ttench\ntench, Tinca tinca\nn01443537\t1300\n",
        "0 tench\n1 goldfish\n",
    ):
        file.write_text(lines)
        assert resolve(f"file:{file}", data).classes == (0, 1)
    file.write_text("gizmo of a kind\n")
    with pytest.raises(InputError, match="unknown class 'gizmo of a kind'"):
        resolve(f"file:{file}", data)


def test_a_class_that_lost_all_its_images_is_an_error(draw: Drawn) -> None:
    root = draw([f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in range(2)])
    (root / "train/b/0.jpg").write_bytes(b"x")
    assert len(drop_unreadable(open_data(str(root)).train)) == 3
    (root / "train/b/1.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="the class 'b' of which no image can be read"):
        drop_unreadable(open_data(str(root)).train)
