"""Print help: everyday options first, the rest by groups; of a method its definition and rates."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from letheon.engine.method import Method
from letheon.launch.console.everyday import EVERYDAY, EXAMPLES, GROUPS, OWN, UNITS
from letheon.launch.console.options import (
    Option,
    describe_kind,
    find_methods,
    list_method_options,
    list_options,
    takes_method,
)
from letheon.launch.console.summary import bold
from letheon.methods import catalogue, inner_fields
from letheon.saved_help import page_width

MOST = 10
"""Options that the first part shows."""
_COLUMN = 26  # where the texts of options begin
LEGEND = (
    "F: forget set; R: retain set; CE: mean cross-entropy; f: pooled feature; z: logits; o: the "
    "original; KL_T: divergence at temperature T times T^2. Cost of an image: 1 forward and "
    "backward, 1/3 forward alone; g: images whose gradient is taken, l: that are only looked at, "
    "of N, N_f to forget, N_r to retain, in E epochs."
)


def show_help(script: str, settings: type, words: Sequence[str]) -> str:
    """Write the help that a command line asks for: of the methods it names, else of the script.

    Args:
        script: its name, such as ``forget``.
        settings: the dataclass of its options.
        words: the arguments.
    """
    methods, width = find_methods(settings, words), page_width()
    if methods:
        pages = [list(describe_method(method, width)) for method in methods]
        lines = [line for page in pages for line in ("", *page)][1:]
        lines += ["", *_wrap(f"What holds for every method: letheon {script} --help", width)]
    else:
        lines = list(_describe_script(script, settings, width))
    return "\n".join(line.rstrip() for line in lines)


def _describe_script(script: str, settings: type, width: int) -> Iterator[str]:
    options = list_options(settings)
    order = EVERYDAY.get(script, ())
    first = [option for name in order for option in options if option.name == name]
    first = first or options[:MOST]
    rest = [option for option in options if option not in first]
    first.sort(key=lambda one: not one.required)
    places = [f"[{one.flag}]" for one in options if one.positional and not one.required]
    needed = [f"{one.flag} {_value(one)}".strip() for one in options if one.required]
    needed = [word.partition(" ")[0] if word.isupper() else word for word in needed]
    method = ["METHOD", "[its options]"] if takes_method(settings) else []
    yield from _wrap(
        f"usage: letheon {script} {' '.join([*needed, *places, '[options]', *method])}", width
    )
    yield ""
    yield from _paragraphs(inspect.getdoc(settings) or "", width)
    yield from _group("Everyday options" if rest else "Options", first, width)
    if takes_method(settings):
        page = f"letheon {script} METHOD --help: definition, cost, options"
        yield from _title(f"Methods ({page})", width)
        yield from _wrap(", ".join(catalogue()), width, "  ", hyphens=False)
    for title, group in _by_title(rest, settings):
        yield from _group(title, group, width)
    yield from _title("How much is printed", width)
    yield from _entry("--quiet", "Print results, warnings and errors alone.", width)
    yield from _entry("--json", "Print one JSON object at the end.", width)
    yield from _entry("-h, --help", "Show this text.", width)
    yield from _example(f"letheon {script} {EXAMPLES[script]}" if script in EXAMPLES else "", width)


def _by_title(options: Sequence[Option], settings: type) -> Iterator[tuple[str, list[Option]]]:
    """Group options by the title of the dataclass that declares them, the script's own first."""

    def title(option: Option) -> str:
        return OWN if option.owner is settings else GROUPS.get(option.owner.__name__, OWN)

    names = dict.fromkeys(sorted(map(title, options), key=lambda name: name != OWN))
    for name in names:
        yield name, [one for one in options if title(one) == name]


