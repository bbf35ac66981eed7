"""One command line that asks for several runs, as the command lines of the single ones.

    --weights W --forget F --out runs --seed 1,2 finetune --lr 0.1,0.01 + salun random-label

`+` begins another method, and a list of numbers after `--seed` or an option of a method is one run
each; what stands before the first method is said for all of them. `--jobs FILE` has the same as
lines of a file, which may have requests of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from letheon.engine.method import Method
from letheon.errors import InputError, suggest
from letheon.regular import read_text


def split(
    args: Sequence[str],
    methods: Collection[str],
    flags: Collection[str],
    own: Collection[str] = (),
) -> list[list[str]]:
    """The arguments of each run; `args` itself where it asks for one.

    Args:
        args: the command line without the script's name.
        methods: the names a method may have.
        flags: options that take no value, with their dashes.
        own: the command's options, of which `--seed` alone may have a list.

    Raises:
        InputError: `+` without a method, an unknown method after it, or a list with a gap or with
            a number twice.
    """
    if "--help" in args or "-h" in args:
        return [list(args)]
    sections = split_sections(args)
    at = method_at(sections[0], methods, flags)
    common, sections[0] = sections[0][:at], sections[0][at:]
    if len(sections) > 1:
        for section in sections:
            if not section or section[0] not in methods:
                raise InputError(
                    f"got {section[0] if section else 'nothing'} where a method begins; expected "
                    f"one of {', '.join(methods)} before and after each +"
                    f"{suggest(section[0], methods) if section else ''}"
                )
    jobs = []
    for section in sections:
        words = [*common, *section]
        chosen = [_choices(words, k, own) for k in range(len(words))]
        jobs += [list(one) for one in itertools.product(*chosen)]
    return jobs


def split_sections(args: Sequence[str]) -> list[list[str]]:
    """Cut a command line at each `+`."""
    sections: list[list[str]] = [[]]
    for word in args:
        if word == "+":
            sections.append([])
        else:
            sections[-1].append(word)
    return sections


def read_jobs(args: Sequence[str]) -> list[list[str]]:
    """The command line of each line of `--jobs FILE`; `args` alone where there is none.

    A line holds the options of one run, its method or recipe among them, as they would stand after
    what `args` says for all; `#` begins a comment.

    Raises:
        InputError: the file cannot be read or is empty, or a line cannot be split into words.
    """
    place = next((k for k, word in enumerate(args) if word.partition("=")[0] == "--jobs"), None)
    if place is None:
        return [list(args)]
    _, equals, value = args[place].partition("=")
    end = place + (1 if equals else 2)
    value = value if equals else "".join(args[place + 1 : end])
    common = [*args[:place], *args[end:]]
    if value == "None" or "--help" in args or "-h" in args:
        return [common]
    if "+" in common:
        raise InputError("got + beside a file of runs; write it as lines of the file", "jobs")
    try:
        text = read_text(value)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"got {value}, which cannot be read ({error}); expected a text file with the options "
            "of one run a line",
            option="jobs",
        ) from error
    jobs = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(
                f"got {value}, line {number} ({error}); expected options as on a command line; "
                "mend the line",
                option="jobs",
            ) from error
        if words:
            jobs.append([*common, *words])
    if not jobs:
        raise InputError(f"got {value} without a run; expected one a line; fill it", option="jobs")
    return jobs


def flags_of(settings: type) -> list[str]:
    """The options of a script's settings that take no value, with their dashes."""
    found = []
    for name, kind in get_type_hints(settings).items():
        if kind is bool:
            option = name.replace("_", "-")
            found += [f"--{option}", f"--no-{option}"]
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found += flags_of(kind)
    return found


def method_at(words: Sequence[str], methods: Collection[str], flags: Collection[str]) -> int:
    """Where the method stands: its name, where no option waits for a value."""
    for k, word in enumerate(words):
        before = words[k - 1] if k else ""
        waits = before.startswith("--") and "=" not in before and before not in flags
        if word in methods and not waits:
            return k
    return len(words)


def _choices(words: Sequence[str], k: int, own: Collection[str]) -> list[str]:
    """What stands for word k in each run: more than one where it is an option's list of numbers."""
    word = words[k]
    option, equals, value = word.partition("=")
    if not (equals and option.startswith("--")):
        option, equals, value = words[k - 1] if k else "", "", word
    numbers = value.split(",")
    if not option.startswith("--") or (option in own and option != "--seed"):
        return [word]
    if len(numbers) == 1 or not all(_number(number) or not number for number in numbers):
        return [word]
    if "" in numbers:
        raise InputError(f"got {option} {value}; expected a number between the commas")
    twice = [n for n, count in Counter(map(float, numbers)).items() if count > 1]
    if twice:
        raise InputError(f"got {option} {value}; it has {twice[0]:g} twice; give each number once")
    return [f"{option}={number}" if equals else number for number in numbers]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def job_names(
    jobs: Sequence[tuple[int, Method, str]], catalogue: Mapping[str, type[Method]]
) -> list[str]:
    """A name for each (seed, method, request): the method's, and what tells it from the others.

    Raises:
        InputError: two are the same.
    """
    known = {kind: name for name, kind in catalogue.items()}
    seeds = len({seed for seed, _, _ in jobs}) > 1
    requests = len({request for _, _, request in jobs}) > 1
    facts = [_facts(method, known) for _, method, _ in jobs]
    names = []
    for (seed, _, request), mine in zip(jobs, facts, strict=True):
        alike = [other for other in facts if other[""] == mine[""]]
        differ = [k for k in mine if len({o[k] for o in alike if k in o}) > 1]
        parts = [mine[""], *(mine[k] for k in differ)]
        parts += [_request_name(request)] * requests + [f"seed{seed}"] * seeds
        names.append("-".join(parts))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"got {twice[0]} twice; give each method, setting, request and seed once")
    return names


def _request_name(text: str) -> str:
    """A request as it would stand in a name; of a list's file the stem."""
    kind, _, rest = text.partition(":")
    return kind + _plain(Path(rest).stem if kind in ("file", "samples") else rest)


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-+." else "_" for c in text)


def _short(value: Any) -> str:
    """A value as text; of a large number its shortest form, 1e9, where that is the same number."""
    short = re.sub(r"e\+0*", "e", f"{value:g}") if isinstance(value, float) else ""
    large = short and abs(value) >= 1e6 and float(short) == value
    return short if large else str(value)


def _facts(value: Any, known: Mapping[Any, str], path: str = "") -> dict[str, str]:
    """Every setting of a method by its path, as it would stand in a name."""
    if not dataclasses.is_dataclass(value):
        last = path.rpartition(".")[2].replace("_", "-")
        text = value.stem if isinstance(value, Path) else _short(value)
        return {path: last + _plain(text)}
    found = {path: known[type(value)]} if type(value) in known else {}
    for field in dataclasses.fields(value):
        below = f"{path}.{field.name}" if path else field.name
        found |= _facts(getattr(value, field.name), known, below)
    return found
