"""The sandbox in every setting and mode: as any user, with namespaces forbidden, without seccomp, in one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools_settings import ATTACKS, HERE, NOBODY, ROOT, Place, alive, outcome, place_for_all, program, run_program

from moss.tools import sandbox as sandbox_module
from moss.tools.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the strict sandbox is for Linux")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """An interpreter and a copy of the project that an ordinary user can run too."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield place_for_all(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("user", "forbidden"),
    [(NOBODY, ""), (NOBODY, "unshare"), (None, "unshare")],
    ids=["user", "user-blocked", "blocked"],
)
def test_same_wall_in_every_setting(place: Place, user: int | None, forbidden: str) -> None:
    """Prevents: a sandbox that holds for root alone, or where the system allows namespaces, as containers do not."""
    lines = """
import json, os
from concurrent.futures import ThreadPoolExecutor
pid = box.pid
names = [*ATTACKS, "still here"]
with ThreadPoolExecutor(4) as pool:
    answers = dict(zip(names, pool.map(lambda name: outcome(box, name), names)))
print(json.dumps([os.geteuid(), box.pid == pid, box.layers, answers]))
"""
    user = user if os.geteuid() == 0 else None
    printed = run_program(lines, user=user, forbidden=forbidden, place=place, environment={})
    uid, same_zygote, layers, answers = json.loads(printed)
    assert uid == (os.geteuid() if user is None else user)
    assert same_zygote
    assert {name: answer for name, answer in answers.items() if not re.fullmatch(ATTACKS.get(name, ".*"), answer)} == {}
    assert answers["still here"] == "answered: still here"
    assert all(layers[name] is True for name in ("seccomp", "limits", "no_new_privileges", "not_dumpable"))
    assert layers["nobody"] or os.geteuid() != 0
    assert layers["network"] is False or not forbidden


def test_strict_refuses_to_run_without_seccomp() -> None:
    """Prevents: a system without the filter running model text as if it were safe."""
    done = run_program("print(box.call('hello'))", forbidden="prctl")
    assert "cannot start" in done
    assert "MOSS_SANDBOX=process" in done
    process = {**os.environ, "MOSS_SANDBOX": "process"}
    done = run_program("print(box.call('hello'), box.layers)", forbidden="prctl", environment=process)
    assert done.strip() == "hello {'mode': 'process'}"


def test_other_systems_run_in_one_process_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: less isolation than on Linux without a word."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("MOSS_SANDBOX", raising=False)
    box = Sandbox("tools_payloads:run", path=(str(HERE),))
    try:
        with pytest.warns(UserWarning, match="less isolated here than on Linux"):
            assert box.call("hello") == "hello"
        assert box.layers == {"mode": "process"}
    finally:
        box.close()


def test_memory_is_watched_where_its_limit_is_not_kept() -> None:
    """Prevents: a memory bomb on macOS, which does not keep the limit on address space."""
    watched = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
from moss.tools.worker import _watch_memory
threading.Thread(target=_watch_memory, args=(64 << 20,), daemon=True).start()
kept = [b"1" * (32 << 20)]
print("a little", flush=True)
while True:
    kept.append(b"1" * (1 << 20))
"""
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, timeout=20)
    assert done.stdout == 'a little\n{"error": "memory limit"}\n'
    assert done.returncode == 1


def test_process_mode_answers_and_ends_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: systems without fork or seccomp having no tools, or tools that hang."""
    monkeypatch.setenv("MOSS_SANDBOX", "process")
    box = Sandbox("tools_payloads:run", path=(str(HERE),), wall=1.0)
    try:
        assert box.layers == {"mode": "process"}
        assert box.call("hello") == "hello"
        assert box.call("environment") == "{}"
        assert outcome(box, "loop") == "time limit"
        assert outcome(box, "memory") == "memory limit"
        assert outcome(box, "abort") == "it crashed"
        assert box.call("back") == "back"
    finally:
        box.close()


def test_process_mode_keeps_callers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a renewal that kills the call of another, and calls that are lost because a neighbour's hung."""
    monkeypatch.setenv("MOSS_SANDBOX", "process")
    monkeypatch.setattr(sandbox_module, "RENEW_AFTER", 1)
    box = Sandbox("tools_payloads:run", path=(str(HERE),), wall=1.0)

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
        assert at_once("loop", "a") == {"loop": "time limit", "a": "answered: a"}
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
    owner = subprocess.Popen(
        [sys.executable, "-c", program(*lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdin is not None
    printed = int(owner.stdout.readline())
    time.sleep(0.5)
    assert alive(printed)
    owner.kill()
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    return printed


def _ends(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a typing error in the mode running with less protection than was asked for."""
    monkeypatch.setenv("MOSS_SANDBOX", "strickt")
    with pytest.raises(ValueError, match=r"'strickt' is not one of strict, process, inline"):
        Sandbox("tools_payloads:run", path=(str(HERE),)).call("hello")
