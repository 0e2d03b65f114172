"""The seccomp filter, run by a small interpreter of our own: it shows both machines, whichever runs the tests."""

from __future__ import annotations

import ctypes
import errno
import platform
import re
import struct
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("seccomp is of Linux", allow_module_level=True)

from moss.tools import jail

KILL, ALLOW, EPERM = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
MACHINES = {"x86_64": (0xC000003E, {"socket": 41, "clone": 56, "execve": 59, "fork": 57, "unshare": 272})}
MACHINES["aarch64"] = (0xC00000B7, {"socket": 198, "clone": 220, "execve": 221, "clone3": 435, "unshare": 97})
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return request.param


def verdict(number: int, *arguments: int, architecture: int) -> int:
    """What the filter returns for a call, by the rules of classic BPF on `struct seccomp_data`."""
    program = jail.filter_program()
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    value, at = 0, 0
    while True:
        step = program.filter[at]
        at += 1
        if step.code == 0x20:
            (value,) = struct.unpack_from("<I", data, step.k)
        elif step.code == 0x06:
            return step.k
        else:
            met = {0x15: value == step.k, 0x35: value >= step.k, 0x45: bool(value & step.k)}[step.code]
            at += step.jt if met else step.jf


def test_filter_lets_a_child_compute_and_nothing_else(machine: str) -> None:
    """Prevents: a wrong jump or number in the column of the machine that nobody here has."""
    architecture, forbidden = MACHINES[machine]
    column = jail._MACHINES[machine][0]

    def of(name: str, *arguments: int) -> int:
        numbers = (jail.ALLOWED | jail.REFUSED)[name]
        return verdict(numbers[column], *arguments, architecture=architecture)

    for name in set(jail.ALLOWED) - {"write"}:
        assert of(name) == ALLOW, name
    for name, numbers in jail.REFUSED.items():
        assert numbers[column] < 0 or of(name) == EPERM, name
    assert of("write", jail.ANSWER) == ALLOW
    assert of("write", 1) == of("write", jail.ANSWER + 1) == EPERM
    for name in ("mmap", "mprotect"):
        assert of(name, 0, 4096, 3) == ALLOW
        assert of(name, 0, 4096, 7) == of(name, 0, 4096, 4) == EPERM
    for name, number in forbidden.items():
        assert verdict(number, architecture=architecture) == KILL, name
    known = {numbers[column] for numbers in (jail.ALLOWED | jail.REFUSED).values()}
    for number in {*range(-1, 600), 0x40000000 + 39, 0x7FFFFFFF} - known:
        assert verdict(number, architecture=architecture) == KILL, number
    for other in (0x40000003, 0xC000003E ^ 0xC00000B7 ^ architecture, 0):  # 32 bits, the other machine, none
        assert verdict(jail.ALLOWED["getpid"][column], architecture=other) == KILL


def test_filter_is_small_enough_for_the_kernel(machine: str) -> None:
    """Prevents: jumps beyond 255 steps or a program beyond 4096, which the kernel refuses."""
    program = jail.filter_program()
    assert program.length <= 4096
    assert ctypes.sizeof(jail._Instruction) == 8


def test_numbers_are_those_of_the_kernel(machine: str) -> None:
    """Prevents: a typing error in the tables, by the kernel's own headers where they are installed."""
    if not Path(HEADERS[machine]).exists():
        pytest.skip(f"no {HEADERS[machine]}")
    text = Path(HEADERS[machine]).read_text(encoding="ascii")
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    column = jail._MACHINES[machine][0]
    for name, pair in (jail.ALLOWED | jail.REFUSED).items():
        assert pair[column] in (-1, numbers.get(name)), name


def test_other_machines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a filter with another machine's numbers."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(jail.JailError, match="riscv64"):
        jail.filter_program()
