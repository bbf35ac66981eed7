"""Make saliency masks for SalUn, of several densities at once.

    python launch/mask.py --weights runs/original --forget class:3,8 --out runs/masks.safetensors

One bit a weight, in one safetensors file that names the weights and the request it was made from;
`salun --mask FILE --density 0.5` uses it. (Without --mask, SalUn makes the same mask itself.) A
command that was stopped goes on when it is given again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.checkpoints.sweep_state import Sweeps, clear_preparation
from letheon.engine.distributed import Ranks
from letheon.engine.memory.sharding import check_weights, shard_run
from letheon.engine.method import Run
from letheon.engine.precision import say_slower
from letheon.engine.recipe import Recipe
from letheon.engine.runs.agreement import plan_facts
from letheon.engine.runs.plan import Plan
from letheon.engine.runs.run_folder import check_free_file, source_facts
from letheon.engine.runs.stop import Poll
from letheon.folders import ranking_folder, state_folder
from letheon.launch.command import run_command, together
from letheon.launch.console.following import changed_options, command_line, free_beside
from letheon.launch.console.summary import Summary, console
from letheon.launch.options import OF_REQUEST, Forgetting, Opened, open_ranking, open_together
from letheon.launch.planning.dry_run import check_world, describe_sweeps
from letheon.launch.records.claim import claim
from letheon.loaders.factory import kind_of
from letheon.loaders.options import OF_IMAGES
from letheon.methods.saliency import mask_facts, require_densities, saliency_masks, save_masks
from letheon.methods.salun import SalUn
from letheon.progress import note, say


@dataclass(frozen=True, kw_only=True)
class Settings(Forgetting):
    """Rank the weights of a network by their saliency for what is to be forgotten."""

    out: Path
    """File to write, .safetensors."""
    densities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Shares of the weights that may move."""
    batch_size: int = 256
    """Images of one global batch."""
    dry_run: int = 0
    """Plan for so many ranks (1 to 512), print what each would read and hold, and stop; nothing is
    written. One process is enough."""
    overwrite: bool = False
    """Replace a file that is already there."""
    save_every: str = "10min"
    """Save what has been added up every so often: 10min, 30s, 2h, or 500steps (batches). off: only
    when a signal stops the command."""

    def check(self) -> None:
        """Refuse a file that cannot be written."""
        check_free_file(self.out, self.overwrite)

    def plan(self, ranks: Ranks, opened: Opened) -> tuple[Plan, Run]:
        """Find everything else that can be wrong, before anything is written."""
        request, recipe = opened.resolve(self), Recipe(batch_size=self.batch_size)
        plan = Plan(self, recipe, opened.model, opened.data, request)
        run = plan.run(ranks)
        require_densities(run, self.densities, "densities")
        if run.splits:
            check_weights(run.model)
        return plan, run


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, then sum the gradients, rank the weights and save."""
    if settings.dry_run:
        opened = open_together([settings], Ranks(device=ranks.device), settings.check)
        _, run = settings.plan(check_world(settings.dry_run, ranks), opened)
        text = describe_sweeps("mask", {"forget": int(run.forget.sum())}, settings.dry_run)
        console().show_text("plan", text)
        return
    with claim([settings.out], ranks, settle=remove_old_state):
        saving = together(ranks, lambda: SaveOptions(settings.save_every))
        ranking = open_ranking(settings.out, ranks, saving)
        opened = open_together([settings], ranks, settings.check, ranking)
        plan, run = together(
            ranks, lambda: settings.plan(ranks, opened), lambda one: plan_facts(*one)
        )
        if ranks.main and (slower := say_slower(run.precision, ranks.device)):
            say(slower)
        if run.splits:
            shard_run(run)
        else:
            run.precision.apply(run.model, ranks.device)
        sweeps = open_sweeps(settings, run)
        masks, facts = saliency_masks(run, settings.densities), mask_facts(run)
        sweeps.close()
        if run.shards is not None:
            masks = [run.shards.gather(group) for group in masks]
        if ranks.main:
            by_density = dict(zip(settings.densities, masks, strict=True))
            save_masks(settings.out, by_density, facts)
            sweeps.clear()
            ranking.clear()
            console().close(summarize(settings, plan))


def open_sweeps(settings: Settings, run: Run) -> Sweeps:
    """Let the run's pass be saved beside the mask, and go on where the same one was stopped."""
    poll = Poll(run.ranks, *SaveOptions(settings.save_every).interval)
    run.sweeps = Sweeps(state_folder(settings.out), poll, settings.out)
    origin = {"images": run.images, "loader": kind_of(run.loader), **source_facts()}
    known = run.sweeps.load(origin)
    if known and run.ranks.main:
        note(f"{settings.out}: goes on with the unfinished mask")
    return run.sweeps


def remove_old_state(out: Path) -> None:
    """Remove what was saved of a mask that was written all the same before its process died."""
    for state in (state_folder(out), ranking_folder(out)):
        if not (out.is_file() and state.is_dir()):
            continue
        files = [file for file in state.rglob("*") if file.is_file()]
        if all(file.stat().st_mtime_ns <= out.stat().st_mtime_ns for file in files):
            clear_preparation(state)


def summarize(settings: Settings, plan: Plan) -> Summary:
    """Say what was ranked, and how the masks are used."""
    assert plan.request is not None
    count = len(settings.densities)
    done = f"ranked the weights of {plan.model.name} for {plan.request.text}: {count} masks"
    usual = SalUn.density
    density = min(settings.densities, key=lambda one: abs(one - usual))
    following = command_line(
        "forget",
        [
            *changed_options(settings, [*OF_IMAGES, "seed", *OF_REQUEST]),
            "--weights", settings.weights, "--forget", settings.forget,
            "--out", free_beside(settings.out, "salun"), "salun", "--mask", settings.out,
            *([] if density == usual else ["--density", density]), "random-label",
        ],
    )  # fmt: skip
    facts = {"densities": settings.densities, "request": plan.request.text}
    return Summary("mask", done, facts, str(settings.out.absolute()), following)


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
