"""The GPU suite: refuses in one line without a GPU, passes all of its checks with one."""

import csv
from dataclasses import replace

import pytest
import torch

from tests.marks import slow_but


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, capsys):
    import gpu_suite

    assert gpu_suite.main(gpu_suite.Options(out=tmp_path / "gpu.csv")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gpu_suite: got no CUDA device, expected one")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tf32_as_before():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize(
    "section", slow_but(("checks", "methods"), ("checks", "ladder", "methods", "every method"))
)
def test_a_rehearsal_without_a_gpu_writes_every_row_and_resumes(
    tmp_path, section, tf32_as_before, capsys
):
    import gpu_suite

    out = tmp_path / "rehearsal.csv"
    options = gpu_suite.Options(out=out, seconds=0, repeats=1, device="cpu", only=(section,))
    assert gpu_suite.main(options) == 0
    assert "FAILED" not in capsys.readouterr().err
    rows = list(csv.DictReader(out.open()))
    metrics = {row["metric"] for row in rows}
    expected = {
        "checks": {"passed", "section ended"},
        "ladder": {"time", "rate", "share of a bf16 product's rate", "section ended"},
        "every method": {"time", "section ended"},
        "methods": {"time", "more than the plain step", "share of what its operations allow"},
    }
    assert expected[section] <= metrics
    assert all(float(row["median"]) == float(row["median"]) for row in rows)
    if section == "checks":
        assert gpu_suite.main(replace(options, resume=True)) == 0
        assert list(csv.DictReader(out.open())) == rows


def test_when_the_time_is_up_the_rows_stay_and_the_rest_is_named(tmp_path, monkeypatch, capsys):
    import gpu_suite
    from harness import row

    def endless(device, repeats):
        yield row("first", "ours", [1.0], device="cpu")
        raise gpu_suite.OutOfTime

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"one": endless, "two": endless})
    options = gpu_suite.Options(out=tmp_path / "gpu.csv", device="cpu", seconds=0)
    assert gpu_suite.main(options) == 1
    assert "left out when the time was up: one, two" in capsys.readouterr().err
    assert [r["name"] for r in csv.DictReader(options.out.open())] == ["first"]


def test_a_result_is_read_from_pytests_line_alone_and_with_workers():
    import gpu_suite

    read = gpu_suite._test_result
    assert read("tests/gpu/test_a.py::test_b[1-x] PASSED   [  1%]\n") == (
        "gpu/test_a.py", "test_b[1-x]", True,
    )  # fmt: skip
    assert read("[gw3] [ 10%] FAILED tests/gpu/test_a.py::test_b[1-x] \n") == (
        "gpu/test_a.py", "test_b[1-x]", False,
    )  # fmt: skip
    assert read("E   AssertionError: PASSED\n") is None
    assert read("[gw3] [ 10%] XFAIL tests/gpu/test_a.py::test_b \n") is None
