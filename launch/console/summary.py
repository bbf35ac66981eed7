"""The last lines of a command: what was done, seconds, where it lies, the next useful command."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from letheon.engine.runs.loggers import read_lines
from letheon.engine.runs.run_folder import FINISHED, LOG
from letheon.progress import choose_mode, clear, format_seconds, note
from letheon.sealed import read_json

OPTIONS = ("--quiet", "--json")


@dataclass(frozen=True)
class Summary:
    """How a command ended, for people and, as JSON, for programs."""

    command: str
    """The script's name."""
    done: str
    """What was done, in one line."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers and paths for programs."""
    out: str | None = None
    """Where the result lies, as an absolute path."""
    following: str | None = None
    """A command that is useful now."""


@dataclass
class Console:
    """How much this process prints."""

    quiet: bool = False
    json: bool = False
    shown: bool = False
    """Whether the JSON object of this command has been printed."""
    part: bool = False
    """Whether what runs now is a step of a longer command, whose own summary follows."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def prints(self) -> bool:
        """Whether what is for people goes to standard output."""
        return not self.json

    def close(self, summary: Summary) -> None:
        """Print the summary, on the first rank."""
        if self.part:
            note(f"{summary.done}: {summary.out}")
            return
        clear()
        seconds = time.perf_counter() - self.started
        if self.json:
            print(json.dumps({**asdict(summary), "seconds": round(seconds, 3)}, default=str))
        elif not self.quiet:
            print(f"{bold(summary.done)}, {format_seconds(seconds)} in all")
            if summary.out is not None:
                print(f"  in    {summary.out}")
            if summary.following is not None:
                print(f"  next  {summary.following}")
        sys.stdout.flush()

    def show(self, result: str) -> None:
        """Print the command's own JSON object; an error after it goes to standard error alone."""
        print(result, flush=True)
        self.shown = True

    def show_text(self, name: str, text: str) -> None:
        """Print a result that is a text, as it is or as the one field of the JSON object."""
        if self.json:
            self.show(json.dumps({name: text}))
        else:
            print(text, flush=True)

    def fail(self, line: str, code: int) -> None:
        """Print an error of one line: on standard error, and as JSON where that was asked for."""
        clear()
        print(line, file=sys.stderr, flush=True)
        if self.json and not self.shown:
            print(json.dumps({"error": line.removeprefix("error: "), "exit_code": code}))


_console = Console()


def console() -> Console:
    """Return the console of the command that runs."""
    return _console


@contextmanager
def open_console(args: list[str]) -> Iterator[Console]:
    """Take --quiet and --json out of a command line, in place; they hold until the block ends."""
    global _console
    before = _console
    words = {word for word in args if word in OPTIONS}
    args[:] = [word for word in args if word not in OPTIONS]
    _console = Console("--quiet" in words, "--json" in words)
    choose_mode(_console.quiet)
    try:
        yield _console
    finally:
        _console = before


def bold(text: str) -> str:
    """Set in bold on a terminal, unless NO_COLOR is set (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stdout.isatty() else f"\x1b[1m{text}\x1b[0m"


def read_facts(out: Path) -> dict[str, Any]:
    """Read what a finished run's record says of its weights, seconds and last losses."""
    facts = read_json(out / FINISHED)
    phases = [line for line in read_lines(out / LOG) if line["kind"] == "phase"]
    # A damaged line is left out: the run has said so.
    losses = {line["phase"]: line["loss"] for line in phases if {"phase", "loss"} <= line.keys()}
    return {"weights": facts["weights"], "spent": facts["seconds"], "losses": losses}
