"""What can go wrong, by whose doing: four kinds, and every message says got, expected, mend."""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Say which of the known names a mistyped one may mean: "; did you mean X?", or nothing.

    Args:
        word: the mistyped name.
        known: the names there are.
        cutoff: share of equal letters (`difflib.SequenceMatcher.ratio`) from which one is near.
    """
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def install_extra(extra: str) -> str:
    """Write the command that installs what an extra of Letheon's brings, wherever it came from.

    It names the packages, as the installed Letheon does: for its users there is no checkout.

    Args:
        extra: its name in setup.py, such as ``mlflow``.
    """
    try:
        known = requires("letheon") or ()
    except PackageNotFoundError:  # run from a checkout that is not installed
        return f"pip install '.[{extra}]' in the checkout"
    own = re.compile(rf"\bextra == ['\"]{re.escape(extra)}['\"]")
    packages = [line.partition(";")[0].strip() for line in known if own.search(line)]
    return f"pip install {shlex.join(packages)}"


class LetheonError(Exception):
    """Base class of everything Letheon raises on purpose."""

    everywhere: bool = False
    """True where every rank of the job raises it: then only the first one prints it."""


class InputError(LetheonError):
    """The user's mistake: what was got, what was expected, and how to mend it, in one line.

    Exit code 2 of every script.
    """

    def __init__(self, message: str, option: str = "") -> None:
        """`option` is the name of the setting in question, such as ``loader``.

        The command line prints it as its flag; code below the scripts never names a flag.
        """
        super().__init__(message)
        self.option = option

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        """As pickled between processes, the option stays with the message."""
        return type(self), (str(self), self.option)


def join_few(items: Sequence[object], most: int = 3, by: str = ", ") -> str:
    """Write the first `most` of what a message names, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return by.join(map(str, items[:most])) + more


@contextlib.contextmanager
def name_option(option: str) -> Iterator[None]:
    """Give an `InputError` that names no setting this one."""
    try:
        yield
    except InputError as error:
        error.option = error.option or option
        raise


class UnreadableImage(InputError):
    """One image that cannot be read: counted, named and left out, or the end of the job."""


class NotMeasurable(LetheonError):
    """A metric lacks an ingredient: its value is None, with this message as the reason.

    A number that is not finite is never of this kind: that is a `RunFailed`.
    """


class RunFailed(LetheonError):
    """A run that cannot go on: numbers that are not finite, ranks that differ, a full disk.

    Exit code 3 of every script.
    """
