"""Check in seconds what a job needs, on every rank it is started with: one line a check.

    letheon doctor --data /data/imagenet --out runs
    torchrun --nnodes=2 --nproc_per_node=8 ... -m letheon.launch.doctor --data /data/imagenet

`ok`, `warning` with its mend, or `failure` with its mend. A check that gives the same line on all
ranks is printed once; otherwise each line names its host and rank. Exit code 3 on a failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from letheon.engine.distributed import Ranks, gather_objects
from letheon.engine.precision import Precision, bf16_gain, say_slower
from letheon.engine.runs.agreement import describe_shared_gpus, name_gpu
from letheon.engine.runs.run_folder import revision, versions
from letheon.errors import InputError, LetheonError, RunFailed, install_extra
from letheon.kernels.keyed import permutation
from letheon.launch.command import run_command
from letheon.launch.console.summary import console
from letheon.launch.planning.estimate import JobForecast, estimate
from letheon.loaders.backends.memory import free_bytes
from letheon.loaders.datasets.image_set import Data, ImageSet
from letheon.loaders.decode import jpeg
from letheon.loaders.open import open_source

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None  # type: ignore[assignment]

Status = Literal["ok", "warning", "failure"]
GIB = 2**30
READ = 64  # images of each part that are decoded, drawn by number
WRITE = 64 * 2**20  # bytes written to measure a disk
ONE_EACH = "one rank a GPU"
REDUCE = (2**18, 2**22, 2**24)  # float32 values of each all-reduce: 1, 16 and 64 MiB


class Finding(NamedTuple):
    """What one check has to say; `mend` is what to do about it."""

    check: str
    status: Status
    text: str
    mend: str = ""
    differs: bool = False
    """Whether it is expected to differ between ranks, such as a speed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check versions, devices, limits, disk, data and the ranks' exchange, before a long job."""

    data: str | None = None
    """The image set of the job: is it readable here, and the same on every rank?"""
    out: Path = Path()
    """Where the job will write: free space and speed of its disk."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is some, else the CPU."""
    estimate: bool = False
    """Predict rate, hours, memory and disk of training on --data, from a probe of 20 steps."""
    job: JobForecast = field(default_factory=JobForecast)


def main(settings: Settings, ranks: Ranks) -> None:
    """Run every check on every rank; the first rank prints what they found."""
    own: list[Finding] = []
    for check in CHECKS:
        try:
            own += check(settings, ranks)
        except (LetheonError, OSError) as error:
            own.append(Finding(check.__name__.strip("_"), "failure", str(error)))
    alike = len(set(gather_objects(ranks.device.type, ranks))) == 1
    apart = all(finding.check != ONE_EACH for finding in own)  # NCCL refuses two on one GPU
    own += _measure_all_reduce(ranks) if alike and apart else []
    if settings.estimate and alike:
        if settings.data is None:
            raise InputError("got no images to estimate a job on; name some", option="data")
        lines = estimate(settings.job, settings.data, settings.device, ranks)
        own += [Finding("estimate", "ok", line, differs=True) for line in lines]
    place = f"{socket.gethostname()} (rank {ranks.rank})"
    reports = gather_objects((place, own), ranks)
    merged = list(_merge(reports))
    if ranks.main:
        _print(merged, ranks)
    if any(finding.status == "failure" for _, finding in merged):
        raise RunFailed("got a check that failed; expected none; mend what it names")


def _merge(reports: list[tuple[str, list[Finding]]]) -> Iterator[tuple[str, Finding]]:
    """Yield (place, finding): once, with no place, where all ranks found the same."""
    order = list(dict.fromkeys(finding.check for _, own in reports for finding in own))
    for check in order:
        lines = [(place, f) for place, own in reports for f in own if f.check == check]
        distinct = dict.fromkeys(finding for _, finding in lines)
        if len(distinct) * len(reports) == len(lines):
            yield from (("", finding) for finding in distinct)
        elif all(finding.differs for finding in distinct):
            worst = max(distinct, key=lambda f: ("ok", "warning", "failure").index(f.status))
            yield from ((p, f) for p, f in lines[:1] if f.status == worst.status == "ok")
            yield from ((p, f) for p, f in lines if worst.status != "ok" and f.status != "ok")
        else:
            mend = "start every rank with the same code and data"
            for place, f in lines:
                yield place, f._replace(status="failure", mend=f.mend or mend)


