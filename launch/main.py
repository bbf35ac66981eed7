"""The console command: `letheon forget ...` runs launch/forget.py, and so on for each script."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

from letheon import __version__
from letheon.errors import suggest
from letheon.processes import end_with_reader
from letheon.saved_help import run_or_show

COMMANDS = {
    "prepare": "check an image set once and store it for fast reading",
    "train": "train the original model",
    "mask": "write saliency masks for SalUn",
    "forget": "make a model forget classes or samples, by one method or several",
    "methods": "list the methods, or show one: definition, cost, source, published settings",
    "recipes": "list methods with settings, and where each comes from",
    "tune": "search for a method's rate and settings",
    "evaluate": "measure what is left, one row a model",
    "oracles": "train the retrained and original models that an audit compares with",
    "serve": "show runs on a local page: compare, sort, filter, watch",
    "run": "train, forget by several methods, evaluate and report from one file",
    "verify": "check that a run's folder is what its record says",
    "dispose": "list what else holds the forgotten data, and remove what is the run's own",
    "export": "write a model for torchvision, timm, ONNX or a Hugging Face folder",
    "completion": "print what a shell needs to complete letheon by TAB",
    "doctor": "check what a job needs: versions, devices, limits, disk, data, ranks",
}
"""Each script of this folder with the line that --help prints about it."""
HELP = ("--help", "-h")
_STOPPED = 75  # as `engine.runs.stop` has it, whose import takes a second
ROOMS = {
    "run": "jobs.", "verify": "records.", "dispose": "records.", "export": "export.",
    "recipes": "tuning.", "tune": "tuning.", "methods": "console.", "completion": "console.",
    "oracles": "ensembles.", "serve": "serving.",
}  # fmt: skip
"""Those that lie in a folder of their own."""


def main() -> None:
    """Run the script that the first argument names; the others are its options."""
    with end_with_reader():
        try:
            _main()
        except KeyboardInterrupt:  # while it imports or looks at its input: nothing is lost
            print("stopped: by SIGINT; the same command starts again", file=sys.stderr)
            sys.exit(_STOPPED)


def _main() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in HELP:
        print(usage())
    elif name == "--version":
        print(f"letheon {__version__}")
    elif name in COMMANDS:
        sys.argv = [f"letheon {name}", *rest]
        run_or_show([name, *rest], HELP, partial(start, find_script(name)))
    else:
        known = f"{', '.join(COMMANDS)}{suggest(name, COMMANDS)}"
        print(f"error: got command {name!r}; expected one of {known}", file=sys.stderr)
        sys.exit(2)


def find_script(command: str) -> str:
    """Return the module of a command's script."""
    return f"letheon.launch.{ROOMS.get(command, '')}{command}"


def start(script: str) -> None:
    """Import a script, which takes a second, and run it."""
    import_module(script).start()


def usage() -> str:
    """Return the text of --help."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: letheon COMMAND [options]    (letheon COMMAND --help lists them)",
            "",
            *lines,
            "",
            "  --version prints the version.",
            "",
            "On several GPUs: torchrun --nproc_per_node=8 -m letheon.launch.main COMMAND [options]",
            "Exit codes: 0 done, 2 bad input, 3 the run failed, 75 stopped by a signal, 1 a fault "
            "of Letheon's own.",
        ]
    )


if __name__ == "__main__":
    main()
