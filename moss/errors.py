"""What went wrong, for people: the error of bad usage, and any error as one line."""

from __future__ import annotations


class UsageError(ValueError):
    """A command line or config file that does not fit the command; the exit code is 2."""


def one_line(error: BaseException) -> str:
    """An error as one line that says what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
