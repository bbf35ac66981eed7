"""Run one of our scripts with its clock split into spans: ours_timed.py forget --data ...

The scripts are what a user runs; only the functions that begin a part of the work are wrapped here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spans import Spans

from letheon.engine.checkpoints.model_file import save_model, weights_digest
from letheon.engine.loop import run_method
from letheon.engine.together import run_together
from letheon.eval.inference.passes import sweep_together
from letheon.eval.quick_row import measure
from letheon.eval.report.write import write_report
from letheon.kernels.threshold import top_masks
from letheon.launch import evaluate, forget, prepare
from letheon.launch.command import run_command
from letheon.loaders.batch import Batch, Loader, Reads
from letheon.loaders.factory import make_loader
from letheon.loaders.formats.arrays_writer import prepare as prepare_set

SCRIPTS = {"forget": forget, "evaluate": evaluate, "prepare": prepare}


class TimedLoader:
    """A loader whose batches are waited for under "data"."""

    def __init__(self, loader: Loader, spans: Spans) -> None:
        self._loader, self._spans = loader, spans

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def train(self, reads: Reads, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """As the loader's."""
        return self._spans.waiting("data", self._loader.train(reads, epoch, skip))

    def sweep(self, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """As the loader's."""
        return self._spans.waiting("data", self._loader.sweep(indices))


def replace(original: Callable[..., Any], made: Callable[..., Any]) -> None:
    """Put `made` wherever a module of ours holds `original`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("letheon."):
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, made)


def wrap(spans: Spans) -> None:
    """Let the parts of the scripts book their time."""
    parts: dict[str, tuple[Callable[..., Any], ...]] = {
        "compute": (run_method, run_together),
        "data": (prepare_set,),
        "evaluation": (sweep_together,),
        "statistics": (measure, top_masks, weights_digest),
        "saving": (save_model, write_report),
    }
    for span, functions in parts.items():
        for function in functions:
            replace(function, spans.timed(span, function))
    made = make_loader
    replace(made, lambda *args, **kwargs: TimedLoader(made(*args, **kwargs), spans))


def main() -> None:
    """Run the script named first with the arguments that follow."""
    spans = Spans()
    wrap(spans)
    script = SCRIPTS[sys.argv[1]]
    sys.argv = sys.argv[1:]
    if script is forget:  # one run or several
        forget.start()
    else:
        run_command(script.Settings, script.main)
    spans.write()


if __name__ == "__main__":
    main()
