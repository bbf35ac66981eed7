"""Every pass of the evaluation, computed on the host as on a GPU: the CPU's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_budget.cuda_on_host import cuda_on_host
from step_budget.fake_cuda import CUDA

from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import Classifier, build
from letheon.eval.attacks.suite import Targets, attack
from letheon.eval.case import Case, Conditions, Peers, Subject
from letheon.eval.evaluate import read_images
from letheon.eval.inference.extract import InferenceOptions, extract
from letheon.eval.inference.passes import Passes, SweepOptions, Swept, sweep_together
from letheon.eval.membership.over_seeds import margins
from letheon.eval.metrics.cka import cka_band
from letheon.eval.probes.critic import critic_information
from letheon.eval.probes.information import BALANCED
from letheon.eval.probes.relearn_evaluator import Lesson, curves, rate_of
from letheon.eval.row_builder import build_row
from letheon.eval.search.neighbors import Proposer, nearest
from letheon.loaders.batch import Loader, Reader
from letheon.loaders.factory import make_loader
from tests.eval.test_features import CLASSES, images
from tests.eval.test_knn import METRICS, clusters

CPU = torch.device("cpu")


def network(seed: int, device: torch.device) -> Classifier:
    """Of the small kind, in evaluation mode."""
    return build("small", CLASSES, seed).eval().to(device)


def loader(count: int, device: torch.device) -> Loader:
    """From images on the device where that is no CPU, else from the host."""
    data = images(count)
    kind = "resident" if device.type == "cuda" else "torch"
    preset = build("small", CLASSES).preset
    return make_loader(kind, data, data.labels == 2, preset, 10, Reader(0, device=device))


def sweep(device: torch.device, taps: tuple[str, ...] = ()) -> list[Passes]:
    """Five networks over all sets."""
    loaders = {"train": loader(47, device), "test": loader(30, device)}
    loaders |= {"domain/art": loader(40, device), BALANCED: loaders["train"]}
    rows = torch.from_numpy(images().labels == 2)
    balanced = sorted([*rows.nonzero()[:8, 0].tolist(), *(~rows).nonzero()[:8, 0].tolist()])
    swept = [Swept(str(seed), network(seed, device), "", taps) for seed in range(5)]
    options = SweepOptions(flip=True, shift=True, parts={BALANCED: balanced})
    return sweep_together(swept, loaders, Ranks(device=device), options)


def rows(device: torch.device) -> dict[str, Any]:
    """A full row, and one under the seed's conditions."""
    taps = tuple(n for n, m in network(0, CPU).named_modules() if isinstance(m, torch.nn.Conv2d))
    passes = sweep(device, taps)
    subjects = [
        Subject(each, network(seed, device)) for seed, each in enumerate(passes)
    ]
    names = tuple(f"class {c}" for c in range(CLASSES))
    peers = Peers(subjects[0], (subjects[1], subjects[2]), passes[3], (2,), names)
    ranks = Ranks(device=device)
    full = build_row(Case(subjects[4], peers, ranks=ranks), "full").as_dict()
    legacy = Conditions(ks=(5, 1), cka="legacy", weights="temperature", metric="l2")
    quick = build_row(Case(subjects[4], peers, legacy, ranks), "quick").as_dict()
    band = cka_band([one.passes for one in subjects[1:3]], ranks)
    return {"full": full, "legacy": quick, "band": band, "margins": margins(passes[4]).tolist()}


def attacks(device: torch.device) -> dict[str, Any]:
    """Each attack, relearning of all kinds, and a critic."""
    read, labels = read_images(loader(47, device), range(47))
    assert read.device.type == labels.device.type == "cpu"
    member = labels == 2
    targets = Targets(read, labels, member, (2,), 4, 0.01)
    model, original = network(4, CPU), network(0, CPU)
    found: dict[str, Any] = dict(attack(model, original, targets, device).results)
    lesson = Lesson(read, labels, read[:9], labels[:9], 4, 0.01, (read[9:20], labels[9:20]))
    for name, curve in curves(model, lesson, device).items():
        found[name] = [curve.steps, curve.accuracy]
    found["rate"] = rate_of(original, [(read[:8], labels[:8])] * 20, device)
    layer = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    for tap in (layer, "features"):
        found[tap] = critic_information(model, tap, read, member, device, steps=3)
    return found


def searches(device: torch.device) -> list[Any]:
    """Neighbors by each proposer without FAISS, of rows of the host and of the device."""
    x, _ = clusters(201)
    q, _ = clusters(30, seed=1)
    proposers: tuple[Proposer, ...] = ("torch", "torch-fp64", "auto")
    return [
        nearest(x.to(place), q, 20, metric, proposer, Ranks(device=device)).places.tolist()
        for metric in METRICS
        for proposer in proposers
        for place in (CPU, device)
    ]


def answers(device: torch.device) -> dict[str, Any]:
    """A part of a set alone, with a layer; and the look at the original."""
    model = network(0, device)
    layer = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d))
    few = extract(model, loader(47, device), Ranks(device=device), InferenceOptions((9, 2), taps=(layer,)))
    return {"logits": few.logits.tolist(), "layer": few.taps[layer].tolist()}


def near(got: Any, wanted: Any) -> None:
    """Compare numbers to rounding, all else exactly."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            near(got[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            near(one, other)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert got == wanted or str(got) == str(wanted)


@pytest.mark.parametrize("compute", [rows, attacks, searches, answers])
def test_numbers_are_those_of_the_cpu(compute: Callable[[torch.device], Any]) -> None:
    wanted = compute(CPU)
    with cuda_on_host() as ledger:
        got = compute(CUDA)
        waits = ledger.waits
        print(compute.__name__, *sorted(f"{n} {k}" for k, n in waits.items()), sep="\n")
    near(got, wanted)
