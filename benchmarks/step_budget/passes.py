"""What an evaluation runs on a device: passes, searches, attacks, and the rows made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from letheon.engine.distributed import Ranks
from letheon.engine.memory.sharding import whole_copy
from letheon.engine.models.classifier import Classifier, build
from letheon.eval.attacks.suite import Targets, attack
from letheon.eval.case import Case, Conditions, Peers, Subject
from letheon.eval.evaluate import read_images
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.inference.passes import Passes, SweepOptions, Swept, sweep_together
from letheon.eval.inference.taps import stages
from letheon.eval.membership.over_seeds import margins
from letheon.eval.metrics.cka import cka_band
from letheon.eval.probes.critic import critic_information
from letheon.eval.probes.information import BALANCED
from letheon.eval.probes.relearn_evaluator import Lesson, curves, rate_of
from letheon.eval.row_builder import build_row
from letheon.eval.search.neighbors import Proposer, nearest, nearest_sets
from letheon.eval.search.scores import Metric
from letheon.kernels.keyed import normal, uniform
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.datasets.image_set import ArrayImages
from letheon.loaders.factory import Kind, make_loader

CLASSES, GONE = 5, 2
CPU = torch.device("cpu")
PROPOSERS: tuple[Proposer, ...] = ("torch", "torch-fp64", "auto")
METRICS: tuple[Metric, ...] = ("cosine", "l2")


@dataclass(frozen=True)
class Scene:
    """Where an evaluation runs, on how many images of noise, of which network."""

    device: torch.device
    count: int = 47
    batch: int = 10
    model: str = "small"

    @property
    def ranks(self) -> Ranks:
        """One rank on the device."""
        return Ranks(device=self.device)

    def place(self, model: Classifier) -> Classifier:
        """Copy a network to the scene's device."""
        return whole_copy(model, self.device)

    def network(self, seed: int, device: torch.device | None = None) -> Classifier:
        """Build a network in evaluation mode, on the device unless told otherwise."""
        return build(self.model, CLASSES, seed).eval().to(device or self.device)

    def images(self, count: int) -> ArrayImages:
        """Noise in five classes."""
        side = build(self.model, CLASSES).preset.size
        noise = uniform(7, "scene", 0, torch.arange(count), side * side * 3).numpy()
        pixels = (noise * 255).astype(np.uint8).reshape(count, side, side, 3)
        labels = np.arange(count, dtype=np.int64) * 3 % CLASSES
        return ArrayImages("noise", pixels, labels, [f"class {c}" for c in range(CLASSES)])

    def loader(self, count: int) -> Loader:
        """Read noise from the device's own memory, on a CPU from the host's."""
        data = self.images(count)
        preset = build(self.model, CLASSES).preset
        kind: Kind = "torch" if self.device.type == "cpu" else "resident"
        reader = Reader(0, device=self.device)
        return make_loader(kind, data, data.labels == GONE, preset, self.batch, reader)

    def lesson(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images and labels on the host, and which are to be forgotten."""
        images, labels = read_images(self.loader(self.count), range(self.count))
        return images, labels, labels == GONE


def infer(scene: Scene) -> Any:
    """Outputs of one network with a layer, and of its mirror and shifted images."""
    model = scene.network(0)
    options = InferenceOptions(taps=(stages(model)[0],), flip=True, shift=True)
    own = extract(model, scene.loader(scene.count), scene.ranks, options)
    return [own.logits, own.features, own.labels, *own.taps.values()]


def search(scene: Scene) -> Any:
    """Neighbors by each proposer that needs no FAISS, of rows on the host and on the device."""
    rows = normal(0, "rows", 0, torch.arange(200), 24).float()
    asked = normal(0, "asked", 0, torch.arange(30), 24).float()
    found: list[Any] = []
    for metric in METRICS:
        for proposer in PROPOSERS:
            for place in (CPU, scene.device):
                of = (rows.to(place), asked)
                near = nearest(*of, 20, metric, proposer, scene.ranks)
                sets = nearest_sets(*of, (1, 5), metric, proposer, scene.ranks)
                found += [near.places, near.similarity, sets[0].sort(dim=1).values]
    return found


def sweep(scene: Scene) -> list[Passes]:
    """Outputs of five networks on all sets, read together."""
    train = scene.loader(scene.count)
    loaders = {"train": train, "test": scene.loader(30), "domain/art": scene.loader(40)}
    loaders[BALANCED] = train
    forget = np.flatnonzero(scene.images(scene.count).labels == GONE)[:8]
    others = np.setdiff1d(np.arange(scene.count), forget)[: len(forget)]
    rows = sorted([*forget.tolist(), *others.tolist()])
    taps = tuple(stages(scene.network(0, CPU)))
    swept = [Swept(str(seed), scene.network(seed), "", taps) for seed in range(5)]
    return sweep_together(swept, loaders, scene.ranks, SweepOptions(parts={BALANCED: rows}))


def rows(scene: Scene) -> Any:
    """A full row of all metrics, and a quick one under the seed's conditions."""
    passes = sweep(scene)
    subjects = [
        Subject(each, partial(scene.network, seed, CPU)) for seed, each in enumerate(passes)
    ]
    names = tuple(f"class {c}" for c in range(CLASSES))
    peers = Peers(subjects[0], (subjects[1], subjects[2]), passes[3], (GONE,), names)
    full = build_row(Case(subjects[4], peers, ranks=scene.ranks), "full").as_dict()
    legacy = Conditions(ks=(5, 1), cka="legacy", weights="temperature", metric="l2")
    quick = build_row(Case(subjects[4], peers, legacy, scene.ranks), "quick").as_dict()
    band = cka_band([one.passes for one in subjects[1:3]], scene.ranks)
    return [full, quick, band, margins(passes[4])]


def attacks(scene: Scene) -> Any:
    """Every attack of the suite, in one call."""
    of = Targets(*scene.lesson(), (GONE,), 4, 0.01)
    return attack(
        scene.network(4, CPU), scene.network(0, CPU), of, scene.device, scene.place
    ).results


def relearn(scene: Scene) -> Any:
    """Relearning of the whole network, of the head, from related images, and its rate."""
    images, labels, member = scene.lesson()
    held = (images[member], labels[member])
    lesson = Lesson(images, labels, *held, 4, 0.01, (images[:20], labels[:20]))
    found = curves(scene.network(4, CPU), lesson, scene.device, scene.place)
    steps = [(images[:8], labels[:8])] * 20
    rate = rate_of(scene.network(0, CPU), steps, scene.device, scene.place)
    return [rate, *([curve.steps, curve.accuracy] for curve in found.values())]


def criticize(scene: Scene) -> Any:
    """A critic of a layer, and of the features."""
    images, _, member = scene.lesson()
    model = scene.network(4, CPU)
    return [
        critic_information(model, tap, images, member, scene.device, steps=3)
        for tap in (stages(model)[0], "features")
    ]


PASSES: dict[str, Callable[[Scene], Any]] = {
    "inference": infer,
    "k-NN": search,
    "rows": rows,
    "attacks": attacks,
    "relearning": relearn,
    "critic": criticize,
}
"""What an evaluation runs, by name; each gives numbers that do not depend on the device."""
