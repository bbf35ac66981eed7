"""Make a trained network forget classes, by one method, or by several in one pass over the data.

    python launch/forget.py --weights runs/original --forget class:3,8 --out runs/salun \
        salun --density 0.5 random-label --epochs 5
    torchrun --nproc_per_node=8 launch/forget.py --data /data/imagenet --weights resnet50.pth \
        --model resnet50 --forget file:random100.txt --out runs/spkd spkd
    python launch/forget.py --weights runs/original --forget class:3,8 --seed 1,2 --out runs/all \
        finetune --lr 0.1,0.01 + salun random-label + spkd
    python launch/forget.py --weights runs/original --out runs/all --jobs jobs.txt

`--help` lists the methods; `launch/forget.py METHOD --help` their options. `retrain` starts from
new weights of the same architecture. Leaves a run folder with the request it resolved; of several
runs, one each in --out, as a single call would leave it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks
from letheon.engine.method import Method, Run
from letheon.engine.runs.agreement import Facts, plan_facts
from letheon.engine.runs.loggers import TrackingOptions
from letheon.engine.runs.plan import Plan, train_and_save
from letheon.engine.runs.run_folder import FINISHED, check_free
from letheon.engine.runs.several import NamedPlan, train_all
from letheon.engine.runs.signature import check_key
from letheon.errors import InputError, join_few
from letheon.launch.api import plan_forgetting
from letheon.launch.command import (
    complete_dry_run,
    method_choice,
    parse,
    run_several,
    together,
)
from letheon.launch.console.following import changed_options, command_line, free_beside
from letheon.launch.console.options import list_options
from letheon.launch.console.summary import Summary, console, read_facts
from letheon.launch.joblist import flags_of, job_names, read_jobs, split
from letheon.launch.options import Forgetting, Opened, open_ranking, open_together
from letheon.launch.planning.dry_run import as_text, check_world, plan_run
from letheon.launch.records.claim import claim
from letheon.launch.records.replay import expand_config
from letheon.launch.tuning.recipe_file import expand_recipes
from letheon.loaders.options import OF_IMAGES
from letheon.methods import catalogue

FEW = 10  # runs, or classes of a request, that the last line names

if TYPE_CHECKING:
    Choice = Method
else:
    Choice = method_choice()


@dataclass(frozen=True, kw_only=True)
class Settings(Forgetting):
    """Make a trained network forget what --forget names.

    Several runs are fed from one pass over the data: `METHOD options + METHOD options`, and a list
    of numbers (--lr 0.1,0.01) after an option of a method or after --seed. Each is then a folder
    in --out.
    """

    method: Choice
    out: Path
    """Run folder to make; of several runs, the folder of their folders."""
    overwrite: bool = False
    """Replace a run that is already there, once the new one is whole."""
    config: Path | None = None
    """File settings.json of an earlier run, to run it again; what is said beside it wins."""
    recipe: str | None = None
    """In place of a method: a recipe's name or TOML file, which names the method and its settings;
    options after it win. `letheon recipes` lists them. The record keeps name and digest."""
    jobs: Path | None = None
    """File with the options of one run a line, requests, seeds and recipes too, which all start
    from the same weights."""
    sign: Path | None = None
    """Ed25519 private key (PEM) that signs the run's manifest."""
    dry_run: int = 0
    """Plan for so many ranks (1 to 512), print what each would read and hold, and stop; nothing is
    written. One process is enough."""
    saving: SaveOptions = field(default_factory=SaveOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def check(self) -> None:
        """Refuse an output folder, a key or a tracker that cannot be used."""
        check_free(self.out, self.overwrite, resume=True, repeat=True)
        check_key(self.sign)
        self.tracking.check()

    def plan(self, ranks: Ranks, opened: Opened) -> tuple[Plan, Run]:
        """Find everything else that can be wrong, before anything is written."""
        request = opened.resolve(self)
        return plan_forgetting(self, self.method, opened.model, opened.data, request, ranks)


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, then forget and save."""
    with claim([settings.out], ranks):
        ranking = open_ranking(settings.out, ranks, settings.saving)
        opened = open_together([settings], ranks, settings.check, ranking)
        plan, run = together(
            ranks, lambda: settings.plan(ranks, opened), lambda one: plan_facts(*one)
        )
        train_and_save(
            plan, settings.method, run, settings.out, settings.saving, settings.overwrite
        )
        ranking.clear()
    if ranks.main:
        console().close(summarize(settings, [settings], [plan]))


def summarize(settings: Settings, runs: Sequence[Settings], plans: Sequence[Plan]) -> Summary:
    """Say which runs forgot what, and how they are evaluated; `settings` holds the asked folder."""
    requests = [plan.request for plan in plans if plan.request is not None]
    counts = [int(plan.split[1].sum()) for plan in plans]
    images = len(plans[0].data.train)
    names = [one.out.name if len(runs) > 1 else one.method.name for one in runs]
    pairs = zip(plans, counts, strict=True)
    said = list(dict.fromkeys(f"{_say_request(p)}, {n:,} of {images:,} images" for p, n in pairs))
    more = f"; and {len(said) - FEW} other requests" if len(said) > FEW else ""
    done = f"{join_few(names, FEW)}: forgot {'; '.join(said[:FEW])}{more}"
    folders = {
        one.out.name: {"request": request.text, "forget_images": count, **read_facts(one.out)}
        for one, request, count in zip(runs, requests, counts, strict=True)
    }
    facts = {
        "request": requests[0].text, "forget_images": counts[0], "images": images, "runs": folders
    }  # fmt: skip
    # Only runs of one request are compared with each other.
    like = [r for r, q in zip(runs, requests, strict=True) if q.numbers == requests[0].numbers]
    roles = {
        flag: [one.out for one in like if (one.method.kind == "reference") == reference]
        for flag, reference in (("--retrained", True), ("--runs", False))
    }
    following = command_line(
        "evaluate",
        [
            *changed_options(settings, [*OF_IMAGES, "checkpoint", "accept_chance"]),
            "--original", settings.weights,
            *(word for flag, outs in roles.items() if outs for word in (flag, *outs)),
            "--out", free_beside(settings.out, "table"),
        ],
    )  # fmt: skip
    return Summary("forget", done, facts, str(settings.out.absolute()), following)


def _say_request(plan: Plan) -> str:
    """Say the request, and which classes a ranking, a draw or a list came to."""
    request = plan.request
    assert request is not None
    if request.samples is not None or request.text.startswith("class:"):
        return request.text
    known = [plan.data.train.classes[number] for number in request.classes]
    return f"{request.text} ({join_few(known, FEW)})"


def assign_folders(runs: Sequence[Settings]) -> list[Settings]:
    """Give each run of several its own folder in --out; they may differ in few things."""
    first = runs[0]
    for settings in runs:
        for one in fields(Settings):
            if one.name in ("method", "seed", "forget", "recipe"):
                continue
            if getattr(settings, one.name) != getattr(first, one.name):
                raise InputError(
                    f"got another {one.name} for one of several runs; only the method, its "
                    "options, --forget and --seed may differ; say the rest for all of them"
                )
    if (first.out / "settings.json").exists():
        raise InputError(
            f"got {first.out}; it is itself a run; name a folder for several", option="out"
        )
    names = job_names([(one.seed, one.method, one.forget) for one in runs], catalogue())
    return [replace(s, out=first.out / name) for s, name in zip(runs, names, strict=True)]


def check_all(runs: Sequence[Settings]) -> None:
    """Refuse an output folder, a key or a tracker of several runs that cannot be used."""
    for settings in runs:
        if not (settings.out / FINISHED).is_file():
            check_free(settings.out, settings.overwrite, resume=True)
        check_key(settings.sign)
        settings.tracking.check()


def plan_all(runs: Sequence[Settings], ranks: Ranks, opened: Opened) -> list[NamedPlan]:
    """Plan every run of several before anything is written."""
    jobs: list[NamedPlan] = []
    for settings in runs:
        like = jobs[0].run.loader if jobs else None
        model, data, request = opened.model, opened.data, opened.resolve(settings)
        plan, run = plan_forgetting(settings, settings.method, model, data, request, ranks, like)
        jobs.append(NamedPlan(settings.out.name, settings.method, plan, run, settings.out))
    return jobs


def main_of_several(runs: Sequence[Settings], ranks: Ranks) -> None:
    """Plan all of them together, then forget and save; one alone as `main`."""
    if runs[0].dry_run:
        _print_plans(runs, ranks)
    elif len(runs) == 1:
        main(runs[0], ranks)
    else:
        each = together(ranks, lambda: assign_folders(runs))
        with claim([one.out for one in each], ranks):
            ranking = open_ranking(each[0].out, ranks, each[0].saving)
            opened = open_together(each, ranks, lambda: check_all(each), ranking)
            jobs = together(ranks, lambda: plan_all(each, ranks, opened), _facts_of_all)
            train_all(jobs, ranks, each[0].saving, each[0].overwrite)
            ranking.clear()
        if ranks.main:
            console().close(summarize(runs[0], each, [job.plan for job in jobs]))


def _print_plans(runs: Sequence[Settings], ranks: Ranks) -> None:
    """Print what each run would do on so many ranks."""
    world, wide = runs[0].dry_run, check_world(runs[0].dry_run, ranks)
    alone = Ranks(device=ranks.device)
    if len(runs) == 1:
        opened = open_together(runs, alone, runs[0].check)
        plans = [(runs[0].method, runs[0].plan(wide, opened)[0])]
    else:
        each = assign_folders(runs)
        opened = open_together(each, alone, lambda: check_all(each))
        plans = [(job.method, job.plan) for job in plan_all(each, wide, opened)]
    texts = [as_text(plan_run(plan, method, ranks.device, world)) for method, plan in plans]
    console().show_text("plan", "\n".join(texts))


def _facts_of_all(jobs: Sequence[NamedPlan]) -> Facts:
    every = {job.name: plan_facts(job.plan, job.run) for job in jobs}
    return {f"{key} of {name}": v for name, facts in every.items() for key, v in facts.items()}


def read(args: Sequence[str]) -> list[Settings]:
    """Parse the settings of each run that a command line asks for."""
    methods, flags = list(catalogue()), flags_of(Settings)
    own = [option.flag for option in list_options(Settings)]
    jobs = []
    for words in read_jobs(expand_config(complete_dry_run(args), methods, flags)):
        words = expand_recipes(words, methods, flags)
        jobs += split(words, methods, flags, own)
    return [parse(Settings, one) for one in jobs]


def start() -> None:
    """Run from the command line to the end of the process."""
    run_several(lambda: read(sys.argv[1:]), main_of_several)


if __name__ == "__main__":
    start()
