"""The attacks with what must become of them, and programs that own a sandbox in the settings where it must hold.

A setting is a user and a system that forbids a call: `run_program(lines, user=..., forbidden="unshare")`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moss.tools.base import ToolError
from moss.tools.sandbox import Sandbox

HERE = Path(__file__).parent
ROOT = HERE.parent
NOBODY = 65534

DENIED = r"it failed \((PermissionError|OSError)\)"
KILLED = "forbidden system call"
ATTACKS = {
    "read /etc/passwd": DENIED,
    "write a file": DENIED,
    "list a folder": DENIED,
    "stat a file": DENIED,
    "unlink": DENIED,
    "read the zygote's environment": DENIED,
    "read the program's environment": DENIED,
    "read the program's memory": DENIED,
    "read standard input": DENIED,
    "read a descriptor": "answered: nothing",
    "duplicate a descriptor": DENIED,
    "make a folder": DENIED,
    "change folder": DENIED,
    "tcp socket": KILLED,
    "unix socket": KILLED,
    "socket pair": KILLED,
    "fork": KILLED,
    "start a program": f"{KILLED}|{DENIED}",
    "replace by a program": KILLED,
    "kill the program": KILLED,
    "kill the zygote": KILLED,
    "ptrace": KILLED,
    "read another's memory": KILLED,
    "steal a descriptor": KILLED,
    "thread": KILLED,
    "pipe": KILLED,
    "unshare": KILLED,
    "become root": KILLED,
    "chroot": KILLED,
    "mount": KILLED,
    "raise a limit": KILLED,
    "executable memory": DENIED,
    "make memory executable": DENIED,
    "bpf": KILLED,
    "io_uring": KILLED,
    "memfd": KILLED,
    "keyctl": KILLED,
    "prctl": KILLED,
    "x32 number": KILLED,
    "sleep": KILLED,
    "memory": "memory limit",
    "loop": "time limit",
    "loop that ignores the signal": "time limit",
    "busy waiting": "time limit",
    "deep recursion": "nested too deep",
    "segmentation fault": "it crashed",
    "abort": KILLED,
    "flood": "bad answer",
    "null": "bad answer",
    "brackets": "bad answer",
    "wrong fields": "bad answer",
    "wrong type": "bad answer",
    "two fields": "bad answer",
    "half a json": "bad answer",
    "control characters": "bad answer",
    "lone surrogate": "bad answer",
    "nothing": "bad answer",
    "all descriptors": "bad answer",
}


def outcome(box: Sandbox, *arguments: str, payload: bytes = b"") -> str:
    """The answer, or the reason there is none."""
    try:
        return "answered: " + box.call(*arguments, payload=payload)
    except ToolError as error:
        return str(error)


class Place(NamedTuple):
    """An interpreter, and the folder that it imports the project from."""

    python: Path = Path(sys.executable)
    root: Path = ROOT


OWN = Place()


def place_for_all(folder: Path) -> Place:
    """One that every user can run; a copy in `folder` where those here lie behind doors that others cannot pass."""
    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    if all(each.stat().st_mode & 0o005 == 0o005 for path in (python, library, HERE) for each in (path, *path.parents)):
        return OWN
    home = Path(sys.base_prefix)
    needless = shutil.ignore_patterns("site-packages", "test", "idlelib", "config-*", "__pycache__")
    shutil.copytree(library, folder / library.relative_to(home), ignore=needless)
    for shared in (home / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, folder / "lib")
    shutil.copy2(python, folder / "python-itself")
    for part in ("moss", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("models", "__pycache__"))
    start = folder / "python"
    start.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={folder}/lib PYTHONHOME={folder} exec {folder}/python-itself "$@"\n')
    start.chmod(0o755)
    return Place(start, folder)


def program(*lines: str, place: Place = OWN) -> str:
    """The text of a program that owns a sandbox `box` and runs these lines."""
    head = f"""
        import sys
        sys.executable = {str(place.python)!r}
        sys.path[:0] = [{str(place.root)!r}, {str(place.root / "tests")!r}]
        from moss.tools.base import ToolError
        from moss.tools.sandbox import Sandbox
        from tools_settings import ATTACKS, outcome
        box = Sandbox("tools_payloads:run", path=({str(place.root / "tests")!r},))
    """
    return textwrap.dedent(head) + "\n".join(lines)


def run_program(
    *lines: str,
    forbidden: str = "",
    user: int | None = None,
    place: Place = OWN,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """What such a program prints, or its last error line; in a system that refuses `prctl(seccomp)` or `unshare`."""
    refuse = f"""
        import ctypes, platform, sys
        sys.path.insert(0, {str(place.root)!r})
        from moss.tools import jail
        column = jail._MACHINES[platform.machine()][0]
        number = {{"prctl": (157, 167), "unshare": (272, 97)}}[{forbidden!r}][column]
        allow, refuse = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50001)
        if {forbidden == "unshare"}:
            code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), refuse, allow]
        else:
            code = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 22), refuse, allow]
        array = (jail._Instruction * len(code))(*[jail._Instruction(*each) for each in code])
        program = jail._Program(len(code), array)
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)
        assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
    """
    body = (textwrap.dedent(refuse) if forbidden else "") + program(*lines, place=place)
    someone = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    done = subprocess.run(
        [place.python, "-c", body], cwd="/", capture_output=True, text=True, env=environment, **someone
    )
    return done.stdout or done.stderr.strip().split("\n")[-1]


def alive(pid: int) -> bool:
    """Whether this process runs; one that only waits to be counted does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
