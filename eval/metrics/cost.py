"""What a run of forgetting costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from letheon.errors import NotMeasurable
from letheon.eval.metrics.registry import Summary, metric

if TYPE_CHECKING:
    from letheon.eval.case import Case


@metric(
    "seconds", title="Run time", group="Cost", unit="seconds", better="low", everywhere=True,
    summary=Summary(
        "time s", "run time of forgetting: preparation and training, compilation and evaluation "
        "apart", 10,
    ),
)  # fmt: skip
def run_time(case: Case) -> float:
    """RTE: seconds of the forgetting run, its preparation (masks, statistics) and its training;
    compilation and evaluation apart.
    """
    if case.subject.runs > 1:
        raise NotMeasurable(
            f"{case.subject.runs} runs were trained together, and the clock counts the others' "
            "steps; run it alone for its time"
        )
    if case.subject.seconds is None:
        raise NotMeasurable("got no record of a run; expected its folder")
    return case.subject.seconds
