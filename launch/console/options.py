"""The options of a script as a list: flag, type, default and help, read from its dataclass."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from letheon.engine.method import Method
from letheon.errors import InputError, suggest
from letheon.launch.console.everyday import UNITS
from letheon.launch.console.summary import OPTIONS
from letheon.methods import catalogue, inner_fields

HELP = ("--help", "-h")
METHOD = "--method"
"""What is typed where a method's name is meant; there is no such option."""
NEAR = 0.7
"""Share of equal letters from which an option is near; all have their dashes in common."""


@dataclass(frozen=True)
class Option:
    """One option of a command line."""

    name: str
    """Name of the field."""
    owner: type
    """Dataclass that declares it."""
    kind: Any
    """Its type, without None."""
    default: Any
    """MISSING where it is required."""
    positional: bool = False

    @property
    def flag(self) -> str:
        """Name on the command line: with dashes, or in capitals where it goes by its place."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        """Whether the command cannot do without."""
        return self.default is MISSING

    @property
    def choices(self) -> tuple[Any, ...]:
        """The closed set of its values; empty where it is open."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def text(self) -> str:
        """The docstring of its field."""
        return " ".join(field_docs(self.owner).get(self.name, "").split())


def list_options(settings: type, instance: Any = None) -> list[Option]:
    """List the options of a dataclass and of those inside it; methods' are not among them.

    Args:
        settings: the dataclass.
        instance: one of it, whose values are the defaults.
    """
    found = []
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        positional = tyro.conf.Positional in _markers(hints[field.name])
        kind, default = _plain(hints[field.name]), _default(field, instance)
        if holds_method(kind) or kind is Method:
            continue
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found += list_options(kind, None if default is MISSING else default)
        else:
            found.append(Option(field.name, _owner(settings, field), kind, default, positional))
    return found


def holds_method(kind: Any) -> bool:
    """Whether a field's type is a choice of methods."""
    kinds = [_plain(one) for one in get_args(kind)] if _is_union(kind) else []
    return any(isinstance(one, type) and issubclass(one, Method) for one in kinds)


def takes_method(settings: type) -> bool:
    """Whether a script's command line names a method."""
    hints = get_type_hints(settings, include_extras=True)
    return any(holds_method(_plain(hints[field.name])) for field in fields(settings))


def list_method_options(method: type[Method]) -> list[Option]:
    """List a method's own options, then those of its optimization with its defaults."""
    found = list_options(method)
    return sorted(found, key=lambda one: not issubclass(method, one.owner))


def find_methods(settings: type, words: Sequence[str]) -> list[type[Method]]:
    """Find the methods that a command line names, the outer one first."""
    return [catalogue()[words[place]] for place in _method_places(settings, words)]


def put_methods_first(settings: type, words: Sequence[str]) -> list[str]:
    """Put the names of methods before all options, which may then stand in any order.

    The parser asks for a method's options behind its name; but no two options of a command line
    share a name, so that their places say nothing.
    """
    places = _method_places(settings, words)
    others = [word for place, word in enumerate(words) if place not in places]
    return [*(words[place] for place in places), *others]


def _method_places(settings: type, words: Sequence[str]) -> list[int]:
    methods = catalogue() if takes_method(settings) else {}
    options = list_options(settings)
    found: list[int] = []
    before = ""
    for place, word in enumerate(words):
        if word in methods and not _waits(before, options):
            found.append(place)
            options += list_method_options(methods[word])
            if not inner_fields(methods[word]):
                break
        before = word
    return found


def _waits(before: str, options: Sequence[Option]) -> bool:
    """Whether an option takes the word behind it; one of a method that is not named yet, too."""
    if not before.startswith("--") or "=" in before:
        return False
    flag = before.replace("_", "-")
    if not any(flag in _forms(option) for option in options):
        options = [one for method in catalogue().values() for one in list_method_options(method)]
    return flag not in _switches(options)


def _refuse_twins(settings: type, methods: Sequence[type[Method]]) -> None:
    """Refuse a method with a setting named as one of the command or of the method round it."""
    owners = {option.flag: "the command" for option in list_options(settings)}
    for method in methods:
        for option in list_options(method):
            if option.flag in owners:
                raise InputError(
                    f"got method {method.name!r}, whose setting {option.name!r} is an option of "
                    f"{owners[option.flag]} too; expected another name, in the method's class"
                )
            owners[option.flag] = f"the method {method.name!r}"


def _switches(options: Sequence[Option]) -> set[str]:
    """The spellings of the options that take no value."""
    return {form for option in options if option.kind is bool for form in _forms(option)}


