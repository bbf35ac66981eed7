"""Check every image of a set once and write it in the form the loaders read fastest.

    python launch/prepare.py --source cifar10.zip --size 32 --out data/cifar10
    python launch/prepare.py --source /data/office-home --out data/office-home

With --size the set is decoded to arrays of that size (for small images); without it the files stay
where they are and their checked list, with digests, is written. Unreadable images are counted and
named in quarantine.csv, and left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from letheon.engine.distributed import Ranks
from letheon.launch.command import run_command
from letheon.loaders.data import open_source
from letheon.loaders.prepare import prepare


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prepare an image set: check it, name what is unreadable, store it for fast reading."""

    source: str
    """Folder or archive: train/<class>/ and val/<class>/, <domain>/<class>/, CIFAR binaries."""
    out: Path
    """Folder to make."""
    size: int | None = None
    """Decode to squares of this many pixels; default: keep the files."""
    workers: int = os.cpu_count() or 1
    """Processes."""


def main(settings: Settings, ranks: Ranks) -> None:
    """Prepare on one process and say what was found."""
    if not ranks.main:
        return
    source = open_source(settings.source)
    report = prepare(source, settings.out, settings.size, settings.workers)
    for part, count in report.counts.items():
        print(f"{part}: {count} images")
    print(f"left out: {len(report.quarantined)} unreadable", end="")
    print(f", named in {settings.out / 'quarantine.csv'}" if report.quarantined else "")


if __name__ == "__main__":
    run_command(Settings, main)
