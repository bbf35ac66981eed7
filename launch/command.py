"""How every script starts and ends: arguments to a dataclass, mistakes to one line, exit 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from letheon.engine.distributed import Ranks, agree, joined
from letheon.errors import InputError, RunFailed
from letheon.methods import catalogue

T = TypeVar("T")


def run_command(settings: Callable[..., T], main: Callable[[T, Ranks], None]) -> None:
    """Parse the command line, join the ranks, run `main`; the process ends with its exit code.

    0: done. 2: bad input, told in one line by the first rank. 3: the numbers became non-finite.
    Anything else is a fault of ours and shows its traceback.
    """
    run_several(lambda: [parse(settings)], lambda chosen, ranks: main(chosen[0], ranks))


def run_several(
    read: Callable[[], Sequence[T]], main: Callable[[Sequence[T], Ranks], None]
) -> None:
    """The same for a command line that `read` makes several settings of, all for one device."""
    try:
        chosen = read()
        with joined(getattr(chosen[0], "device", "auto")) as ranks:
            main(chosen, ranks)
    except (InputError, RunFailed) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 3)


def parse(settings: Callable[..., T], args: list[str] | None = None) -> T:
    """The settings from the command line (or `args`); --help lists every method and option."""
    return tyro.cli(
        settings,
        args=args,
        console_outputs=os.environ.get("RANK", "0") == "0",
        config=(
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.CascadeSubcommandArgs,
        ),
    )


def method_choice() -> Any:
    """The type of a method on the command line: one subcommand each, by its catalogue name."""
    union: Any = None
    for name, method in catalogue().items():
        choice: Any = Annotated[method, tyro.conf.subcommand(name)]
        union = choice if union is None else union | choice
    return union


def together(ranks: Ranks, check: Callable[[], T]) -> T:
    """Run `check` on every rank; if any finds bad input, all raise the first one's InputError.

    Whatever can fail on bad input goes through here, so that no rank waits for one that has left.
    """
    result: list[T] = []
    problem = None
    try:
        result.append(check())
    except InputError as error:
        problem = str(error)
    agree(ranks, problem)
    return result[0]
