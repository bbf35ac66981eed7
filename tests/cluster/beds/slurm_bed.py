"""A SLURM of two nodes on this machine, in one folder; for root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.patience import wait_for
from tests.ports import free_ports

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n1", "n2")
_CONF = """
ClusterName=lab
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={bed}/munge/socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
FirstJobId={first}
StateSaveLocation={bed}/state
SlurmdSpoolDir={bed}/spool.%n
SlurmctldPidFile={bed}/slurmctld.pid
SlurmdPidFile={bed}/slurmd.%n.pid
SlurmctldLogFile={bed}/log/slurmctld.log
SlurmdLogFile={bed}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MinJobAge=86400
KillWait=3600
SlurmdTimeout=60
MessageTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=3600
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no bed here; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs apt-get install slurmctld slurmd slurm-client munge ({absent})" if absent else ""


class Bed:
    """The daemons, and the commands of a user."""

    def __init__(self, folder: Path) -> None:
        """Start in a folder whose path is short: those of sockets end at 107 letters."""
        self.folder = folder
        for name in ("state", "spool.n1", "spool.n2", "log", "munge"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        # Ports and numbers of jobs that no other bed of this machine has.
        conf = _CONF.format(
            bed=folder, ports=free_ports(3), first=1 + 10 * (os.getpid() % 1_000_000)
        )
        (folder / "slurm.conf").write_text(conf)
        self._waits: dict[str, float] = {}  # job -> when it was first seen to be queued again
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        munge = folder / "munge"
        self.run(
            "munged", "--force", f"--socket={munge}/socket", f"--key-file={key}",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            "--num-threads=2",
        )  # fmt: skip
        self.run("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D") == "idle 2", "two idle nodes")

    def run(self, *command: str) -> str:
        """Run one command of SLURM, and return what it prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *command: str, **variables: str) -> str:
        """Submit a job; returns its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *command], env={**self.env, **variables},
            capture_output=True, text=True, check=True, cwd=self.folder,
        )  # fmt: skip
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of what SLURM says of a job, such as JobState."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def hurry(self, job: str) -> bool:
        """Let a job that was queued again start soon, not in two minutes; true once it runs.

        Nodes refuse a turn that starts in the second in which the last one was taken back.
        """
        if self.field(job, "JobState") != "PENDING":
            self._waits.pop(job, None)
        elif time.monotonic() - self._waits.setdefault(job, time.monotonic()) > 5:
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.env, check=False,
                capture_output=True,
            )  # fmt: skip
        return self.field(job, "JobState") == "RUNNING"

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything that it runs, at once, as a power cut does."""
        victims = [pid for pid, env in self.processes() if f"SLURMD_NODENAME={node}" in env]
        keepers = {_parent(pid) for pid in victims}
        stepds = [pid for pid in keepers if pid and "slurmstepd" in _name(pid)]
        daemon = int((self.folder / f"slurmd.{node}.pid").read_text())
        for pid in (daemon, *stepds, *victims):
            _kill(pid)

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Processes that jobs of this bed have started, with their environment."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    env = (entry / "environ").read_text(errors="replace").split("\0")
                except OSError:
                    continue
                if f"SLURM_CONF={self.folder}/slurm.conf" in env and any(
                    one.startswith("SLURM_JOB_ID=") for one in env
                ):
                    yield int(entry.name), env

    def close(self) -> None:
        """End every job, daemon and process of the bed."""
        subprocess.run(["scancel", "--user=root"], env=self.env, check=False)
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge/pid"):
            file = self.folder / name
            if file.exists():
                pid = int(file.read_text())
                _kill(pid, signal.SIGTERM)
                wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"end of {name}")
        for pid, _ in list(self.processes()):
            _kill(pid)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
