"""The one kind of error that a user can cause."""


class UserError(Exception):
    """Wrong input: one line that says what is wrong, where, and the remedy.

    `launch.py` prints it without a traceback and leaves with exit code 2.
    """
