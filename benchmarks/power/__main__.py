"""How often each number of an audit finds a leak of known size, beside its false-positive rate.

    letheon oracles --data digits --forget class:3,8 --count 20 --out runs/oracles --epochs 30 \
        --lr 0.1 --schedule cosine
    cd benchmarks && python -m power --data digits --oracles ../runs/oracles/class_3_8 \
        --out ../runs/power --epochs 30 --lr 0.1 --schedule cosine

A leak is a network retrained on the retain set and a share of the forget set, by other seeds than
the retrained models. Writes power.md and power.json. With --samples 1 3 10 it is so many single
samples, and samples.md and samples.json have the rates at which attacks on single samples find
these. A call that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path

import numpy as np

from letheon import durable
from letheon.engine.checkpoints.model_file import load_model, weights_digest
from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs.plan import JobOptions, describe
from letheon.engine.runs.several import NamedPlan, train_all
from letheon.errors import InputError
from letheon.eval.attacks.session import Lessons, attack_table
from letheon.eval.audit.power import as_table, measure_power
from letheon.eval.audit.sample_power import Leak as LeakedAnswers
from letheon.eval.audit.sample_power import as_sample_tables, largest_rates, measure_samples
from letheon.eval.case import Conditions
from letheon.eval.comparison import Comparison, Entry, open_comparison
from letheon.eval.evaluate import Extent, Measuring
from letheon.eval.membership.single_samples import Answers, read_answers
from letheon.eval.report.rows import prepare
from letheon.eval.report.verdict import ORACLES
from letheon.kernels import keyed
from letheon.launch.api import plan_forgetting
from letheon.launch.command import run_command
from letheon.launch.ensembles.oracles import find_oracles
from letheon.launch.inputs import Call
from letheon.loaders.forget_request import request_samples
from letheon.methods.retrain import Retrain
from letheon.sealed import read_sealed

FIRST_SEED = 10_001
"""Of the leaks; the retrained models have others."""


@dataclass(frozen=True, kw_only=True)
class Settings(JobOptions):
    """Plant leaks of known size, and count who finds them."""

    oracles: Path
    """Folder of one request of an ensemble: the retrained models that leaks are compared with."""
    out: Path
    """Folder of the leaks and of what is written."""
    shares: tuple[float, ...] = (0.02, 0.1, 0.5)
    """Sizes of the leaks, as shares of the forget set."""
    samples: tuple[int, ...] = ()
    """Sizes of the leaks in samples, in place of shares."""
    count: int = 6
    """Leaks of each size."""
    attacks: int = 40
    """Steps of the attacks that learn."""
    method: Retrain = field(default_factory=Retrain)
    """How the retrained models were made."""
    saving: SaveOptions = field(default_factory=SaveOptions)


@dataclass(frozen=True)
class Leak:
    """A network that is retrained on a share of the forget set, too."""

    size: str
    seed: int
    samples: tuple[int, ...]  # that it does not see

    @property
    def name(self) -> str:
        """Of its folder and row."""
        return f"leak-{self.size.replace(' %', '').replace(' ', '-')}-seed{self.seed}"


def list_leaks(settings: Settings, of: Comparison) -> Iterator[Leak]:
    """Draw who sees what: keyed by the leak's seed."""
    forget, seed = np.flatnonzero(of.forget_mask("train")), FIRST_SEED
    if wild := [share for share in settings.shares if not 0 < share < 1]:
        raise InputError(f"got the share {wild[0]}; expected 0 < share < 1", option="shares")
    sizes = {f"{share * 100:g} %": round(share * len(forget)) for share in settings.shares}
    if settings.samples:
        sizes = {f"{n} sample{'s' if n > 1 else ''}": n for n in settings.samples}
    if not sizes or settings.count < 1:
        raise InputError(f"got {len(sizes)} sizes and {settings.count} of each; expected a leak")
    odd = next((size for size, n in sizes.items() if not 1 <= n < len(forget)), None)
    if odd is not None:
        raise InputError(
            f"got a leak of {odd}, {sizes[odd]} of the {len(forget)} images that were to be "
            f"forgotten; expected 1 to {len(forget) - 1}; give another size",
            option="samples" if settings.samples else "shares",
        )
    for size, number in sizes.items():
        for _ in range(settings.count):
            order = keyed.permutation(seed, "leak", 0, len(forget)).numpy()
            yield Leak(size, seed, tuple(sorted(forget[order[number:]].tolist())))
            seed += 1