def _print(merged: list[tuple[str, Finding]], ranks: Ranks) -> None:
    if console().json:
        rows = [{"place": place, **finding._asdict()} for place, finding in merged]
        for row in rows:
            del row["differs"]
        console().show(json.dumps({"world": ranks.world, "checks": rows}, indent=2))
        return
    for place, finding in merged:
        mend = f"; {finding.mend}" if finding.mend else ""
        at = f" on {place}" if place else ""
        print(f"{finding.status:<8} {finding.check}{at}: {finding.text}{mend}")


def _code(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    packages = versions(ranks)["packages"]
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    source = revision()
    commit = f", commit {source['revision'][:10]}" if source else ""
    yield Finding("code", "ok", f"Python {platform.python_version()}, {named}{commit}")
    if source.get("uncommitted_changes"):
        yield Finding(
            "changes", "warning", "the source tree has uncommitted changes",
            "commit them, so that a record names what ran",
        )  # fmt: skip


def _devices(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    kinds = set(gather_objects(ranks.device.type, ranks))
    if len(kinds) > 1:  # what they exchange would never meet
        yield Finding(
            "kind of device", "failure", f"ranks compute on {' and '.join(sorted(kinds))}",
            "mend the nodes that see no GPU, or name the device",
        )  # fmt: skip
    if ranks.device.type == "cpu":
        built = torch.version.cuda
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        text = f"cpu, {torch.get_num_threads()} threads of {cores} cores a rank"
        gain = bf16_gain()
        advice = "" if gain >= 1 else "; --dtype auto computes in fp32, name no bf16"
        yield Finding(
            "bf16", "ok", f"a product is {gain:.2g} times as fast as in fp32{advice}", differs=True
        )
        if built and torch.cuda.is_available():
            yield Finding("device", "ok", text)
        else:
            why = f"no GPU is visible to CUDA {built}" if built else "torch is built without CUDA"
            yield Finding(
                "device", "warning", f"{text}; {why}",
                "for a GPU check nvidia-smi and CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        return
    card = torch.cuda.get_device_properties(ranks.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(
        "device", "ok",
        f"{card.name}, {card.total_memory / GIB:.0f} GiB, sm_{card.major}{card.minor}, NCCL {nccl}",
    )  # fmt: skip
    if slower := say_slower(Precision("bf16"), ranks.device):
        yield Finding("bf16", "ok", f"{slower}; --dtype auto computes in fp32")
    if len(kinds) > 1:
        return
    if shared := describe_shared_gpus(gather_objects(name_gpu(ranks), ranks)):
        yield Finding(ONE_EACH, "failure", shared, "start one rank a GPU")


def _host(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    nodes = len(set(gather_objects(socket.gethostname(), ranks)))
    yield Finding("ranks", "ok", f"{ranks.world} on {nodes} host{'s' * (nodes > 1)}")
    if nodes > 1:
        mend = "name its address on the network in /etc/hosts, or set GLOO_SOCKET_IFNAME"
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError as error:
            yield Finding("host name", "failure", f"it does not resolve ({error})", mend)
        else:
            local = address.startswith("127.")
            yield Finding(
                "host name", "failure" if local else "ok", f"it resolves to {address}",
                mend if local else "", differs=not local,
            )  # fmt: skip
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        yield Finding(
            "restarts", "warning", "torchrun keeps one store over its restarts, under which the "
            "first restart over gloo fails or hangs",
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started",
        )  # fmt: skip


def _limits(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = ranks.world + 512  # a socket to each rank, and files
        yield Finding(
            "open files", "ok" if soft >= needed else "failure",
            f"{soft} may be open, about {needed} are needed",
            "" if soft >= needed else f"ulimit -n {max(needed, min(hard, 65536))}",
        )  # fmt: skip
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield Finding(
            "shared memory", "ok" if free >= GIB else "warning", f"{free / GIB:.1f} GiB free",
            "" if free >= GIB else "loader workers need some GiB: docker run --shm-size=8g",
            differs=True,
        )  # fmt: skip
    free = free_bytes(torch.device("cpu"))
    yield Finding(
        "memory", "ok" if free >= GIB else "warning", f"{free / GIB:.1f} GiB free",
        "" if free >= GIB else "end other processes", differs=True,
    )  # fmt: skip


def _disk(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    folder = settings.out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < WRITE * 4:
        yield Finding("disk", "failure", f"{free / 2**20:.0f} MiB free at {folder}", "free some")
        return
    block = os.urandom(2**20)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(WRITE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = WRITE / (time.perf_counter() - started)
    status: Status = "ok" if free >= 5 * GIB and speed > 20e6 else "warning"
    yield Finding(
        "disk", status, f"{free / GIB:.0f} GiB free at {folder}, {speed / 1e6:.0f} MB/s",
        "" if status == "ok" else "name a larger or faster disk as the output folder",
        differs=True,
    )  # fmt: skip


def _libraries(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    codecs = jpeg.available()
    yield Finding(
        "JPEG decoder", "ok" if codecs[0] != "pillow" else "warning", f"{', '.join(codecs)}",
        "" if codecs[0] != "pillow" else f"simplejpeg decodes faster; {install_extra('fast')}",
    )  # fmt: skip
    optional = {"ffcv": "ffcv", "nvidia.dali": "dali", "faiss": "faiss", "matplotlib": "report"}
    there = {name for name in optional if _is_importable(name)}
    missing = [f"{name} ([{extra}])" for name, extra in optional.items() if name not in there]
    text = f"{', '.join(sorted(there)) or 'none'} installed"
    yield Finding(
        "optional packages", "ok", text + (f"; not {', '.join(missing)}" if missing else "")
    )
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        yield Finding("compiler", "warning", "no C++ compiler", "compile needs one: install g++")


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _data(settings: Settings, ranks: Ranks) -> Iterator[Finding]:
    if settings.data is None:
        return
    source = open_source(settings.data)
    sets = {"train": source.train, "test": source.test} if isinstance(source, Data) else source
    for part, images in sets.items():
        yield Finding(
            f"data {part}", "ok",
            f"{len(images)} images of {len(images.classes)} classes, digest {images.digest[:12]}",
        )  # fmt: skip
        yield _read(part, images)


def _read(part: str, images: ImageSet) -> Finding:
    """Decode a keyed sample, the same on every rank."""
    sample = permutation(0, "doctor", 0, len(images))[:READ].tolist()
    started = time.perf_counter()
    broken = []
    for number in sample:
        try:
            images.read(number)
        except InputError as error:
            broken.append(str(error))
    speed = len(sample) / (time.perf_counter() - started)
    if broken:
        text = f"{len(broken)} of {len(sample)} cannot be read, such as {broken[0]}"
        return Finding(f"reading {part}", "failure", text, "mend or drop them: unreadable drop")
    text = f"{len(sample)} images, {speed:.0f} a second on one thread"
    return Finding(f"reading {part}", "ok", text, differs=True)


def _measure_all_reduce(ranks: Ranks) -> list[Finding]:
    """Time the exchange that averages gradients: bytes a rank sends, over the slowest seconds."""
    if ranks.world == 1:
        return []
    speeds = []
    for values in REDUCE:
        tensor = torch.ones(values, device=ranks.device)
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])
        seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        sent = 2 * (ranks.world - 1) / ranks.world * values * 4
        speeds.append(f"{values * 4 // 2**20} MiB at {sent / seconds.item() / 1e9:.2f} GB/s")
    return [Finding("all-reduce", "ok", ", ".join(speeds))]


CHECKS: tuple[Callable[[Settings, Ranks], Iterator[Finding]], ...] = (
    _code,
    _host,
    _devices,
    _limits,
    _disk,
    _libraries,
    _data,
)
"""Those that each rank runs; one that raises is a failure with its message."""


def start() -> None:
    """Run from the command line to the end of the process."""
    run_command(Settings, main)


if __name__ == "__main__":
    start()
