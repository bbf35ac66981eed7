"""Train the original model on a whole training set.

    python launch/train.py --data digits --model small --epochs 30 --lr 0.05 --out runs/original
    torchrun --nproc_per_node=8 launch/train.py --data /data/imagenet --model resnet50 \
        --batch-size 1024 --lr 0.4 --warmup 5 --out runs/original

Leaves a run folder: settings, versions, metrics as JSON lines and weights.safetensors.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from letheon.engine.checkpoints.saver import SaveOptions
from letheon.engine.distributed import Ranks
from letheon.engine.method import Run
from letheon.engine.models.classifier import build, preset_of, without_memory
from letheon.engine.runs.agreement import plan_facts
from letheon.engine.runs.loggers import TrackingOptions
from letheon.engine.runs.plan import JobOptions, Plan, train_and_save
from letheon.engine.runs.run_folder import check_free
from letheon.engine.runs.signature import check_key
from letheon.launch.api import plan_training
from letheon.launch.command import parse, run_several, together
from letheon.launch.console.following import changed_options, command_line, free_beside
from letheon.launch.console.summary import Summary, console, read_facts
from letheon.launch.planning.dry_run import as_text, check_world, plan_run
from letheon.launch.records.claim import claim
from letheon.launch.records.replay import expand_config
from letheon.loaders.canaries import CanaryOptions, draw_canaries, plant
from letheon.loaders.forget_request import name_first_class
from letheon.loaders.options import OF_IMAGES
from letheon.methods.train import Train


@dataclass(frozen=True, kw_only=True)
class Settings(JobOptions):
    """Train a network on all classes: the original model, which is to forget later."""

    out: Path
    """Run folder to make."""
    model: str = "small"
    """Architecture by name, such as resnet50; an unknown name lists them all."""
    size: int | None = None
    """Input pixels, where they are not to be the architecture's own."""
    method: Train = field(default_factory=Train)
    planting: CanaryOptions = field(default_factory=CanaryOptions)
    overwrite: bool = False
    """Replace a run that is already in --out, once the new one is whole."""
    config: Path | None = None
    """File settings.json of an earlier run, to run it again; what is said beside it wins."""
    sign: Path | None = None
    """Ed25519 private key (PEM) that signs the run's manifest."""
    dry_run: int = 0
    """Plan for so many ranks (1 to 512), print what each would read and hold, and stop; nothing is
    written. One process is enough."""
    saving: SaveOptions = field(default_factory=SaveOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def plan(self, ranks: Ranks) -> tuple[Plan, Run]:
        """Find everything that can be wrong with the input, before anything is written."""
        check_free(self.out, self.overwrite, resume=True, repeat=True)
        check_key(self.sign)
        self.tracking.check()
        data = self.open_data()
        canaries = draw_canaries(self.planting, data, self.seed)
        preset = preset_of(self.model)
        if self.size is not None:
            preset = dataclasses.replace(preset, size=self.size, resize_to=self.size)
        # A plan needs no numbers, and a network may be larger than the memory here.
        with without_memory() if self.dry_run else nullcontext():
            model = build(self.model, len(data.classes), self.seed, preset)
        model.class_names, model.canaries = data.classes, canaries
        return plan_training(self, self.method, model, plant(data, canaries), ranks)


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, then train and save."""
    if settings.dry_run:
        plan, _ = settings.plan(check_world(settings.dry_run, ranks))
        text = as_text(plan_run(plan, settings.method, ranks.device, settings.dry_run))
        console().show_text("plan", text)
        return
    with claim([settings.out], ranks):
        plan, run = together(ranks, lambda: settings.plan(ranks), lambda one: plan_facts(*one))
        train_and_save(
            plan, settings.method, run, settings.out, settings.saving, settings.overwrite
        )
    if ranks.main:
        console().close(summarize(settings, plan))


def summarize(settings: Settings, plan: Plan) -> Summary:
    """Say what was trained, and how it is made to forget."""
    images, name, epochs = len(plan.data.train), plan.model.name, plan.recipe.epochs
    duration = f"{epochs} epoch{'s' * (epochs != 1)}"
    done = f"trained {name} for {duration} on {images:,} images of {settings.data}"
    following = None
    if (first_class := name_first_class(plan.data)) is not None:
        following = command_line(
            "forget",
            [
                *changed_options(settings, OF_IMAGES), "--weights", settings.out, "--forget",
                f"class:{first_class}", "--out", free_beside(settings.out, "salun"), "salun",
                "random-label",
            ],
        )  # fmt: skip
    out = str(settings.out.absolute())
    facts = {
        "model": name,
        "epochs": plan.recipe.epochs,
        "images": images,
        **read_facts(settings.out),
    }
    return Summary("train", done, facts, out, following)


def start() -> None:
    """Run from the command line to the end of the process."""
    run_several(
        lambda: [parse(Settings, expand_config(sys.argv[1:]))],
        lambda runs, ranks: main(runs[0], ranks),
    )


if __name__ == "__main__":
    start()
