"""Do a whole job from one file: train, forget by several methods, evaluate, report.

    letheon run launch/recipes/digits.toml --out runs/digits --seed 1
    torchrun --nproc_per_node=8 -m letheon.launch.jobs.run imagenet.toml --out runs/imagenet

The file is TOML; its names are those of the scripts' options, with _ for -:

    data = "digits"                      # options of every step stand on top

    [train]                              # left out where [forget] names weights
    model = "small"
    epochs = 30

    [forget]
    forget = "class:3,8"
    [[forget.methods]]
    name = "salun"
    density = 0.5
    inner = { name = "random-label", epochs = 6, lr = 0.02 }

    [evaluate]
    downstream = "digits-varied"
    report = true

All is done in one process (or one a rank), the methods in one pass over the data. The same command
goes on with a job that was stopped: what is finished is left out, the table too unless something
that it was made of has changed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.runs.run_folder import FINISHED, ORIGIN
from letheon.engine.runs.stop import check
from letheon.errors import InputError, suggest
from letheon.launch import evaluate, forget, train
from letheon.launch.command import parse, run_command, together
from letheon.launch.console.summary import console
from letheon.launch.records.replay import method_words, option_words
from letheon.loaders.forget_request import resolve
from letheon.regular import read_text

SECTIONS = ("train", "forget", "evaluate")
_OWN = ("recipe", "out", "seed", "device")  # options of this command
_FLAG = r"--([a-z][a-z0-9-]*)"
_SEED = "# --seed "  # first line of the recipe that is kept


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train, forget by several methods, evaluate and report, as one file says."""

    recipe: tyro.conf.Positional[Path]
    """TOML file of the job."""
    out: Path
    """Folder of the job: original/, a folder a method, and table/."""
    seed: int = 1
    """Seed of the job, where the file has none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is some, else the CPU."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Do the steps of the file one after another; those that are finished are left out."""
    recipe = together(ranks, lambda: read_recipe(settings.recipe))
    tables: dict[str, dict[str, Any]] = {name: recipe.pop(name, {}) for name in SECTIONS}
    common = {"seed": settings.seed, "device": settings.device, **recipe}
    out, original = settings.out, settings.out / "original"
    trains = "weights" not in tables["forget"]
    original = Path(tables["forget"].pop("weights", original))
    methods = tables["forget"].pop("methods")
    words = [*option_words({**common, **tables["forget"]}), "--weights", str(original)]
    words += ["--out", str(out)]
    first = [*option_words({**common, **tables["train"]}), "--out", str(out / "original")]
    mistakes = _Place(settings.recipe, frozenset(recipe))
    requested = together(ranks, lambda: _read_methods(words, methods, mistakes))
    with mistakes.of("forget"):
        runs = together(ranks, lambda: forget.assign_folders(requested))
    with mistakes.of("train"):
        training = together(ranks, lambda: parse(train.Settings, first)) if trains else None
    last = [*option_words({**common, **tables["evaluate"]}), "--overwrite"]
    last += ["--original", str(original), "--out", str(out / "table")]
    retrained = [str(one.out) for one in runs if one.method.kind == "reference"]
    others = [str(one.out) for one in runs if str(one.out) not in retrained]
    last += [*(["--retrained", *retrained] if retrained else [])]
    last += [*(["--runs", *others] if others else [])]
    with mistakes.of("evaluate"):
        evaluation = together(ranks, lambda: parse(evaluate.Settings, last))
    together(ranks, lambda: _keep_recipe(settings, ranks))
    trained = training is None or (training.out / FINISHED).is_file()
    if not trained:
        with mistakes.of("forget"):
            together(ranks, lambda: _check_requests(runs))
        with mistakes.of("evaluate"):
            together(ranks, lambda: _check_downstream(evaluation))

    console().part = True
    if training is not None and not trained:
        with mistakes.of("train"):
            train.main(training, ranks)
        check(ranks)
    if any(not (one.out / FINISHED).is_file() for one in runs):
        with mistakes.of("forget"):
            several = len(runs) > 1
            forget.main_of_several(requested, ranks) if several else forget.main(runs[0], ranks)
    console().part = False
    check(ranks)
    with mistakes.of("evaluate"):
        evaluate.main(evaluation, ranks, keep=True)