def plan_leaks(settings: Settings, of: Comparison, ranks: Ranks) -> list[NamedPlan]:
    """Plan the training of every leak, by the recipe of the retrained models."""
    known = of.of_role("retrained")[0].model
    job = {each.name: getattr(settings, each.name) for each in fields(JobOptions)}
    plans: list[NamedPlan] = []
    for leak in list_leaks(settings, of):
        model = build(known.name, known.classes, leak.seed, known.preset)
        model.class_names, model.canaries = known.class_names, known.canaries
        request = request_samples(leak.name, leak.samples, of.data)
        out = settings.out / leak.name
        call = Call(**{**job, "seed": leak.seed}, forget=leak.name, method=settings.method, out=out)
        like = plans[0].run.loader if plans else None
        plan, run = plan_forgetting(call, call.method, model, of.data, request, ranks, like)
        plans.append(NamedPlan(leak.name, call.method, plan, run, out))
    return plans


def main(settings: Settings, ranks: Ranks) -> None:
    """Train the leaks, measure all, count and write."""
    originals, retrained, outputs = find_oracles(settings.oracles)
    made = read_sealed(retrained[0] / "settings.json")["method"]
    if len(retrained) <= ORACLES:
        raise InputError(
            f"got {len(retrained)} retrained models; expected {ORACLES + 1}: a rate of 5 % needs "
            "them",
            option="oracles",
        )
    if made != json.loads(json.dumps(describe(settings.method), default=str)):
        raise InputError("got another recipe than the retrained models'; give theirs")
    of = open_comparison(settings, originals, retrained, (), CheckpointOptions(), None, None)
    train_all(plan_leaks(settings, of, ranks), ranks, settings.saving)
    entries, sizes = [*of.entries], dict[str, list[str]]()
    for leak in list_leaks(settings, of):
        model = load_model(settings.out / leak.name)
        model.requests = ()  # it is judged by the whole request
        entries.append(
            Entry(leak.name, "unlearned", model, weights_digest(model), settings=leak.size)
        )
        sizes.setdefault(leak.size, []).append(leak.name)
    extent = Extent(depth="full", attacks=settings.attacks, cache=outputs)
    measuring = Measuring(settings, replace(of, entries=entries), Conditions(), extent, 256, ranks)
    table = measuring.measure()
    if settings.attacks:
        before = measuring.comparison.find_original(table.left_out)
        attack_table(measuring, table, Lessons(measuring.inference, before))
    if ranks.main:
        powers = measure_power(prepare(table.flat).rows, sizes)
        durable.write(settings.out / "power.md", as_table(powers))
        facts = [dataclasses.asdict(one) for one in powers]
        durable.write(settings.out / "power.json", json.dumps(facts, indent=1) + "\n")
        print(settings.out / "power.md")
    if settings.samples:
        write_samples(settings, measuring)


def write_samples(settings: Settings, measuring: Measuring) -> None:
    """Count what attacks on single samples find of the leaks, and write it; every rank calls."""
    inference, of = measuring.inference, measuring.comparison
    answers: dict[str, Answers] = {}
    for group in inference.groups(of.entries):
        for entry, passes in zip(group, inference.sweep(group), strict=True):
            answers[entry.name] = read_answers(passes)
            entry.model.to("cpu")

    def join(role: str) -> Answers:
        return reduce(Answers.join, (answers[entry.name] for entry in of.of_role(role)))

    forget = np.flatnonzero(of.forget_mask("train"))
    leaks = [
        LeakedAnswers(leak.size, answers[leak.name], ~np.isin(forget, leak.samples))
        for leak in list_leaks(settings, of)
    ]
    retrained, originals = join("retrained"), join("original")
    powers = list(measure_samples(leaks, retrained, originals))
    models = list(largest_rates(leaks, retrained, originals))
    if measuring.ranks.main:
        durable.write(settings.out / "samples.md", as_sample_tables(leaks, powers, models))
        facts = {"samples": [dataclasses.asdict(one) for one in powers], "models": models}
        text = json.dumps(facts, indent=1, default=dataclasses.asdict)
        durable.write(settings.out / "samples.json", text + "\n")
        print(settings.out / "samples.md")


if __name__ == "__main__":
    run_command(Settings, main)
