"""Print a script's --help as it was printed before, which needs no import of torch.

The text lies in the user's cache folder, under a digest of all it depends on: the sizes and times
of Letheon's source files, the versions, the arguments, and how the terminal looks. Where another
package adds methods or metrics nothing is saved, since their source is not ours to watch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from letheon import durable
from letheon.errors import RunFailed

FOLDERS = ("engine", "eval", "kernels", "launch", "loaders", "methods")
KINDS = ("*.py", "*.toml")
PAGES = ("methods", "completion")
"""Commands that print nothing but help."""
WIDTHS = (40, 60, 80, 100)
"""Columns of a page of help: few, so that a terminal of another size finds its text saved."""
_KEEP = 64  # texts: other widths, commands and methods


class _Recorder:
    """Standard output that keeps what passes through it; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self.stream, self.parts = stream, list[str]()

    def write(self, text: str) -> int:
        """Write and keep."""
        self.parts.append(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_or_show(args: Sequence[str], flags: Collection[str], run: Callable[[], None]) -> None:
    """Show the saved help where `args` ask for help alone; else run, and save the help it prints.

    Args:
        args: the command and its arguments. Options beside the one for help may change its text (a
            file of settings, say), so with any of them nothing is saved.
        flags: the options that ask for help.
        run: the command; it may leave by SystemExit.
    """
    file = _file(args) if _asks_for_help(args, flags) else None
    if file is None:
        run()
        return
    try:
        _show_or_save(file, run)
        sys.stdout.flush()
    except BrokenPipeError:  # a pager or `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_or_save(file: Path, run: Callable[[], None]) -> None:
    text = ""
    with suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8")
    if text:
        sys.stdout.write(text)
        return
    recorder = _Recorder(sys.stdout)
    sys.stdout = recorder
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout = recorder.stream
    _save(file, "".join(recorder.parts))


def _asks_for_help(args: Sequence[str], flags: Collection[str]) -> bool:
    options = [arg for arg in args if arg.startswith("-")]
    return set(options) <= set(flags) and (bool(options) or args[0] in PAGES)


def _file(args: Sequence[str]) -> Path | None:
    """Name the file of the help that `args` ask for; None where it is not to be saved."""
    if "RANK" in os.environ or any(
        entry_points(group=f"letheon.{kind}") for kind in ("methods", "metrics")
    ):
        return None
    with suppress(RuntimeError, PackageNotFoundError):  # no home folder; a copy without tyro
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "letheon" / "help" / f"{_digest(args)}.txt"
    return None


def page_width() -> int:
    """Columns of a page: the most of `WIDTHS` that the terminal has, or the fewest."""
    columns = shutil.get_terminal_size((80, 24)).columns
    return max((width for width in WIDTHS if width <= columns), default=WIDTHS[0])


def _digest(args: Sequence[str]) -> str:
    """SHA-256 in hex over all that the text depends on."""
    looks = [os.environ.get(name) for name in ("TERM", "NO_COLOR", "FORCE_COLOR")]
    facts = (*args, *looks, sys.version, version("tyro"), os.cpu_count())
    total = hashlib.sha256(repr((facts, sys.stdout.isatty(), page_width())).encode())
    for name in ("letheon", *(f"letheon.{folder}" for folder in FOLDERS)):
        spec = find_spec(name)
        for root in (spec and spec.submodule_search_locations) or ():
            for path in sorted(one for kind in KINDS for one in Path(root).rglob(kind)):
                of = path.stat()
                total.update(f"{path} {of.st_ino} {of.st_size} {of.st_mtime_ns}\n".encode())
    return total.hexdigest()


def _save(file: Path, text: str) -> None:
    """Save a text and drop the oldest; a cache that cannot be written is no error."""
    with suppress(OSError, RunFailed):
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write(file, text)
        texts = sorted(file.parent.glob("*.txt"), key=lambda path: path.stat().st_mtime)
        for old in texts[:-_KEEP]:
            old.unlink(missing_ok=True)