def refuse_unknown(settings: type, words: Sequence[str]) -> None:
    """Refuse an option, a value of a closed set or a method that does not exist, with a near one.

    What is not refused here may still be by the parser, which looks at types.

    Raises:
        InputError: the first word that is none of the known.
    """
    if any(word.startswith("--tyro-") for word in words):
        return  # the parser's own, which print what a shell completes
    methods = find_methods(settings, words)
    _refuse_twins(settings, methods)
    by_flag = _index(settings, methods)
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if not flag.startswith("--") or flag in (*HELP, "--"):
            continue
        if flag not in by_flag:
            refuse_unknown_method(settings, words)  # whose own option this may be
            raise InputError(
                f"got {flag}; expected an option that the help lists"
                f"{_elsewhere(settings, methods, flag) or _suggest_flag(settings, flag, by_flag)}"
            )
        follows = words[place + 1] if place + 1 < len(words) else ""
        _refuse_choice(by_flag[flag], value if equals else follows)
    refuse_unknown_method(settings, words)


def _index(settings: type, methods: Sequence[type[Method]]) -> dict[str, list[Option]]:
    """The options of a script and of the methods it was given, by their spellings."""
    options = list_options(settings)
    options += [one for method in methods for one in list_method_options(method)]
    by_flag: dict[str, list[Option]] = {}
    for option in options:
        for form in _forms(option):
            by_flag.setdefault(form, []).append(option)
    return by_flag


def _suggest_flag(settings: type, flag: str, by_flag: Mapping[str, Sequence[Option]]) -> str:
    """Say which option a mistyped one may mean, or that a method is named without an option."""
    known = [*by_flag, *OPTIONS]
    method = [METHOD] if takes_method(settings) else []
    if get_close_matches(flag, [*known, *method], n=1, cutoff=NEAR) == [METHOD]:
        return "; the method is a bare word without dashes, such as finetune"
    return suggest(flag, known, NEAR)


def _refuse_choice(options: Sequence[Option], value: str) -> None:
    """Refuse a value that is none of a closed set's."""
    known = [str(choice) for option in options for choice in option.choices]
    closed = all(option.choices for option in options)
    if closed and value and not value.startswith("--") and value not in (*known, "None"):
        raise InputError(
            f"got {value!r}; expected one of {', '.join(dict.fromkeys(known))}"
            f"{suggest(value, known)}",
            option="" if options[0].positional else options[0].name,
        )


def refuse_unknown_method(settings: type, words: Sequence[str]) -> None:
    """Refuse a word in the place of a method; none at all is the parser's to refuse.

    Behind an option that does not exist nothing is refused: what follows may be its value.

    Raises:
        InputError: the first such word, with the nearest method.
    """
    if not takes_method(settings):
        return
    methods, by_flag = catalogue(), _index(settings, find_methods(settings, words))
    values = 0.0  # that the last option still takes
    for word in words:
        flag, equals, _ = word.replace("_", "-").partition("=")
        if word in (*HELP, "+"):
            values = 0
        elif word.startswith("--"):
            if flag not in by_flag:
                return
            values = 0 if equals else _count_values(by_flag[flag][0])
        elif values and not (values == inf and word in methods):
            values -= 1
        elif word not in methods:
            raise InputError(
                f"got method {word!r}; expected one that the help lists{suggest(word, methods)}"
            )
        else:
            values = 0


