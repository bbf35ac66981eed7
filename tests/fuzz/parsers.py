"""The parsers of files that others may have made: a good input of each, and how it is read.

Run as a script it damages each parser's files, reads them with little memory, and prints as JSON
what did not end in a result or in an error of `letheon.errors`.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from letheon.engine.checkpoints.model_file import load_model, save_model
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.errors import LetheonError
from letheon.eval import comparison
from letheon.eval.inference import cache
from letheon.eval.inference.column_digests import digest_columns
from letheon.eval.inference.networks import Shelf
from letheon.folders import new_folder
from letheon.launch import joblist
from letheon.loaders.datasets.image_set import ArrayImages, Data, ImageSet
from letheon.loaders.decode.encoded_image import from_file
from letheon.loaders.decode.pillow import FORMATS, decode
from letheon.loaders.forget_request import resolve
from letheon.loaders.formats import parts
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.beton import BetonImages, manifest_path
from letheon.loaders.formats.beton_set import write_betons
from letheon.loaders.formats.beton_writer import write_beton
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_data, open_source
from letheon.loaders.preset import Preset
from letheon.loaders.views import order_classes
from letheon.methods.saliency import load_masks, save_masks
from letheon.sealed import seal
from tests.fuzz import records
from tests.fuzz.image_sets import (
    encoded,
    make_arrow,
    make_cifar,
    make_cub,
    make_labels,
    make_lists,
    make_parquet,
    make_pickles,
    make_shards,
    make_tar,
    make_zip,
    noise,
)
from tests.fuzz.mutate import mutate, mutate_json
from tests.patience import PATIENCE

MEMORY = 2**31
"""Bytes a parser may take beyond what the imported packages have."""
SECONDS = 20
"""Seconds of processor time, which other processes do not add to, that a parser may take."""
SAFE = tuple(map(str, (Path("/dev/null"), Path("/dev/tty"))))


class Parser(NamedTuple):
    """One parser: `make` writes good files into a folder, `read` reads what became of them."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


def read_all(found: Data | dict[str, ImageSet]) -> None:
    """Read labels, classes and every image."""
    sets = {"train": found.train, "test": found.test} if isinstance(found, Data) else found
    for images in sets.values():
        assert len(images.labels) == len(images) and len(images.classes)
        for i in range(len(images)):
            try:
                assert images.read(i).ndim == 3
            except LetheonError:
                continue


def open_all(path: Path) -> None:
    """Open a set and read all of it."""
    read_all(open_source(str(path)))


def open_pair(path: Path) -> None:
    """Open a set as train and test, which lists may divide, and read all of it."""
    read_all(open_data(str(path)))


def data() -> Data:
    """Eight images of four classes in memory."""
    pixels = np.stack([noise(k) for k in range(8)])
    images = ArrayImages("small", pixels, np.arange(8) % 4, list("abcd"))
    return Data(images, images, tuple((name,) for name in "abcd"))


def photographs(folder: Path) -> ImageSet:
    """Four JPEGs of two classes on disk."""
    for k in range(4):
        place = folder / "photos" / "ab"[k % 2] / f"{k}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded("JPEG", k))
    found = open_source(str(folder / "photos"))
    assert isinstance(found, dict)
    return next(iter(found.values()))


def make_beton(folder: Path) -> None:
    write_beton(photographs(folder), folder / "set.beton", Encoding(raw=0.5, page=2**21))
    shutil.rmtree(folder / "photos")


def make_plain_beton(folder: Path) -> None:
    make_beton(folder)
    manifest_path(folder / "set.beton").unlink()


def read_beton(folder: Path) -> None:
    images = BetonImages(folder / "set.beton")
    assert isinstance(images.digest, str) and isinstance(images.source(0), str)
    images.will_need(np.arange(len(images)))
    read_all({"set": images})


