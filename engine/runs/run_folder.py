"""The run folder: settings, request, what happened as JSON lines, versions and the weights."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from letheon import durable
from letheon.engine.distributed import Ranks
from letheon.engine.runs.loggers import JsonLines
from letheon.errors import InputError
from letheon.sealed import read_sealed

FINISHED = "run.json"
"""Written last: a folder without it holds an unfinished run."""
FAILED = "failed.json"
"""Why a run ended without weights, where it ended by itself."""


def failure_reason(folder: Path) -> str | None:
    """Why the run of a folder failed; None where it is finished, or still runs."""
    if (folder / FINISHED).is_file() or not (folder / FAILED).is_file():
        return None
    return str(read_sealed(folder / FAILED).get("message"))


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists or cannot be written, before anything is done.

    Raises:
        InputError: the folder holds something and `overwrite` is false, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"got {folder}; it is a file; name a folder", option="out")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        states = {FINISHED: "a finished", FAILED: "a failed"}
        state = next((s for file, s in states.items() if (folder / file).exists()), "an unfinished")
        raise InputError(
            f"got {folder}; it holds {state} run; name another folder, or allow to overwrite it",
            option="out",
        )
    _check_writable(folder)


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
    """One run's folder. Only the main rank writes; on the others every call does nothing."""

    def __init__(self, folder: Path, ranks: Ranks, settings: Mapping[str, Any]) -> None:
        """Make the folder (its check is `check_free`) and write the settings and versions."""
        self.folder = folder
        self.main = ranks.main
        self._started = time.time()
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (FINISHED, FAILED, "metrics.jsonl", "weights.safetensors"):
            (folder / stale).unlink(missing_ok=True)
        self._logger = JsonLines(folder / "metrics.jsonl")
        self.write("settings.json", settings)
        self.write("versions.json", versions(ranks))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """One JSON file of the folder, atomically."""
        if self.main:
            text = json.dumps(content, indent=2, sort_keys=True, default=str)
            durable.write(self.folder / name, text + "\n")

    def log(self, kind: str, **numbers: Any) -> None:
        """Append one line to metrics.jsonl, at once on disk, to be watched."""
        if self.main:
            at = round(time.time() - self._started, 3)
            self._logger.log({"kind": kind, "at": at, **numbers})

    def fail(self, reason: str) -> None:
        """Mark the run as failed, by a reason."""
        self.write(FAILED, {"message": reason})

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished, with what it ended as."""
        self.write(FINISHED, facts)


def versions(ranks: Ranks) -> dict[str, Any]:
    """Software, hardware and source revision of this run."""
    packages = {}
    for name in ("letheon", "torch", "torchvision", "numpy", "scikit-learn", "faiss-cpu"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = ranks.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world": ranks.world,
        "command": sys.argv,
        **revision(),
    }


def revision() -> dict[str, Any]:
    """Commit of the source tree, and whether it had changes; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here, capture_output=True, check=True,
        )  # fmt: skip
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"revision": commit, "uncommitted_changes": bool(changed)}
