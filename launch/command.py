"""How every script starts and ends: arguments to a dataclass, mistakes to one line, exit codes.

0: done. 2: bad input. 3: the run failed (numbers, ranks, disk). 75: stopped by a signal, to be
started again. 1: a fault of Letheon's own, with its traceback. `docs/python.md` states them; they
do not change.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from letheon import durable
from letheon.engine.distributed import (
    Ranks,
    explain_loss,
    explain_timeout,
    is_first_to_fail,
    join_ranks,
    share_out,
)
from letheon.engine.method import Method
from letheon.engine.ranks.launchers import adopt_launcher
from letheon.engine.ranks.store import hangs
from letheon.engine.ranks.watch import describe_silence
from letheon.engine.runs.agreement import Facts, agree_on_start
from letheon.engine.runs.stop import STOPPED, Stopped, defer, last_signal, listen
from letheon.errors import InputError, LetheonError, RunFailed
from letheon.launch.console.help import show_help
from letheon.launch.console.options import (
    HELP,
    put_methods_first,
    refuse_missing,
    refuse_unknown,
    refuse_unknown_method,
)
from letheon.launch.console.summary import console, open_console
from letheon.loaders.shared_work import share_by
from letheon.methods import catalogue, inner_fields
from letheon.processes import end_with_reader, reuse_freed_memory
from letheon.progress import clear

T = TypeVar("T")

BAD_INPUT, RUN_FAILED = 2, 3
LOST = 1
"""Exit code of a rank that has lost the others: to be started again, a few times."""


def run_command(settings: Callable[..., T], main: Callable[[T, Ranks], None]) -> None:
    """Parse the command line, join the ranks, run `main`; on an error the process exits."""
    run_several(lambda: [parse(settings)], lambda parsed, ranks: main(parsed[0], ranks))


def run_several(
    read: Callable[[], Sequence[T]], main: Callable[[Sequence[T], Ranks], None]
) -> None:
    """Run `main` on the several settings that `read` makes of one command line, on one device.

    An `InputError` ends the process with exit code 2 and a `RunFailed` with 3, both in one line:
    of the first rank where all have the error, else of the rank that fails first, with its host.
    Anything else is raised, for its traceback, unless another rank has failed before. Under
    torchrun every rank that fails says why in the file that torchrun prints at its end.
    """
    reuse_freed_memory()
    with end_with_reader(), open_console(sys.argv):
        _run_on_ranks(read, main)
    if hangs():
        _leave(0)


def _run_on_ranks(
    read: Callable[[], Sequence[T]], main: Callable[[Sequence[T], Ranks], None]
) -> None:
    speaks = os.environ.get("RANK", "0") == "0"
    place, lost = "", ""
    try:
        adopt_launcher()
        parsed = read()
        with listen(), _join(parsed[0]) as ranks:
            try:
                main(parsed, ranks)
            except Exception as error:  # before the others notice that this rank has gone
                defer(True)  # a signal that comes now ends it below, with the reason
                if not (isinstance(error, LetheonError) and error.everywhere):
                    speaks = is_first_to_fail(ranks)
                    place = f"on {socket.gethostname()} (rank {ranks.rank}): "
                    place *= ranks.world > 1
                if who := explain_timeout(error, traceback.format_exc()):
                    raise RunFailed(describe_silence(who)) from error
                if place:
                    lost = explain_loss(error, traceback.format_exc(), speaks, last_signal)
                raise
    except Stopped as stop:
        _end_stopped(str(stop), speaks)
    except (InputError, RunFailed) as error:
        line = error_line(error, place)
        code = BAD_INPUT if isinstance(error, InputError) else RUN_FAILED
        if speaks:
            console().fail(line, code)
            write_end(code, line)
        write_torchrun_error(line)
        _leave(code)
    except Exception as error:
        if name := last_signal():  # what the same signal has ended cannot be waited for
            reason = lost or (type(error).__name__ if speaks else "another rank failed first")
            _end_stopped(f"by {name} before it could save ({reason})", speaks)
        if place and not speaks:
            _leave(RUN_FAILED)  # such as a connection that the failed rank has closed
        if lost:
            line = f"error: {place}{lost}; the same command goes on from the last save"
            console().fail(line, LOST)
            write_torchrun_error(line)
            _leave(LOST)
        clear()
        write_torchrun_error(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise


def _leave(code: int) -> NoReturn:
    """Exit, at once where a thread hangs in the ranks' store: as Python ends it would abort."""
    if hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _join(settings: Any) -> AbstractContextManager[Ranks]:
    timeout = getattr(settings, "timeout", 1800.0)
    return join_ranks(getattr(settings, "device", "cpu"), timeout)


