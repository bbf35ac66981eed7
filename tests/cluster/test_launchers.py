"""mpirun without torchrun: the results of torchrun's ranks; a rank or mpirun itself killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.drills import HELD, HOLD, SCRIPT, TRAIN, newest_state, note, weights_of
from tests.launch_tools import ROOT, Ended, torchrun
from tests.patience import PATIENCE, wait_for

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
]  # fmt: skip
MPIRUN = {  # as Debian names them, so that both can be there
    "Open MPI": ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"),
    "MPICH": ("mpirun.mpich",),
}
EPOCHS = ("--epochs", "6")


@pytest.fixture(params=MPIRUN)
def mpirun(request: pytest.FixtureRequest) -> tuple[str, ...]:
    words = MPIRUN[request.param]
    if shutil.which(words[0]) is None:
        pytest.skip(f"needs {words[0]} (apt-get install openmpi-bin mpich)")
    return words


def run_jobs(out: Path, run: Callable[..., Ended]) -> tuple[str, str, list[dict[str, object]]]:
    """Train, forget and evaluate on two ranks; the two weights and the rows."""
    data = ("--data", "digits", "--device", "cpu")
    first = (*data, "--weights", out / "original", "--forget", "class:3", "--out", out / "spkd")
    ended = [
        run("train", *TRAIN, *EPOCHS, "--out", out / "original"),
        run("forget", *first, "spkd", "--epochs", "1"),
        run("evaluate", *data, "--original", out / "original", "--runs", out / "spkd", "--out",
            out / "table"),
    ]  # fmt: skip
    for one in ended:
        assert one.code == 0, one.err
        # One job of two ranks, not two of one.
        assert one.err.count("error") == 0
    versions = json.loads((out / "original" / "versions.json").read_text())
    assert [node["ranks"] for node in versions["nodes"]] == [[0, 1]]
    rows = json.loads((out / "table" / "metrics.json").read_text(), object_hook=without_clock)
    return weights_of(out / "original"), weights_of(out / "spkd"), rows


def without_clock(of: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in of.items() if name != "seconds"}


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, str, list[dict[str, object]]]:
    def run(script: str, *args: object) -> Ended:
        return torchrun(2, script, *args)

    return run_jobs(tmp_path_factory.mktemp("torchrun"), run)


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def test_the_results_are_those_of_torchrun(
    mpirun: tuple[str, ...],
    expected: tuple[str, str, list[dict[str, object]]],
    tmp_path: Path,
) -> None:
    def run(script: str, *args: object) -> Ended:
        path = str(ROOT / "launch" / f"{script}.py")
        ended = subprocess.run(
            [*mpirun, "-n", "2", sys.executable, path, *map(str, args)], env=environment(),
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    assert run_jobs(tmp_path, run) == expected


def ranks_of(out: Path) -> dict[int, int]:
    """Processes of the run in `out` by rank; those of mpirun's that are none are left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_text().split("\0")
            env = (entry / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        for name in ("OMPI_COMM_WORLD_RANK=", "PMI_RANK="):
            rank = next((one for one in env if one.startswith(name)), "")
            if rank and str(out) in words and HELD in words[:3]:
                found[int(rank.removeprefix(name))] = int(entry.name)
    return found


@pytest.fixture
def job(mpirun: tuple[str, ...], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training on two ranks that has saved and waits; its standard error is in `log`."""
    out, hold = tmp_path / "run", tmp_path / "hold"
    hold.write_text("2")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*mpirun, "-n", "2", sys.executable, HELD, *TRAIN, *EPOCHS, "--out", str(out)],
            env=environment(**{HOLD: str(hold)}), stdout=log, stderr=log, text=True,
        )  # fmt: skip
    wait_for(lambda: process.poll() is not None or newest_state(out) > 0, "state")
    assert process.poll() is None, (tmp_path / "log").read_text()
    yield process
    for pid in ranks_of(out).values():
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "mpirun"])
def test_no_rank_outlives_what_was_killed(
    victim: str,
    job: subprocess.Popen[str],
    mpirun: tuple[str, ...],
    expected: tuple[str, str, list[dict[str, object]]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    ranks = ranks_of(out)
    assert sorted(ranks) == [0, 1]
    pid = job.pid if victim == "mpirun" else ranks[int(victim[-1])]
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "hold").unlink()
    assert job.wait(PATIENCE) != 0
    wait_for(lambda: not ranks_of(out), "end of every rank")
    again = subprocess.run(
        [*mpirun, "-n", "2", sys.executable, SCRIPT, *TRAIN, *EPOCHS, "--out", str(out)],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "goes on with the unfinished run" in again.stdout + again.stderr
    assert weights_of(out) == expected[0]
    outcome = "no rank left; the same line: equal weights"
    note(f"{mpirun[0]} -n 2", f"SIGKILL of {victim}", outcome)
