"""The one exception that means: the input was wrong, and here is what to do."""


class GradvarError(Exception):
    """A mistake that the user can mend: expected, received, what to do, in one line.

    The command line prints the message without a traceback and ends with exit code 2.
    """
