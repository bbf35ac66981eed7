"""Who starts the ranks: what launchers say of a process's place, and the device that follows."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from letheon.errors import InputError


def find_device(name: str, local_rank: int) -> torch.device:
    """Find the device of a rank of this host.

    Raises:
        InputError: a device that is not there.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"got device {name}; expected auto, cpu or cuda", option="device")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "got device cuda; no CUDA device is visible; use device cpu or auto", option="device"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1 and _sees_its_gpu_alone():
        local_rank = 0  # each task sees its own GPU alone
    if local_rank >= torch.cuda.device_count():
        mend = "give each rank its own by torchrun's virtual local ranks" if visible_slice() else ""
        raise InputError(
            f"got local rank {local_rank}; this machine shows {torch.cuda.device_count()} GPUs; "
            + (mend or "start fewer processes on it")
        )
    return torch.device("cuda", local_rank)


def visible_slice() -> str:
    """The part of a GPU (MIG instance) that this process sees; "" where it sees whole ones.

    Of several that CUDA_VISIBLE_DEVICES names CUDA shows the first alone.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    return first if first.startswith("MIG-") else ""


def _sees_its_gpu_alone() -> bool:
    """Whether srun or mpirun lets this task see one GPU: by a binding, or by a script between.

    torchrun would have counted its ranks anew (its virtual local ranks); two of its ranks that see
    one GPU share it by mistake. Two others that do are refused where all agree on the start.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return "SLURM_GPUS_PER_TASK" in os.environ or "CUDA_VISIBLE_DEVICES" in os.environ


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher tells a process its place."""

    name: str
    world: str
    rank: str
    local_rank: str
    local_world: str
    job: Sequence[str]
    """What is equal on all processes of one start and differs between starts; the port's seed."""


_MPIRUN = Launcher(
    "mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE", ("PMIX_NAMESPACE",),
)  # fmt: skip
_MPIEXEC = Launcher(
    "mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_JOBID",)
)
_SRUN = Launcher(
    "srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "",
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
)  # fmt: skip

_QUEUES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
"""What a queue says to all processes of a job, which may hold several starts."""


def list_launchers() -> tuple[Launcher, ...]:
    """List the launchers whose processes know their rank without torchrun, the innermost first.

    Open MPI, MPICH and Intel MPI start their daemons by srun inside a SLURM job: the ranks on the
    other nodes then see the daemons' numbers in srun's variables, and their own in MPI's. srun
    itself may say MPICH's variables too, then with the same number of processes.
    """
    sizes = [os.environ.get(one.world, "") for one in (_MPIEXEC, _SRUN)]
    two = (_SRUN, _MPIEXEC) if sizes[0] in ("", "1", sizes[1]) else (_MPIEXEC, _SRUN)
    return (_MPIRUN, *two)


def is_launched() -> bool:
    """Whether a launcher that is known here has started this process as one rank of several."""
    worlds = (os.environ.get(one.world, "") for one in list_launchers())
    several = any(world.isdecimal() and int(world) > 1 for world in worlds)
    return several or "TORCHELASTIC_RUN_ID" in os.environ


def adopt_launcher() -> None:
    """Say in torchrun's variables what another launcher said in its own.

    torchrun's own are left alone, so that one torchrun a node may be started by any of them. Where
    the first process's host is not known (mpirun over several nodes), MASTER_ADDR must name it, and
    MASTER_PORT a port where the launcher names no job (MPICH's over several nodes).

    Raises:
        InputError: several processes were started that are not told apart, or cannot meet.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for launcher in list_launchers():
        world = os.environ.get(launcher.world, "1")
        if not world.isdecimal() or int(world) < 2:
            continue
        rank = os.environ.get(launcher.rank, "")
        if not rank.isdecimal():
            raise InputError(
                f"got {world} processes of {launcher.name}, none of which is told its rank "
                f"({launcher.rank}), so that each would be a whole job; expected torchrun: start "
                f"one torchrun per node with {launcher.name}, which starts the ranks"
            )
        local = os.environ.get(launcher.local_rank, "")
        address = os.environ.get("MASTER_ADDR") or _first_host(launcher, int(world))
        os.environ |= {
            "RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_RANK": local if local.isdecimal() else "0",
            "LOCAL_WORLD_SIZE": _count_local_ranks(launcher),
            "MASTER_ADDR": address,
            "MASTER_PORT": os.environ.get("MASTER_PORT") or _choose_port(launcher, world),
        }
        return


def _choose_port(launcher: Launcher, world: str) -> str:
    """The port at which the ranks meet: the same for all of them, another for each start."""
    seed = "-".join(os.environ.get(name, "") for name in launcher.job).strip("-")
    if not seed and os.environ.get(launcher.local_world, world) == world:
        seed = str(_find_launcher(launcher))
    seed = seed or next((os.environ[name] for name in _QUEUES if name in os.environ), "")
    if not seed:
        raise InputError(
            f"got {world} processes of {launcher.name} on several nodes, which names no job to "
            "them, and no MASTER_PORT; expected the port at which they meet; set MASTER_PORT to "
            "one that is free on the first host"
        )
    return str(20000 + zlib.crc32(seed.encode()) % 10000)


def _find_launcher(launcher: Launcher) -> int:
    """The process that started all ranks of this host: the nearest one that is told no rank.

    The parent may be a script that the launcher runs for each rank.
    """
    pid = os.getppid()
    with suppress(OSError):  # where there is no /proc, or another user's process
        while pid > 1:
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if not any(word.startswith(f"{launcher.rank}=".encode()) for word in words):
                break
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
    return pid


def _count_local_ranks(launcher: Launcher) -> str:
    """Ranks on this host, which share its memory and cores; 1 where the launcher does not say."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "") if launcher.name == "srun" else ""
    if not counts:
        return os.environ.get(launcher.local_world, "") or "1"
    every: list[str] = []
    for one in counts.split(","):  # such as 4(x2),3
        ranks, _, times = one.rstrip(")").partition("(x")
        every += [ranks] * int(times or "1")
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return every[node] if node < len(every) else every[0]


def _first_host(launcher: Launcher, world: int) -> str:
    """The host of rank 0: this one if all ranks are here, else the first of SLURM's list."""
    here = os.environ.get(launcher.local_world, "") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    nodes = os.environ.get("SLURM_STEP_NODELIST", "") if launcher.name == "srun" else ""
    if here == str(world) or os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    if nodes:
        return first_node(nodes)
    raise InputError(
        f"got {world} processes of {launcher.name} on several nodes and no MASTER_ADDR; expected "
        "the host of the first of them; set MASTER_ADDR to it"
    )


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM node list: n[09-12,20],m3 -> n09."""
    head, bracket, rest = nodes.partition("[")
    if "," in head or not bracket:
        return head.partition(",")[0]
    numbers, _, suffix = rest.partition("]")
    return head + re.split("[-,]", numbers)[0] + re.split(r"[,\[]", suffix)[0]
