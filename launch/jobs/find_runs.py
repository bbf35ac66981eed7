"""Find the runs in a folder by their records: the original, the retrained and the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from letheon.engine.runs.run_folder import FINISHED
from letheon.errors import InputError
from letheon.sealed import read_sealed


class RunFolders(NamedTuple):
    """Run folders by what their records say they are, each in the order of their names."""

    originals: tuple[Path, ...]
    retrained: tuple[Path, ...]
    runs: tuple[Path, ...]

    def find_original(self, others: Sequence[Path] = ()) -> Path | None:
        """Find the one original besides these others; None where there is none.

        Raises:
            InputError: there are two.
        """
        known = {path.resolve() for path in others}
        originals = [path for path in self.originals if path.resolve() not in known]
        if len(originals) > 1:
            raise InputError(
                f"got {len(originals)} original models in {originals[0].parent} "
                f"({', '.join(path.name for path in originals[:3])}); expected one; name it",
                option="original",
            )
        return next(iter(originals), None)


def find_runs(folder: Path) -> RunFolders:
    """Find the finished runs in a folder, those of several seeds in folders of theirs too.

    Raises:
        InputError: there is none.
    """
    kinds: dict[str, list[Path]] = {"training": [], "reference": [], "": []}
    for path, kind in _records(folder):
        kinds[kind if kind in kinds else ""].append(path)
    originals, retrained, runs = kinds["training"], kinds["reference"], kinds[""]
    if not originals and not retrained and not runs:
        raise InputError(f"got {folder}; it holds no finished run; name a folder of runs")
    return RunFolders(tuple(originals), tuple(retrained), tuple(runs))


def _records(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the run folders below, and the kind of each."""
    for record in sorted([*folder.glob(f"*/{FINISHED}"), *folder.glob(f"*/*/{FINISHED}")]):
        if any(part.startswith(".") for part in record.relative_to(folder).parts):
            continue  # a run that is about to replace another
        yield record.parent, str(read_sealed(record).get("kind", ""))
