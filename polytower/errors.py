"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the way out.

    The command line prints it without a traceback and exits with 1; HTTP turns it into a problem response.
    """
