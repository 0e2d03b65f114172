"""The sandbox's wall: one attack per test. `tools_payloads.py` is what runs inside, as if the solver had a hole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moss.tools import sandbox as sandbox_module
from moss.tools.base import ToolError
from moss.tools.sandbox import AT_ONCE, QUEUED, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the strict sandbox is for Linux")
HERE = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[1])

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


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox("tools_payloads:run", path=(HERE,))
    yield sandbox
    sandbox.close()


def outcome(box: Sandbox, *arguments: str) -> str:
    """The answer, or the reason there is none."""
    try:
        return "answered: " + box.call(*arguments)
    except ToolError as error:
        return str(error)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained(box: Sandbox, name: str) -> None:
    """Prevents: a hole in the solver becoming a hole in the machine, or one call ending the service for all."""
    zygote = box.pid
    started = time.monotonic()
    assert re.fullmatch(ATTACKS[name], outcome(box, name))
    assert time.monotonic() - started < 3.5
    assert box.call("still here") == "still here"
    assert box.pid == zygote


def test_every_layer_holds_or_is_named(box: Sandbox) -> None:
    """Prevents: a layer that silently stopped to work; the ones that every Linux has are required."""
    layers = box.layers
    for name in ("seccomp", "limits", "no_new_privileges", "not_dumpable"):
        assert layers[name] is True, name
    assert set(layers) >= {"mode", "landlock", "network", "nobody"}
    if os.geteuid() == 0:
        assert layers["nobody"]
        assert f"\t{65534}\t" in Path(f"/proc/{box.pid}/status").read_text().split("Uid:")[1]


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
    box = Sandbox("tools_payloads:run", path=(HERE,))
    try:
        assert secret not in box.call("environment")
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
    box = Sandbox("tools_payloads:run", path=(HERE,))
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
    program = subprocess.Popen(
        [sys.executable, "-c", _program("print(box.pid, flush=True)", "box.call('busy waiting')")],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert program.stdout is not None
    zygote = int(program.stdout.readline())
    deadline = time.monotonic() + 2
    while not (children := _children(zygote)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children, "the call should be running"
    program.kill()
    program.wait()
    program.stdout.close()
    time.sleep(1)
    assert not any(_alive(pid) for pid in (zygote, *children))


def test_many_callers_get_their_own_answer_or_busy(box: Sandbox) -> None:
    """Prevents: answers that reach another caller, and a queue without end."""
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda number=number: answers.update({number: outcome(box, f"caller {number}")}))
        for number in range(64)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answers) == 64
    for number, answer in answers.items():
        assert answer == f"answered: caller {number}" or answer.startswith("busy"), answer


def test_queue_has_an_end(box: Sandbox) -> None:
    """Prevents: hundreds of waiting calls behind a few slow ones."""
    box.call("warm")
    answers: list[str] = []
    slow = [
        threading.Thread(target=lambda: answers.append(outcome(box, "busy waiting"))) for _ in range(AT_ONCE + QUEUED)
    ]
    for thread in slow:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    assert outcome(box, "one more").startswith("busy")
    assert time.monotonic() - started < 1.5  # and not the seconds of those before
    for thread in slow:
        thread.join(20)
    assert len(answers) == AT_ONCE + QUEUED


@pytest.mark.parametrize("calls", [500, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_calls_leave_nothing_behind(box: Sandbox, calls: int) -> None:
    """Prevents: a leak of descriptors, zombies or memory in the process that serves every call."""
    for number in range(50):
        box.call(str(number))
    time.sleep(0.2)
    before = _descriptors(box.pid), _descriptors(os.getpid()), _resident(box.pid)
    for number in range(calls):
        assert box.call(str(number)) == str(number)
    time.sleep(0.2)
    assert (_descriptors(box.pid), _descriptors(os.getpid())) == before[:2]
    assert _resident(box.pid) - before[2] < 1 << 20
    assert not _children(box.pid)


def test_strict_refuses_to_run_without_seccomp() -> None:
    """Prevents: a system without the filter running model text as if it were safe."""
    done = _under_filter("prctl", "print(box.call('hello'))")
    assert "cannot start" in done
    assert "MOSS_SANDBOX=process" in done
    assert _under_filter("prctl", "print(box.call('hello'))", MOSS_SANDBOX="process").strip() == "hello"


def test_same_wall_where_namespaces_are_forbidden() -> None:
    """Prevents: relying on namespaces, which containers forbid by default."""
    attack = "for name in ('tcp socket', 'read /etc/passwd', 'fork'):\n    print(outcome(name))"
    done = _under_filter("unshare", "print(box.layers['network'])", attack).split("\n")
    assert done[:4] == ["False", KILLED, "it failed (PermissionError)", KILLED]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_same_wall_for_an_ordinary_user() -> None:
    """Prevents: a sandbox that works for root alone."""
    if not _reachable_by_others(Path(sys.executable).resolve()):
        pytest.skip(f"no ordinary user can run {Path(sys.executable).resolve()}")
    body = _program("print(outcome('tcp socket'), outcome('read /etc/passwd'), box.call('hello'), sep='|')")
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, user=65534, group=65534, env={}
    )
    assert done.stdout.strip() == f"{KILLED}|it failed (PermissionError)|hello", done.stderr


def test_process_mode_answers_and_ends_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: systems without fork or seccomp having no tools, or tools that hang."""
    monkeypatch.setenv("MOSS_SANDBOX", "process")
    box = Sandbox("tools_payloads:run", path=(HERE,), wall=1.0)
    try:
        assert box.layers == {"mode": "process"}
        assert box.call("hello") == "hello"
        assert "PATH" not in box.call("environment")
        assert outcome(box, "loop") == "time limit"
        assert outcome(box, "memory") == "memory limit"
        assert outcome(box, "abort") == "it crashed"
        assert box.call("back") == "back"
    finally:
        box.close()


