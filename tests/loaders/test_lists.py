"""Domains by list files: the listed images with the listed labels, and what is refused."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.beton_set import write_betons
from letheon.loaders.open import open_data, open_domains, open_source

Drawn = Callable[..., Path]
LABELS = {"zebra": 0, "t-shirt": 1, "The Mona Lisa": 2}  # not in the order of the names
DOMAINS = ("clipart", "real")
Truth = dict[str, dict[str, int]]  # domain -> path -> label


@pytest.fixture
def drawn(draw: Drawn) -> tuple[Path, Truth]:
    """Two listed domains, one without a list, a class that no list names, and an image left out."""
    classes = (*LABELS, "anvil")
    paths = [
        f"{domain}/{name}/{domain} {i}.jpg"
        for domain in (*DOMAINS, "infograph")
        for name in classes
        for i in range(4)
    ]
    root = draw(paths)
    truth: Truth = {domain: {} for domain in DOMAINS}
    for path in paths:
        domain, name, file = path.split("/")
        if domain in truth and name in LABELS and not file.endswith("3.jpg"):
            truth[domain][path] = LABELS[name]
    return root, truth


def write(folder: Path, truth: Truth, kind: str = "list", end: str = "\n") -> None:
    """The lists of `truth`, their lines in a mixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, labels in truth.items():
        lines = [f"{path} {label}{end}" for path, label in labels.items()]
        np.random.default_rng(1).shuffle(lines)
        (folder / f"{domain}_{kind}.txt").write_bytes("".join(lines).encode())


def check(domains: dict[str, ImageSet], truth: Truth, root: Path) -> None:
    assert list(domains) == sorted(truth)
    for domain, images in domains.items():
        found = {
            images.path(i).removeprefix(f"{root}/"): int(label)
            for i, label in enumerate(images.labels)
        }
        assert found == truth[domain] and list(found) == sorted(found)
        assert images.name == domain and images.classes == tuple(LABELS)
        assert all(images.read(i).shape == (12, 10, 3) for i in range(len(images)))


@pytest.mark.parametrize("place", ["", "image_list"])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n\n"])
def test_the_listed_images_and_no_others(drawn: tuple[Path, Truth], place: str, end: str) -> None:
    root, truth = drawn
    write(root / place, truth, end=end)
    check(open_domains(str(root)), truth, root)
    with pytest.raises(InputError, match=r"2 domain\(s\) \(clipart, real\)"):
        open_data(str(root))