@dataclass(frozen=True)
class _Place:
    """Where in the file a mistake stands; messages name its keys, which are no options here."""

    path: Path
    common: frozenset[str]
    """Keys that stand on top of the file."""

    @contextmanager
    def of(self, section: str, method: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Name the file, the section, its method and the key in the mistakes found inside."""
        try:
            yield
        except InputError as error:
            option = error.option.rpartition(".")[2]
            if option in _OWN:
                raise
            text = str(error).replace("letheon run --help", f"letheon {section} @help")
            named = re.findall(_FLAG, text)
            key = (option or (named[0] if named else "")).replace("-", "_")
            text = re.sub(_FLAG, lambda found: found[1].replace("-", "_"), text)
            place = f"[{section}]"
            if method and _words_of(method) & {key, *re.findall(r"[\w-]+", text.partition(";")[0])}:
                place = f"[[{section}.methods]] {method['name']}"
            where = f"{self.path}" if key in self.common else f"{self.path}, {place}"
            error.args = (f"{where}: {f'{key}: ' * bool(option)}{text.replace('@help', '--help')}",)
            error.option = ""
            raise


def _read_methods(
    words: Sequence[str], methods: Sequence[Mapping[str, Any]], mistakes: _Place
) -> list[forget.Settings]:
    """Parse the runs; each method alone first, so that a mistake is named with its method."""
    joined: list[str] = []
    for method in methods:
        alone = list(method_words(method, mistakes.path))
        with mistakes.of("forget", method):
            forget.read([*words, *alone])
        joined += [*(["+"] if joined else []), *alone]
    with mistakes.of("forget"):
        return forget.read([*words, *joined])


def _words_of(method: Mapping[str, Any]) -> set[str]:
    """Return the name and the keys of a method and of those that it wraps."""
    inner = [value for value in method.values() if isinstance(value, Mapping)]
    own = {key for key, value in method.items() if key != "name" and value not in inner}
    return own.union({str(method.get("name"))}, *map(_words_of, inner))


def _check_requests(runs: Sequence[forget.Settings]) -> None:
    """Refuse a request that the images cannot fulfil before hours of training are spent on it."""
    data = runs[0].open_data()
    for one in runs:
        if not one.ranking and one.forget != "canaries":  # those are known once it is trained
            resolve(one.forget, data, one.seed)


def _check_downstream(settings: evaluate.Settings) -> None:
    if settings.downstream is not None:
        settings.open_domains(settings.downstream)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the file of a job.

    Raises:
        InputError: no such file, no TOML, an unknown section or no method.
    """
    try:
        recipe = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"got {path}, which cannot be read ({error}); expected TOML") from error
    for name, value in recipe.items():
        if name in SECTIONS and not isinstance(value, Mapping):
            raise InputError(
                f"got {name} = {value!r:.40} in {path}; expected a section [{name}]; mend the file"
            )
        if isinstance(value, Mapping) and name not in SECTIONS:
            raise InputError(
                f"got section [{name}] in {path}; expected one of {', '.join(SECTIONS)}"
                f"{suggest(name, SECTIONS)}"
            )
    methods = recipe.get("forget", {}).get("methods", [])
    if not isinstance(methods, list) or not methods or not all(map(_is_method, methods)):
        raise InputError(
            f"got {path} without a method; expected [[forget.methods]], such as one named salun"
        )
    return recipe


def _is_method(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def _keep_recipe(settings: Settings, ranks: Ranks) -> None:
    """Keep the file beside the runs; refuse another one once one of its runs has begun."""
    text = f"{_SEED}{settings.seed}\n" + read_text(settings.recipe)
    kept = settings.out / "recipe.toml"
    before = read_text(kept) if kept.is_file() else ""
    if before and _content(before) == _content(text):
        return
    if before and any(settings.out.glob(f"*/{ORIGIN}")):
        raise InputError(
            f"got {settings.out}, which holds the runs of another recipe or seed (recipe.toml "
            "there says which); name another folder",
            option="out",
        )
    if ranks.main:
        settings.out.mkdir(parents=True, exist_ok=True)
        durable.write(kept, text)


def _content(text: str) -> tuple[str, dict[str, Any]]:
    """Return the seed and the settings of a recipe that is kept; comments do not count."""
    first = text.partition("\n")[0]
    return first.removeprefix(_SEED), tomllib.loads(text)


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
