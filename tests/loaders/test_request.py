"""Forget requests: what they resolve to, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from letheon.errors import InputError
from letheon.loaders.datasets.image_set import ArrayImages, Data
from letheon.loaders.forget_request import Request, forget_mask, resolve

# 100 of the 1000 ImageNet classes, as published; the fingerprints were computed independently.
RANDOM100 = (
    "10,12,20,35,63,68,75,81,84,96,110,116,123,124,139,141,151,152,173,179,183,186,192,214,234,239,"
    "256,264,276,277,286,287,292,304,329,330,341,349,351,373,385,407,408,412,416,430,437,453,454,"
    "457,460,487,489,517,529,532,535,540,543,545,546,547,553,555,562,567,576,582,592,593,600,631,"
    "638,644,657,661,715,718,771,788,790,794,795,803,810,861,867,871,876,883,897,899,915,918,919,"
    "960,963,969,990,997"
)


def data_of(names: list[tuple[str, ...]], per_class: int = 2) -> Data:
    labels = np.repeat(np.arange(len(names)), per_class)
    images = ArrayImages(
        "x", np.zeros((len(labels), 1, 1, 3), np.uint8), labels, [name[0] for name in names]
    )
    return Data(images, images, tuple(names))


TEN = data_of(
    [
        ("n01440764", "tench"),
        ("n02102040", "English springer"),
        ("n02979186", "cassette player"),
        ("n03000684", "crane"),
        ("n03028079", "church", "church building"),
        ("n03394916", "crane"),
    ]
)
THOUSAND = data_of([(str(i),) for i in range(1000)])


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("class:3", (3,)),
        ("class: 4, 0 ", (0, 4)),
        ("class:tench", (0,)),
        ("class:ENGLISH_springer,cassette-player", (1, 2)),
        ("class:n03028079,church building,4", (4,)),
        ("class:id=5", (5,)),
        ("class:name=tench", (0,)),
    ],
)
def test_classes_by_id_name_and_wordnet_id(text: str, classes: tuple[int, ...]) -> None:
    request = resolve(text, TEN)
    assert request.classes == classes and request.samples is None and request.text == text
    assert request.digest == hashlib.sha256(",".join(map(str, classes)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class:tenhc", "unknown class 'tenhc'.*did you mean tench"),
        ("class:crane", "write one of id=3, id=5"),
        ("class:6", r"got class 6 .*expected ids in 0\.\.5.*another dataset"),
        ("class:-1", "unknown class"),
        ("class:", "expected one of"),
        ("class:,", "names no class"),
        ("tench", "expected one of"),
        ("random:0", "names no class"),
        ("random:6", "all 6 classes"),
        ("random:7", "at most 6"),
        ("random:x", "expected one of"),
        ("class:0,1,2,3,4,5", "all 6 classes"),
        ("top:2", "without a ranking"),
        ("file:/no/such/list.txt", "cannot be read"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        resolve(text, TEN, seed=1)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_another_classs_id_must_be_told_apart() -> None:
    data = data_of([("1",), ("10",), ("2",)])
    with pytest.raises(InputError, match="id=0, id=1"):
        resolve("class:1", data)
    assert resolve("class:id=1", data).classes == (1,)
    assert resolve("class:name=1", data).classes == (0,)
    assert resolve("class:10", data).classes == (1,)


def test_list_files_in_any_shape(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeff# classes\r\n4\r\n\r\nn01440764  # tench\r\ntench\r\n0\r\n".encode())
    request = resolve(f"file:{file}", TEN)
    assert request.classes == (0, 4) and request.notes == ("id 0 stood 3 times; counted once",)
    file.write_text("709\n3\n709")
    request = resolve(f"file:{file}", THOUSAND)
    assert request.classes == (3, 709) and request.notes == ("id 709 stood twice; counted once",)
    with pytest.raises(InputError, match="another dataset"):
        resolve(f"file:{file}", TEN)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        resolve(f"file:{file}", TEN)
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="names no class"):
        resolve(f"file:{file}", TEN)


def test_published_list_has_its_fingerprint(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(RANDOM100.split(","))
    (tmp_path / "random100.txt").write_text("\n".join(shuffled))
    request = resolve(f"file:{tmp_path / 'random100.txt'}", THOUSAND)
    assert len(request.classes) == 100 and sum(request.classes) == 47224
    assert request.digest.startswith("139d2583d80a791a")


def test_random_classes_depend_on_the_seed_alone_and_have_images() -> None:
    first, again, other = (resolve("random:100", THOUSAND, seed).classes for seed in (2, 2, 3))
    assert first == again != other and len(set(first)) == 100
    sparse = Data(
        ArrayImages(
            "x", np.zeros((3, 1, 1, 3), np.uint8), np.array([7, 500, 900]), THOUSAND.classes
        ),
        THOUSAND.test,
        THOUSAND.names,
    )
    assert set(resolve("random:2", sparse, 0).classes) < {7, 500, 900}
    with pytest.raises(InputError, match="without a seed"):
        resolve("random:2", TEN)


def test_a_comma_inside_a_name_divides_nothing() -> None:
    data = data_of([("tench",), ("table, round",), ("table",), ("crane",)])
    assert resolve("class:Table, round,tench,table", data).classes == (0, 1, 2)
    assert resolve("class:name=table,round,0", data).classes == (0, 1)


def test_a_comma_that_may_divide_or_not_is_refused() -> None:
    data = data_of([("a",), ("b",), ("a, b",), ("c",)])
    with pytest.raises(InputError, match=r"got 'a, b' in .*, which names one class"):
        resolve("class:a,b", data)
    assert resolve("class:a,c", data).classes == (0, 3)
    many = resolve("class:" + ",".join(map(str, range(999))), THOUSAND)  # at once
    assert len(many.classes) == 999


def test_top_takes_the_nearest() -> None:
    assert resolve("top:2", TEN, ranking=[5, 5, 1, 0]).classes == (1, 5)
    with pytest.raises(InputError, match="at most 1"):
        resolve("top:2", TEN, ranking=[5])


def test_drawn_and_ranked_samples() -> None:
    """A share of a set by the seed alone; the first of a ranking that is handed in."""
    count = len(TEN.train)
    first, again, other = (resolve("random-samples:5", TEN, s).samples for s in (2, 2, 3))
    assert first == again != other and len(set(first or ())) == 5
    share = resolve("random-samples:50%", TEN, 1).samples
    assert share is not None and len(share) == round(count / 2)
    ranking = list(range(count))[::-1]
    assert resolve("hardest:2", TEN, ranking=ranking).samples == (count - 2, count - 1)
    assert resolve("easiest:2,confidence", TEN, ranking=ranking[::-1]).samples == (0, 1)
    for text, words in {
        "random-samples:0": "a number of 1 to", "random-samples:100%": "a number of 1 to",
        "random-samples:ten": "such as 10%", "random-samples:": "such as 10%",
        "hardest:2,margin": "loss or confidence", "hardest:2": "without a ranking",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words):
            resolve(text, TEN, 1)
    with pytest.raises(InputError, match="without a seed"):
        resolve("random-samples:2", TEN)


def test_samples(tmp_path: Path) -> None:
    file = tmp_path / "samples.txt"
    file.write_text("7\n2\n2\n")
    request = resolve(f"samples:{file}", TEN)
    assert request.samples == (2, 7) and request.classes == () and len(request.notes) == 1
    assert np.flatnonzero(forget_mask(request, TEN.train.labels)).tolist() == [2, 7]
    for text, words in [("12", "another dataset"), ("tench", "sample number"), ("", "no sample")]:
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            resolve(f"samples:{file}", TEN)
    file.write_text("\n".join(map(str, range(12))))
    with pytest.raises(InputError, match="every sample"):
        resolve(f"samples:{file}", TEN)


def test_forget_mask_of_classes() -> None:
    request = Request("class:1,3", (1, 3), None, "")
    mask = forget_mask(request, np.array([0, 1, 2, 3, 1]))
    assert mask.dtype == np.bool_ and mask.tolist() == [False, True, False, True, True]
