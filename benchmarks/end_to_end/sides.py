"""The sides of the end-to-end benchmark as processes with clocks; the models they start from."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from baseline.training import Name
from harness import SECONDS, SPAWNED

from letheon.engine.checkpoints.model_file import save_model
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.models.classifier import build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.loaders.batch import Reader
from letheon.loaders.factory import make_loader
from letheon.loaders.open import open_data
from letheon.loaders.preset import Preset
from letheon.methods.retrain import Retrain
from letheon.methods.train import Train
from letheon.spans import OUTSIDE

BENCHMARKS = Path(__file__).parents[1]
METHODS: tuple[Name, ...] = ("ft", "ga", "salun", "spkd")
TOGETHER = "together"
OURS = {
    "ft": ["finetune"],
    "ga": ["grad-ascent"],
    "salun": ["salun", "--density", "0.5", "random-label"],
    "spkd": ["spkd"],
}


@dataclass(frozen=True)
class Setting:
    """One network, its images and how it is made to forget."""

    name: str
    model: str
    preset: Preset
    counts: tuple[int, int, int]  # images of each class in train, val, downstream
    epochs: int
    batch_size: int
    rates: dict[str, float]  # method -> learning rate
    prepared: int | None  # ours decodes once to this size; None: reads the files each epoch
    forget: tuple[int, ...] = (0, 3, 7)
    once: tuple[str, ...] = ()  # steps that only the first repeat runs, to save time


@dataclass(frozen=True)
class Spent:
    """What one process took, in seconds."""

    wall: float
    cpu: float  # of the process and its children, user and system
    parts: dict[str, float]  # these add up to wall


def process(command: Sequence[str | Path], folder: Path) -> Spent:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed; with the last lines of what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "spans.json"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {
        **os.environ,
        SPAWNED: str(time.time()),
        SECONDS: str(result),
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    parts = json.loads(result.read_text())
    parts[OUTSIDE] += wall - sum(parts.values())  # closing the process
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Spent(wall, cpu, parts)


HARDLY_TRAINED = ("--accept-chance",)
"""The models are those of `starting_models`, shown larger images than they were trained on."""


@dataclass(frozen=True)
class Side:
    """One way to do the job, on the images and models in `root`."""

    name: str
    setting: Setting
    root: Path
    device: str
    dtype: str = "fp32"
    ranks: int = 1

    @property
    def place(self) -> Path:
        """Where its results lie."""
        return self.root / self.name.replace(" ", "-")

    @property
    def data(self) -> Path:
        """Where it reads the images."""
        ours = self.name != "baseline" and self.setting.prepared is not None
        return self.place / "prepared" if ours else self.root / "images"

    def prepare(self) -> Spent | None:
        """Decode the images once, where this side does."""
        if self.data.name == "images":
            return None
        source = self.root / "images"
        words: list[object] = ["--source", source, "--out", self.data, "--form", "arrays"]
        words += ["--size", self.setting.prepared, "--workers", "2"]
        return self._ours("prepare", words, ranks=1)

    def forget(self, method: str) -> Spent:
        """Train one method; weights.safetensors is in `place/method` afterwards."""
        weights, out = self.root / "original.safetensors", self.place / method
        if self.name != "baseline":
            return self._ours("forget", [*self._job(out), *self._method(method)], self.ranks)
        words = ["--weights", weights, "--method", method, "--out", out, *self._recipe(method)]
        return self._baseline("forget", words)

    def together(self, methods: Sequence[str] = METHODS) -> Spent | None:
        """All methods by one command, which ours feeds from one pass over the images."""
        if self.name == "baseline":
            return None
        words = self._job(self.place / TOGETHER)
        for method in methods:
            words += ["+", *self._method(method)] if method != methods[0] else self._method(method)
        return self._ours("forget", words, self.ranks)

    def _job(self, out: Path) -> list[object]:
        request = "class:" + ",".join(map(str, self.setting.forget))
        weights = self.root / "original.safetensors"
        words = ["--data", self.data, "--weights", weights, "--forget", request, "--out", out]
        return [*words, *HARDLY_TRAINED, "--device", self.device, "--dtype", self.dtype]

    def _method(self, method: str) -> list[object]:
        return [*OURS[method], *self._recipe(method)]

    def _recipe(self, method: str) -> list[object]:
        setting = self.setting
        recipe = ["--epochs", setting.epochs, "--lr", setting.rates[method]]
        return [*recipe, "--batch-size", setting.batch_size]

    def evaluate(self, methods: Sequence[str] = METHODS) -> Spent:
        """Measure original, retrained and the results of the methods; `rows` has them."""
        domains, out = self.root / "images" / "downstream", self.place / "table"
        batch = ["--batch-size", self.setting.batch_size]
        first = [self.root / f"{name}.safetensors" for name in ("original", "retrained")]
        runs = [self.place / method for method in methods]
        if self.name != "baseline":
            words = ["--data", self.data, "--original", first[0], "--retrained", first[1]]
            words += ["--runs", *runs, "--downstream", domains, "--out", out]
            words += ["--cka", "legacy", "--split", "legacy", *HARDLY_TRAINED]
            request = "class:" + ",".join(map(str, self.setting.forget))
            words += ["--device", self.device, "--dtype", self.dtype, "--forget", request]
            return self._ours("evaluate", [*words, *batch], self.ranks)
        weights = [*first, *(run / "weights.safetensors" for run in runs)]
        words = ["--models", *weights, "--retrained", weights[1], "--domains", domains]
        return self._baseline("evaluate", [*words, "--out", out, *batch])

    def rows(self) -> dict[str, dict[str, float]]:
        """The final table: model -> metric -> value."""
        table = json.loads((self.place / "table" / "metrics.json").read_text())
        return {row["name"]: row for row in table["rows"]}

    def _baseline(self, command: str, words: Sequence[object]) -> Spent:
        forget = ["--forget", *self.setting.forget, "--device", self.device]
        words = ["--data", self.data, *forget, *words]
        script = [sys.executable, "-m", "baseline", command]
        return process([*script, *map(str, words)], self.place)

    def _ours(self, command: str, words: Sequence[object], ranks: int) -> Spent:
        python: list[str | Path] = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return process([*python, "-m", "end_to_end.ours", command, *map(str, words)], self.place)


def starting_models(setting: Setting, root: Path) -> None:
    """Train original and retrained briefly, at 32 pixels: what they know is not the point."""
    data = open_data(str(root / "images"))
    small = replace(setting.preset, size=32, resize_to=32)
    recipe = Recipe(epochs=8, lr=0.01, batch_size=20, schedule="cosine")
    forget = np.isin(data.train.labels, setting.forget)
    for seed, (name, method) in enumerate(
        {"original": Train(recipe), "retrained": Retrain(recipe)}.items()
    ):
        model = build(setting.model, len(data.classes), seed, setting.preset)
        model.class_names = data.classes
        loader = make_loader(
            "auto", data.train, forget, small, recipe.batch_size, Reader(seed, workers=2)
        )
        run = Run(
            model=model, loader=loader, recipe=recipe, ranks=Ranks(), seed=seed,
            forget=torch.from_numpy(forget), forget_classes=setting.forget,
            precision=Precision("fp32"),
        )  # fmt: skip
        run_method(method, run)
        save_model(root / f"{name}.safetensors", model)
