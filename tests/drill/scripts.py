"""The jobs of the drill: command lines on tiny sets, and the digests of what they leave."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from letheon.launch import evaluate, forget, mask, prepare, train
from letheon.launch.command import parse
from letheon.launch.records import verify
from letheon.loaders.formats import parts
from tests.drill.processes import End, run_job
from tests.engine.resume_tools import lines

SCRIPTS = {
    "train": train, "forget": forget, "evaluate": evaluate, "mask": mask, "prepare": prepare,
    "verify": verify,
}  # fmt: skip
BESIDE = "<beside>"
"""Stands for the folder that the output lies in."""
SMALL = ("--epochs", "2", "--batch-size", "16")
CLASSES, IMAGES, SIDE = 3, 16, 12  # of the folder of PNG files, a class

parts.CHUNK = 16  # so that a tiny set has several parts


def start_of(script: str) -> Callable[[], None]:
    """What a script's console command calls."""
    return SCRIPTS[script].start  # type: ignore[no-any-return,attr-defined]


@dataclass(frozen=True)
class Job:
    """A command line that makes `out` in a folder of its own, and what is compared of it."""

    name: str
    script: str
    args: tuple[str, ...]
    out: str
    digest: Callable[[Path], str]
    marks: tuple[str, ...] = ("",)
    """Files in `out` that say that it is whole; "": `out` itself does."""
    world: int = 1
    saves: bool = False
    """Whether states are saved on the way."""
    agent: bool = True
    """Whether the launcher keeps the store of several ranks; else rank 0."""

    def command(self, folder: Path) -> tuple[str, ...]:
        """The words after the script's name; the methods come after --out."""
        place = ("--out", str(folder / self.out))
        args = [word.replace(BESIDE, str(folder)) for word in self.args]
        if "//" not in args:
            return (*args, *place)
        at = args.index("//")
        return (*args[:at], *place, *args[at + 1 :])

    def run(self, folder: Path, **faults: Any) -> End:
        """Run it in `folder`; as `run_job`."""
        folder.mkdir(parents=True, exist_ok=True)
        args = self.command(folder)
        return run_job(self.script, args, folder, world=self.world, agent=self.agent, **faults)

    def is_whole(self, folder: Path) -> bool:
        """Whether a reader would take what is there for finished."""
        return all((folder / self.out / mark).exists() for mark in self.marks)


