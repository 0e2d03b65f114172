"""What a sandboxed process takes away from itself: the kernel's part of the sandbox, by ctypes alone.

Two moments. `shut_in` is for the zygote, once, after it has imported all it will ever need: no new privileges, not
dumpable, no user id worth having, no files (Landlock), no network (a namespace, where allowed). `shut_off` is for each
forked child, just before it computes: resource limits, then a seccomp filter that lets it allocate memory, write to
one pipe, read the clock and exit; file calls fail with EPERM, every other call kills the process.

Seccomp and the resource limits are what holds everywhere (root or not, in containers too); the rest is extra and
reported, so that a kernel without it is no surprise. x86-64 and aarch64 Linux. Not covered: timing side channels and
kernel bugs behind the calls that remain.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys

ALLOWED = {  # name: (x86-64, aarch64)
    "close": (3, 57),
    "mprotect": (10, 226),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "sched_yield": (24, 124),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "getrandom": (318, 278),
    "write": (1, 64),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
REFUSED = {  # fail with EPERM, so that Python reports them like a missing permission; -1 = not on that machine
    "open": (2, -1),
    "openat": (257, 56),
    "openat2": (437, 437),
    "read": (0, 63),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "stat": (4, -1),
    "lstat": (6, -1),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, -1),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, -1),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "getdents64": (217, 61),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "mkdir": (83, -1),
    "mkdirat": (258, 34),
    "rename": (82, -1),
    "renameat2": (316, 276),
}

ANSWER = 3  # the descriptor that a child may write to

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_KILL, _ALLOW, _EPERM = 0x80000000, 0x7FFF0000, 0x00050001
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_X32_BIT = 0x40000000
_PROT_EXEC = 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_FILTER = 2
_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x40000000, 0x08000000, 0x10000000
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction))]


class JailError(OSError):
    """A layer that must hold is not there."""


def shut_in() -> dict[str, object]:
    """Take from this process, for good, what its children must not inherit; say which layers took hold."""
    layers: dict[str, object] = {"network": _unshare(0)}
    layers["nobody"] = _drop_user()  # before a user namespace, where everybody looks like nobody
    layers["network"] = layers["network"] or _unshare(_CLONE_NEWUSER)
    layers["no_new_privileges"] = _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    layers["not_dumpable"] = _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    layers["landlock"] = _deny_files()
    return layers


def shut_off(program: _Program, *, memory: int, seconds: int) -> None:
    """Limit this process to computing and writing to `ANSWER`, by `filter_program()`; `JailError` when it cannot.

    `memory` is its whole address space in bytes, `seconds` of processor time.
    """
    for limit, value in (
        (resource.RLIMIT_AS, (memory, memory)),
        (resource.RLIMIT_CPU, (seconds, seconds + 1)),
        (resource.RLIMIT_FSIZE, (0, 0)),
        (resource.RLIMIT_NOFILE, (0, 0)),
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_NPROC, (0, 0)),
    ):
        resource.setrlimit(limit, value)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(program), 0, 0) != 0:
        raise JailError(ctypes.get_errno(), "seccomp is not available here")


def try_shut_off(program: _Program, *, memory: int, seconds: int) -> None:
    """Let a forked process shut itself off, so that a system without seccomp is known before the first call."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            shut_off(program, memory=memory, seconds=seconds)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1] != 0:
        raise JailError(0, "seccomp and resource limits do not take hold on this system")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it, ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def filter_program() -> _Program:
    """The seccomp filter of a child; the same for each, so that it is made once."""
    if platform.machine() not in _MACHINES:
        raise JailError(0, f"no system call table for {platform.machine()}")
    column, architecture = _MACHINES[platform.machine()]
    code = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 numbers name the same calls a second time
        code += [(_JUMP_ABOVE, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    for name, numbers in ALLOWED.items():
        if name == "write":  # first argument: only the answer's descriptor
            test = [(_LOAD, 0, 0, 16), (_JUMP_EQUAL, 0, 1, ANSWER), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
        elif name in ("mmap", "mprotect"):  # third argument: never executable
            test = [(_LOAD, 0, 0, 32), (_JUMP_BITS, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
        else:
            test = [(_RETURN, 0, 0, _ALLOW)]
        code += [(_JUMP_EQUAL, 0, len(test), numbers[column]), *test]
    for numbers in REFUSED.values():
        if numbers[column] >= 0:
            code += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _EPERM)]
    code.append((_RETURN, 0, 0, _KILL))
    array = (_Instruction * len(code))(*[_Instruction(*each) for each in code])
    return _Program(len(code), array)  # which keeps the array alive


def address_space() -> int:
    """Bytes of address space this process uses now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (pathlib would cost the zygote an import)
        return int(file.read().split()[0]) * resource.getpagesize()


def most_memory() -> int:
    """Bytes of real memory that this process has used at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _unshare(more: int) -> bool:
    """Move to an empty network of our own, where the system lets a process do so."""
    return _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC | more) == 0


def _drop_user() -> bool:
    """Become nobody when root; whether this process now has no rights of a user's."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may not grant it; the other layers stand
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    return os.geteuid() == _NOBODY


def _deny_files() -> int:
    """Forbid every file, and what else Landlock knows here; its version, 0 without it."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return 0
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    handled = (ctypes.c_uint64 * 3)(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), size, 0)
    if ruleset < 0:
        return 0
    held = _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return int(version) if held else 0
