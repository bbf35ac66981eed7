"""Cold and warm starts of a compiled step, whole or block by block, and the steps that follow.

    cd benchmarks && python -m compiling.bench_compile --out results/compile_cpu.csv

A start is a process of its own that builds the network and takes two training steps of one batch:
"cold" with an empty folder of compiled code, "warm" with what the cold one left, "from a file" with
an empty folder and the file of compiled code (`--compile-file`). Time is by the clock and by the
processor, of the process with all that it starts (the C++ compiler among it); the start that
compiles nothing is what the others are to be held to. Steps are timed in one process, the ways
taking turns. "Two networks" are a ResNet-18 and the network of the row in one process, with images
of different sizes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from bench_step import Options as StepOptions
from bench_step import our_step, synthetic
from harness import Results, row

from letheon.engine.compiled import CodeFile
from letheon.engine.memory.activations import find_blocks
from letheon.engine.models.classifier import build, preset_of
from letheon.engine.precision import Precision

Mode = Literal["off", "blocks", "default"]


@dataclass(frozen=True)
class Network:
    """A network and the batch that it is given."""

    model: str
    size: int
    batch: int

    @property
    def label(self) -> str:
        """As rows name it."""
        return f"{self.model} {self.size}px b{self.batch}"


NETWORKS = (
    Network("small", 16, 64),
    Network("resnet18", 64, 16),
    Network("resnet50", 64, 8),
    Network("vit_tiny_16", 64, 16),
)
OTHER = Network("resnet18", 48, 8)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    out: Path | None = None
    """CSV file to write; printed only, if not given"""
    only: tuple[str, ...] = ()
    """networks by name; all, if not given"""
    starts: int = 2
    """of each kind"""
    repeats: int = 7
    """of the steps"""
    file: bool = True
    """starts from a file of compiled code, too"""
    beside: str = "resnet50"
    """the network that is compiled after a smaller one in one process"""
    threads: int = 1
    """of torch; the C++ compilers of a start run beside each other"""
    work: str = ""
    """what a process of this script does; for the script itself"""


def step_of(network: Network, mode: Mode) -> tuple[Callable[[], object], Callable[[], float]]:
    """A step on a batch of its own, compiled in this way, and the seconds it has compiled for."""
    options = StepOptions(size=network.size, batch=network.batch)
    preset = preset_of(network.model)
    model = build(network.model, 100, 0, type(preset)(**{**vars(preset), "size": network.size}))
    return our_step(model, synthetic(options), "plain", [], Precision("fp32", compile=mode))


def start(work: dict[str, object]) -> None:
    """In a process of its own: take two steps of each network, and say what compiling took."""
    code = CodeFile(Path(str(work["file"])) if work["file"] else None, main=True)
    seconds = 0.0
    for values in work["networks"]:  # type: ignore[attr-defined]
        take, compiled = step_of(Network(*values), work["mode"])  # type: ignore[arg-type]
        take()
        take()
        seconds += compiled()
    code.save()
    print(json.dumps(seconds))


def time_start(
    options: Options, networks: tuple[Network, ...], mode: Mode, cache: Path, file: Path | None
) -> tuple[float, float, float]:
    """Seconds by the clock and by the processor of a start, and what its step called compiling."""
    work = {
        "networks": [(n.model, n.size, n.batch) for n in networks],
        "mode": mode,
        "file": str(file or ""),
    }
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": str(options.threads),
    }
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "compiling.bench_compile", "--work", json.dumps(work)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(ended.stderr)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, float(ended.stdout.splitlines()[-1])


def starts(
    options: Options, networks: tuple[Network, ...], x: str, results: Results, left: Path
) -> None:
    """Rows of the starts of each way, the ways taking turns; what they compiled goes to `left`."""
    found: dict[tuple[Mode, str], list[tuple[float, float, float]]] = {}
    modes: list[Mode] = ["off", "default"]
    if all(has_blocks(network) for network in networks):
        modes.insert(1, "blocks")
    for _ in range(options.starts):
        for mode in modes:
            with tempfile.TemporaryDirectory() as folder:
                cache, file = Path(folder) / "cache", Path(folder) / "code"
                ways: list[tuple[str, Path, Path | None]] = [("", cache, None)]
                if mode != "off":
                    ways = [
                        ("cold", cache, file),
                        ("warm", cache, None),
                        ("from a file", Path(folder) / "empty", file),
                    ][: 3 if options.file else 2]
                for name, where, code in ways:
                    spent = time_start(options, networks, mode, where, code)
                    found.setdefault((mode, name), []).append(spent)
                if cache.exists():
                    shutil.copytree(cache, left, dirs_exist_ok=True)
    for (mode, name), each in found.items():
        for place, metric in enumerate(("wall", "processor", "compile")):
            if metric != "compile" or mode != "off":
                values = [one[place] for one in each]
                results.add([row("start", f"{mode} {name}".strip(), values, metric=metric,
                                 unit="s", mode="train", x=x, device="cpu")])  # fmt: skip


def has_blocks(network: Network) -> bool:
    """Whether there is something that repeats."""
    with torch.device("meta"):
        return bool(find_blocks(build(network.model, 10)))


def steps(options: Options, network: Network, results: Results, left: Path) -> None:
    """Rows of the step of each way in one process, with what the starts compiled."""
    modes: tuple[Mode, ...] = ("off", "blocks", "default")
    if not has_blocks(network):
        modes = ("off", "default")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(left)
    takes = {mode: step_of(network, mode)[0] for mode in modes}
    times: dict[Mode, list[float]] = {mode: [] for mode in modes}
    for number in range(2 + options.repeats):
        for mode, take in takes.items():
            begin = time.process_time()
            take()
            if number > 1:  # the first two compile, and settle the memory
                times[mode].append((time.process_time() - begin) * 1e3)
    for mode, values in times.items():
        ratios = [plain / mine for plain, mine in zip(times["off"], values, strict=True)]
        for metric, unit, each in (
            ("processor", "ms", values),
            ("off over this", "times", ratios),
        ):
            results.add([row("step after", mode, each, metric=metric, unit=unit, mode="train",
                             x=network.label, device="cpu")])  # fmt: skip


def main(options: Options) -> None:
    """Measure each network; a row is on the disk as soon as it is known."""
    torch.set_num_threads(options.threads)
    if options.work:
        start(json.loads(options.work))
        return
    results = Results(options.out, append=bool(options.only))
    for network in NETWORKS:
        if options.only and network.model not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            starts(options, (network,), network.label, results, Path(folder))
            steps(options, network, results, Path(folder))
            if network.model == options.beside:
                x = f"{OTHER.label}, then {network.label}"
                starts(options, (OTHER, network), x, results, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