def test_a_byte_order_mark_tabs_and_dots_do_not_matter(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    for domain, labels in truth.items():
        lines = "".join(f"./{path}\t{label}\n" for path, label in labels.items())
        (root / f"{domain}_list.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    check(open_domains(str(root)), truth, root)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("inside", ["", "DomainNet/"])
def test_an_archive_is_the_same_set(drawn: tuple[Path, Truth], kind: str, inside: str) -> None:
    root, truth = drawn
    write(root / "image_list", truth)
    out = root.with_name(f"set.{kind}")
    files = [p for p in root.rglob("*") if p.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as zipped:
            for file in files:
                zipped.write(file, f"{inside}{file.relative_to(root)}")
    else:
        with tarfile.open(out, "w") as tarred:
            for file in files:
                tarred.add(file, f"{inside}{file.relative_to(root)}")
    folder, archive = open_domains(str(root)), open_domains(str(out))
    assert {name: s.digest for name, s in folder.items()} == {
        name: s.digest for name, s in archive.items()
    }
    assert np.array_equal(archive["real"].labels, folder["real"].labels)
    assert np.array_equal(archive["real"].read(4), folder["real"].read(4))


def test_the_digest_tells_labels_apart_and_survives_a_pickle(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    write(root, truth)
    before = open_domains(str(root))["real"]
    again = pickle.loads(pickle.dumps(before))
    assert again.digest == before.digest and np.array_equal(again.read(1), before.read(1))
    write(root, {d: {p: 2 - label for p, label in of.items()} for d, of in truth.items()})
    assert open_domains(str(root))["real"].digest != before.digest


def test_both_halves_of_domainnet_are_one_domain(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    for number, kind in enumerate(("train", "test")):
        half = {d: dict(list(of.items())[number::2]) for d, of in truth.items()}
        write(root / "splits", half, kind)
    check(open_domains(str(root)), truth, root)
    (alone,) = open_domains(str(root / "splits" / "real_test.txt")).values()
    assert alone.name == "real" and len(alone) == len(truth["real"]) // 2


@pytest.mark.parametrize("place", ["", "image_list"])
def test_one_list_is_one_domain(drawn: tuple[Path, Truth], place: str) -> None:
    root, truth = drawn
    write(root / place, truth)
    check(open_domains(str(root / place / "real_list.txt")), {"real": truth["real"]}, root)
    (root / place / "mine.txt").write_text("real/zebra/real 1.jpg 0\n")
    assert list(open_domains(str(root / place / "mine.txt"))) == ["mine"]


def test_a_folder_of_lists_chooses_among_several(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    few = {d: dict(list(of.items())[:7]) for d, of in truth.items()}
    write(root / "few", few)
    write(root / "all", truth)
    with pytest.raises(InputError, match=r"in all/ and in few/.*name the folder"):
        open_domains(str(root))
    check(open_domains(str(root / "all")), truth, root)
    assert len(open_domains(str(root / "few"))["real"]) == 7


def test_one_domain_unpacked(drawn: tuple[Path, Truth], draw: Drawn) -> None:
    _, truth = drawn
    root = draw(list(truth["real"]), "alone")
    write(root, {"real": truth["real"]})
    check(open_domains(str(root)), {"real": truth["real"]}, root)
    write(root, truth)
    with pytest.raises(InputError, match=r"\(9 of 9 images of clipart are missing\).*unpack"):
        open_domains(str(root))


def test_a_label_without_images_keeps_its_number(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    without = {path: label for path, label in truth["real"].items() if label != 1}
    write(root, {"real": without})
    (images,) = open_domains(str(root / "real_list.txt")).values()
    assert images.classes == ("zebra", "(1)", "The Mona Lisa")
    assert sorted(set(images.labels.tolist())) == [0, 2]


@pytest.mark.parametrize("form", ["arrays", "list", "beton"])
def test_prepared_it_is_the_same_set(drawn: tuple[Path, Truth], tmp_path: Path, form: str) -> None:
    root, truth = drawn
    write(root / "image_list", truth)
    source, out = open_source(str(root)), tmp_path / "out"
    if form == "beton":
        write_betons(source, out)
    else:
        prepare(source, out, size=8 if form == "arrays" else None)
    domains = open_domains(str(out))
    assert list(domains) == sorted(truth)
    for domain, images in domains.items():
        assert images.classes == tuple(LABELS)
        assert images.labels.tolist() == [truth[domain][path] for path in sorted(truth[domain])]


def test_other_sets_are_not_taken_for_lists(draw: Drawn) -> None:
    root = draw([f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in "01"], "net")
    for split in ("train", "val"):
        (root / f"{split}_list.txt").write_text("a/0.jpg 0\n")
    assert len(open_data(str(root)).train) == 4
    root = draw([f"{d}/{c}/0.jpg" for d in ("Art", "Clipart") for c in "ab"], "home")
    (root / "class_list.txt").write_text("a 0\nb 1\n")
    assert len(open_domains(str(root))["Art"]) == 2


FIRST = "real/zebra/real 0.jpg"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty list"),
        ("\r\n \n", "empty list"),
        (f"{FIRST} 0\n\n{FIRST} 0\n", "line 3: got .*, which .*line 1 lists already"),
        (f"{FIRST} zebra\n", "line 1: got .*expected .*a label"),
        (f"{FIRST}\n", "line 1: got .*expected .*a label"),
        (f"{FIRST} -1\n", "line 1: got .*expected .*a label"),
        (f"{FIRST} 1.0\n", "line 1: got .*expected .*a label"),
        (f"{FIRST} 99999999999\n", "line 1: got .*expected .*a label"),
        ("7\n", "line 1: got '7'"),
        (f"/data/{FIRST} 0\n", "line 1: got the path '/data/real.*expected"),
        (f"real/../../{FIRST} 0\n", "line 1: got the path"),
        ("real\\zebra\\x.jpg 0\n", "line 1: got the path"),
        ("x.jpg 0\n", "line 1: got the path"),
        (
            f"{FIRST} 0\nreal/zebra/gone.jpg 0\nreal/zebra/too.jpg 0\n",
            r"line 2: got 'real/zebra/gone\.jpg', which is not in .*set/ \(2 of 3 images of real",
        ),
        (f"{FIRST} 0\nreal/anvil/real 0.jpg 0\n", "label 0 for the folder 'anvil'.*for 'zebra'"),
        (f"{FIRST} 0\nreal/zebra/real 1.jpg 1\n", "label 1 for the folder 'zebra'.*label 0"),
    ],
)
def test_bad_lists_are_named(drawn: tuple[Path, Truth], text: str, said: str) -> None:
    root, _ = drawn
    (root / "real_list.txt").write_text(text, newline="")
    for path in (root, root / "real_list.txt"):
        with pytest.raises(InputError, match=f"real_list.txt.*{said}") as error:
            open_domains(str(path))
        assert "\n" not in str(error.value)


def test_the_labels_of_all_domains_are_numbered_alike(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    write(root, truth | {"real": {path: 2 - label for path, label in truth["real"].items()}})
    with pytest.raises(InputError, match=r"real_list\.txt.*one label a folder in all lists"):
        open_domains(str(root))


def test_two_kinds_of_list_for_one_domain_are_refused(drawn: tuple[Path, Truth]) -> None:
    root, truth = drawn
    write(root, truth)
    write(root, {"real": truth["real"]}, "train")
    with pytest.raises(InputError, match=r"real_list\.txt: got real_train\.txt beside it"):
        open_domains(str(root))


def test_a_list_far_from_its_images_is_refused(drawn: tuple[Path, Truth], tmp_path: Path) -> None:
    _, truth = drawn
    write(tmp_path / "a" / "b", truth)
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "real_list.txt"):
        with pytest.raises(InputError, match="neither in .*a/b nor in .*a, expected"):
            open_domains(str(path))
