"""The run folder: settings, request, what happened as JSON lines, versions and the weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.ranks.watch import STACKS
from letheon.engine.runs.loggers import (
    TENSORBOARD,
    JsonLines,
    broken_link,
    open_trackers,
    read_lines,
)
from letheon.engine.runs.manifest import (
    DISPOSAL,
    MANIFEST,
    SIGNATURE,
    build_manifest,
    trace_ancestry,
)
from letheon.engine.runs.signature import sign
from letheon.errors import InputError, RunFailed
from letheon.folders import (
    LOCK,
    can_replace,
    clear_new_folder,
    new_folder,
    publish,
    remove_own,
    settle,
)
from letheon.sealed import read_sealed

FINISHED = "run.json"
"""Written last: a folder without it holds an unfinished run."""
ORIGIN = "origin.json"
"""What the run is made of, written first: `engine/runs/origin.py`."""
LOG = "metrics.jsonl"
"""What happened, a line a report."""
STATE = "state"
"""Folder of the saved states of an unfinished run."""
FAILED = "failed.json"
"""Why a run ended without weights, where it ended by itself."""
LAST_FINITE = "last-finite.safetensors"
"""Weights of a failed run at the end of its last epoch with finite ones, where one had ended."""
_AGAIN = "again"
"""Entry of that file: the disk was the reason, and the same command may end otherwise."""
OWN = (
    FINISHED, FAILED, "settings.json", "versions.json", "request.json", LOG,
    "weights.safetensors", LAST_FINITE, "reads.safetensors", MANIFEST, SIGNATURE, DISPOSAL, ORIGIN,
    STATE, STACKS, TENSORBOARD, "*.partial",
)  # fmt: skip
"""Patterns of the files that a run writes in its folder; all others are somebody else's."""
_FLOORS = ("letheon", "kernels", "loaders", "engine", "methods", "eval", "launch")


def settle_run(out: Path) -> None:
    """Complete or undo the replacement of a run that was interrupted; call it under its lock."""
    settle(out, FINISHED, OWN)


def remove_leftovers(out: Path) -> None:
    """Settle a run, and remove the states of a finished one that died before it removed them."""
    settle_run(out)
    if (out / FINISHED).is_file() and (out / STATE).is_dir():
        remove_own(out, (STATE,))


def working_folder(out: Path) -> Path:
    """Return the folder in which a run for `out` works, equal on every rank.

    It is `out` itself, unless that holds a finished run: this stays as it is until the new one, in
    `.NAME.new` beside it, is whole and takes its place.
    """
    return new_folder(out) if (out / FINISHED).is_file() else out


def failure_reason(folder: Path) -> str | None:
    """Why the run of a folder failed; None where it is finished, or still runs."""
    if (folder / FINISHED).is_file() or not (folder / FAILED).is_file():
        return None
    return str(read_sealed(folder / FAILED).get("message"))


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds a run that was stopped and can go on."""
    if not (folder / ORIGIN).is_file() or (folder / FINISHED).exists():
        return False
    failed = folder / FAILED
    if not failed.exists() or (folder / STATE).is_dir():
        return True
    return bool(read_sealed(failed).get(_AGAIN))


def has_only_started(folder: Path) -> bool:
    """Whether a run died there before it had said what it is made of: nothing is lost with it."""
    names = _content(folder)
    return bool(names) and all(
        name in ("settings.json", "versions.json", TENSORBOARD) or name.endswith(durable.PARTIAL)
        for name in names
    )


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a finished run that says what it is made of."""
    return (folder / ORIGIN).is_file() and (folder / FINISHED).is_file()


def check_free(folder: Path, overwrite: bool, resume: bool = False, repeat: bool = False) -> None:
    """Refuse an output folder that exists or cannot be written, before anything is done.

    With `resume` an unfinished run is no reason; with `repeat` neither is a finished one, which
    is compared later (`plan_start`).

    Raises:
        InputError: the folder holds something and `overwrite` is false, or it cannot be made.
    """
    try:
        other = folder.exists() and not folder.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"got {folder}; it cannot be looked for ({error.strerror}); name another folder",
            option="out",
        ) from error
    if other:
        raise InputError(f"got {folder}; it is a file; name a folder", option="out")
    resume = folder.is_dir() and (
        (resume and (is_unfinished(folder) or has_only_started(folder)))
        or (repeat and not overwrite and is_finished(folder))
    )
    if folder.is_dir() and _content(folder) and not overwrite and not resume:
        states = {
            FINISHED: "a finished run", FAILED: "a failed run", "evaluation.json": "an evaluation",
            "set.json": "a prepared set", "betons.json": "a prepared set",
            "settings.json": "an unfinished run",
        }  # fmt: skip
        state = next((s for file, s in states.items() if (folder / file).exists()), "")
        state = state or f"files that are no run ({', '.join(sorted(_content(folder))[:3])})"
        raise InputError(
            f"got {folder}; it holds {state}; name another folder, or allow to overwrite it",
            option="out",
        )
    if folder.is_dir() and _content(folder) and not resume and not can_replace(folder):
        raise InputError(
            f"got {folder} to overwrite; it is mounted, or {folder.parent} cannot be written, so "
            "it cannot be replaced as a whole; name a folder in it",
            option="out",
        )
    _check_writable(folder)


