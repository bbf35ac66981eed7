"""The picture of the model of step time: fitted on two published points, beside all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from letheon.launch.planning.estimate import StepTime

FITTED = {"H100": (8, 512), "A100": (8, 64)}
"""GPUs of the two points on which each machine's curve is fitted."""
MOST = 64  # GPUs for which the model is stated


def points(lines: Sequence[Mapping[str, str]], machine: str) -> dict[int, tuple[int, float]]:
    """GPUs -> images of a GPU, images/s of all."""
    found = {}
    for line in lines:
        if line["variant"] == machine:
            count, _, batch = line["x"].partition("x")
            found[int(count)] = (int(batch), float(line["median"]))
    return found


def fit(known: Mapping[int, tuple[int, float]], machine: str) -> StepTime:
    """Fit the model on the machine's two points of `FITTED`."""
    large, small = (
        (known[n][0], n * known[n][0] / known[n][1]) for n in FITTED[machine]
    )  # images of a GPU, seconds of a step
    return StepTime.fit(small, large)


def step_time(lines: Sequence[Mapping[str, str]], axes: Any) -> None:
    """Draw images/s of a GPU over its images in a step: curves fitted, points published."""
    for machine in FITTED:
        known = points(lines, machine)
        times = fit(known, machine)
        batches = [2**k for k in range(4, 10)]
        (line,) = axes.plot(
            batches, [b / times.seconds(b) for b in batches],
            label=f"{machine}: {1e3 * times.fixed:.2f} ms a step, {1e6 * times.image:.0f} us an "
            "image",
        )  # fmt: skip
        for count, (batch, rate) in known.items():
            axes.plot(batch, rate / count, "o", color=line.get_color())
            axes.annotate(f"{count} GPUs", (batch, rate / count), fontsize="x-small",
                          xytext=(4, -10), textcoords="offset points")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images of a GPU in a step")
    axes.set_ylabel("images/s of a GPU, ResNet-50 at 224 pixels")
    axes.legend(fontsize="small")
