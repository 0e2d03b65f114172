"""The sandbox's wall: one attack per test. `tools_payloads.py` is what runs inside, as if the solver had a hole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tools_settings import ATTACKS, HERE, NOBODY, alive, outcome, program

from moss.tools.base import ToolError
from moss.tools.calculator import calculate
from moss.tools.sandbox import AT_ONCE, MAX_PAYLOAD, PATIENCE, QUEUED, Sandbox
from moss.tools.solver import solve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the strict sandbox is for Linux")
LIMITS = {"memory": 1.5, "loop": 3.2, "loop that ignores the signal": 3.2, "busy waiting": 3.2}  # seconds


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox("tools_payloads:run", path=(str(HERE),))
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained(box: Sandbox, name: str) -> None:
    """Prevents: a hole in the solver becoming a hole in the machine, or one call ending the service for all."""
    zygote = box.pid
    started = time.monotonic()
    assert re.fullmatch(ATTACKS[name], outcome(box, name))
    assert time.monotonic() - started < LIMITS.get(name, 1.0)
    assert box.call("still here") == "still here"
    if name in LIMITS:
        assert min(_seconds(lambda: box.call("still here")) for _ in range(10)) < 0.05
    assert box.pid == zygote


def _seconds(do: Callable[[], object]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started


def test_every_layer_holds_or_is_named(box: Sandbox) -> None:
    """Prevents: a layer that silently stopped to work; the ones that every Linux has are required."""
    layers = box.layers
    for name in ("seccomp", "limits", "no_new_privileges", "not_dumpable"):
        assert layers[name] is True, name
    assert set(layers) >= {"mode", "landlock", "network", "nobody"}
    if os.geteuid() == 0:
        assert layers["nobody"]
        assert f"\t{NOBODY}\t" in Path(f"/proc/{box.pid}/status").read_text().split("Uid:")[1]


def test_memory_of_a_call_is_gone_after_it(box: Sandbox) -> None:
    """Prevents: state that one user's call leaves for the next one."""
    assert [box.call("remember") for _ in range(3)] == ["1", "1", "1"]


def test_memory_bomb_stays_out_of_this_process(box: Sandbox) -> None:
    """Prevents: an allocation loop that swaps the machine or grows the server."""
    before = _resident(os.getpid())
    assert outcome(box, "memory") == "memory limit"
    assert _resident(os.getpid()) - before < 20 << 20


def test_secrets_of_this_process_do_not_reach_the_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a forked server handing its keys to the process that runs the model's text."""
    secret = "-".join(["open", "sesame", str(time.time_ns())])
    monkeypatch.setenv("SECRET", secret)
    box = Sandbox("tools_payloads:run", path=(str(HERE),))
    try:
        assert box.call("environment") == "{}"
        if os.geteuid() == 0:
            assert secret.encode() not in Path(f"/proc/{box.pid}/environ").read_bytes()
            assert not _memory_holds(box.pid, secret.encode())
    finally:
        box.close()


def _memory_holds(pid: int, needle: bytes) -> bool:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            if " rw" in line and "[v" not in line:
                memory.seek(start)
                if needle in memory.read(end - start):
                    return True
    return False


def test_killed_zygote_is_replaced() -> None:
    """Prevents: a tool that stays dead, or hangs its caller, once its process died."""
    box = Sandbox("tools_payloads:run", path=(str(HERE),))
    try:
        found: list[str] = []
        caller = threading.Thread(target=lambda: found.append(outcome(box, "busy waiting")))
        zygote = box.pid
        caller.start()
        time.sleep(0.2)
        os.kill(zygote, signal.SIGKILL)
        caller.join(2)
        assert found == ["the sandbox ended; try again"]
        started = time.monotonic()
        assert box.call("back") == "back"
        assert time.monotonic() - started < 5
        assert box.pid != zygote
    finally:
        box.close()


