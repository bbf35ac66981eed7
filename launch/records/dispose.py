"""List what else holds the data that a run forgot, and remove what is the run's own.

    letheon dispose runs/salun --cache /data/outputs
    letheon dispose runs/salun --cache /data/outputs --yes

Removed with --yes: saved states and unfinished replacements of the run, and stored outputs of its
training set in --cache. Never removed: image sets, prepared sets, other models, and outputs that do
not say of which images they are; those are named for you to decide. What was removed stands in the
run's disposal.json.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.runs.manifest import DISPOSAL, MANIFEST, read_manifest
from letheon.engine.runs.run_folder import STATE, settle_run
from letheon.eval.inference.cache import outputs_of_unknown_images, stored_outputs
from letheon.folders import new_folder, ranking_folder, state_folder
from letheon.launch.command import run_command, together
from letheon.launch.console.summary import console
from letheon.launch.records.claim import claim
from letheon.sealed import expect_shape, read_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """List, and with --yes remove, what still holds the data that a run forgot."""

    run: tyro.conf.Positional[Path]
    """Folder of the finished run."""
    cache: Path | None = None
    """Folder of stored outputs, as evaluate takes it."""
    yes: bool = False
    """Remove what is the run's own."""


class Holder(NamedTuple):
    """A file or folder that holds forgotten data, or what was learned from it."""

    path: str
    what: str
    removable: bool


def list_holders(run: Path, cache: Path | None) -> list[Holder]:
    """List what a run's manifest and the folders beside it know to hold the forgotten data.

    Raises:
        InputError: the run has no manifest, or it was changed.
    """
    manifest = read_manifest(run)
    with expect_shape(run / MANIFEST):
        settings = dict(manifest["settings"])
        place, train = str(settings["data"]), str(manifest["facts"]["data"]["train"])
        ancestors = _ancestors(manifest)
        mask = _find(settings.get("method"), "mask")
    found = [Holder(place, "the image set itself, or a prepared form of it", False)]
    found += ancestors
    if mask:
        found.append(Holder(str(mask), "a mask made from its gradients", False))
        if (state := state_folder(Path(mask))).exists():
            found.append(Holder(str(state), "sums of gradients of a mask that was stopped", False))
    for path in (run / STATE, new_folder(run), ranking_folder(run)):
        if path.exists():
            found.append(Holder(str(path), "saved states, or an unfinished replacement", True))
    if cache is not None:
        what = "stored outputs of a model on its training set"
        found += [Holder(str(path), what, True) for path in stored_outputs(cache, train)]
        what = "outputs that do not say of which images"
        found += [Holder(str(path), what, False) for path in outputs_of_unknown_images(cache)]
    return found


def _ancestors(manifest: dict[str, Any]) -> list[Holder]:
    """The models that a run goes back to, which were trained on what it forgot."""
    found: dict[str, Holder] = {}
    original = manifest.get("original")
    while original is not None and original["path"] not in found:  # a circle was made by hand
        path = Path(original["path"])
        what = "a model trained on it, the run's original"
        found[original["path"]] = Holder(str(path), what, False)
        above = path / MANIFEST
        original = read_manifest(path).get("original") if above.is_file() else None
    return [*found.values()]


def _find(method: Any, name: str) -> Any:
    """The value of a setting of a method, or of the one it wraps."""
    if not isinstance(method, dict):
        return None
    inner = [_find(value, name) for value in method.values() if isinstance(value, dict)]
    return method.get(name) or next(filter(None, inner), None)


def remove(run: Path, holders: list[Holder]) -> None:
    """Remove what may be removed, and write down in the run's folder what that was.

    Raises:
        RunFailed: the disk refuses.
    """
    gone = [holder for holder in holders if holder.removable]
    file = run / DISPOSAL
    earlier = read_json(file) if file.is_file() else []
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {
        "at": at, "removed": [holder._asdict() for holder in gone],
        "left": [holder._asdict() for holder in holders if not holder.removable],
    }  # fmt: skip
    for holder in gone:
        with durable.disk_errors(Path(holder.path)):
            shutil.rmtree(holder.path)
    durable.write(file, json.dumps([*earlier, entry], indent=1) + "\n")


def main(settings: Settings, ranks: Ranks) -> None:
    """Print the list, and remove what is the run's own where that was asked for."""
    with claim([settings.run], ranks, settle=settle_run):  # states are removed with a record
        holders = together(ranks, lambda: list_holders(settings.run, settings.cache))
        if not ranks.main:
            return
        listed = [holder._asdict() for holder in holders]
        if console().json and not settings.yes:
            console().show(json.dumps(listed, indent=1))
        elif not console().json:
            for path, what, removable in holders:
                print(f"{path}: {what}; {'' if removable else 'not '}removed by --yes")
        if settings.yes:
            remove(settings.run, holders)
            count = sum(holder.removable for holder in holders)
            if console().json:  # once all is removed, so that an error is the only object
                console().show(json.dumps(listed, indent=1))
            else:
                print(f"removed {count}; the list is in {settings.run / DISPOSAL}")


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
