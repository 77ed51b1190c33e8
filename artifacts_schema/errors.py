"""The one exception that reaches a user: a single line that says what is wrong and what to do."""


class UserError(Exception):
    """Bad input or a bad environment. The command prints the message without a traceback and exits with 2."""


def failed_operation(error: Exception) -> OSError | None:
    """The file operation that failed, if that is what an error comes from: the next time it may not."""
    because = error if isinstance(error, OSError) else error.__context__
    return because if isinstance(because, OSError) else None


class Busy(UserError):
    """Another process is at it right now: the same may work later."""


class Unavailable(UserError):
    """Something that is asked for is not on this machine, or not now: a model, for example."""


class Damaged(UserError):
    """Something that was written is missing or no longer what it was: it may be made again."""


class Unreadable(UserError):
    """Something that may be whole, but cannot be read here and now."""
