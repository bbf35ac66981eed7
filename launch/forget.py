"""Make a trained network forget classes, by one method.

    python launch/forget.py --weights runs/original --forget class:3,8 --out runs/salun \
        salun --density 0.5 random-label --epochs 5
    torchrun --nproc_per_node=8 launch/forget.py --data /data/imagenet --weights resnet50.pth \
        --model resnet50 --forget file:random100.txt --out runs/spkd spkd

`--help` lists the methods; `launch/forget.py METHOD --help` their options. `retrain` starts from
new weights of the same architecture. Leaves a run folder with the request it resolved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from letheon.engine.distributed import Ranks
from letheon.engine.method import Method, Run
from letheon.engine.model import build
from letheon.engine.record import check_free
from letheon.launch.command import method_choice, run_command, together
from letheon.launch.job import Plan, train_and_save
from letheon.launch.requests import Forgetting
from letheon.loaders.request import forget_mask

if TYPE_CHECKING:
    Choice = Method
else:
    Choice = method_choice()


@dataclass(frozen=True, kw_only=True)
class Settings(Forgetting):
    """Make a trained network forget what --forget names."""

    method: Choice
    out: Path
    """Run folder to make."""
    overwrite: bool = False
    """Replace a run that is already in --out."""

    def plan(self, ranks: Ranks) -> tuple[Plan, Run]:
        """Everything that can be wrong with the input, found before anything is written."""
        check_free(self.out, self.overwrite)
        model, data, request = self.opened(ranks)
        if self.method.fresh:
            names = model.class_names
            model = build(model.name, model.classes, self.seed, model.preset)
            model.class_names = names
        forget = forget_mask(request, data.train.labels)
        plan = Plan(self, self.method.recipe, model, data, forget, request)
        run = plan.run(ranks)
        self.method.check(run)
        return plan, run


def main(settings: Settings, ranks: Ranks) -> None:
    """Plan together, then forget and save."""
    plan, run = together(ranks, lambda: settings.plan(ranks))
    train_and_save(plan, settings.method, run, settings.out)


if __name__ == "__main__":
    run_command(Settings, main)
