"""torchrun over two hosts: an agent or a rank killed, the link cut, one side slow; equal ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.beds.two_hosts import Hosts, missing
from tests.cluster.drills import (
    HELD,
    HELD_EVALUATE,
    HOLD,
    TRAIN,
    make_models,
    newest_state,
    note,
    rows_of,
    weights_of,
)
from tests.launch_tools import torchrun
from tests.patience import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
EPOCHS = ("--epochs", "40")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Weights and seconds of the same run on one host, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started = time.monotonic()
    ended = torchrun(4, "train", *TRAIN, *EPOCHS, "--out", out)
    assert ended.code == 0, ended.err
    return weights_of(out), time.monotonic() - started


class Job:
    """One run on both hosts."""

    def __init__(self, hosts: Hosts, tmp_path: Path) -> None:
        self.hosts, self.out, self.log = hosts, tmp_path / "run", tmp_path / "log"
        self.hold = tmp_path / "hold"
        self.hold.write_text("4")
        self.started = time.monotonic()
        self.agents = [self.start(host) for host in (0, 1)]

    def start(self, host: int, meeting: str = "job") -> subprocess.Popen[str]:
        args = (*TRAIN, *EPOCHS, "--out", str(self.out))
        return self.hosts.start(
            host, meeting, *args, log=self.log, script=HELD, env={HOLD: str(self.hold)}
        )

    def wait_for_save(self) -> None:
        """Until the run has saved a state, after which it waits."""
        wait_for(lambda: newest_state(self.out) > 0, "state")

    def finish(self, whole: tuple[str, float], fault: str) -> None:
        """Wait for the end, and compare; the row of the table.

        Agents that give up (torch's own may miss each other after one was killed) must leave no
        process; a scheduler then starts both again.
        """
        turns = 0
        while True:
            wait_for(lambda: all(agent.poll() is not None for agent in self.agents), "end")
            wait_for(lambda: not self.hosts.processes(), "end of every process")
            if [agent.returncode for agent in self.agents] == [0, 0]:
                break
            turns += 1
            assert turns < 3, self.log.read_text()[-4000:]
            self.agents = [self.start(host, f"job{turns}") for host in (0, 1)]
        assert weights_of(self.out) == whole[0]
        lost = time.monotonic() - self.started - whole[1]
        again = f"started again {turns} x, " if turns else "went on, "
        note("two hosts x 2 ranks", fault, again + "equal weights", lost)


def test_a_killed_agent_comes_back(hosts: Hosts, whole: tuple[str, float], tmp_path: Path) -> None:
    job = Job(hosts, tmp_path)
    job.wait_for_save()
    job.agents[1].kill()
    job.agents[1].wait()
    job.hold.unlink()
    job.agents[1] = job.start(1)
    job.finish(whole, "an agent killed and started again")


def test_a_link_that_is_cut_for_a_while(
    hosts: Hosts, whole: tuple[str, float], tmp_path: Path
) -> None:
    """No condition can be polled while nothing moves: the length of the cut is the fault itself."""
    job = Job(hosts, tmp_path)
    job.wait_for_save()
    hosts.link("down")
    job.hold.unlink()
    time.sleep(20)
    hosts.link("up")
    job.finish(whole, "link cut for 20 s")


def test_a_slow_side(hosts: Hosts, whole: tuple[str, float], tmp_path: Path) -> None:
    hosts.slow_down(1, "20mbit")
    job = Job(hosts, tmp_path)
    job.hold.unlink()
    job.finish(whole, "one side at 20 Mbit/s")


def test_an_evaluation_on_unequal_hosts_loses_a_rank(hosts: Hosts, tmp_path: Path) -> None:
    """Two ranks here and one there; the one there is killed, and the agents start all again."""
    told = make_models(tmp_path)
    out, log, hold = tmp_path / "table", tmp_path / "log", tmp_path / "hold"
    hold.write_text("3")
    agents = [
        hosts.start(
            host, "job", *told, "--out", str(out), log=log, ranks=ranks, script=HELD_EVALUATE,
            env={HOLD: str(hold)},
        )
        for host, ranks in enumerate((2, 1))
    ]  # fmt: skip

    def waiting() -> bool:
        assert all(agent.poll() is None for agent in agents), log.read_text()[-3000:]
        return all(hold.with_name(f"hold-{rank}").exists() for rank in range(3))

    wait_for(waiting, "wait of every rank")
    (victim,) = hosts.ranks(1)
    os.kill(victim, signal.SIGKILL)
    hold.unlink()
    wait_for(lambda: all(agent.poll() is not None for agent in agents), "end")
    assert [agent.returncode for agent in agents] == [0, 0], log.read_text()[-4000:]
    wait_for(lambda: not hosts.processes(), "end of every process")
    whole = torchrun(3, "evaluate", *told, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert rows_of(out) == rows_of(tmp_path / "whole")
    note("evaluate, two hosts of 2 + 1 ranks", "SIGKILL of a rank", "went on, equal table")