def make_ffcv(folder: Path) -> None:
    images = photographs(folder)
    for split in ("train_a", "val_a"):
        place = folder / "set" / f"{split}.ffcv"
        place.parent.mkdir(exist_ok=True)
        write_beton(images, place, Encoding(page=2**21))
        for beside in set(place.parent.glob(f"{place.name}.*")):
            beside.unlink()
    shutil.rmtree(folder / "photos")


def make_betons(folder: Path) -> None:
    write_betons(data(), folder / "set", Encoding(raw=0.5, page=2**21))


def make_arrays(folder: Path) -> None:
    prepare(data(), folder / "set", 8)


def make_list_form(folder: Path) -> None:
    prepare({"set": photographs(folder)}, folder / "set")


def make_parts(folder: Path) -> None:
    prepare(data(), folder / "set", 8)
    (folder / "set").rename(new_folder(folder / "set"))
    growing = new_folder(folder / "set") / "train"
    page = json.loads((growing.parent / "set.json").read_text())
    about = {key: value for key, value in page.items() if key != "parts"}
    (growing.parent / parts.ABOUT).write_bytes(seal(about))
    images = data().train
    about = {"format": page["format"], "source": images.digest, "size": 8}
    made = parts.Parts(growing / "parts", about, len(images))

    def fill(file: Any) -> dict[str, Any]:
        file.write(images.read_many(np.arange(8)).tobytes())  # type: ignore[union-attr]
        return {"rows": [(i,) for i in range(8)], "bad": []}

    made.write(0, fill)


def read_parts(folder: Path) -> None:
    prepare(data(), folder / "set", 8)
    found = open_source(str(folder / "set"))
    assert isinstance(found, Data)
    assert np.array_equal(found.train.read_many(np.arange(8)), data().train.read_many(np.arange(8)))


