"""List the recipes: methods with settings, and where each comes from.

    letheon recipes
    letheon recipes --show cifar10-resnet18-samples/salun

One line a recipe: its name, what it is worth (published or tuned, and whether it was ever run
here), and its source. `letheon forget --recipe NAME` runs one; `docs/recipes.md` has the rest.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from letheon.engine.distributed import Ranks
from letheon.launch.command import run_command
from letheon.launch.console.summary import console
from letheon.launch.records.replay import method_words
from letheon.launch.tuning.recipe_file import describe_all, list_recipes, read_recipe


@dataclass(frozen=True, kw_only=True)
class Settings:
    """List the recipes, or show one with its options."""

    show: str = ""
    """Recipe to show: its name, or the path of a file."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Print all recipes, one a line, or one of them."""
    if not ranks.main:
        return
    if settings.show:
        recipe = read_recipe(settings.show, "show")
        if console().json:
            facts = {"name": recipe.name, **recipe.facts, "digest": recipe.digest}
            console().show(json.dumps(facts, default=str))
            return
        for key, value in recipe.facts.items():
            if key != "method":
                print(f"{key:<10}{value}")
        print(f"{'options':<10}{shlex.join(method_words(recipe.method, Path(recipe.name)))}")
        print(f"{'digest':<10}{recipe.digest}")
        return
    if console().json:
        rows = [{"name": one.name, "status": one.status, **one.facts} for one in list_recipes()]
        console().show(json.dumps(rows, default=str))
        return
    print("\n".join(describe_all()))


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
