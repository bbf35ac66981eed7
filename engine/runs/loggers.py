"""Where the numbers of a run go while it runs: one small interface, one class a destination."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from letheon import durable
from letheon.errors import InputError, install_extra
from letheon.regular import open_regular
from letheon.sealed import parse_json

PREVIOUS = "previous"
"""Key of a line's link to the line before: its SHA-256 in hex, empty in the first line."""


class Logger(Protocol):
    """Takes what the loop reports, on the first rank; it must not wait for the device."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One report: its ``kind``, seconds since the start as ``at``, and numbers by name."""
        ...


class JsonLines:
    """Append each report to a file as one line of JSON, at once; each holds the last one's digest.

    A line that the disk refuses is counted and left out, and takes no run down.

    Attributes:
        missing: lines that could not be written.
        reason: of the first of these.
        link: SHA-256 of the last line in hex, which the next one will hold; empty without a line.
    """

    def __init__(self, path: Path):
        """Go on with the file at `path`, if there is one."""
        self.path = path
        self.missing, self.reason = 0, ""
        self._read()

    def _read(self) -> None:
        text = _read(self.path)
        self._size, self._lines = len(text), text.count(b"\n")
        self.link = hashlib.sha256(text.splitlines()[-1]).hexdigest() if text else ""

    def _count_loss(self) -> None:
        """Count the lines of a file that has gone; where its folder has too, both may come back."""
        if self._size and self.path.parent.is_dir() and not self.path.exists():
            self.missing += self._lines
            self.reason = self.reason or "the file had gone"
            self._read()

    def log(self, line: Mapping[str, Any]) -> None:
        """Append; a machine that stops loses at most the line being written."""
        if self.path.exists() and self.path.stat().st_size < self._size:
            self._read()  # it was cut, for a run that goes on from an earlier state
        self._count_loss()
        text = json.dumps({**line, PREVIOUS: self.link}, default=str).encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(handle, self._size)  # half a line of an earlier failure
                if os.pwrite(handle, text + b"\n", self._size) <= len(text):
                    raise OSError(0, "only half a line fitted")
            finally:
                os.close(handle)
        except OSError as error:
            self.missing += 1
            self.reason = self.reason or str(error.strerror or error)
        else:
            self.link = hashlib.sha256(text).hexdigest()
            self._size += len(text) + 1
            self._lines += 1

    def flush(self) -> None:
        """Push the lines to the disk, at the end of a run."""
        self._count_loss()
        try:
            durable.flush(self.path)
        except OSError as error:
            self.reason = self.reason or str(error.strerror or error)


def broken_link(path: Path) -> int | None:
    """Find the first line of a log, counted from one, that does not hold the digest of the last.

    None where the chain is whole; lines of old logs, which have no link, are not checked.
    """
    link = ""
    for number, text in enumerate(_read(path).splitlines(), 1):
        try:
            line = parse_json(text)
        except ValueError:
            return number
        if not isinstance(line, dict) or line.get(PREVIOUS, link) != link:
            return number
        link = hashlib.sha256(text).hexdigest()
    return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the reports of a log, those that are damaged or have no kind left out."""
    yield from parse_lines(_read(path))


def _read(path: Path) -> bytes:
    """The bytes of a log; none where there is no such file.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        return b""


def parse_lines(log: bytes) -> Iterator[dict[str, Any]]:
    """Yield the reports of a log, or of its end, as `read_lines`."""
    for text in log.splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line:
            yield line


# --------------------------------------------------------------------------------- trackers


class Tracker(Protocol):
    """Takes the numbers of each report, under names such as ``retain/loss``."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of report number `step`, counted over the whole run."""
        ...

    def close(self) -> None:
        """End of the run: what is still held back is written or sent."""
        ...


class TensorBoard:
    """Event files in the folder tensorboard/ of the run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """`settings` of the run stand beside the curves as text."""
        from torch.utils.tensorboard import SummaryWriter  # here: an extra, and slow to import

        self._writer = SummaryWriter(str(folder / TENSORBOARD))
        self._writer.add_text("settings", f"    {json.dumps(settings, default=str)}")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One point a curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class HostedRun:
    """A run of Weights & Biases or of Trackio, whose packages have the same three calls."""

    def __init__(self, package: str, folder: Path, settings: Mapping[str, Any]):
        """Open the run; the package's own variables say who and where (such as WANDB_MODE)."""
        module = importlib.import_module(package)  # here: an extra
        config = json.loads(json.dumps(settings, default=str))
        self._run = module.init(project=PROJECT, name=folder.name, config=config)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One report."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run in the experiment `letheon`, where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Open the run through a client, so that several runs of one process stay apart."""
        from mlflow import MlflowClient  # here: an extra

        self._client = client = MlflowClient()
        known = client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else client.create_experiment(PROJECT)
        self._id = client.create_run(experiment, run_name=folder.name).info.run_id
        client.log_dict(self._id, json.loads(json.dumps(settings, default=str)), "settings.json")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One value a metric."""
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


class Guard:
    """A logger over a tracker that may fail: its first error ends it, in one line, and no run."""

    def __init__(self, name: str, build: Callable[[], Tracker], step: int = 0):
        """`step` is the number of reports of the run so far."""
        self._name, self._step = name, step
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", build()))

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a tracker is somebody else's code, often a network's
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            line = f"warning: {self._name} takes no more numbers of this run ({reason})"
            print(line, file=sys.stderr, flush=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass on the numbers of a report."""
        tracker, step, self._step = self._tracker, self._step, self._step + 1
        numbers = report_numbers(line)
        if tracker is not None and numbers:
            self._try(lambda: tracker.log(numbers, step))

    def close(self) -> None:
        """End of the run."""
        if self._tracker is not None:
            self._try(self._tracker.close)
        self._tracker = None


def report_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a report, named after its phase or else its kind.

    Those of a line within a pass are apart from the pass's own: ``retain/steps/loss``.
    """
    prefix = line.get("phase") or line.get("kind")
    if line.get("kind") == "steps":
        prefix = f"{prefix}/steps"
    return {
        f"{prefix}/{name}": float(value)
        for name, value in line.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name != "at"
        and math.isfinite(value)
    }


PROJECT = "letheon"
"""Name of the project or experiment at a tracker."""
TENSORBOARD = "tensorboard"
"""Folder of the event files in a run's."""
_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(HostedRun, "wandb"),
    "mlflow": MLflow,
    "trackio": partial(HostedRun, "trackio"),
}


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where else the numbers go while a run runs; metrics.jsonl has them always."""

    tracker: Literal["auto", "none", "tensorboard", "wandb", "mlflow", "trackio"] = "auto"
    """Tracker that gets the numbers too; auto: TensorBoard where it is installed."""

    def check(self) -> None:
        """Refuse a tracker that is not installed, on every rank, before anything is written."""
        if self.tracker not in ("auto", "none") and find_spec(self.tracker) is None:
            raise InputError(
                f"got tracker {self.tracker}, which is not installed; expected it; "
                f"{install_extra(self.tracker)}",
                option="tracker",
            )


def open_trackers(folder: Path, settings: Mapping[str, Any]) -> list[Guard]:
    """Open the tracker that a run's settings name, on the first rank; none where they name none.

    Args:
        folder: the run's, with the reports so far in metrics.jsonl.
        settings: the run's, as settings.json has them.
    """
    name = dict(settings.get("tracking") or {}).get("tracker", "none")
    if name == "auto":
        name = "tensorboard" if find_spec("tensorboard") is not None else "none"
    if name == "none":
        return []
    log = folder / "metrics.jsonl"
    lines = _read(log).count(b"\n")
    return [Guard(name, lambda: _TRACKERS[name](folder, settings), lines)]
