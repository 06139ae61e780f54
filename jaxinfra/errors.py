"""The one exception that means: the input is wrong, and this sentence says how to mend it."""


class UserError(ValueError):
    """Bad input, missing file or impossible request; the message names the cause and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """
