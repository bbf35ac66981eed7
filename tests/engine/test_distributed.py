"""Sums, gathered rows and agreement over ranks, and the gradient statistics made of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from letheon.engine.distributed import (
    Ranks,
    agree,
    gather_rows,
    join_ranks,
    require_equal,
    share_out,
    sum_over_ranks,
)
from letheon.engine.ranks.launchers import (
    adopt_launcher,
    find_device,
    first_node,
    is_launched,
)
from letheon.engine.recipe import Recipe
from letheon.engine.runs.agreement import name_gpu
from letheon.engine.statistics import gradient_sum
from letheon.errors import InputError, RunFailed
from letheon.loaders.order import share
from letheon.methods.finetune import Finetune, cross_entropy
from tests.patience import PATIENCE
from tests.pool import on_ranks
from tests.ports import free_port
from tests.world import run_of


def sums(ranks: Ranks) -> list[Tensor]:
    tensors = [
        torch.full((2, 3), float(ranks.rank + 1)).t(),
        torch.arange(4) + ranks.rank,
        torch.tensor(0.5, dtype=torch.float64),
    ]
    sum_over_ranks(tensors, ranks)
    return tensors


def test_sums_keep_shapes_and_dtypes() -> None:
    for a, b, c in on_ranks(3, sums):
        assert torch.equal(a, torch.full((3, 2), 6.0))
        assert torch.equal(b, 3 * torch.arange(4) + 3)
        assert c.dtype == torch.float64 and c == 1.5


def rows(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.arange(ranks.rank * 2, dtype=torch.float32).reshape(-1, 1) + 10 * ranks.rank
    flags = torch.ones(ranks.rank, dtype=torch.bool)
    mine = torch.arange(7)[share(7, ranks.rank, ranks.world)]
    return gather_rows(own, ranks), gather_rows(flags, ranks), gather_rows(mine, ranks, total=7)


def test_rows_come_in_rank_order_from_ranks_with_different_counts() -> None:
    for values, flags, known in on_ranks(3, rows):
        assert values.flatten().tolist() == [10, 11, 20, 21, 22, 23]
        assert flags.dtype == torch.bool and len(flags) == 3
        assert known.tolist() == list(range(7))


def disagree(ranks: Ranks) -> str:
    try:
        agree(ranks, "got a bad list" if ranks.rank == 1 else None)
    except InputError as error:
        return str(error)
    return ""


def differ(ranks: Ranks) -> str:
    require_equal(ranks, "weights", "same")
    try:
        require_equal(ranks, "weights", str(ranks.rank == 2))
    except RunFailed as error:
        return str(error)
    return ""


def test_one_ranks_problem_is_everybodys() -> None:
    assert on_ranks(3, disagree) == ["got a bad list"] * 3
    assert all("ranks [2]" in text for text in on_ranks(3, differ))


def gradients(ranks: Ranks, batch_size: int) -> list[Tensor]:
    run = run_of(Finetune(Recipe(batch_size=batch_size)), ranks)
    return gradient_sum(run, "forget", cross_entropy)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradient_sums_do_not_depend_on_ranks_or_batches(world: int) -> None:
    expected = gradients(Ranks(), 41)
    results = on_ranks(world, gradients, 4)
    for result in results:
        for ours, theirs, first in zip(result, expected, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert torch.equal(ours, first)


SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "12345",
}


@pytest.mark.parametrize(
    ("variables", "rank", "world", "local", "address"),
    [(SRUN, "3", "4", "1", "gpu07"), (MPIRUN, "1", "2", "1", "127.0.0.1")],
)
def test_the_variables_of_other_launchers_are_understood(
    variables: dict[str, str],
    rank: str,
    world: str,
    local: str,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {**variables, next(k for k in variables if k.endswith(("PROCID", "D_RANK"))): "0"}
    ports = []
    for process in (variables, other):
        monkeypatch.setattr(os, "environ", dict(process))
        adopt_launcher()
        ports.append(os.environ["MASTER_PORT"])
        assert os.environ["MASTER_ADDR"] == address
    assert ports[0] == ports[1]
    monkeypatch.setattr(os, "environ", dict(variables))
    adopt_launcher()
    assert [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [rank, world, local]
    monkeypatch.setattr(os, "environ", {**variables, "WORLD_SIZE": "8", "RANK": "5"})
    adopt_launcher()  # torchrun's own, started by srun or mpirun
    assert os.environ["RANK"] == "5" and "MASTER_ADDR" not in os.environ


ORTED = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}
"""What srun says to the daemon by which an MPI starts its ranks on another node."""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({**ORTED, **MPIRUN}, ("1", "2", "1", "2")),
        # Hydra under SLURM: its own numbers. srun with MPICH's plugin: srun's, whose local rank is
        # known.
        ({**ORTED, "PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
          "MASTER_ADDR": "gpu07"}, ("5", "8", "1", "2")),
        ({**SRUN, "PMI_SIZE": "4", "PMI_RANK": "3", "SLURM_STEP_TASKS_PER_NODE": "1,3",
          "SLURM_NODEID": "1"}, ("3", "4", "1", "3")),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, ("3", "4", "1", "2")),
    ],
)  # fmt: skip
def test_the_innermost_launcher_is_heard(
    variables: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    adopt_launcher()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert tuple(os.environ[name] for name in names) == expected


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 0),  # --gpu-bind, or a script that mpirun starts
        ({"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({}, None),
    ],
)
def test_one_visible_gpu_is_a_tasks_own_but_not_under_torchrun(
    variables: dict[str, str], device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if device is None:
        with pytest.raises(InputError, match="local rank 3; this machine shows 1 GPUs"):
            find_device("auto", 3)
    else:
        assert find_device("auto", 3) == torch.device("cuda", device)


@pytest.mark.parametrize(
    ("variables", "local_rank", "card"),
    [
        ({"CUDA_VISIBLE_DEVICES": "MIG-b", "TORCHELASTIC_RUN_ID": "x"}, 0, "MIG-b"),  # virtual
        ({"CUDA_VISIBLE_DEVICES": "MIG-b"}, 3, "MIG-b"),  # srun, mpirun
        ({"CUDA_VISIBLE_DEVICES": " MIG-b,MIG-a"}, 1, "MIG-b"),  # CUDA shows the first alone
        ({"CUDA_VISIBLE_DEVICES": "GPU-b"}, 1, "the whole card"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b", "TORCHELASTIC_RUN_ID": "x"}, 1, None),
    ],
)
def test_parts_of_a_gpu(
    variables: dict[str, str],
    local_rank: int,
    card: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two parts of one card may show its number: their names tell them apart."""
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    known = SimpleNamespace(uuid="the whole card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    if card is None:
        with pytest.raises(InputError, match="shows 1 GPUs; give each .* virtual local ranks"):
            find_device("auto", local_rank)
        return
    device = find_device("auto", local_rank)
    assert device == torch.device("cuda", 0)
    ranks = Ranks(1, 2, local_rank, device)
    assert name_gpu(ranks) == f"{socket.gethostname()} {card}"


def test_mpirun_over_several_nodes_needs_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    monkeypatch.setattr(os, "environ", dict(spread))
    with pytest.raises(InputError, match="no MASTER_ADDR"):
        adopt_launcher()
    monkeypatch.setattr(os, "environ", {**spread, "MASTER_ADDR": "n1"})
    adopt_launcher()
    assert os.environ["MASTER_ADDR"] == "n1"


MPIEXEC = {
    "PMI_SIZE": "4",
    "PMI_RANK": "2",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
"""What Hydra, of MPICH, says; nothing of it names the job."""


def test_mpiexec_over_several_nodes_needs_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its hosts has a daemon of its own, so that nothing there is equal on both."""
    unknown = {name: value for name, value in MPIEXEC.items() if name != "MASTER_PORT"}
    monkeypatch.setattr(os, "environ", unknown)
    with pytest.raises(InputError, match="no MASTER_PORT"):
        adopt_launcher()
    monkeypatch.setattr(os, "environ", dict(MPIEXEC))
    adopt_launcher()
    assert (os.environ["MASTER_PORT"], os.environ["RANK"]) == ("29500", "2")


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        (SRUN, True), (MPIRUN, True), (MPIEXEC, True), ({"TORCHELASTIC_RUN_ID": "x"}, True),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, False),  # by hand, perhaps with nohup in a shell
    ],
)  # fmt: skip
def test_a_rank_ends_with_the_launcher_that_started_it(
    variables: dict[str, str], launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    assert is_launched() == launched
    adopt_launcher()  # which says it in other words
    assert is_launched() == launched


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_that_a_script_starts_meet_at_one_port() -> None:
    """It goes by the process that starts all of them, here this one; not by the script between."""
    ask = "from letheon.engine.ranks.launchers import *; adopt_launcher(); print(os.environ[PORT])"
    ask = ask.replace("PORT", "'MASTER_PORT'")
    env = {"PMI_SIZE": "3", "PMI_RANK": "2", "MPI_LOCALNRANKS": "3"}
    done = subprocess.run(
        ["sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", ask],
        env={**os.environ, **env}, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == 20000 + zlib.crc32(str(os.getpid()).encode()) % 10000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[09-12,20],m3", "n09"), ("a[3,7]-ib,b1", "a3-ib")],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


LEAVE = """
import os, pathlib, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from letheon.engine.distributed import join_ranks
assert "torch._dynamo" not in sys.modules
with join_ranks("cpu") as ranks:
    import torch.distributed.fsdp, torch.distributed.optim
    net = DistributedDataParallel(torch.nn.Linear(2, 2))
    net(torch.ones(1, 2)).sum().backward()
    del net
    assert "torch._dynamo" in sys.modules
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(sorted(name.strip() for name in names if "gloo" in name))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_outlives_it() -> None:
    """Though torch's modules that are first imported within it have it for a default argument."""
    port = free_port()
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for one in started:
        out, err = one.communicate(timeout=PATIENCE)
        assert (one.returncode, out) == (0, "[]\n"), err


def in_an_existing_group(ranks: Ranks) -> tuple[int, int, float, bool]:
    with join_ranks("cpu") as own:
        total = torch.ones(1)
        sum_over_ranks([total], own)
    return own.rank, own.world, total.item(), dist.is_initialized()


def test_a_process_group_that_exists_is_used_and_left_alone() -> None:
    assert on_ranks(2, in_an_existing_group) == [(0, 2, 2.0, True), (1, 2, 2.0, True)]


def shared(ranks: Ranks) -> tuple[list[str], str]:
    def check(number: int) -> int:
        if number in (3, 4):
            raise InputError(f"got {number}")
        return number

    named = share_out(range(5), lambda n: f"{n} on {ranks.rank}", ranks)
    try:
        share_out(range(7), check, ranks)
    except InputError as error:
        return named, str(error)
    return named, ""


def test_work_shared_out_comes_in_order_with_the_first_items_problem() -> None:
    want = ["0 on 0", "1 on 1", "2 on 0", "3 on 1", "4 on 0"]
    assert on_ranks(2, shared) == [(want, "got 3")] * 2
