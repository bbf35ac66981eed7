"""Letheon makes trained image classifiers forget classes, fast, and measures what is left.

    import letheon

    result = letheon.forget(net, train=images, forget=[3, 8], method="salun")
    rows = letheon.evaluate(original=net, unlearned=[result], train=images, test=held_out,
                            forget=[3, 8])

Everything public is imported at its first use, so that `import letheon` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from letheon import errors
    from letheon.engine.method import Method, Phase
    from letheon.eval.report.row_list import Rows
    from letheon.launch.api import evaluate, forget, load_model, train
    from letheon.launch.inputs import Result

__version__ = "0.1.0"
"""The one place of the version: setup.py and the files we write read it from here."""

__all__ = [
    "Method",
    "Phase",
    "Result",
    "Rows",
    "__version__",
    "errors",
    "evaluate",
    "forget",
    "load_model",
    "train",
]

_MODULES = {
    "Method": "letheon.engine.method",
    "Phase": "letheon.engine.method",
    "Result": "letheon.launch.inputs",
    "Rows": "letheon.eval.report.row_list",
    "evaluate": "letheon.launch.api",
    "forget": "letheon.launch.api",
    "load_model": "letheon.launch.api",
    "train": "letheon.launch.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name == "errors":
        return import_module("letheon.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """List the public names, whether or not they have been imported."""
    return sorted({*globals(), *__all__})
