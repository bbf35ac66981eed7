"""Search for a method's rate and settings by trials, and write them as a recipe.

    letheon tune --weights runs/original --forget class:3,8 --out runs/tune --seeds 1,2 spkd
    letheon tune --weights runs/original --forget random-samples:10% --out runs/tune \
        --retrained runs/retrain --ranges lr=1e-4:0.1,density=0.1:0.9 salun random-label

What is made small is the mean difference of forget and retain accuracy to a retrained model, or
without one to what is known of any: docs/recipes.md. Leaves study.db (Optuna; the same command goes
on with it, and several processes may work on it), report.json and recipe.toml.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from letheon import durable
from letheon.engine.checkpoints.model_file import load_model, weights_digest
from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks, wait_for_ranks
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.runs.agreement import plan_facts
from letheon.engine.runs.plan import Plan, check_knowledge, describe
from letheon.engine.runs.run_folder import check_free
from letheon.engine.runs.stop import Poll
from letheon.engine.runs.together import refuse_split
from letheon.errors import InputError, RunFailed
from letheon.kernels import keyed
from letheon.launch.api import plan_forgetting
from letheon.launch.command import method_choice, parse, run_several, together
from letheon.launch.console.summary import console
from letheon.launch.joblist import flags_of
from letheon.launch.options import Forgetting, Opened, open_together
from letheon.launch.tuning.objective import (
    STREAM,
    Division,
    Target,
    accuracies,
    divide,
    target_of_retrained,
    target_without,
)
from letheon.launch.tuning.ranges import Range, choose_ranges, current_settings, replace_settings
from letheon.launch.tuning.recipe_file import expand_recipes, format_recipe
from letheon.launch.tuning.search import Budget, Search, Study, load_optuna, lock_of
from letheon.loaders.batch import Loader
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.forget_request import Request, leave_out_earlier
from letheon.loaders.views import SubsetImages
from letheon.methods import catalogue

if TYPE_CHECKING:
    Choice = Method
else:
    Choice = method_choice()

STUDY = "study.db"


@dataclass(frozen=True, kw_only=True)
class Settings(Forgetting):
    """Search for the best rate and settings of a method, for one request on one model."""

    method: Choice
    out: Path
    """Folder of the search; a search that is there goes on, and other processes may join it."""
    recipe: str | None = None
    """In place of a method: a recipe's name or TOML file, whose settings the search starts from."""
    ranges: str = ""
    """What is searched, such as lr=1e-4:0.1,epochs=1:10,order=mixed|paired; without, the rate and
    what the method declares."""
    trials: int = 30
    """Settings to try in all, each with every seed; hopeless ones that were stopped count."""
    minutes: float | None = None
    """No new trials after so long, in this process."""
    seeds: str = "1"
    """Seeds of the runs of each trial, such as 1,2,3."""
    at_once: int = 4
    """Trials that are proposed and trained together, where memory allows."""
    retrained: Path | None = None
    """Run folder of a model retrained without what is to be forgotten, to be as near to as can be;
    without one the search uses nothing but the original."""
    forget_target: float | None = None
    """Forget accuracy to aim at without a retrained model, from 0 to 1."""
    validation_share: float = 0.2
    """Share of the training images that are measured, and not read by the trials."""
    prune: bool = True
    """Stop a trial whose gap after an epoch is above the median of the earlier ones'."""

    @cached_property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds as numbers, each once."""
        words = self.seeds.split(",")
        if not all(word.strip().isdecimal() for word in words) or len({*words}) < len(words):
            raise InputError(
                f"got seeds {self.seeds!r}; expected whole numbers, each once, such as 1,2,3",
                option="seeds",
            )
        return tuple(int(word) for word in words)

    def check(self) -> None:
        """Refuse a budget of nothing, and an output folder of something else."""
        for name in ("trials", "at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name} {getattr(self, name)}; expected 1 or more", name)
        if self.forget_target is not None and not 0 <= self.forget_target <= 1:
            raise InputError(
                f"got a forget target of {self.forget_target}; expected a fraction of 0 to 1",
                option="forget_target",
            )
        load_optuna()
        try:
            check_free(self.out, False)
        except InputError:  # where another process has begun this search, its lock may stand alone
            study = self.out / STUDY
            if not (study.is_file() or lock_of(study).is_file()):
                raise
        choose_ranges(self.ranges, self.method)


@dataclass(frozen=True)
class Case:
    """The model, the request and the divided images of a search."""

    settings: Settings
    ranks: Ranks
    model: Classifier
    data: Data
    request: Request
    division: Division
    ranges: list[Range] = field(default_factory=list)

    def plan(self, method: Method, seed: int, like: Loader | None) -> tuple[Plan, Run]:
        """Plan one run on the images that the search may read."""
        job = dataclasses.replace(self.settings, seed=seed)
        part = self.division
        plan, run = plan_forgetting(
            job, method, self.model, part.data, part.request, self.ranks, like
        )
        refuse_split(run)
        return plan, run

    def open_measured(self, run: Run, model: Classifier | None = None) -> Loader:
        """Open the measured images, as a model wants them."""
        return self._open(self.division.data.test, self.division.forget, run, model or run.model)

    def unseen(self, run: Run) -> float:
        """Accuracy of the original on a keyed half of the held-out images.

        Raises:
            InputError: there are none.
        """
        images = self.data.test
        if images is self.data.train or len(images) < 2:
            raise InputError(
                "got a request of single samples, no retrained model and no held-out images; "
                "expected one of them, or a forget accuracy to aim at",
                option="forget_target",
            )
        order = keyed.permutation(self.settings.seed, STREAM, 0, len(images)).numpy()
        half = SubsetImages(images, np.sort(order[: len(images) // 2]))
        flags = np.arange(len(half)) == 0  # one of each kind, so that both have an accuracy
        shares = accuracies(run, self.model, self._open(half, flags, run, self.model))
        return float(np.average(shares, weights=[1, len(half) - 1]))

    def _open(self, images: ImageSet, flags: Any, run: Run, model: Classifier) -> Loader:
        size = run.recipe.batch_size
        return self.settings.loader_of(images, flags, model.preset, size, self.ranks)

    def choose_target(self, plan: Plan, run: Run) -> Target:
        """Measure what the trials are compared with."""
        path = self.settings.retrained
        if path is not None:
            other = self.retrained_model
            assert other is not None
            pair = accuracies(run, other, self.open_measured(run, other))
            return target_of_retrained([pair], str(path))
        original = accuracies(run, plan.model, self.open_measured(run, plan.model))
        wish = self.settings.forget_target
        single = self.request.samples is not None and wish is None
        return target_without(original, self.unseen(run) if single else None, wish)

    @cached_property
    def retrained_model(self) -> Classifier | None:
        """The retrained model that the trials are to be near to; None where none is named.

        Raises:
            InputError: it is a model of another request or of other classes.
        """
        path = self.settings.retrained
        if path is None:
            return None
        other = load_model(path)
        last = other.requests[-1].numbers if other.requests else None
        if other.classes != self.model.classes or last not in (None, self.request.numbers):
            wrong = f"of {other.requests[-1].text}" if last else f"of {other.classes} classes"
            raise InputError(
                f"got {path}, a model {wrong}; expected one retrained without "
                f"{self.request.text}, of {self.model.classes} classes; name that",
                option="retrained",
            )
        return other

    @property
    def facts(self) -> dict[str, Any]:
        """What every process of the study must agree on."""
        settings, retrained = self.settings, self.retrained_model
        return {
            "weights": weights_digest(self.model), "data": self.data.train.digest,
            "request": self.request.digest,
            "method": json.loads(json.dumps(describe(settings.method), default=str)),
            "ranges": json.loads(json.dumps([dataclasses.asdict(one) for one in self.ranges])),
            "seeds": list(settings.seed_numbers), "share": settings.validation_share,
            "seed": settings.seed,
            "forget_target": settings.forget_target, "prune": settings.prune,
            "retrained": "" if retrained is None else weights_digest(retrained),
        }  # fmt: skip


def open_case(settings: Settings, ranks: Ranks, opened: Opened) -> tuple[Case, Plan, Run]:
    """Find everything else that can be wrong, before anything is written."""
    ranges = choose_ranges(settings.ranges, settings.method)
    model, data, request = opened.model, opened.data, opened.resolve(settings)
    data, forget = leave_out_earlier(data, request, model.requests)
    model.requests = ()  # they are out; the trials' images have numbers of their own
    division = divide(data, forget, request, settings.validation_share, settings.seed)
    case = Case(settings, ranks, model, data, request, division, ranges)
    plan, run = case.plan(settings.method, settings.seed_numbers[0], None)
    return case, plan, run


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, search, and write the report and the recipe."""
    opened = open_together([settings], ranks, settings.check)
    case, plan, run = together(
        ranks, lambda: open_case(settings, ranks, opened), lambda one: plan_facts(*one[1:])
    )
    check_knowledge(plan, settings.method, run)
    if ranks.main:
        settings.out.mkdir(parents=True, exist_ok=True)
    wait_for_ranks(ranks)
    target = case.choose_target(plan, run)
    if ranks.main:
        print(f"knowledge: {target.knowledge}", file=sys.stderr)
    seed = settings.seed
    study = together(ranks, lambda: Study(settings.out / STUDY, case.facts, ranks, seed))
    poll = Poll(ranks, *SaveOptions().interval)
    search = Search(
        study, settings.method, settings.seed_numbers, case.plan, case.open_measured, target,
        settings.prune, poll,
    )  # fmt: skip
    known = current_settings(settings.method)
    start = {one.name: known[one.name] for one in case.ranges if one.holds(known[one.name])}
    search.run(case.ranges, start, Budget(settings.trials, settings.at_once, settings.minutes))
    if ranks.main:
        report(case, target, study)


