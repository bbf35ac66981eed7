"""The user's mistakes, told in one line: what was got, what was expected, how to mend it."""


class InputError(Exception):
    """Bad input. The scripts print its text as one line and exit with code 2 on every rank.

    No ValueError on purpose: those the command-line parser takes for its own and frames.
    """
