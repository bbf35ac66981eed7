"""The field's way of doing this job, written anew from a description of the published code.

    PYTHONPATH=benchmarks python -m baseline forget --data DIR --weights original.safetensors \
        --forget 3 8 --method spkd --out DIR
    PYTHONPATH=benchmarks python -m baseline evaluate --data DIR --domains DIR --forget 3 8 \
        --models original.safetensors --retrained retrained.safetensors --out DIR

ImageFolder, Pillow, a DataLoader with 4 worker processes; float32, NCHW, eager; the loss and the
accuracy read from the device at each step; a saliency mask by two sorts of all gradients and an
int64 product per tensor and step; SPKD by forward hooks; after each epoch the state is saved and
accuracy measured on all four sets; evaluation in three passes, k-NN by scikit-learn, a biased CKA
per batch. (Kim et al. 2025 and the code it grew from, Fan et al. 2024; see docs/benchmarks.md.)

Where the published code's result is a fault that Letheon names as an option, the value here is
Letheon's default, so that results can be compared; the costs stay. Fixed are: batch-norm in passes
over forget samples alone (frozen), the leak of decay and momentum through the mask, the saliency of
augmented images and batch means (test transform, sums), the exact size of the mask, random labels
that may be the truth (never) and are not mixed with retain samples (mixed), the unsquared norm of
SPKD (squared, weight 30,000), accuracy on augmented training images (test transform), resizing that
loses the aspect ratio (short side), k-NN on logits (pooled features) and on files in the order of
the disk (sorted), and tiny last batches (shared with the one before).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from harness import report_spans
from safetensors.torch import save_file

from baseline.data import Images
from baseline.evaluation import evaluate
from baseline.model import load, read_facts, read_preset
from baseline.training import Name, Training, forget
from letheon.spans import span


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of both commands."""

    data: Path
    """Folder with train/<class>/ and val/<class>/."""
    forget: tuple[int, ...]
    """Ids of the classes to forget."""
    out: Path
    batch_size: int = 256
    workers: int = 4
    """Worker processes of each DataLoader; the published code has 4."""
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Forget(Common):
    """Make a network forget."""

    weights: Path
    method: Name
    epochs: int = 10
    lr: float = 0.01
    seed: int = 1
    validate: bool = True
    """Measure accuracy on all four sets after each epoch, as published."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Measure any number of networks."""

    models: tuple[Path, ...]
    retrained: Path
    domains: Path
    """Folder of <domain>/<class>/ folders for k-NN."""


def run_forget(options: Forget) -> None:
    """Train, and leave weights.safetensors in `out`."""
    device = torch.device(options.device)
    model = load(options.weights, device)
    preset = read_preset(options.weights)
    images = Images(options.data, options.forget, preset, options.workers)
    run = Training(
        model, images, options.epochs, options.lr, options.batch_size, options.seed, device,
        validate=options.validate, out=options.out,
    )  # fmt: skip
    forget(options.method, run)
    with span("saving"):
        options.out.mkdir(parents=True, exist_ok=True)
        state = {k: v.cpu() for k, v in model.net.state_dict().items()}
        facts = read_facts(options.weights)  # architecture and preset, which `evaluate` reads
        save_file(state, options.out / "weights.safetensors", metadata=facts)


def run_evaluate(options: Evaluate) -> None:
    """Measure each model, print the rows and write them as JSON."""
    device = torch.device(options.device)
    images = Images(
        options.data, options.forget, read_preset(options.retrained), options.workers
    )  # fmt: skip
    rows = []
    for path in options.models:
        row = evaluate(path, options.retrained, images, options.domains, options.batch_size, device)
        name = path.parent.name if path.stem == "weights" else path.stem
        rows.append({"name": name, **row})
        print(rows[-1], flush=True)
    with span("saving"):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "metrics.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


Command = (
    Annotated[Forget, tyro.conf.subcommand("forget")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def main() -> None:
    """Run one command."""
    command: Forget | Evaluate = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes,))
    with report_spans():
        if isinstance(command, Forget):
            run_forget(command)
        else:
            run_evaluate(command)


if __name__ == "__main__":
    main()