def _content(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name != LOCK]


def check_free_file(file: Path, overwrite: bool) -> None:
    """Refuse an output file that exists or cannot be written."""
    if file.is_dir():
        raise InputError(f"got {file}; it is a folder; name a file", option="out")
    if file.exists() and not overwrite:
        raise InputError(
            f"got {file}; it exists; name another file, or allow to overwrite it", option="out"
        )
    _check_writable(file)


def _check_writable(path: Path) -> None:
    """The nearest folder that exists must be one we may write in."""
    nearest = path if path.is_dir() else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    try:  # tried, not asked: the superuser is told yes even where nothing can be written
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            f"got {path}; {nearest} cannot be written ({error.strerror}); name another place",
            option="out",
        ) from error


class Record:
    """One run's folder. Only the main rank writes; on the others every call does nothing.

    Attributes:
        out: the folder that was asked for.
        folder: where the run works (`working_folder`); `out` once it is finished.
    """

    def __init__(
        self, out: Path, ranks: Ranks, settings: Mapping[str, Any], resume: bool = False
    ) -> None:
        """Make the folder (its check is `check_free`) and write the settings and versions.

        With `resume` the lines and states of an unfinished run stay, until `cut`; so do its curves
        and the stacks of a job that hung.
        """
        self.out = out
        self.folder = working_folder(out)
        self.main = ranks.main
        self._started = time.time()
        if not self.main:
            return
        if not resume:
            clear_new_folder(out)  # what an unfinished run left there
        with durable.disk_errors(self.folder):
            self.folder.resolve().mkdir(parents=True, exist_ok=True)
        stays = (LOG, STATE, ORIGIN, STACKS, TENSORBOARD) if resume else ()
        remove_own(self.folder, [name for name in OWN if name not in stays])
        self._settings = settings
        self._texts: dict[str, str] = {}
        self._logger = JsonLines(self.folder / LOG)
        self._trackers = open_trackers(self.folder, settings)
        self.write("settings.json", settings)
        self.write("versions.json", versions(ranks))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """One JSON file of the folder, atomically."""
        if self.main:
            self._texts[name] = _text(content)
            durable.write(self.folder / name, self._texts[name])

    def log(self, kind: str, **numbers: Any) -> None:
        """Append one line to metrics.jsonl, at once on disk, to be watched."""
        if self.main:
            at = round(time.time() - self._started, 3)
            line = {"kind": kind, "at": at, **numbers}
            self._logger.log(line)
            for tracker in self._trackers:
                tracker.log(line)

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl; 0 on all ranks but the first."""
        file = self.folder / LOG
        return file.stat().st_size if self.main and file.exists() else 0

    @property
    def link(self) -> str:
        """What the next line of metrics.jsonl will hold; empty on all ranks but the first."""
        return self._logger.link if self.main else ""

    def cut(self, length: int, link: str = "") -> None:
        """Drop the lines of metrics.jsonl beyond `length` bytes: they will be written again.

        The next line holds `link`: where the last one that stays was changed since, the chain
        breaks there, which `finish` and `letheon verify` say.
        """
        if self.main and self.length > length:
            content = (self.folder / LOG).read_bytes()
            durable.write(self.folder / LOG, content[:length])
            self._logger = JsonLines(self.folder / LOG)
        if self.main:
            self._logger.link = link

    def _write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest, signed where the settings name a key, over all other files."""
        read = {
            name: json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("settings", "request", "versions")
            if (self.folder / f"{name}.json").is_file()
        }
        weights = self._settings.get("weights")
        ancestry = {} if weights is None else {"original": trace_ancestry(str(weights))}
        log = self.folder / LOG
        phases = {line.get("phase"): line for line in read_lines(log) if line["kind"] == "phase"}
        metrics = {"weights": facts.get("weights"), "last_of_each_phase": phases}
        known = {**read, **ancestry, "metrics": metrics, "facts": json.loads(_text(facts))}
        text = build_manifest(self.folder, known, {FINISHED: _text(facts)})
        durable.write(self.folder / MANIFEST, text)
        if key := self._settings.get("sign"):
            durable.write(self.folder / SIGNATURE, sign(Path(key), text.encode()))

    def fail(self, reason: Exception) -> None:
        """Mark the run as failed, by a reason; where the disk is that, as one that may go on."""
        self._close_trackers()
        with suppress(RunFailed):  # a full disk: the reason itself is what counts
            disk = isinstance(reason.__cause__, OSError)
            self.write(FAILED, {"message": str(reason), **({_AGAIN: True} if disk else {})})

    def _close_trackers(self) -> None:
        for tracker in self._trackers if self.main else ():
            tracker.close()

    def _restore(self) -> None:
        """Write again what was removed from the folder while the run ran."""
        gone = [name for name in self._texts if not (self.folder / name).is_file()]
        for name in gone:
            durable.write(self.folder / name, self._texts[name])
        if gone:
            print(
                f"warning: {self.out}: {', '.join(gone)} had gone from the folder, and were "
                "written again",
                file=sys.stderr,
            )

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished, with what it ended as; it now replaces an earlier one.

        Raises:
            RunFailed: the disk refuses; an earlier run is as it was.
        """
        self._close_trackers()
        if self.main:
            self._restore()
            self._logger.flush()
            if self._logger.missing:
                facts["log_lines_missing"] = self._logger.missing
                print(
                    f"warning: {self.out}: {self._logger.missing} lines of metrics.jsonl could not "
                    f"be written ({self._logger.reason})",
                    file=sys.stderr,
                )
        if self.main and (line := broken_link(self.folder / LOG)) is not None:
            facts["log_damaged_from"] = line
            print(
                f"warning: {self.out}: line {line} of metrics.jsonl is not as it was written; the "
                "weights do not depend on it",
                file=sys.stderr,
            )
        if self.main:
            self._write_manifest(facts)
        self.write(FINISHED, facts)
        if self.main:
            remove_own(self.folder, (STATE,))
            with suppress(OSError):  # empty where no rank hung
                (self.folder / STACKS).rmdir()
        if self.main and self.folder != self.out:
            publish(self.out, OWN)
        self.folder = self.out


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"


@cache
def packages() -> dict[str, str]:
    """Versions of the installed packages that a result may depend on, by name."""
    found = {}
    for name in ("letheon", "torch", "torchvision", "numpy", "scikit-learn", "faiss-cpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def versions(ranks: Ranks) -> dict[str, Any]:
    """Software, hardware and source revision of this run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "device": device_name(ranks),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world": ranks.world,
        "nodes": ranks.nodes,
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "command": sys.argv,
        **revision(),
    }


