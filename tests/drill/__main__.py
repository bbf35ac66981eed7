"""Run the drill, or the part of it that fits in some minutes, and print its table.

    make drill                                  the whole of it; goes on where it was stopped
    python -m tests.drill --minutes 2           a small form
    python -m tests.drill --only SIGKILL --table

Each attempt is one line of attempts.jsonl, written at once. The exit code is 1 where a state was
lost or a wrong result trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.drill.faults import Drill, Outcome

WHOLE = 25.0
"""Minutes of the whole drill on two quiet cores."""
KILLED, FLIPPED, FULL_DISKS, RESUMES, FUZZED = 216, 500, 50, 5, 10_000
"""Attempts of the whole drill: of kills, flips and full disks in all, of the others each kind."""
Key = tuple[str, str, int]


def shared_out(total: float, shares: dict[str, float]) -> dict[str, int]:
    """Attempts of each kind by its share, at least one."""
    whole = sum(shares.values())
    return {kind: max(1, round(total * share / whole)) for kind, share in shares.items()}


def attempts(scale: float) -> dict[Key, Callable[[Drill], Outcome]]:
    """All attempts by row, kind and number; a smaller drill's are among a larger one's."""
    from tests.drill import faults
    from tests.drill.resuming import NAMES
    from tests.fuzz.parsers import PARSERS

    rows: dict[Key, Callable[[Drill], Outcome]] = {}

    def add(
        row: str, counts: dict[str, int], attempt: Callable[[Drill, str, int], Outcome]
    ) -> None:
        for kind, count in counts.items():
            for number in range(count):
                rows[row, kind, number] = partial(attempt, kind=kind, number=number)

    add("SIGKILL", shared_out(KILLED * scale, {k: v[2] for k, v in faults.KILLS.items()}),
        faults.kill)  # fmt: skip
    add("bit flip", shared_out(FLIPPED * scale, faults.FLIPS), faults.flip)
    if can_mount():
        add("full disk", shared_out(FULL_DISKS * scale, faults.FULL), faults.fill_disk)
    else:
        print("full disk: left out; mounting a tmpfs needs root", file=sys.stderr)
    add("SIGSTOP", dict.fromkeys(faults.STOPS, max(1, round(2 * scale))), faults.stop_rank)
    kinds = [*NAMES] if scale >= 0.2 else [*NAMES][:: max(1, round(0.4 / scale))]
    add("resume, bitwise", {kind: max(1, round(RESUMES * scale)) for kind in kinds},
        faults.stop_and_resume)  # fmt: skip
    count = max(5, round(FUZZED * scale))
    for name in PARSERS:
        rows["fuzzed input", name, count] = partial(faults.fuzz, count=count, names=[name])
    return rows


def can_mount() -> bool:
    """Whether this user may mount a small disk."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def read(file: Path) -> list[dict[str, Any]]:
    """The attempts that are done; half a line, of a drill that was killed, is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def work(base: Any, known: tuple[dict[str, str], dict[str, int]], todo: list[Any], file: Path,
         scratch: Path) -> None:  # fmt: skip
    """Make some of the attempts, one after another."""
    from tests.drill import faults

    drill = faults.Drill(base, scratch, *known)
    faults.stop_a_training(drill)
    for (row, kind, number), attempt in todo:
        try:
            found = attempt(drill)
        except Exception as error:  # a fault of the drill: said, counted, and not the end of it
            found = faults.Outcome(row, kind, number, 0, "WRONG", 0, 1, [f"drill: {error!r}"])
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(handle, (json.dumps(asdict(found)) + "\n").encode())
        os.close(handle)
        for note in found.notes if found.wrong else ():
            print(f"{row}, {kind}, {number}: {note}", file=sys.stderr, flush=True)


def table(done: list[dict[str, Any]]) -> Iterator[str]:
    """The rows of the drill as Markdown: one a fault and what it struck."""
    yield "| fault | what it struck | attempts | faults | states lost | wrong results | outcomes |"
    yield "|---|---|---:|---:|---:|---:|---|"
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in done:
        one_kind = one["row"] in ("resume, bitwise", "fuzzed input")
        what = {"resume, bitwise": "methods and loader backends", "fuzzed input": "parsers"}
        kind = what[one["row"]] if one_kind else one["kind"]
        groups.setdefault((one["row"], kind), []).append(one)
    for (row, kind), found in sorted(groups.items()):
        kinds = len({one["kind"] for one in found})
        what = f"{kinds} {kind}" if kinds > 1 else kind
        sums = [sum(one[name] for one in found) for name in ("faults", "lost", "wrong")]
        outcomes = Counter(one["outcome"] for one in found).most_common()
        text = "; ".join(f"{count} {outcome}" for outcome, count in outcomes)
        yield f"| {row} | {what} | {len(found)} | {' | '.join(map(str, sums))} | {text} |"


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=WHOLE, help="about so long on two cores")
    parser.add_argument("--folder", type=Path, default=Path("build/drill"), help="of its lines")
    parser.add_argument("--scratch", type=Path, default=None, help="default: in /dev/shm")
    parser.add_argument("--only", nargs="*", default=None, help="rows to run")
    parser.add_argument("--processes", type=int, default=2, help="attempts at a time")
    parser.add_argument("--table", action="store_true", help="only print what is done")
    options = parser.parse_args()
    file = options.folder / "attempts.jsonl"
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options, file)
    done = read(file)
    print("\n".join(table(done)))
    print(f"\n{len(done)} attempts; {platform.machine()}, {os.cpu_count()} cores, Linux "
          f"{platform.release()}, Python {platform.python_version()}")  # fmt: skip
    return int(any(one["lost"] or one["wrong"] for one in done))


def run(options: argparse.Namespace, file: Path) -> None:
    """Make the attempts that are not done yet."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.drill.faults import Drill
    from tests.drill.processes import fork
    from tests.drill.scripts import Base

    shm = Path("/dev/shm")
    place = options.scratch or (shm if shm.is_dir() else options.folder.resolve())
    scratch = place / f"letheon-drill-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        done = {(one["row"], one["kind"], one["number"]) for one in read(file)}
        rows = attempts(options.minutes / WHOLE)
        todo = [(key, one) for key, one in rows.items()
                if key not in done and key[0] in (options.only or key[0:1])]  # fmt: skip
        started = time.monotonic()
        base = Base(scratch / "base")
        drill = Drill(base, scratch / "learning")
        drill.learn()
        known = drill.expected, drill.events
        processes = [
            fork(partial(work, base, known, todo[k :: options.processes], file,
                         scratch / f"worker-{k}"))
            for k in range(options.processes)
        ]  # fmt: skip
        for process in processes:
            os.waitpid(process, 0)
        print(f"{len(todo)} attempts in {(time.monotonic() - started) / 60:.1f} min, after "
              f"{len(done)} earlier ones", file=sys.stderr)  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
