"""Make the models that an audit needs: K retrained ones a request, originals, and their outputs.

    letheon oracles --data digits --forget class:3,8 --count 20 --out runs/oracles \
        --epochs 30 --lr 0.1 --schedule cosine
    letheon evaluate --data digits --oracles runs/oracles/class_3_8 --runs runs/salun --depth full

All are fed from one pass over the images. A call that was stopped goes on when it is given again,
and a larger --count adds to what is there. In --out lie original-seed1, ..., a folder a request
with retrain-seed1, ..., and outputs, which evaluate reads in place of running the networks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from letheon.engine.checkpoints.options import CheckpointOptions
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks, wait_for_ranks
from letheon.engine.models.classifier import build
from letheon.engine.runs.agreement import Facts, plan_facts
from letheon.engine.runs.plan import JobOptions
from letheon.engine.runs.run_folder import FINISHED, check_free
from letheon.engine.runs.several import NamedPlan, train_all
from letheon.engine.runs.stop import check
from letheon.errors import InputError
from letheon.eval.comparison import open_comparison
from letheon.eval.evaluate import Extent, Inference
from letheon.launch.api import plan_forgetting, plan_training
from letheon.launch.command import run_command, together
from letheon.launch.console.summary import console
from letheon.launch.inputs import Call
from letheon.launch.records.claim import claim
from letheon.loaders.canaries import CanaryOptions, draw_canaries, plant
from letheon.loaders.forget_request import resolve
from letheon.methods.retrain import FromScratch, Retrain
from letheon.methods.train import Train

OUTPUTS = "outputs"
"""Folder of the stored outputs, beside those of the requests."""


@dataclass(frozen=True, kw_only=True)
class Settings(JobOptions):
    """Train the models that an audit compares with: retrained ones of each request, originals."""

    out: Path
    """Folder of the ensemble."""
    forget: tuple[str, ...]
    """Requests, each as forget takes it: class:3,8 or file:LIST or random-samples:100."""
    count: int = 20
    """Retrained models of each request, with the seeds from --seed on. An audit with a p-value of
    5 % needs 19, false-positive rates 20."""
    originals: int = 1
    """Models trained on everything, with the seeds from --seed on."""
    model: str = "small"
    """Architecture by name."""
    method: Retrain = field(default_factory=Retrain)
    planting: CanaryOptions = field(default_factory=CanaryOptions)
    saving: SaveOptions = field(default_factory=SaveOptions)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("count", "originals"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"got {name} {getattr(self, name)}; expected 1 or more", option=name
                )
        folders = [name_request(text) for text in self.forget]
        if len(set(folders)) < len(folders):
            raise InputError(
                f"got requests {' '.join(self.forget)}, two of which have one folder name; give "
                "each once",
                option="forget",
            )

    def call(self, seed: int, out: Path, method: FromScratch, forget: str = "") -> Call:
        """Return the settings of one of the runs."""
        job = {each.name: getattr(self, each.name) for each in fields(JobOptions)}
        return Call(
            **{**job, "seed": seed}, forget=forget, method=method, out=out, planting=self.planting
        )

    @property
    def runs(self) -> list[tuple[int, str, Path]]:
        """Seed, request and folder of each run; an original's request is empty."""
        seeds = range(self.seed, self.seed + max(self.count, self.originals))
        originals = [(one, "", self.out / f"original-seed{one}") for one in seeds[: self.originals]]
        return originals + [
            (seed, text, self.out / name_request(text) / f"retrain-seed{seed}")
            for text in self.forget
            for seed in seeds[: self.count]
        ]

    def plans(self, ranks: Ranks) -> list[NamedPlan]:
        """Plan every run before anything is written; finished ones are compared, and left out."""
        data = self.open_data()
        canaries = draw_canaries(self.planting, data, self.seed)
        data = plant(data, canaries)
        shared = {each.name: getattr(self.method, each.name) for each in fields(FromScratch)}
        jobs: list[NamedPlan] = []

        for seed, text, out in self.runs:
            check_free(out, False, resume=True, repeat=True)
            call = self.call(seed, out, self.method if text else Train(**shared), text)
            model = build(self.model, len(data.classes), seed)
            model.class_names, model.canaries = data.classes, canaries
            if not text:
                plan, run = plan_training(call, call.method, model, data, ranks)
            else:
                wanted = resolve(text, data, self.seed)
                like = jobs[0].run.loader if jobs else None
                plan, run = plan_forgetting(call, call.method, model, data, wanted, ranks, like)
            name = str(out.relative_to(self.out))
            jobs.append(NamedPlan(name, call.method, plan, run, out))
        return jobs


def name_request(text: str) -> str:
    """Name the folder of a request: its text, other characters than letters and digits as _."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def find_oracles(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...], Path]:
    """Find the originals, the retrained models of a request and the outputs, as `main` leaves them.

    Raises:
        InputError: it is no folder of a request of an ensemble.
    """

    def list_runs(where: Path, pattern: str) -> list[Path]:
        runs = [path for path in where.glob(pattern) if (path / FINISHED).is_file()]
        return sorted(runs, key=lambda path: int(path.name.rpartition("seed")[2]))

    originals = list_runs(folder.parent, "original-seed*")
    retrained = list_runs(folder, "retrain-seed*")
    if not originals or not retrained:
        raise InputError(
            f"got {folder}, which holds {len(retrained)} finished retrained models beside "
            f"{len(originals)} originals; expected the folder of one request, as oracles leaves it",
            option="oracles",
        )
    return tuple(originals), tuple(retrained), folder.parent / OUTPUTS


def store_outputs(settings: Settings, ranks: Ranks) -> None:
    """Run every model over its request's sets, layers too, and keep the outputs."""
    for text in settings.forget:
        originals, retrained, outputs = find_oracles(settings.out / name_request(text))
        found = together(
            ranks,
            lambda originals=originals, retrained=retrained: open_comparison(  # type: ignore[misc]
                settings, originals, retrained, (), CheckpointOptions(), None, None
            ),
        )
        extent = Extent(depth="full", cache=outputs)
        size, interval = settings.method.recipe.batch_size, settings.saving.interval
        inference = Inference(settings, found, extent, size, ranks, interval)
        for group in inference.groups(found.entries):
            inference.sweep(group)


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, train what is not finished, and store the outputs.

    Raises:
        InputError: a finished model was made by other settings than these.
    """
    with claim([settings.out / "ensemble", *(out for _, _, out in settings.runs)], ranks):
        jobs = together(ranks, lambda: settings.plans(ranks), _facts_of_all)
        train_all(jobs, ranks, settings.saving)
        wait_for_ranks(ranks)
        check(ranks)
        store_outputs(settings, ranks)
    if ranks.main:
        folders = [str(settings.out / name_request(text)) for text in settings.forget]
        if console().json:
            console().show(json.dumps(dict(zip(settings.forget, folders, strict=True))))
        else:
            print("\n".join(folders))


def _facts_of_all(jobs: Sequence[NamedPlan]) -> Facts:
    every = {job.name: plan_facts(job.plan, job.run) for job in jobs}
    return {f"{key} of {name}": v for name, facts in every.items() for key, v in facts.items()}


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
