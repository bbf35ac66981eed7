"""`--recipe NAME`: a method with its settings, from a TOML file that says where they come from.

    set = "CIFAR-10"
    model = "resnet18"
    request = "samples"            # classes, samples or any
    status = "published"           # or "tuned"
    source = "Fan et al. 2024, ..."
    never-run = true               # by us

    [method]
    name = "salun"
    density = 0.5

    [method.inner]
    name = "random-label"
    lr = 0.013

One file is one row of a table. Those of Letheon lie in `launch/recipes/`, named by folder and file;
another file is named by its path.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from letheon.errors import InputError, suggest
from letheon.launch.joblist import method_at, split_sections
from letheon.launch.records.replay import method_words, option_name
from letheon.regular import LARGEST, read_regular

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
OPTION = "--recipe"
STATUSES = ("published", "tuned")
REQUESTS = ("classes", "samples", "any")
_TEXTS = ("set", "model", "request", "status", "source")
_FURTHER = ("never-run", "method", "result", "knowledge")


@dataclass(frozen=True)
class RecipeFile:
    """One method's settings for a set, an architecture and a kind of request."""

    name: str
    facts: Mapping[str, Any]
    """Set, model, request, status, source; result and knowledge of a search."""
    method: Mapping[str, Any]
    """Its name and its settings, those of a method inside it as a table of their own."""
    digest: str
    """First 16 hex digits of the file's SHA-256."""

    @property
    def mark(self) -> str:
        """Name and digest, as a run's record keeps them."""
        return f"{self.name}@{self.digest}"

    @property
    def status(self) -> str:
        """What the settings are worth: published or tuned, and whether they were ever run here."""
        never = ", never run" if self.facts.get("never-run") else ""
        return f"{self.facts['status']}{never}"


def list_recipes() -> list[RecipeFile]:
    """Read every recipe that comes with Letheon, by name."""
    files = sorted(FOLDER.glob("*/*.toml"))
    return [_read(file, file.relative_to(FOLDER).with_suffix("").as_posix()) for file in files]


def describe_all() -> list[str]:
    """Return a line for each recipe: its name, what it is worth and its source."""
    recipes = list_recipes()
    width = max(len(one.name) for one in recipes)
    return [f"{one.name:<{width}}  {one.status}: {one.facts['source']}" for one in recipes]


def read_recipe(name: str, option: str = "recipe") -> RecipeFile:
    """Read a recipe by its name, or a file by its path; messages call the setting `option`.

    Raises:
        InputError: there is none, it lacks a field, or it has another digest than `name` says.
    """
    plain, _, digest = name.partition("@")
    own = FOLDER / f"{plain}.toml"
    if own.is_file():
        recipe = _read(own, plain, option)
    elif plain.endswith(".toml"):
        recipe = _read(Path(plain), plain, option)
    else:
        known = [one.name for one in list_recipes()]
        raise InputError(
            f"got {plain!r}; expected one of {len(known)} recipes or a path that ends in .toml"
            f"{suggest(plain, known)}; `letheon recipes` lists them",
            option=option,
        )
    if digest and not recipe.digest.startswith(digest):
        raise InputError(
            f"got {name}, whose file has digest {recipe.digest} now; expected the same; leave the "
            "digest out to take the file as it is",
            option=option,
        )
    return recipe


def _read(file: Path, name: str, option: str = "recipe") -> RecipeFile:
    try:
        content = read_regular(file, LARGEST)
        facts = tomllib.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"got {file}, which cannot be read ({error}); expected a recipe in TOML",
            option=option,
        ) from error
    missing = [key for key in (*_TEXTS, "method") if key not in facts]
    extra = [key for key in facts if key not in (*_TEXTS, *_FURTHER)]
    for wrong, words in ((missing, "without"), (extra, "with")):
        if wrong:
            raise InputError(
                f"got {file} {words} {wrong[0]!r}; expected {', '.join(_TEXTS)}, a [method], and "
                f"at most {', '.join(_FURTHER)} beside"
                f"{suggest(wrong[0], _FURTHER) if words == 'with' else ''}; mend the file",
                option=option,
            )
    method = facts["method"]
    for key, known in (("status", STATUSES), ("request", REQUESTS)):
        if facts[key] not in known:
            raise InputError(
                f"got {file} of {key} {facts[key]!r}; expected {' or '.join(known)}"
                f"{suggest(str(facts[key]), known)}; mend the file",
                option=option,
            )
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise InputError(
            f"got {file}, whose [method] has no name; expected one; mend the file", option=option
        )
    return RecipeFile(name, facts, method, hashlib.sha256(content).hexdigest()[:16])


def format_recipe(facts: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """Write a recipe as TOML: its facts, then the method with the one inside it."""
    return "\n".join([*_table("", facts), *_table("method", method)]) + "\n"


def _table(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Write one table and those inside it; a value that is None is left out."""
    if path:
        yield f"\n[{path}]"
    inside = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    for key, value in values.items():
        if key not in inside and value is not None:
            yield f"{key.replace('_', '-')} = {_value(value)}"
    for key, value in inside.items():
        yield from _table(f"{path}.{key}".lstrip("."), value)


def _value(value: Any) -> str:
    """Write a value as TOML does: its strings, numbers and lists are nearly those of JSON."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool | str | Path):
        text = value if isinstance(value, bool) else str(value)
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def expand_recipes(
    args: Sequence[str], methods: Collection[str], flags: Collection[str]
) -> list[str]:
    """Put the method that a recipe names, and its options, in the place of `--recipe NAME`.

    Of several runs each section may have one. Options that stand after it win over the recipe's.
    Name and digest stay on the command line, for the record.

    Args:
        args: the command line without the script's name.
        methods: the names a method may have.
        flags: options that take no value, with their dashes.

    Raises:
        InputError: no such recipe, or a method beside it.
    """
    words: list[str] = []
    for number, section in enumerate(split_sections(args)):
        words += [*(["+"] if number else []), *_expand(section, methods, flags)]
    return words


def _expand(section: list[str], methods: Collection[str], flags: Collection[str]) -> list[str]:
    option = next((k for k, w in enumerate(section) if w.partition("=")[0] == OPTION), None)
    if option is None:
        return section
    _, equals, value = section[option].partition("=")
    end = option + (1 if equals else 2)
    value = value if equals else "".join(section[option + 1 : end])
    before, after = section[:option], section[end:]
    others = [part for part in (before, after) if method_at(part, methods, flags) < len(part)]
    if value == "None" or (others and "@" in value):
        return section  # a replay: the settings themselves stand beside it
    if others:
        raise InputError(
            f"got {value} beside a method; a recipe names its own; leave the method out, and write "
            "what is to differ after the recipe",
            option="recipe",
        )
    if value == "list":
        print("\n".join(describe_all()))
        raise SystemExit(0)
    recipe = read_recipe(value)
    named = {option_name(word) for word in after if word.startswith("--")}
    own = method_words(recipe.method, Path(recipe.name), named)
    return [*before, *own, *after, f"{OPTION}={recipe.mark}"]
