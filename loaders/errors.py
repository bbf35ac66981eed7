"""The user's mistakes, told in one line: what was got, what was expected, how to mend it."""


class InputError(ValueError):
    """Bad input. The scripts print its text as one line and exit with code 2 on every rank."""
