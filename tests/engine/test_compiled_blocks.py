"""Blocks that are compiled by kind, and compiled code in a file that is trusted with care."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.compiler._cache import CacheInfo

from letheon.engine import compiled
from letheon.engine.compiled import CodeFile, check_code_file, compile_blocks, read_code
from letheon.engine.loop import run_method
from letheon.engine.method import Method, Run
from letheon.engine.models.classifier import Classifier
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.methods.finetune import Finetune
from letheon.methods.spkd import Spkd
from tests.marks import slow_but
from tests.methods.cases import cases
from tests.world import PRESET, network, run_of, weights

RECIPE = Recipe(epochs=2, lr=0.01, batch_size=7)
FEW = Recipe(epochs=1, lr=0.01, batch_size=14)
QUICK = ("munba", "boundary-shrink")  # several gradients of one pass; a gradient by the pixels
METHODS = {name: method for name, method in cases(FEW).items() if method.recipe.epochs}


class Block(nn.Module):
    """A residual block; `scale` is a plain setting."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x + self.scale * self.norm(self.conv(x))).relu()
        return out


def run_with_blocks(method: Method, compile: str) -> Run:
    """A run of a network of three equal blocks and one with another setting."""
    run = run_of(method)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Sequential(Block(), Block(), Block(), Block(0.5)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
    run.model = Classifier(net, "blocks", PRESET)
    run.precision = Precision("fp32", compile=compile)  # type: ignore[arg-type]
    return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What is compiled, by a compiler that runs the graph as it is."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", keep)
    return found


def test_equal_blocks_share_a_graph_and_the_run_ends_as_the_plain_one(
    graphs: list[torch.fx.GraphModule],
) -> None:
    method = Finetune(RECIPE)
    run = run_with_blocks(method, "blocks")
    seconds = run_method(method, run)
    sizes = {len(batch.labels) for epoch in (0, 1) for batch in run.loader.train("retain", epoch)}
    assert len(graphs) == 2 * len(sizes)  # two kinds of block
    assert seconds.compile > 0
    assert all("forward" not in vars(layer) for layer in run.model.modules())
    plain = run_with_blocks(method, "off")
    run_method(method, plain)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[key], value, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", slow_but(QUICK, METHODS))
def test_every_method_ends_as_without(name: str, graphs: list[torch.fx.GraphModule]) -> None:
    ends = []
    for way in ("blocks", "off"):
        run = run_with_blocks(METHODS[name], way)
        run_method(METHODS[name], run)
        ends.append(weights(run))
    assert graphs
    for key, value in ends[1].items():
        torch.testing.assert_close(ends[0][key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_a_teacher_and_a_forward_pass_outside_the_loss_stay_as_they_are(
    graphs: list[torch.fx.GraphModule],
) -> None:
    method = Spkd(replace(RECIPE, epochs=1))
    run = run_with_blocks(method, "blocks")
    run_method(method, run)
    count = len(graphs)
    assert count > 0
    run.model(torch.zeros(11, 3, 8, 8))  # a size that no loss has met
    assert len(graphs) == count

    def fails(net: nn.Module, batch: object) -> Tensor:
        net(torch.zeros(2, 3, 8, 8))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compile_blocks(fails, run.model)(run.model, None)  # type: ignore[arg-type]
    assert all("forward" not in vars(layer) for layer in run.model.modules())


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="use compile default") as refusal:
        compile_blocks(lambda net, batch: torch.zeros(()), network())
    assert refusal.value.option == "compile"


def test_code_is_read_back_unless_it_is_damaged_or_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, code = tmp_path / "code", b"\x00a graph\nof two lines"
    info = CacheInfo()
    info.artifacts["graph"].append("one")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (code, info))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda code: deepcopy(info))
    assert read_code(path) is None  # nothing there yet
    CodeFile(path, main=False).save()
    assert not path.exists()
    CodeFile(path, main=True).save()
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_code(path) == code
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_code(path) is None
    path.write_bytes(whole.replace(torch.__version__.encode(), b"2.0.0", 1))
    assert read_code(path) is None
    CodeFile(path, main=True).save()
    assert path.read_bytes() == whole  # though nothing was compiled since
    CodeFile(path, main=True).save()
    before = path.stat().st_ino
    CodeFile(path, main=True).save()
    assert path.stat().st_ino == before  # the file has it all
    file = CodeFile(path, main=True)
    info.artifacts["graph"].append("two")
    code += b"!"
    file.save()
    assert read_code(path) == code
    path.chmod(0o620)
    with pytest.raises(InputError, match="whose code would be run") as refusal:
        read_code(path)
    assert refusal.value.option == "compile_file"


def test_a_file_that_cannot_be_written_is_refused_at_the_start_and_later_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no code")
    check_code_file(tmp_path / "file", main=True)  # is written anew
    check_code_file(tmp_path / "none/code", main=False)  # another host, which only reads
    for place, main in (("none/code", True), ("file/code", True), (".", True), (".", False)):
        with pytest.raises(InputError, match="got .*; expected a file of yours") as refusal:
            check_code_file(tmp_path / place, main)
        assert refusal.value.option == "compile_file"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(InputError, match="whose folder cannot be written to"):
            check_code_file(tmp_path / "code", main=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        with pytest.raises(InputError, match=r"which cannot be read \(no\)"):
            check_code_file(tmp_path / "file", main=False)
    info = CacheInfo()
    info.artifacts["graph"].append("one")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"graph", info))
    (tmp_path / "folder").mkdir()
    file = CodeFile(tmp_path / "folder/code", main=True)
    (tmp_path / "folder").rmdir()
    file.save()
    assert "compiled code is not saved, and the run goes on: got" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    file.save()
    assert read_code(tmp_path / "folder/code") == b"graph"


@pytest.mark.slow
def test_a_new_machine_starts_warm_from_the_file(tmp_path: Path) -> None:
    """In new processes with empty caches; with the real code generator."""
    script = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from tests.engine.test_compiled_blocks import *\n"
        "run = run_with_blocks(Finetune(RECIPE), 'blocks')\n"
        "run.precision = replace(run.precision, compile_file=Path(sys.argv[1]))\n"
        "print(run_method(Finetune(RECIPE), run).start)\n"
    )
    starts = []
    for cache in ("one", "two"):
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / cache)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "code")],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        starts.append(done.stdout.split()[-1])
    assert starts == ["cold", "warm"]
