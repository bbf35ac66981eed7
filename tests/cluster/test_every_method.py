"""2, 3 and 4 ranks on one and on two hosts: losses, weights and metrics of one rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from letheon.engine.distributed import Ranks
from tests.cluster import every_method
from tests.cluster.beds.two_hosts import Hosts, missing
from tests.patience import wait_for
from tests.pool import on_ranks

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5  # as tests/methods/test_ranks.py


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return every_method.everything(Ranks())


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


def compare(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["runs"].keys() == alone["runs"].keys() and len(found["runs"]) > 60
    for name, one in alone["runs"].items():
        other = found["runs"][name]
        pairs = [(other["losses"], one["losses"])]
        pairs += [(other["weights"][key], value) for key, value in one["weights"].items()]
        for mine, value in pairs:
            torch.testing.assert_close(
                torch.tensor(mine, dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                atol=TOLERANCE, rtol=TOLERANCE, msg=name,
            )  # fmt: skip
    for key, value in alone["row"].items():
        near = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
        assert found["row"][key] == near, key


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_host(world: int, alone: dict[str, Any]) -> None:
    compare(on_ranks(world, every_method.everything)[0], alone)


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 2)])
def test_two_hosts(
    ranks: tuple[int, int], hosts: Hosts, alone: dict[str, Any], tmp_path: Path
) -> None:
    out, log = tmp_path / "ends.json", tmp_path / "log"
    agents = [
        hosts.start(
            host, "job", str(out), log=log, ranks=count, script=every_method.__file__, restarts=0
        )
        for host, count in enumerate(ranks)
    ]
    wait_for(lambda: all(agent.poll() is not None for agent in agents), "end")
    assert [agent.returncode for agent in agents] == [0, 0], log.read_text()[-4000:]
    compare(json.loads(out.read_text()), alone)
