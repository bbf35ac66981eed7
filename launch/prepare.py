"""Check every image of a set once and write it in the form the loaders read fastest.

    python launch/prepare.py --source cifar10.zip --out data/cifar10 --form arrays --size 32
    python launch/prepare.py --source /data/imagenet --out data/imagenet --max-side 500 --raw 0.5

`beton`: encoded photographs in ffcv's file format, one file a split or domain; resumable. `arrays`:
decoded squares, for small images. `list`: the files stay where they are, and their checked list
with digests is written. Unreadable images are counted and named, and left out.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from letheon.engine.distributed import Ranks
from letheon.engine.runs.stop import SIGNALS, STOPPED
from letheon.errors import InputError
from letheon.folders import free_path
from letheon.launch.command import run_command
from letheon.launch.console.following import command_line
from letheon.launch.console.summary import Summary, console
from letheon.loaders.datasets.image_set import Data
from letheon.loaders.formats.arrays_writer import prepare
from letheon.loaders.formats.beton_set import write_betons
from letheon.loaders.formats.encoding import Encoding
from letheon.loaders.open import open_source
from letheon.loaders.views import list_notes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prepare an image set: check it, name what is unreadable, store it for fast reading."""

    source: str
    """Folder or archive: train/<class>/ and val/<class>/, <domain>/<class>/, CIFAR binaries."""
    out: Path
    """Folder to make."""
    form: Literal["beton", "arrays", "list"] = "beton"
    """beton: one file of JPEGs, as ffcv writes; arrays: pixels of one size; list: an index of the
    images, which stay where they are."""
    size: int | None = None
    """Pixels of the squares; arrays only."""
    encoding: Encoding = field(default_factory=Encoding)
    workers: int = os.cpu_count() or 1
    """Processes that decode and encode."""

    def __post_init__(self) -> None:
        """Refuse a size without arrays, and arrays without a size."""
        if (self.size is not None) != (self.form == "arrays"):
            raise InputError(
                f"got --form {self.form} {'with' if self.size else 'without'} --size; arrays have "
                "a size and nothing else has; give both or neither"
            )


def main(settings: Settings, ranks: Ranks) -> None:
    """Prepare on one process and say what was found; exit code 75 where a signal stops it."""
    if ranks.main:
        with _stoppable(settings.out):  # whoever writes the set holds its lock
            _prepare(settings)


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Turn the first of `SIGNALS` into one line and exit code 75; the second ends at once."""

    def stop(number: int, frame: object) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: signal.signal(one, stop) for one in SIGNALS}
    try:
        yield
    except KeyboardInterrupt as error:
        print(
            f"stopped by {error or 'Ctrl-C'}: {out} is not there yet; the same command goes on "
            "with what is done",
            file=sys.stderr,
        )
        sys.exit(STOPPED)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _prepare(settings: Settings) -> None:
    source = open_source(settings.source)
    sets = {"train": source.train, "test": source.test} if isinstance(source, Data) else source
    for line in list_notes(sets):
        print(line, file=sys.stderr)
    if settings.form == "beton":
        written = write_betons(source, settings.out, settings.encoding, settings.workers)
        counts = {part: file.samples for part, file in written.items()}
        left_out = sum(len(file.quarantined) for file in written.values())
    else:
        report = prepare(source, settings.out, settings.size, settings.workers)
        counts, left_out = report.counts, len(report.quarantined)
    images = ", ".join(f"{count:,} images of {part}" for part, count in counts.items())
    named = f", named in {settings.out}" if left_out else ""
    done = f"prepared {images} ({left_out} unreadable left out{named})"
    following = None  # domains are for evaluate and top:K, beside a model that is there
    if isinstance(source, Data):
        out = free_path(Path("runs/original"))
        following = command_line("train", ["--data", settings.out, "--out", out])
    facts = {"counts": counts, "left_out": left_out}
    console().close(Summary("prepare", done, facts, str(settings.out.absolute()), following))


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