def report(case: Case, target: Target, study: Study) -> None:
    """Write and print what was found: report.json and, of the best trial, recipe.toml.

    Raises:
        RunFailed: no trial was run to its end, or all runs failed, so that none is the best.
    """
    settings = case.settings
    trials = study.list_finished()
    rows = [
        {"number": t.number, "values": t.params, "gap": t.value, "state": t.state.name.lower(),
         "runs": t.user_attrs.get("runs", {})}
        for t in trials
    ]  # fmt: skip
    counts = {"read": len(case.division.data.train), "measured": len(case.division.forget),
              "measured_forget": int(case.division.forget.sum())}  # fmt: skip
    facts = {**case.facts, "knowledge": target.knowledge, "images": counts,
             "target": {"forget": target.forget, "retain": target.retain}}  # fmt: skip
    reasons = [_failure(row["runs"]) for row in rows]
    done = [  # a pruned one has a gap of its way
        row for row, why in zip(rows, reasons, strict=True)
        if row["state"] == "complete" and why is None
    ]  # fmt: skip
    best = min(done, key=lambda row: row["gap"]) if done else None
    text = json.dumps({**facts, "best": best, "trials": rows}, indent=1) + "\n"
    durable.write(settings.out / "report.json", text)
    failed = [why for why in reasons if why is not None]
    if failed and len(failed) == len(rows):
        raise RunFailed(f"got {len(failed)} trials, which all failed, the last one: {failed[-1]}")
    if failed:
        print(f"{len(failed)} trials failed, the last one: {failed[-1]}", file=sys.stderr)
    if console().json:
        console().show(json.dumps({**facts, "best": best}))
    if best is None:
        raise RunFailed(
            f"got no trial that was run to its end, of {len(rows)} that count; expected one at "
            "least; give more trials or minutes: the search goes on"
        )
    method = replace_settings(settings.method, best["values"])
    seeds = ", ".join(map(str, settings.seed_numbers))
    result = f"gap {best['gap']:.4f}, the mean of seeds {seeds}; {len(rows)} trials"
    recipe = {
        "set": Path(settings.data).name, "model": case.model.name,
        "request": "classes" if case.request.samples is None else "samples", "status": "tuned",
        "source": f"letheon tune --forget {case.request.text}, best of {len(rows)} trials",
        "result": result, "knowledge": target.knowledge,
    }  # fmt: skip
    durable.write(settings.out / "recipe.toml", format_recipe(recipe, describe(method)))
    values = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                       for name, value in best["values"].items())  # fmt: skip
    if console().prints:
        print(f"best: {values}; {result}\nrecipe: {settings.out / 'recipe.toml'}")


def _failure(runs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why all runs of a trial failed; None where one was run to its end."""
    reasons = [facts.get("failed") for facts in runs.values()]
    return str(reasons[-1]) if reasons and None not in reasons else None


def read(args: Sequence[str]) -> list[Settings]:
    """Parse the settings of a search from a command line."""
    return [parse(Settings, expand_recipes(args, list(catalogue()), flags_of(Settings)))]


def start() -> None:
    """Run from the command line to the end of the process."""
    run_several(lambda: read(sys.argv[1:]), lambda parsed, ranks: main(parsed[0], ranks))


if __name__ == "__main__":
    start()