def device_name(ranks: Ranks) -> str:
    """Name the model of a GPU, or the kind of processor."""
    cuda = ranks.device.type == "cuda"
    return torch.cuda.get_device_name(ranks.device) if cuda else platform.machine()


@cache
def revision() -> dict[str, Any]:
    """Commit of the source tree, and whether it had changes; empty outside a checkout.

    As it was when this process first asked: of what is edited later, a module that this process
    has not imported by then runs as edited, and is not told of here.
    """
    here = Path(__file__).resolve().parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here, capture_output=True, check=True,
        )  # fmt: skip
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "diff", "HEAD"], cwd=here, capture_output=True, check=True
        ).stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {
        "revision": commit,
        "uncommitted_changes": bool(changed),
        "diff": hashlib.sha256(changes).hexdigest(),
    }


def source_facts() -> dict[str, Any]:
    """What computes, for states that only the same code may go on from."""
    return {"code": code_digest(), "packages": packages()}


@cache
def code_digest() -> str:
    """SHA-256 in hex over the source files of this package, edited or not.

    As `revision`, of the time when this process first asked.
    """
    return _digest_sources(Path(__file__).resolve().parents[2])


def _digest_sources(root: Path) -> str:
    total = hashlib.sha256()
    for floor in _FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            total.update(f"{file.relative_to(root).as_posix()}\n".encode())
            total.update(file.read_bytes())
    return total.hexdigest()