def test_process_mode_keeps_callers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a renewal that kills the call of another, and an exception where a neighbour outlived its time."""
    monkeypatch.setenv("MOSS_SANDBOX", "process")
    monkeypatch.setattr(sandbox_module, "RENEW_AFTER", 1)
    box = Sandbox("tools_payloads:run", path=(HERE,), wall=1.0)

    def at_once(*names: str) -> dict[str, str]:
        answers: dict[str, str] = {}
        threads = [
            threading.Thread(target=lambda name=name: answers.update({name: outcome(box, name)})) for name in names
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(20)
        return answers

    try:
        first = box.pid
        assert at_once("a", "b", "c") == {name: f"answered: {name}" for name in "abc"}
        assert box.pid != first
        assert at_once("loop", "a") == {"loop": "time limit", "a": "the sandbox ended; try again"}
        assert box.call("back") == "back"
    finally:
        box.close()


def test_hanging_process_ends_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a search without end that outlives the killed server in `process` mode, on a whole core."""
    monkeypatch.setenv("MOSS_SANDBOX", "process")
    pid = _killed_program("print(box.pid, flush=True)", "box.call('loop')")
    assert _ends(pid, within=5)


def test_zygote_that_still_loads_ends_with_the_program(tmp_path: Path) -> None:
    """Prevents: SymPy being loaded for seconds on behalf of a program that is gone."""
    (tmp_path / "slow_job.py").write_text("import time\nwarm_up = lambda: time.sleep(60)\nrun = str\n")
    start = f"box = Sandbox('slow_job:run', path=({str(tmp_path)!r},)); box.start()"
    assert _ends(_killed_program(start, "print(box._worker.process.pid, flush=True)", "input()"), within=5)


def _killed_program(*lines: str) -> int:
    """What a program printed first, after it was killed in what it did next."""
    program = subprocess.Popen(
        [sys.executable, "-c", _program(*lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert program.stdout is not None and program.stdin is not None
    printed = int(program.stdout.readline())
    time.sleep(0.5)
    assert _alive(printed)
    program.kill()
    program.wait()
    program.stdin.close()
    program.stdout.close()
    return printed


def _ends(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


def test_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a typing error in the mode running with less protection than was asked for."""
    monkeypatch.setenv("MOSS_SANDBOX", "strickt")
    with pytest.raises(ValueError, match=r"'strickt' is not one of strict, process, inline"):
        Sandbox("tools_payloads:run", path=(HERE,)).call("hello")


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


def _program(*lines: str) -> str:
    """A program that owns a sandbox `box` and runs these lines."""
    head = f"""
        import sys
        sys.path[:0] = [{ROOT!r}, {HERE!r}]
        from moss.tools.base import ToolError
        from moss.tools.sandbox import Sandbox
        box = Sandbox("tools_payloads:run", path=({HERE!r},))
        def outcome(*arguments):
            try:
                return box.call(*arguments)
            except ToolError as error:
                return str(error)
    """
    return textwrap.dedent(head) + "\n".join(lines)


def _under_filter(name: str, *lines: str, **environment: str) -> str:
    """What such a program prints, or its last error line, in a system that refuses `prctl(seccomp)` or `unshare`."""
    refuse = f"""
        import ctypes, platform
        from moss.tools import jail
        column = jail._MACHINES[platform.machine()][0]
        number = {{"prctl": (157, 167), "unshare": (272, 97)}}[{name!r}][column]
        allow, refuse = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50001)
        if {name == "unshare"}:
            code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), refuse, allow]
        else:
            code = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 22), refuse, allow]
        array = (jail._Instruction * len(code))(*[jail._Instruction(*each) for each in code])
        program = jail._Program(len(code), array)
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)
        assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
    """
    body = f"import sys; sys.path.insert(0, {ROOT!r})\n" + textwrap.dedent(refuse) + _program(*lines)
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.stdout or done.stderr.strip().split("\n")[-1]


def _reachable_by_others(path: Path) -> bool:
    return all(each.stat().st_mode & 0o005 == 0o005 for each in (path, *path.parents))


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