def refuse_missing(settings: type, words: Sequence[str], script: str) -> None:
    """Refuse a command line that lacks what the command cannot do without.

    Raises:
        InputError: an option or a method that is missing, an option without its value, or a word
            of one dash, which may be the name of a file, or one that nothing asks for.
    """
    if any(word.startswith("--tyro-") for word in words):
        return
    methods = find_methods(settings, words)
    by_flag = _index(settings, methods)
    plain: list[str] = []  # words that are no option and no option's value
    last, values, stated = "", 0.0, set()
    for place, word in enumerate([*words, "--"]):
        if values and values != inf and word.startswith("--"):
            option = by_flag[last][0]
            wanted = describe_kind(option.kind, UNITS.get(option.name, ""))
            raise InputError(f"got {last} without a value; expected {wanted} after it")
        if place == len(words):
            break
        if word == "--":
            plain += words[place + 1 :]
            break
        if word.startswith("--"):
            last, equals, _ = word.replace("_", "-").partition("=")
            stated.add(last)
            values = 0 if equals else _count_values(by_flag[last][0])
        elif word[:1] == "-" and len(word) > 1 and not _is_number(word):
            raise InputError(
                f"got {word}; expected options of two dashes; a name that begins with a dash is "
                f"written ./{word}"
            )
        elif values and not (values == inf and takes_method(settings) and word in catalogue()):
            values -= 1
        else:
            values = 0
            plain.append(word)
    _refuse_extra(settings, methods, plain)
    needed = [one for one in list_options(settings) if one.required]
    lacking = [one.flag for one in needed if not one.positional and one.flag not in stated]
    places = [one.flag for one in needed if one.positional]
    lacking = [*places[len(plain) :], *lacking]
    if takes_method(settings) and not methods:
        lacking.append("METHOD")
    if methods and inner_fields(methods[-1]):
        raise InputError(
            f"got {methods[-1].name} alone; expected the method that it wraps after it, such as "
            "random-label"
        )
    if lacking:
        names = f"{', '.join(lacking[:-1])} and {lacking[-1]}" if lacking[1:] else lacking[0]
        raise InputError(f"got no {names}; letheon {script} --help says what to give")


def _refuse_extra(settings: type, methods: Sequence[type[Method]], plain: Sequence[str]) -> None:
    """Refuse a bare word beyond a command's places and methods, or a choice there is not."""
    places = [one for one in list_options(settings) if one.positional]
    for option, word in zip(places, plain, strict=False):
        _refuse_choice([option], word)
    count = len(places) + len(methods)
    if len(plain) <= count or any(_count_values(one) == inf for one in places):
        return
    if methods and plain[count] in catalogue():
        raise InputError(
            f"got {plain[count]} beside {methods[-1].name}; expected one method, or a + between two"
        )
    raise InputError(f"got {plain[count]}, which no option takes; expected --OPTION before it")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _count_values(option: Option) -> float:
    """How many words an option takes."""
    if get_origin(option.kind) is tuple:
        parts = get_args(option.kind)
        return inf if parts[-1] is ... else len(parts)
    return 0 if option.kind is bool else 1


def _elsewhere(settings: type, methods: Sequence[type[Method]], flag: str) -> str:
    """Say which methods have an option that the one that was named lacks."""
    if not takes_method(settings):
        return ""
    having = [
        name
        for name, method in catalogue().items()
        if method not in methods and any(flag in _forms(one) for one in list_options(method))
    ]
    if not having:
        return ""
    lacks = "no method is named" if not methods else ""
    if methods and inner_fields(methods[-1]):
        lacks = f"{methods[-1].name} wraps no method yet"
    more = " and others" if having[3:] else ""
    return f"; it is an option of {', '.join(having[:3])}{more}{f'; {lacks}' if lacks else ''}"


def _forms(option: Option) -> tuple[str, ...]:
    """The spellings of an option: a switch may be turned off, too."""
    if option.kind is bool:
        return option.flag, f"--no-{option.flag.removeprefix('--')}"
    return (option.flag,)


@cache
def field_docs(cls: type) -> Mapping[str, str]:
    """Read the docstrings below a dataclass's fields from its source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object and is_dataclass(base):
            found |= dict(_docs_in_source(base))
    return found


def _docs_in_source(cls: type) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # made while running, or installed without its source
        return
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            yield field.target.id, str(text.value.value)


def _owner(settings: type, field: Field[Any]) -> type:
    """The first class, from the oldest, that has the field."""
    return next(
        cls for cls in reversed(settings.__mro__)
        if field.name in getattr(cls, "__dataclass_fields__", {})
    )  # fmt: skip


def _default(field: Field[Any], instance: Any) -> Any:
    if instance is not None:
        return getattr(instance, field.name)
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _markers(kind: Any) -> tuple[Any, ...]:
    """What stands beside a type in `Annotated`, as the parser's marks do."""
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _plain(kind: Any) -> Any:
    """A type without marks and None."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if _is_union(kind) and NoneType in get_args(kind):
        kinds = [one for one in get_args(kind) if one is not NoneType]
        return _plain(kinds[0]) if len(kinds) == 1 else kind
    return kind


def describe_kind(kind: Any, unit: str = "") -> str:
    """Write a type as a word of the help: PATH, {a,b}, INT [INT ...], or the unit in its place."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        word = describe_kind(_plain(parts[0]), unit)
        return f"{word} [{word} ...]" if parts[-1] is ... else " ".join([word] * len(parts))
    if unit:
        return unit
    return "PATH" if kind is Path else str(getattr(kind, "__name__", "VALUE")).upper()
