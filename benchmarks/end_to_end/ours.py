"""Run one of our scripts with its spans recorded: python -m end_to_end.ours forget --data ..."""

from __future__ import annotations

import sys

from harness import report_spans

from letheon.launch import evaluate, forget, prepare
from letheon.launch.command import run_command


def main() -> None:
    """Run the script named first with the arguments that follow."""
    sys.argv = sys.argv[1:]
    with report_spans():
        if sys.argv[0] == "forget":  # one run or several
            forget.start()
        elif sys.argv[0] == "evaluate":
            run_command(evaluate.Settings, evaluate.main)
        else:
            run_command(prepare.Settings, prepare.main)


if __name__ == "__main__":
    main()