def test_everything_ends_with_the_program() -> None:
    """Prevents: processes that stay behind for ever when the server is killed."""
    owner = subprocess.Popen(
        [sys.executable, "-c", program("print(box.pid, flush=True)", "box.call('busy waiting')")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    zygote = int(owner.stdout.readline())
    deadline = time.monotonic() + 2
    while not (children := _children(zygote)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children, "the call should be running"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    time.sleep(1)
    assert not any(alive(pid) for pid in (zygote, *children))


@pytest.mark.parametrize("mode", ["strict", "process"])
def test_a_crowd_is_answered_and_nobody_gets_anothers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: answers that reach another caller, and calls that are lost or refused in an ordinary rush."""
    monkeypatch.setenv("MOSS_SANDBOX", mode)
    box = Sandbox("tools_payloads:run", path=(str(HERE),))
    try:
        assert _together(lambda number: outcome(box, f"caller {number}"), 64) == [
            f"answered: caller {number}" for number in range(64)
        ]
    finally:
        box.close()


def test_the_tools_answer_a_crowd() -> None:
    """Prevents: the same for the calculator and the solver themselves, both at once."""
    answers = _together(lambda n: solve(f"x+{n}=5") if n % 2 else calculate(f"{n}*12"), 128)
    assert answers == [f"x = {5 - n}" if n % 2 else str(n * 12) for n in range(128)]


def test_queue_has_an_end() -> None:
    """Prevents: hundreds of waiting calls behind a few slow ones, and callers who wait for ever."""
    box = Sandbox("tools_payloads:run", path=(str(HERE),), wall=0.5)
    try:
        box.call("warm")
        started = time.monotonic()
        refused: list[float] = []

        def call(_: int) -> str:
            answer = outcome(box, "busy waiting")
            if answer.startswith("busy"):
                refused.append(time.monotonic() - started)
            return answer

        answers = _together(call, AT_ONCE + QUEUED + 32)
    finally:
        box.close()
    assert {answer.split(":")[0] for answer in answers} == {"time limit", "busy"}
    assert answers.count("time limit") >= AT_ONCE
    assert sum(seconds < 0.5 for seconds in refused) >= 32 - AT_ONCE  # at once, not after those before
    assert max(refused) < (PATIENCE + 1) * box.wall + 0.5


def _together(call: Callable[[int], str], number: int) -> list[str]:
    """What each of so many threads got, all begun at the same moment."""
    answers = [""] * number
    begin = threading.Barrier(number)

    def one(index: int) -> None:
        begin.wait()
        answers[index] = call(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


@pytest.mark.parametrize("calls", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_calls_leave_nothing_behind(box: Sandbox, calls: int) -> None:
    """Prevents: a leak of descriptors, zombies or memory in the process that serves every call."""
    for number in range(50):
        box.call(str(number))
    time.sleep(0.2)
    before = _descriptors(box.pid), _descriptors(os.getpid()), _resident(box.pid)
    for number in range(calls):
        if number % 20:
            assert box.call(str(number)) == str(number)
        else:
            assert box.call(str(number), payload=b"page").startswith(f"{number} 4 ")
    time.sleep(0.2)
    assert (_descriptors(box.pid), _descriptors(os.getpid())) == before[:2]
    assert _resident(box.pid) - before[2] < 1 << 20
    assert not _children(box.pid)


@pytest.mark.parametrize("mode", ["strict", "process"])
def test_payload_arrives_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a page that is cut, mixed up with another caller's, or read as a request."""
    monkeypatch.setenv("MOSS_SANDBOX", mode)
    page = b'{"arguments": ["x"]}\n' + bytes(range(256)) * (MAX_PAYLOAD // 256)
    pages = [page[:MAX_PAYLOAD], b"\n", b"\x00" * 100_000, *(page[:number] for number in range(1, 30))]
    box = Sandbox("tools_payloads:run", path=(str(HERE),))
    try:
        answers = _together(lambda number: box.call(f"page {number}", payload=pages[number]), len(pages))
        assert answers == [f"page {number} {len(page)} {zlib.crc32(page)}" for number, page in enumerate(pages)]
        assert box.call("none") == "none"
        with pytest.raises(ToolError, match=f"{MAX_PAYLOAD + 1} bytes are too many"):
            box.call("page", payload=bytes(MAX_PAYLOAD + 1))
        with pytest.raises(ToolError, match="characters are too many"):
            box.call("x" * 9000)
    finally:
        box.close()


@pytest.mark.parametrize("mode", ["strict", "process"])
def test_box_has_its_own_limits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: the limits of the calculator for a job that reads pages, or none for it."""
    monkeypatch.setenv("MOSS_SANDBOX", mode)
    box = Sandbox("tools_payloads:run", path=(str(HERE),), wall=1.0, memory=64 << 20, answer=256 << 10)
    try:
        text = box.call("answer", payload=b"262144")
        assert len(text.encode()) == 256 << 10
        assert set(text) == set('"\n文')
        assert outcome(box, "answer", payload=b"262145") == "bad answer"
        assert outcome(box, "hoard", payload=b"20") == "answered: 20"
        assert outcome(box, "hoard", payload=b"80") == "memory limit"
        assert _seconds(lambda: outcome(box, "loop", payload=b"page")) < 1.5
        assert outcome(box, "all descriptors", payload=b"page") == "bad answer" or mode == "process"
        assert outcome(box, "read a descriptor", payload=b"secret") == "answered: nothing" or mode == "process"
    finally:
        box.close()


def test_fork_of_this_process_gets_its_own_sandbox(box: Sandbox) -> None:
    """Prevents: a data loader's forked worker and its parent reading each other's answers, or closing the sandbox."""
    zygote = box.pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        own = str(box.pid != zygote and box.call("child")).encode()
        os.write(write, own)
        box.close()
        os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"child"
    os.close(read)
    os.waitpid(child, 0)
    assert box.call("parent") == "parent"
    assert box.pid == zygote


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(pid: int) -> int:
    """How many it has open; 0 where only root may know."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())) if os.access(f"/proc/{pid}/fd", os.R_OK) else 0


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