def describe_method(method: type[Method], width: int) -> Iterator[str]:
    """Write a method's page: formula, cost, source, its own options, optimization and rates."""
    head, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
    yield from _wrap(f"{method.name}: {' '.join(head.split())}", width)
    facts = method.definition
    if facts is not None:
        yield ""
        named = (
            ("known as", facts.alias), ("definition", facts.formula), ("reads", facts.reads),
            ("cost", facts.cost), ("source", facts.source),
        )  # fmt: skip
        for title, text in named:
            if text:
                yield from _entry(title, text, width, 14)
    if rest:
        yield ""
        yield from _paragraphs(rest, width)
    options = list_method_options(method)
    own = [one for one in options if issubclass(method, one.owner)]
    yield from _group(f"Options of {method.name}", own, width)
    shared = [one for one in options if one not in own]
    yield from _group("Optimization (the defaults are this method's)", shared, width)
    rates = list(_list_rates(method, width))
    if rates:
        yield from _title("Published settings (letheon forget --recipe NAME)", width)
        yield from rates
    if facts is not None:
        yield ""
        yield from _wrap(LEGEND, width)
    inner = " random-label" if inner_fields(method) else ""
    call = "--weights runs/original --forget class:3,8 --out runs/{0} {0}{1}"
    yield from _example(f"letheon forget {call.format(method.name, inner)}", width)


def _list_rates(method: type[Method], width: int) -> Iterator[str]:
    """List the recipes of a method that come from a paper or its authors' code."""
    from letheon.launch.tuning.recipe_file import list_recipes  # it looks back at the command line

    for recipe in list_recipes():
        if recipe.method["name"] != method.name or recipe.facts["status"] != "published":
            continue
        yield f"  {recipe.name}"
        settings = ", ".join(_settings(recipe.method))
        yield from _wrap(settings or "as the defaults", width, "    ")
        yield from _wrap(str(recipe.facts["source"]), width, "    ")


def _settings(method: Any) -> Iterator[str]:
    for key, value in method.items():
        if isinstance(value, dict):
            yield f"{value['name']} ({', '.join(_settings(value))})"
        elif key != "name":
            yield f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def _group(title: str, options: Sequence[Option], width: int) -> Iterator[str]:
    """Write a titled group of options; nothing of an empty one."""
    if options:
        yield from _title(title, width)
    for option in options:
        head = option.flag
        if option.kind is bool and option.default is True:
            head = f"--no-{head.removeprefix('--')}"
        # a setting that the text names is an option here
        text = re.sub(r"`(\w+_\w+)`", lambda m: f"--{m[1].replace('_', '-')}", option.text)
        if option.required:
            text = f"{text} (required)"
        elif option.kind is bool:
            text = f"Without it: {text[0].lower()}{text[1:]}" if option.default else text
        elif option.default not in (None, "", ()):
            text = f"{text} (default: {_default(option.default)})"
        yield from _entry(f"{head} {_value(option)}".rstrip(), text, width)


def _title(text: str, width: int) -> Iterator[str]:
    yield from ("", *map(bold, _wrap(text, width)))


def _value(option: Option) -> str:
    """The word for an option's value; none of a switch, or of one that goes by its place."""
    if option.positional or option.kind is bool:
        return ""
    return describe_kind(option.kind, UNITS.get(option.name, ""))


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_default(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _entry(head: str, text: str, width: int, column: int = _COLUMN) -> Iterator[str]:
    """Write a head and its text beside it, or below where the head is long or the page narrow."""
    column = column if width >= 60 else 6
    lines = _wrap(text, width, " " * column) or [""]
    if len(head) + 4 <= column:
        lines[0] = f"  {head}".ljust(column) + lines[0].lstrip()
    else:
        yield from _wrap(head, width, "  ", hyphens=False)
    yield from lines


def _paragraphs(text: str, width: int) -> Iterator[str]:
    for number, part in enumerate(text.split("\n\n")):
        yield from [""] * (number > 0)
        yield from _wrap(" ".join(part.split()), width)


def _wrap(text: str, width: int, indent: str = "", hyphens: bool = False) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=hyphens,
    )  # fmt: skip


def _example(call: str, width: int) -> Iterator[str]:
    """Write one call, over several lines where it is long."""
    if call:
        yield from _title("Example", width)
        lines = _wrap(call, width - 6)
        for number, line in enumerate(lines):
            yield f"  {'  ' * (number > 0)}{line}{' ' + chr(92) if line != lines[-1] else ''}"
