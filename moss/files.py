"""Files that are written whole or not at all.

with replacing(Path("out/model.json")) as beside:
    beside.write_text(text, encoding="utf-8")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
