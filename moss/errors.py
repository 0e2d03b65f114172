"""What goes to a person's terminal: the error of bad usage, any error as one line, any text made harmless."""

from __future__ import annotations

# Text from a model, a tool or a file must not steer the terminal: its control characters become visible pictures.
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class UsageError(ValueError):
    """A command line or config file that does not fit the command; the exit code is 2."""


def plain(text: str) -> str:
    """Text that cannot steer the terminal."""
    return text.translate(_CONTROL)


def one_line(error: BaseException) -> str:
    """An error as one line that says what is wrong; of a failed rename, the file that was to be made."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename
        return plain(f"{name}: {error.strerror}" if name else error.strerror)
    return plain(" ".join(str(error).split())) or type(error).__name__