def _end_stopped(reason: str, speaks: bool) -> NoReturn:
    """Say in one line that a signal has stopped the job, and exit with its code."""
    line = f"stopped: {reason}; the same command goes on from the last save"
    if speaks:
        console().fail(line, STOPPED)
        write_end(STOPPED, line)
    write_torchrun_error(line)
    _leave(STOPPED)


def error_line(error: Exception, place: str = "") -> str:
    """Return the one line a user sees: "error: ", the option's flag where there is one, the text.

    `place` comes before all. An option inside another ("recipe.lr") has the flag of its last part,
    as the parser gives it.
    """
    option = getattr(error, "option", "").rpartition(".")[2].replace("_", "-")
    flag = f"--{option}: " if option else ""
    return f"error: {place}{flag}{' '.join(str(error).split())}"


def write_end(code: int, line: str) -> None:
    """Write how the command has ended to the file that LETHEON_END_FILE names, if it does.

    For batch scripts: torchrun ends with 1 whatever its ranks end with.
    """
    if path := os.environ.get("LETHEON_END_FILE"):
        with contextlib.suppress(RunFailed):  # the line itself has been printed already
            durable.write(Path(path), f"{code} {line}\n")


def write_torchrun_error(line: str, stack: str = "") -> None:
    """Write this rank's error to the file that torchrun reads for its closing lines.

    Of a record with a call stack torchrun prints the stack alone, so the line stands there too.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # torchrun takes the earliest second for the cause; a crash may follow another rank's error.
    second = math.ceil(time.time()) if stack else math.floor(time.time())
    extra = {"timestamp": str(second), "py_callstack": stack or line}
    with contextlib.suppress(RunFailed):  # the line itself has been printed already
        durable.write(Path(path), json.dumps({"message": {"message": line, "extraInfo": extra}}))


def parse(settings: Callable[..., T], args: list[str] | None = None) -> T:
    """Parse the command line (or `args`) to `settings`; --help leaves by SystemExit.

    Raises:
        InputError: an option twice, or an option, method or value of a closed set that there is
            not; with --help a method.
    """
    words = complete_dry_run(sys.argv[1:] if args is None else args)
    if isinstance(settings, type) and any(word in HELP for word in words):
        refuse_unknown_method(settings, words)
        if os.environ.get("RANK", "0") == "0":
            print(show_help(script_name(), settings, words))
        raise SystemExit(0)
    _refuse_repeats(words)
    if isinstance(settings, type):
        refuse_unknown(settings, words)
        refuse_missing(settings, words, script_name())
        words = put_methods_first(settings, words)
    with _one_line():
        return tyro.cli(
            settings,
            args=words,
            config=(
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.CascadeSubcommandArgs,
            ),
        )


def script_name() -> str:
    """The name of the script that runs: `forget` of `letheon forget` and of launch/forget.py."""
    return Path(sys.argv[0].removeprefix("letheon ")).stem


def complete_dry_run(args: Sequence[str]) -> list[str]:
    """Add the 1 of `--dry-run` where no number of ranks follows it."""
    words = list(args)
    if "--dry-run" in words:
        place = words.index("--dry-run") + 1
        if not words[place : place + 1] or not words[place].lstrip("-").isdecimal():
            words.insert(place, "1")
    return words


def _refuse_repeats(args: Sequence[str]) -> None:
    """Refuse an option that stands twice: the parser would take the last one without a word."""
    options = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    for option, count in Counter(name.replace("_", "-") for name in options).items():
        if count > 1:
            raise InputError(
                f"got {option} {count} times; expected it once; of several classes write one list, "
                "such as class:3,8"
                if option == "--forget"
                else f"got {option} {count} times; expected it once; leave the others out"
            )


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn what the parser refuses, which it says in a box, into an `InputError`."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            yield
    except SystemExit as end:
        if not end.code:
            print(text.getvalue(), end="", file=sys.stderr, flush=True)
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
        border = re.compile("─{3}|-{3}|[╭╰]")  # the box has a title, what is wrong, and advice
        parts: list[list[str]] = [[]]
        for line in plain.splitlines():
            if border.search(line):
                parts.append([])
            else:
                parts[-1] += line.strip("│| ").split()
        bodies = [" ".join(part) for part in parts if part]
        body = [text for text in bodies if "helptext" not in text][-1]
        body = _say_expected(body.rstrip("."))
        raise InputError(f"{body}; letheon {script_name()} --help lists what there is") from None


_MISREAD = (
    (r"invalid literal for int\(\) with base 10: '(.*)'", "a whole number"),
    (r"could not convert string to float: '(.*)'", "a number"),
    (r"Could not find valid parse for arguments: \[(.*)\]", "values of another kind"),
)
"""What the parser says of a value that it cannot read, and what it wanted."""


def _say_expected(body: str) -> str:
    """Say what was got and expected where the parser only says how it failed."""
    for text, expected in _MISREAD:
        if found := re.fullmatch(rf"Error parsing (\S+): {text}", body):
            return f"got {found[1]} {found[2]}; expected {expected}"
    return body


def method_choice() -> Any:
    """Build the type of a method on the command line: one subcommand each, by its catalogue name.

    A method that wraps another (a field annotated `Method`) takes any method that wraps none.
    """
    methods = catalogue()
    inner = _union({n: m for n, m in methods.items() if not inner_fields(m)})
    return _union({name: _with_inner(method, inner) for name, method in methods.items()})


def _union(methods: dict[str, type[Method]]) -> Any:
    union: Any = None
    for name, method in methods.items():
        choice: Any = Annotated[method, tyro.conf.subcommand(name)]
        union = choice if union is None else union | choice
    return union


def _with_inner(method: type[Method], inner: Any) -> type[Method]:
    """Return a type that the parser reads as `method` with `inner` for the methods it wraps.

    Calling it makes an instance of `method` itself.
    """
    names = inner_fields(method)
    if not names:
        return method

    def make(cls: type, *args: Any, **values: Any) -> Method:
        return method(*args, **values)

    return type(
        method.__name__,
        (method,),
        {
            "__doc__": method.__doc__,
            "__module__": method.__module__,
            "__annotations__": dict.fromkeys(names, inner),
            "__new__": make,
        },
    )


def together(
    ranks: Ranks, check: Callable[[], T], facts: Callable[[T], Facts] = lambda result: {}
) -> T:
    """Run `check` on every rank; if any refuses its input, raise the first rank's error on all.

    `facts` states what the result is; where it differs between ranks, all refuse it. What `check`
    does with every image of a set (`share_work`) the ranks share out.

    Whatever can fail on bad input goes through here, so that no rank waits for one that has left.
    """
    result: list[T] = []
    problem: LetheonError | None = None
    stated: Facts = {}
    try:
        with share_by(partial(_share_on, ranks)) if ranks.world > 1 else nullcontext():
            result.append(check())
        if ranks.world > 1:
            stated = facts(result[0])
    except LetheonError as error:
        if error.everywhere:  # all have met already
            raise
        problem = error
    agree_on_start(ranks, problem, {"stage": "start", **stated})
    return result[0]


def _share_on(
    ranks: Ranks, name: str, items: Sequence[Any], compute: Callable[[Any], Any]
) -> list[Any]:
    """Deal out work on the ranks, once all of them have come to it.

    A rank that has met a problem before, or whose settings ask for no such work, is elsewhere: then
    all refuse.
    """
    agree_on_start(ranks, None, {"stage": f"{name} ({len(items)} parts)"})
    return share_out(items, compute, ranks)
