"""What an attacker would run in the sandbox's child, had the solver a hole: the job of the tests' own sandbox.

Imported by the zygote, not by the tests: `Sandbox("tools_payloads:run", path=(tests folder,))`.
"""

# An attacker does not tidy up.
# ruff: noqa: PTH102, PTH108, PTH116, PTH123, PTH208, SIM115

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import subprocess
import threading
import time
import zlib

_libc = ctypes.CDLL(None, use_errno=True)
_PARENT = os.getppid()  # the program that started the zygote
_ZYGOTE = os.getpid()
_answers: list[int] = []


def _call(number: int, *arguments: object) -> str:
    """A raw system call; EPERM becomes the exception Python would raise."""
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return f"returned {result}"


def _answer_descriptor() -> int:
    """The one descriptor that takes a write."""
    for descriptor in range(64):
        try:
            os.write(descriptor, b"")
        except OSError:
            continue
        return descriptor
    raise RuntimeError("no descriptor takes a write")


def _say(data: bytes) -> str:
    """Write these bytes instead of an answer and end."""
    os.write(_answer_descriptor(), data)
    os._exit(0)


def _flood() -> str:
    descriptor = _answer_descriptor()
    for _ in range(160):
        os.write(descriptor, b"x" * 65536)
    return "written"


def _everywhere() -> str:
    for descriptor in range(64):
        try:
            os.write(descriptor, b'{"text": "forged"}')
        except OSError:
            continue
    os._exit(0)


def _read() -> str:
    """What any descriptor gives."""
    for descriptor in range(64):
        try:
            return repr(os.read(descriptor, 100))
        except OSError:
            continue
    return "nothing"


def _memory() -> str:
    blocks = []
    while True:
        blocks.append(bytes(8 << 20))  # not touched: a busy machine takes seconds to give out so many pages


def _loop() -> str:
    while True:
        pass


def _stubborn() -> str:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    return _loop()


def _pause() -> str:
    """Wait without using processor time or a system call that sleeps."""
    while True:
        os.sched_yield()


def _thread() -> str:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    return "started"


def _executable_memory() -> str:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    return "mapped"


def _make_executable() -> str:
    libc_mprotect = _libc.mprotect
    libc_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    region = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if libc_mprotect(address, 4096, 7) != 0:
        raise OSError(ctypes.get_errno(), "refused")
    return "executable"


def _write_file() -> str:
    with open("/tmp/moss-escaped", "w") as file:
        file.write("x")
    return "written"


PAYLOADS = {
    # files
    "read /etc/passwd": lambda: open("/etc/passwd").read(),
    "write a file": _write_file,
    "list a folder": lambda: str(os.listdir("/")),
    "stat a file": lambda: str(os.stat("/etc/passwd")),
    "unlink": lambda: str(os.unlink("/tmp/moss-nothing")),
    "read the zygote's environment": lambda: open(f"/proc/{_ZYGOTE}/environ").read(),
    "read the program's environment": lambda: open(f"/proc/{_PARENT}/environ").read(),
    "read the program's memory": lambda: str(open(f"/proc/{_PARENT}/mem", "rb").read(1)),
    "read standard input": lambda: str(os.read(0, 10)),
    "read a descriptor": _read,
    "duplicate a descriptor": lambda: str(os.dup(1)),
    "make a folder": lambda: str(os.mkdir("/tmp/moss-folder")),
    "change folder": lambda: str(os.chdir("/")),
    # network and other processes
    "tcp socket": lambda: str(socket.socket()),
    "unix socket": lambda: str(socket.socket(socket.AF_UNIX)),
    "socket pair": lambda: str(socket.socketpair()),
    "fork": lambda: str(os.fork()),
    "start a program": lambda: str(subprocess.run(["/bin/true"], check=False)),
    "replace by a program": lambda: str(os.execv("/bin/true", ["true"])),
    "kill the program": lambda: str(os.kill(_PARENT, 9)),
    "kill the zygote": lambda: str(os.kill(_ZYGOTE, 9)),
    "ptrace": lambda: _call(101, 16, _ZYGOTE, 0, 0),
    "read another's memory": lambda: _call(310, _PARENT, 0, 0, 0, 0, 0),
    "steal a descriptor": lambda: _call(438, 3, 0, 0),
    "thread": _thread,
    "pipe": lambda: str(os.pipe()),
    # privileges and the kernel
    "unshare": lambda: str(_libc.unshare(0x10000000)),
    "become root": lambda: str(os.setuid(0)),
    "chroot": lambda: str(os.chroot("/")),
    "mount": lambda: _call(165, 0, 0, 0, 0, 0),
    "raise a limit": lambda: str(resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))),
    "executable memory": _executable_memory,
    "make memory executable": _make_executable,
    "bpf": lambda: _call(321, 0, 0, 0),
    "io_uring": lambda: _call(425, 1, 0),
    "memfd": lambda: _call(319, 0, 0),
    "keyctl": lambda: _call(250, 0, 0),
    "prctl": lambda: str(_libc.prctl(4, 1, 0, 0, 0)),
    "x32 number": lambda: _call(0x40000000 + 39),
    "sleep": lambda: str(time.sleep(60)),
    # exhaustion and crashes
    "memory": _memory,
    "loop": _loop,
    "loop that ignores the signal": _stubborn,
    "busy waiting": _pause,
    "deep recursion": lambda: PAYLOADS["deep recursion"](),
    "segmentation fault": lambda: str(ctypes.string_at(0)),
    "abort": lambda: str(os.abort()),
    # forged answers
    "flood": _flood,
    "null": lambda: _say(b"null\n"),
    "brackets": lambda: _say(b"[" * 8000 + b"\n"),
    "wrong fields": lambda: _say(b'{"ok": 1}\n'),
    "wrong type": lambda: _say(b'{"text": 1}\n'),
    "two fields": lambda: _say(b'{"text": "a", "error": "b"}\n'),
    "half a json": lambda: _say(b'{"text": "a'),
    "control characters": lambda: _say(b'{"text": "\\u001b[2J"}\n'),
    "lone surrogate": lambda: _say(b'{"text": "\\ud800"}\n'),
    "nothing": lambda: _say(b""),
    "all descriptors": _everywhere,
    # not attacks
    "environment": lambda: repr(dict(os.environ)),
    "remember": lambda: str(_answers.append(1) or len(_answers)),
}


def _answer(size: bytes) -> str:
    """A text of so many bytes, with all that JSON writes longer."""
    text = '"\n文' * (int(size) // 5)
    return text + '"' * (int(size) - len(text.encode()))


PAGES = {
    "answer": _answer,
    "hoard": lambda megabytes: str(len(bytearray(int(megabytes) << 20)) >> 20),
}


def run(name: str, payload: bytes = b"") -> str:
    """The named payload's result; any other name comes back as it is, with the length and checksum of what came."""
    if name in PAYLOADS:
        return PAYLOADS[name]()
    if name in PAGES:
        return PAGES[name](payload)
    return f"{name} {len(payload)} {zlib.crc32(payload)}" if payload else name