def digest_of(value: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_digest(folder: Path) -> str:
    """Weights, reads, request and metrics lines without times of a run folder."""
    log = [
        {name: value for name, value in line.items() if name != "together"}  # of its clock
        for line in lines(folder)
        if line["kind"] != "note"  # of free memory
    ]
    files = ("weights.safetensors", "reads.safetensors")
    request = folder / "request.json"
    asked = json.loads(request.read_text()) if request.exists() else None
    return digest_of([log, asked, *(file_digest(folder / name) for name in files)])


def runs_digest(folder: Path) -> str:
    """The same of every run in a folder."""
    return digest_of({one.name: run_digest(one) for one in sorted(folder.iterdir())})


def tree_digest(folder: Path) -> str:
    """Every file of a folder by its name; or the file itself."""
    if folder.is_file():
        return file_digest(folder)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return digest_of({str(path.relative_to(folder)): file_digest(path) for path in files})


def table_digest(folder: Path) -> str:
    """The rows of an evaluation, but for the clock of measuring."""
    return digest_of(json.loads((folder / "metrics.json").read_text()))


def make_images(folder: Path) -> None:
    """Draw noise whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", IMAGES // 2)):
        for label in range(CLASSES):
            place = folder / split / "abc"[label]
            place.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(60 * label, 60 * label + 120, (SIDE, SIDE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{k}.png")


class Base:
    """What the jobs start from, made once: an original, a retrained and a forgetful run, sets."""

    def __init__(self, folder: Path) -> None:
        """Make all of it in `folder`."""
        self.folder = folder
        make_images(folder / "images")
        self.data = ("--data", str(folder / "images"), "--device", "cpu", "--workers", "0")
        self.training = (*self.data, "--model", "small", "--batch-size", "16")
        for script in ("train", "mask", "evaluate", "prepare"):  # the parser remembers
            with suppress(SystemExit), redirect_stdout(io.StringIO()):
                parse(SCRIPTS[script].Settings, ["--help"])  # type: ignore[attr-defined]
        self._make("train", "original", *self.training, "--epochs", "3", "--lr", "0.1")
        forgetting = ("--weights", str(folder / "original"), *self.data, "--forget", "class:2")
        self.forgetting = (*forgetting, "--accept-chance")
        self._make("forget", "retrained", *self.forgetting, "//", "retrain", *SMALL)
        self._make("forget", "finetuned", *self.forgetting, "//", "finetune", *SMALL)
        self._make("mask", "mask.safetensors", *self.forgetting[:-1])
        for form in ("beton", "arrays", "list"):
            self._make("prepare", f"set-{form}", *self.preparing(form))
        self._make("evaluate", "table", *self.evaluating(self.folder / "finetuned"), "--cache",
                   str(folder / "outputs"))  # fmt: skip

    def _make(self, script: str, out: str, *args: str) -> None:
        end = Job(out, script, args, out, tree_digest).run(self.folder)
        if end.code:
            raise SystemExit(f"the drill could not make {out}:\n{end.text}")

    def preparing(self, form: str) -> tuple[str, ...]:
        """Arguments of `prepare`."""
        size = ("--size", "12") if form == "arrays" else ()
        page = ("--page", str(2**21)) if form == "beton" else ()
        source = ("--source", str(self.folder / "images"))
        return (*source, "--form", form, *size, *page, "--workers", "0")

    def evaluating(self, run: Path) -> tuple[str, ...]:
        """Arguments of `evaluate`."""
        original, retrained = (str(self.folder / name) for name in ("original", "retrained"))
        models = ("--original", original, "--retrained", retrained, "--runs", str(run))
        return (*self.data, "--accept-chance", *models)

    def jobs(self) -> dict[str, Job]:
        """Every job by its name."""
        training = (*self.training, "--lr", "0.05", "--save-every")
        salun = ("salun", "--density", "0.5", "random-label", *SMALL)
        pair = ("finetune", *SMALL, "+", "spkd", *SMALL, "--lr", "0.001")
        masking = (*self.forgetting[:-1], "--batch-size", "4", "--save-every", "1step")
        stored = (
            *self.evaluating(self.folder / "finetuned"), "--batch-size", "8", "--cache",
            f"{BESIDE}/outputs", "--save-every", "1step",
        )  # fmt: skip
        made = [
            Job("train", "train", (*training, "1step", "--epochs", "3"), "run", run_digest,
                ("run.json",), saves=True),
            Job("forget", "forget", (*self.forgetting, "--save-every", "2steps", "//", *salun),
                "run", run_digest, ("run.json",), saves=True),
            Job("several runs in one call", "forget",
                (*self.forgetting, "--save-every", "2steps", "//", *pair), "all", runs_digest,
                ("finetune/run.json", "spkd/run.json")),
            Job("train on two ranks", "train", (*training, "1step", "--epochs", "2"), "run",
                run_digest, ("run.json",), world=2, saves=True),
            Job("train split over two ranks", "train",
                (*training, "1step", "--epochs", "2", "--reduce", "shard"), "run", run_digest,
                ("run.json",), world=2, saves=True),
            Job("mask", "mask", masking, "mask.safetensors", tree_digest),
            Job("mask on three ranks", "mask", masking, "mask.safetensors", tree_digest, world=3),
            Job("prepare beton", "prepare", self.preparing("beton"), "set", tree_digest),
            Job("prepare arrays", "prepare", self.preparing("arrays"), "set", tree_digest),
            Job("evaluate", "evaluate", self.evaluating(self.folder / "finetuned"), "table",
                table_digest, ("evaluation.json",)),
            Job("evaluate, stored", "evaluate", stored, "table", table_digest,
                ("evaluation.json",)),
            Job("evaluate on two ranks", "evaluate", stored, "table", table_digest,
                ("evaluation.json",), world=2),
            Job("evaluate on three ranks", "evaluate", self.evaluating(self.folder / "finetuned"),
                "table", table_digest, ("evaluation.json",), world=3),
            Job("forget the hardest", "forget",
                (*self.forgetting[:-3], "--forget", "hardest:9", "--accept-chance",
                 "--save-every", "1step", "//", "influence", "--samples", "16"),
                "run", run_digest, ("run.json",)),
        ]  # fmt: skip
        return {job.name: job for job in made}


def last_line(text: str) -> str:
    """The line of an error, or the last one."""
    found: Sequence[str] = [line for line in text.splitlines() if line and "events " not in line]
    errors = [line for line in found if line.startswith(("error:", "stopped:"))]
    return (errors or found or [""])[-1][:300]