def make_run(folder: Path) -> None:
    model = build("small", 4, 1, Preset(size=8, resize_to=8))
    model.class_names = tuple("abcd")
    digest = save_model(folder, model)
    files = {
        "run.json": {"weights": digest, "seconds": {"prepare": 1.0, "train": 2.0, "together": 1},
                     "method": "finetune", "kind": "unlearning"},
        "settings.json": {"seed": 1, "lr": 0.1},
        "request.json": {"text": "class:1", "classes": [1], "samples": None, "notes": [],
                         "digest": resolve("class:1", data()).digest},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def read_run(folder: Path) -> None:
    comparison._entry(folder, "x", "", comparison.CheckpointOptions(), Shelf())
    comparison._request([folder], None, data(), 1)


def make_weights(folder: Path) -> None:
    save_model(folder / "weights.safetensors", build("small", 2, 1, Preset(size=8, resize_to=8)))


def read_weights(folder: Path) -> None:
    (file,) = (path for path in folder.iterdir() if path.suffix != ".json")
    load_model(folder if (folder / "config.json").is_file() else file, tell=lambda line: None)


def make_torch(**options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        state = build("small", 2, 1, Preset(size=8, resize_to=8)).net.state_dict()
        torch.save({"state_dict": state, "epoch": 3}, folder / "model.pth", **options)

    return make


def make_hub(folder: Path) -> None:
    from safetensors.torch import save_file

    state = build("small", 2, 1, Preset(size=8, resize_to=8)).net.state_dict()
    save_file(dict(state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "small", "num_classes": 2}))
    content = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def make_mask(folder: Path) -> None:
    masks = {d: {"a": torch.rand(9, 3) < d, "b": torch.rand(5) < d} for d in (0.1, 0.5)}
    save_masks(folder / "mask", masks, {"weights": "w", "request": "r"})


def read_mask(folder: Path) -> None:
    found = load_masks(folder / "mask", 0.5, {"weights": "w", "request": "r"}, ["a", "b"])
    assert found["a"].shape == (9, 3) and found["b"].dtype == torch.bool


def make_outputs(folder: Path) -> None:
    np.save(folder / "index.npy", np.arange(9))
    np.save(folder / "labels.npy", np.arange(9))
    content = {"samples": 9, "digests": digest_columns(folder, ["index.npy", "labels.npy"])}
    (folder / "facts.json").write_bytes(seal(content))


def read_outputs(folder: Path) -> None:
    cache._verify(folder, {"samples": 9}, Ranks())


def read_request(folder: Path) -> None:
    text = ""
    if (folder / "list.txt").is_file():
        text = (folder / "list.txt").read_bytes().decode("utf-8", "replace")
    for form in (f"samples:{folder / 'list.txt'}", f"file:{folder / 'list.txt'}", text[:80]):
        try:
            resolve(form, data(), 1)
        except LetheonError:
            continue
    joblist.split(text.split(), ["finetune", "salun"], ["--flag"])


def read_image(folder: Path) -> None:
    for file in folder.iterdir():
        content = file.read_bytes()
        try:
            assert decode(content, "x").ndim == 3
            one = from_file(content, "x")
            one.crop((0, 0, min(4, one.height), min(4, one.width)))
        except LetheonError:
            continue


def write_file(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


TINY_LABELS = "v0.png\ta\t0\t0\nv1.png\tb\t0\t0\n"
CSV_LABELS = "ImageId,label\nv0,a 1 2\nv1,b 1 2\n"
REQUEST = b"class:3,b # c\n1\n2\nsalun --lr 0.1,0.2 + finetune\n"


def read_order(folder: Path) -> None:
    order_classes(data(), str(folder / "classes.txt"))


def open_within(name: str) -> Callable[[Path], None]:
    return lambda folder: open_all(folder / name)


PARSERS: dict[str, Parser] = {
    "zip": Parser(make_zip, open_within("set.zip")),
    "tar": Parser(make_tar("w"), open_within("set.tar")),
    "tar.gz": Parser(make_tar("w:gz"), open_within("set.tar")),
    "tar.xz": Parser(make_tar("w:xz"), open_within("set.tar")),
    "list files": Parser(make_lists, open_all),
    "Tiny-ImageNet labels": Parser(make_labels(TINY_LABELS, "val_annotations.txt"), open_all),
    "CSV labels": Parser(make_labels(CSV_LABELS, "solution.csv"), open_all),
    "CUB lists": Parser(make_cub, open_pair),
    "CIFAR binaries": Parser(make_cifar, open_all),
    "CIFAR pickles": Parser(make_pickles, open_all),
    "forget requests and jobs": Parser(write_file("list.txt", REQUEST), read_request),
    "class order": Parser(write_file("classes.txt", b"a\nb\nc\nd it\n"), read_order),
    ".beton": Parser(make_beton, read_beton),
    ".beton of others": Parser(make_plain_beton, read_beton),
    "ffcv folder": Parser(make_ffcv, open_within("set")),
    "shards": Parser(make_shards("cls", ["0", "1"], "cat\ndog\n"), open_all),
    "shards of JSON": Parser(make_shards("json", ['{"label": 0}', '{"label": 1}']), open_all),
    "betons": Parser(make_betons, open_within("set")),
    "arrays": Parser(make_arrays, open_within("set")),
    "prepared list": Parser(make_list_form, open_within("set")),
    "parts of a stopped prepare": Parser(make_parts, read_parts),
    "run folder": Parser(make_run, read_run),
    "record of a run": Parser(records.make_record, records.read_record),
    "saved states": Parser(records.make_states, records.read_states),
    "settings": Parser(records.make_settings, records.read_settings),
    "recipe": Parser(write_file("recipe.toml", records.RECIPE), records.read_recipe_file),
    "job file": Parser(write_file("job.toml", records.JOB), records.read_job_file),
    "safetensors": Parser(make_weights, read_weights),
    "torch file": Parser(make_torch(), read_weights),
    "old torch file": Parser(make_torch(_use_new_zipfile_serialization=False), read_weights),
    "Hugging Face folder": Parser(make_hub, read_weights),
    "masks": Parser(make_mask, read_mask),
    "stored outputs": Parser(make_outputs, read_outputs),
    **{f"{form} image": Parser(write_file("x", encoded(form)), read_image) for form in FORMATS},
}

if importlib.util.find_spec("pyarrow") is not None:
    PARSERS["Arrow"] = Parser(make_arrow, open_within("set"))
    PARSERS["parquet"] = Parser(make_parquet, open_all)


def files_of(folder: Path) -> list[Path]:
    """The files that may be damaged, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Watch:
    """An audit hook that notes what a parser must not do: write elsewhere, start programs."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.crimes: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Look at one event."""
        if self.allowed is None:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
        ):
            self.crimes.append(f"{event} {args}")
        places: list[Any] = []
        if event == "open" and isinstance(args[2], int):
            places = [args[0]] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"):
            places = [one for one in args[:2] if isinstance(one, str | bytes | os.PathLike)]
            if isinstance(args[-1], int) and args[-1] >= 0:  # relative to an open folder
                above = os.readlink(f"/proc/self/fd/{args[-1]}")
                places = [os.path.join(above, os.fsdecode(one)) for one in places]
        for place in places:
            path = os.path.realpath(os.fsdecode(place)) if not isinstance(place, int) else ""
            if path and path not in SAFE and not path.startswith(str(self.allowed)):
                self.crimes.append(f"{event} {path}")


def fuzz(name: str, count: int, seed: int, folder: Path, watch: Watch) -> Iterator[dict[str, Any]]:
    """Read `count` damaged inputs of a parser; yield each that ended as none may."""
    parser = PARSERS[name]
    good, now = folder / "good", folder / "now"
    for place in (good, now):
        shutil.rmtree(place, ignore_errors=True)
    good.mkdir(parents=True)
    parser.make(good)
    base = {file.relative_to(good): file.read_bytes() for file in files_of(good)}
    shutil.copytree(good, now)
    parser.read(now)  # the good one is read
    for number in range(count):
        rng = random.Random(f"{seed} {name} {number}")
        if {file.relative_to(now) for file in files_of(now)} != set(base):
            shutil.rmtree(now)
            shutil.copytree(good, now)
        victims = rng.sample(sorted(base), min(len(base), rng.choice((1, 1, 1, 2))))
        for victim in victims:
            is_json = (
                victim.suffix == ".json" and rng.random() < 0.6 and parser.read is not read_parts
            )
            (now / victim).write_bytes((mutate_json if is_json else mutate)(base[victim], rng))
        problem = ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(PATIENCE)
        watch.allowed = folder.resolve()
        try:
            parser.read(now)
        except LetheonError as error:
            if "\n" in str(error):
                problem = f"several lines: {error}"
        except BaseException:
            problem = traceback.format_exc()
        watch.allowed = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if watch.crimes:
            problem += "\n".join(watch.crimes)
            watch.crimes.clear()
        if problem:
            yield {
                "parser": name,
                "number": number,
                "victims": [*map(str, victims)],
                "problem": problem,
            }
        for victim in victims:
            if (now / victim).parent.is_dir():
                (now / victim).write_bytes(base[victim])


def _late(number: int, frame: object) -> None:
    raise TimeoutError(f"over {SECONDS} s of computing, or {PATIENCE} s of waiting")


def main(count: int, seed: int, folder: Path, names: list[str]) -> None:
    """Fuzz the parsers `names` (all, if there are none) and print what went wrong."""
    faulthandler.enable()
    # Before anything is watched: it brings torch's compiler, which makes its cache folder.
    importlib.import_module("torchvision.models")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    signal.signal(signal.SIGPROF, _late)
    watch = Watch()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for name in names or PARSERS:
        for problem in fuzz(name, count, seed, folder / "work", watch):
            print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
