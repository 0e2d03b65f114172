"""Files that are written whole or not at all, what tells a damaged one, and small JSON files that may be broken.

with replacing(Path("out/model.json")) as beside:
    beside.write_text(text, encoding="utf-8")
settings = json_object(Path("out/model.json"))
same = sha256(Path("out/model.safetensors")) == settings["weights_sha256"]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file beside the target that takes its place when the block ends well, and is removed otherwise.

    It is on the disk before it is published, and has the mode that the umask allows, whoever wrote it. An OSError
    about it names the target.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors makes files that their owner alone can read
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        if str(error.filename) != str(beside):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from None
    finally:
        with contextlib.suppress(OSError):  # on a disk that became read-only it cannot be removed either
            beside.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError says what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is broken (it is not JSON: {error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is broken (it must hold a JSON object); copy it again")
    return value
