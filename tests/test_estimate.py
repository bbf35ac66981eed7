"""The model of step time: against published figures, and as the doctor prints it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from letheon.errors import InputError
from letheon.launch.planning.estimate import StepTime, reduce_seconds
from tests.launch_tools import ROOT, Scripts

# ResNet-50, 224 pixels: GPUs -> (images of a GPU, images/s of all), from the public logs of MLPerf
# Training, mlcommons/training_results. The batch at 16 GPUs is half of that at 8.
with (ROOT / "benchmarks" / "results" / "published_steps.csv").open(newline="") as _file:
    _LINES = list(csv.DictReader(_file))
H100, A100 = (
    {
        int(line["x"].partition("x")[0]): (int(line["x"].partition("x")[2]), int(line["median"]))
        for line in _LINES
        if line["variant"] == machine
    }
    for machine in ("H100", "A100")
)
WEIGHTS = 25_557_032


def seconds(points: dict[int, tuple[int, int]], world: int) -> float:
    batch, rate = points[world]
    return world * batch / rate


@pytest.mark.parametrize(
    ("points", "world", "other"), [(H100, 8, 512), (H100, 8, 64), (A100, 8, 64)]
)
def test_two_sizes_four_times_apart_predict_the_published_figures(
    points: dict[int, tuple[int, int]], world: int, other: int
) -> None:
    large, small = ((points[n][0], seconds(points, n)) for n in (world, other))
    times = StepTime.fit(small, large)
    for ranks, (batch, rate) in points.items():
        if ranks <= 64:
            predicted = ranks * batch / times.seconds(batch)
            assert predicted == pytest.approx(rate, rel=0.10), ranks


def test_sizes_too_close_are_refused_since_they_predict_badly() -> None:
    close = [(H100[n][0], seconds(H100, n)) for n in (16, 8)]
    with pytest.raises(InputError, match="at least 4 times apart"):
        StepTime.fit(*close)
    (a, s), (b, t) = close
    image = (t - s) / (b - a)
    predicted = 64 * 50 / (s - image * a + image * 50)
    assert predicted < 0.8 * H100[64][1]


def test_ring_all_reduce() -> None:
    """36 ms steps of 256 images: 4.5 ms for float32 gradients on one 400 Gb port a node."""
    assert reduce_seconds(4 * WEIGHTS, 1, 50e9) == 0
    assert reduce_seconds(4 * WEIGHTS, 1000, 50e9) == pytest.approx(4.1e-3, rel=0.05)


def test_the_doctor_estimates_from_a_probe(scripts: Scripts, tmp_path: Path) -> None:
    words = ("doctor", "--data", "digits", "--out", tmp_path, "--device", "cpu", "--estimate")
    ended = scripts(*words, "--model", "small", "--batch-size", "32", "--nodes", "2")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if line.startswith("ok       estimate:")]
    assert "probes of 4 and 16 images a rank" in lines[0]
    assert "images/s on 2 ranks of 2 nodes" in lines[1]
    assert "hours for 10 epochs of 1438 images" in lines[2]
    refused = scripts(*words, "--batch-size", "1", "--nodes", "2")
    assert refused.code == 2 and "--batch-size: got a batch of 1 images" in refused.err
