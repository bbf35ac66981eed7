"""Share of a run's wall clock that saving its state at every epoch takes, for ResNet-50.

    cd benchmarks && python -m saving.bench_save --out results/save_cpu.csv

One run of several epochs, saved at the end of each but the last: `blocked` is the time for which
the steps waited, for the copy to the host and the start of the write, over the wall clock of the
run; `disk` is how long the write of a state took, in its thread, in seconds. Exit code 1: the steps
waited for more than two hundredths of it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from harness import Results, row

from letheon.engine.checkpoints.saver import Saver
from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.method import Run
from letheon.engine.models.classifier import build
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.engine.runs.run_folder import Record
from letheon.engine.runs.stop import SAVE, Poll
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.methods.finetune import Finetune

LIMIT = 0.02


@dataclass
class Settings:
    """How large the run is."""

    out: Path
    """Results file (CSV)."""
    images: int = 128
    """Images of an epoch, drawn at random."""
    size: int = 64
    """Pixels."""
    epochs: int = 4
    model: str = "resnet50"
    device: str = "cpu"


class EveryEpoch(Poll):
    """Saves at the end of every epoch."""

    def after_epoch(self) -> int:
        """Always."""
        return SAVE


class Clock(Saver):
    """Adds up how long the steps wait for a save."""

    blocked = 0.0

    def save(self) -> None:
        """Save, timed."""
        start = time.perf_counter()
        super().save()
        self.blocked += time.perf_counter() - start


def main(settings: Settings) -> int:
    """Train once, saved at every epoch; write two rows."""
    device = torch.device(settings.device)
    ranks = Ranks(device=device)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (settings.images, settings.size, settings.size, 3), np.uint8)
    labels = np.arange(settings.images, dtype=np.int64) % 10
    data = ArrayImages("drawn", pixels, labels, [f"c{c}" for c in range(10)])
    model = build(settings.model, 10, 0)
    model.preset = model.preset.with_size(settings.size)
    recipe = Recipe(epochs=settings.epochs, batch_size=16, lr=1e-4)
    none = np.zeros(settings.images, dtype=np.bool_)
    loader = TorchLoader(data, none, model.preset, recipe.batch_size, Reader(0, device=device))
    run = Run(
        model=model, loader=loader, recipe=recipe, ranks=ranks, seed=0,
        forget=torch.from_numpy(none).to(device), forget_classes=(),
        precision=Precision().resolve(device),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder) / "run", ranks, {})
        clock = Clock(record, EveryEpoch(ranks), ranks)
        start = time.perf_counter()
        run_method(Finetune(recipe), run, record.log, clock)
        wall = time.perf_counter() - start
        clock.save()
        start = time.perf_counter()
        clock.wait()
        disk = time.perf_counter() - start
    share = clock.blocked / wall
    x = f"{settings.model} {settings.images}x{settings.size} {settings.epochs} epochs"
    kind = {"mode": "train", "x": x, "device": settings.device}
    results = Results(settings.out)
    results.add([
        row("save", "blocked", [share], metric="share of wall clock", unit="1", **kind),
        row("save", "disk", [disk], unit="s", **kind),
    ])  # fmt: skip
    print(f"blocked {share:.2%} of {wall:.1f} s; the write of a state took {disk:.2f} s")
    return int(share > LIMIT)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
