"""The one error that a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do. The command line exits with code 2."""
