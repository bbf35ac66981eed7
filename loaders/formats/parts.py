"""What a stopped preparation leaves, and how it goes on: parts in a folder beside the result.

A set is checked in chunks of images. Each chunk becomes a part: its bytes, and a sealed page about
them. A part is whole or absent, and verified before it is used, so that one that a disk has damaged
is made again. Processes that make parts end with their parent.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from letheon.durable import disk_errors, flush, replacing, write
from letheon.errors import InputError, RunFailed
from letheon.folders import clear_new_folder, lock, new_folder, publish
from letheon.processes import blocked_interrupts, follow_parent, in_main_thread
from letheon.regular import open_regular
from letheon.sealed import SEAL, read_sealed, seal

ABOUT = "about.json"
CHUNK = 256
"""Images of a part."""


@contextmanager
def growing(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder in which `out` grows; at the end it takes that name, in one step.

    What a stopped run of the same `settings` left there is kept, and anything else is removed. If
    the block raises `InputError`, nothing of ours is left; if it is stopped, the folder stays.
    Meanwhile no other process can work for `out`.

    Raises:
        InputError: `out` exists, another process works for it, or its place cannot be written.
        RunFailed: the disk refuses.
    """
    with lock(out):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        if out.exists() or out.is_symlink():
            holds = " and holds a set" if any(out.glob("*.json")) else ""
            raise InputError(
                f"got {out}, which exists{holds}, expected a new folder; remove it or name another"
            )
        folder = new_folder(out)
        go_on(folder, settings)
        try:
            yield folder
        except InputError:
            clear_new_folder(out)
            raise
        with disk_errors(out):
            (folder / ABOUT).unlink()
            flush(folder)
        publish(out, ())


def go_on(folder: Path, settings: dict[str, Any]) -> None:
    """Keep a folder that was begun with the same settings; empty it after any other."""
    about = folder / ABOUT
    try:
        same = {**read_sealed(about), SEAL: ""} == {**json.loads(json.dumps(settings)), SEAL: ""}
    except InputError:
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(about, seal(settings))


class Parts:
    """The parts of one image set, in a folder of their own."""

    def __init__(self, folder: Path, settings: dict[str, Any], images: int) -> None:
        """Go on with the folder's parts if they were made with the same settings."""
        go_on(folder, settings)
        self.folder, self.images, self.chunk = folder, images, CHUNK

    def __len__(self) -> int:
        return -(-self.images // self.chunk)

    def members(self, chunk: int) -> range:
        """Numbers of the images of a chunk."""
        return range(chunk * self.chunk, min(self.images, (chunk + 1) * self.chunk))

    def missing(self) -> list[int]:
        """The chunks that have no part, or one that is not as it was written."""
        return [chunk for chunk in range(len(self)) if not self._is_whole(chunk)]

    def _is_whole(self, chunk: int) -> bool:
        try:
            page = self.page(chunk)
            with open_regular(self.data(chunk)) as file:
                return SEAL in page and hashlib.file_digest(file, "sha256").hexdigest() == str(
                    page.get("data")
                )
        except (InputError, OSError):
            return False

    def write(self, chunk: int, fill: Callable[[BinaryIO], dict[str, Any]]) -> int:
        """Write one part: its bytes by `fill`, which returns what there is to say about them."""
        with replacing(self.data(chunk)) as temporary, open(temporary, "w+b") as file:
            page = fill(file)
            file.seek(0)
            page["data"] = hashlib.file_digest(file, "sha256").hexdigest()
        write(self.folder / f"{chunk}.json", seal(page))
        return chunk

    def data(self, chunk: int) -> Path:
        """The file of a part's bytes."""
        return self.folder / f"{chunk}.bin"

    def page(self, chunk: int) -> dict[str, Any]:
        """What is said about a part's bytes; raises `InputError` if it is damaged."""
        return read_sealed(self.folder / f"{chunk}.json")

    def remove(self) -> None:
        """Remove the folder, once all is in the result."""
        shutil.rmtree(self.folder)


_work: list[Callable[[int], int]] = []  # of this worker process


def _start_worker(work: Callable[[int], int], signals: bool) -> None:
    """Keep the work: sent once, since its images may be an archive of a million members."""
    follow_parent(signals)
    _work[:] = [work]


def _work_on(chunk: int) -> int:
    return _work[0](chunk)


def run_chunks(work: Callable[[int], int], chunks: Sequence[int], workers: int) -> Iterator[int]:
    """Do `work` for each chunk, in `workers` processes or in this one; yield them as they are done.

    Raises:
        RunFailed: a process was killed, as for want of memory.
    """
    if not workers:
        yield from map(work, chunks)
        return
    # Spawned: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, max(len(chunks), 1)), context, _start_worker, (work, in_main_thread())
    )
    try:
        with blocked_interrupts():
            results = [pool.submit(_work_on, chunk) for chunk in chunks]
        for done in as_completed(results):
            yield done.result()
    except BrokenProcessPool:
        raise RunFailed(
            "got a process that was killed while it prepared images, perhaps for want of memory; "
            "expected all to live; run the same again with fewer workers: it goes on with its parts"
        ) from None
    except BaseException:  # parts are whole or absent, so nobody is waited for
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
