"""Two hosts on this machine: network namespaces with a cable between them; for root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.cluster.drills import SCRIPT
from tests.launch_tools import ROOT


def missing() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and ip (iproute2)"
    probe = f"lhprobe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if done.returncode:
        return f"needs the right to make network namespaces ({done.stderr.decode().strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return ""


class Hosts:
    """Two namespaces, each with a name, an address and ranks of its own."""

    def __init__(self) -> None:
        """Make both; `close` removes them."""
        number = os.getpid() % 10000
        self.names = [f"lh{number}a", f"lh{number}b"]
        self.cables = [f"lv{number}a", f"lv{number}b"]
        self.agents: list[subprocess.Popen[str]] = []
        (first, second), (one, two) = self.names, self.cables
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run(*f"ip link add {one} netns {first} type veth peer name {two} netns {second}".split())
        lines = ["127.0.0.1 localhost", *(f"{self.address(k)} {self.names[k]}" for k in (0, 1))]
        for k, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            _run("ip", "-n", name, "addr", "add", f"{self.address(k)}/24", "dev", cable)
            for device in ("lo", cable):
                _run("ip", "-n", name, "link", "set", device, "up")
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            (etc / "hosts").write_text("\n".join(lines) + "\n")

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(
        self,
        host: int,
        meeting: str,
        *args: str,
        log: Path,
        ranks: int = 2,
        script: str = SCRIPT,
        restarts: int = 3,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[str]:
        """Start one agent with its ranks on a host; `meeting` names the job."""
        agent = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address(0)}:29701", f"--rdzv-id={meeting}",
            "--shutdown-timeout=10", script, *args,
        ]  # fmt: skip
        name = self.names[host]
        command = ["ip", "netns", "exec", name, "unshare", "-u", "bash", "-c"]
        command += [f'hostname {name}; exec "$@"', "agent", *agent]
        with log.open("a") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, text=True, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
            )  # fmt: skip
        self.agents.append(process)
        return process

    def link(self, state: str) -> None:
        """Plug the cable in or out: up, down."""
        _run("ip", "-n", self.names[0], "link", "set", self.cables[0], state)

    def slow_down(self, host: int, rate: str) -> None:
        """Limit what a host sends."""
        limit = f"root tbf rate {rate} burst 32kb latency 400ms".split()
        name, cable = self.names[host], self.cables[host]
        _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", cable, *limit)

    def processes(self) -> list[int]:
        """Processes that run on the two hosts."""
        lines = [_run("ip", "netns", "pids", name).split() for name in self.names]
        return [int(pid) for pids in lines for pid in pids]

    def ranks(self, host: int) -> list[int]:
        """Processes of a host that are ranks of a job."""
        pids = [int(pid) for pid in _run("ip", "netns", "pids", self.names[host]).split()]
        envs = {pid: Path(f"/proc/{pid}/environ").read_text(errors="replace") for pid in pids}
        return [pid for pid, env in envs.items() if "\0RANK=" in env]

    def close(self) -> None:
        """Kill what runs there, and remove both hosts."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()
        for name in self.names:
            _run("ip", "netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout
