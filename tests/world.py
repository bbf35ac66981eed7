"""A small world for tests of the loop and the methods: 41 images, four classes, 300 weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from letheon.engine.distributed import Ranks
from letheon.engine.loop import run_method
from letheon.engine.memory.shards import own_parts
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.kernels.keyed import uniform
from letheon.loaders.backends.torch_loader import TorchLoader
from letheon.loaders.batch import Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.preset import Preset
from letheon.methods.salun import SalUn

PRESET = Preset(
    size=8, mean=(0.5,) * 3, std=(0.25,) * 3, resize="none", resize_to=8, augment="shift"
)
FORGOTTEN = (2,)


def images(n: int = 41, classes: int = 4) -> ArrayImages:
    """Noise whose mean brightness tells the class; an odd number, so that no batch divides."""
    labels = np.arange(n, dtype=np.int64) * 7 % classes
    noise = uniform(0, "test-images", 0, torch.arange(n), 8 * 8 * 3).numpy().reshape(n, 8, 8, 3)
    pixels = (noise * 120 + labels[:, None, None, None] * 40).astype(np.uint8)
    return ArrayImages("noise", pixels, labels, [f"c{c}" for c in range(classes)])


def network(seed: int = 0, classes: int = 4) -> Classifier:
    """Convolution, batch-norm, ReLU, pooling, linear: 300 weights with every kind of parameter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )
        for module in net:
            if isinstance(module, nn.BatchNorm2d):  # as after training: not 0 and 1
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
        return Classifier(net, "test", PRESET)


def run_of(
    method: Method, ranks: Ranks | None = None, seed: int = 0, forgotten: Sequence[int] = ()
) -> Run:
    """A run of `method` on the small world; `forgotten` are samples in place of a class."""
    ranks = ranks or Ranks()
    data = images()
    forget = np.isin(data.labels, FORGOTTEN)
    if forgotten:
        forget = np.isin(np.arange(len(data)), forgotten)
    loader = TorchLoader(
        data, forget, PRESET, method.recipe.batch_size, Reader(seed, ranks.rank, ranks.world)
    )
    return Run(
        model=network().to(ranks.device),
        loader=loader,
        recipe=method.recipe,
        ranks=ranks,
        seed=seed,
        forget=torch.from_numpy(forget).to(ranks.device),
        forget_classes=() if forgotten else FORGOTTEN,
    )


def trained(method: Method, ranks: Ranks | None = None) -> tuple[Run, list[dict[str, object]]]:
    """The run after its end, and the lines it logged."""
    run = run_of(method, ranks)
    lines: list[dict[str, object]] = []
    run_method(method, run, lambda kind, **numbers: lines.append({"kind": kind, **numbers}))
    return run, lines


def masks_of(method: SalUn) -> list[torch.Tensor]:
    """The mask that a run of `method` on the small world has, by parameter."""
    return list(method.prepare(run_of(method)).masks.values())


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The state dict, copied; of a network that is split over the ranks, this rank's parts."""
    return {name: value.clone() for name, value in own_parts(run.model.net.state_dict()).items()}
