"""Where tools do their work: text goes into a process that can do nothing but compute, text comes back.

    box = Sandbox("moss.tools.arithmetic:evaluate")
    box.call("37*12")                                    # '444'

`MOSS_SANDBOX` chooses how:

* `strict` (Linux, the default there): a zygote, started by a new interpreter with an empty environment, forks a child
  per call; seccomp and resource limits must hold or nothing runs (`jail.py` has the layers, `layers` says which hold).
* `process` (the default elsewhere): one long-lived process with an empty environment, killed when a call outlives its
  time and renewed after many calls. The grammar and the bounded arithmetic are then the wall, not the kernel.
* `inline`: the calculator in this very process, for evaluation and training on our own material; Solve is refused.

Covered: hangs, memory, floods, crashes, forged answers, reading this process's memory and environment, files, network,
other processes. The answer is parsed as untrusted. Not covered: timing side channels, kernel bugs, a full machine.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss.tools.base import ToolError

MODES = ("strict", "process", "inline")
WALL_SECONDS = 3.0
CPU_SECONDS = 2
MEMORY = 256 << 20  # bytes on top of what the process needs to start
MAX_ANSWER = 16 << 10
MAX_REQUEST = 8 << 10
AT_ONCE, QUEUED = 4, 8  # calls that run side by side, and that may wait
START_SECONDS = 30.0
RENEW_AFTER = 500  # calls of one process in `process` mode

_BOOT = (
    "import json, sys; config = json.loads(sys.argv[1]); sys.path.extend(config['path']); "
    "from moss.tools.worker import main; main(config)"
)
_CLEAN = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]*")  # printable text and line breaks
_ENDINGS = {
    "time": "time limit",
    "-9": "time limit",  # the kernel's, at the end of the processor time
    "-24": "time limit",
    "-31": "forbidden system call",
    "-11": "it crashed",
}


def mode() -> str:
    """What `MOSS_SANDBOX` says, or what this system does by itself."""
    chosen = os.environ.get("MOSS_SANDBOX") or ("strict" if sys.platform == "linux" else "process")
    if chosen not in MODES:
        raise ValueError(f"MOSS_SANDBOX={chosen!r} is not one of {', '.join(MODES)}")
    return chosen


class Sandbox:
    """One kind of job behind the wall. Starts at the first call or by `start`; thread-safe; ends with the program.

    `target` is "module:function" of str arguments that returns str and imports nothing later; `packages` names what
    it needs beyond the standard library; `path` are further folders to import from.
    """

    def __init__(
        self,
        target: str,
        *,
        packages: tuple[str, ...] = (),
        path: tuple[str, ...] = (),
        wall: float = WALL_SECONDS,
        memory: int = MEMORY,
    ):
        self.target = target
        self.packages = packages
        self.path = path
        self.wall = wall
        self.memory = memory
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        self._forget()

    def _forget(self) -> None:
        """Begin anew, without a process: a fork of this program must not talk to its parent's."""
        self._worker: _Zygote | _Loop | None = None
        self._lock = threading.Lock()  # of the worker
        self._count = threading.Lock()  # of `_waiting`
        self._running = threading.BoundedSemaphore(AT_ONCE)
        self._waiting = 0

    @property
    def layers(self) -> dict[str, Any]:
        """Which protections hold; starts the process when it has not started yet."""
        return dict(self._ready().layers)

    @property
    def pid(self) -> int:
        """The process behind this sandbox."""
        return self._ready().process.pid

    def start(self) -> None:
        """Begin to start the process, without waiting for it: loading SymPy takes about a second."""
        if mode() != "inline":
            with self._lock:
                self._begin()

    def call(self, *arguments: str) -> str:
        """The job's answer; `ToolError` with the reason when there is none."""
        request = json.dumps({"arguments": arguments}).encode()
        if len(request) > MAX_REQUEST:
            raise ToolError(f"{sum(map(len, arguments))} characters are too many")
        with self._turn():
            return _checked(self._ready().ask(request, self.wall))

    def close(self) -> None:
        """End the process; the next call starts a new one."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker = None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the places to run, or "busy"."""
        with self._count:
            if self._waiting >= AT_ONCE + QUEUED:
                raise ToolError("busy: too many calls at once; try again")
            self._waiting += 1
        try:
            if not self._running.acquire(timeout=self.wall):
                raise ToolError("busy: too many calls at once; try again")
            try:
                yield
            finally:
                self._running.release()
        finally:
            with self._count:
                self._waiting -= 1

    def _begin(self) -> _Zygote | _Loop:
        """The live worker, started if need be; the lock is held."""
        if self._worker is not None and not self._worker.alive():
            self._worker.close()
            self._worker = None
        if self._worker is None:
            roots = [str(Path(__file__).parents[2]), *self.path, *map(_home, self.packages)]
            config = {"target": self.target, "path": roots, "wall": self.wall, "memory": self.memory}
            config["seconds"] = CPU_SECONDS
            self._worker = (_Zygote if mode() == "strict" else _Loop)(config)
        return self._worker

    def _ready(self) -> _Zygote | _Loop:
        with self._lock:
            worker = self._begin()
            worker.wait_ready()
        return worker


class _Zygote:
    """This end of a forking worker: one message with two pipe ends per call."""

    def __init__(self, config: dict[str, Any]):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = {**config, "kind": "zygote", "control": theirs.fileno(), "parent": os.getpid()}
        with theirs:
            self.process = _spawn(config, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        self.layers: dict[str, Any] = {}

    def wait_ready(self) -> None:
        """Return once requests are taken; `ToolError` with what is missing when they never will be."""
        if self.layers:
            return
        self.control.settimeout(START_SECONDS)
        try:
            message = self.control.recv(65536)
        except TimeoutError:
            message = b""
        hello: dict[str, Any] = (
            json.loads(message) if message else {"failed": "the process ended or hung while it started"}
        )
        if "failed" in hello:
            self.close()
            raise ToolError(f"the sandbox cannot start: {hello['failed']}; MOSS_SANDBOX=process does with less")
        self.layers = {"mode": "strict", "seccomp": True, "limits": True, **hello["layers"]}

    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: bytes, wall: float) -> bytes:
        """The raw answer line; raises `ToolError` with how the child ended when it gave none."""
        deadline = time.monotonic() + wall + 0.3  # the zygote kills at `wall`; this is for a zygote that does not
        answer, answer_end = os.pipe()
        status, status_end = os.pipe()
        try:
            try:
                socket.send_fds(self.control, [request], [answer_end, status_end])
            except OSError:
                raise ToolError("the sandbox ended; try again") from None
            finally:
                os.close(answer_end)
                os.close(status_end)
            line = _read(answer, deadline, MAX_ANSWER)
            if line.endswith(b"\n"):
                return line
            if len(line) > MAX_ANSWER:
                raise ToolError("bad answer")
            ended = _read(status, deadline, 64).decode()
        finally:
            os.close(answer)
            os.close(status)
        if not ended:  # the zygote itself is gone, or stuck
            self.close()
            raise ToolError("the sandbox ended; try again")
        raise ToolError(_ENDINGS.get(ended, "bad answer" if ended == "0" else f"it ended with {ended}"))

    def close(self) -> None:
        self.control.close()
        _end(self.process)


class _Loop:
    """This end of a worker that answers one request after the other in one process."""

    def __init__(self, config: dict[str, Any]):
        self.process = _spawn({**config, "kind": "loop"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.layers: dict[str, Any] = {}
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.calls = 0
        self.lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name="sandbox").start()

    def _listen(self) -> None:
        """Lines from the process to the queue: a read with a time limit that works on every system."""
        output = self.process.stdout
        assert output is not None
        while line := output.readline(MAX_ANSWER + 1):
            self.lines.put(line)
        self.lines.put(b"")

    def wait_ready(self) -> None:
        if self.layers:
            return
        with contextlib.suppress(queue.Empty):
            if b"layers" in self.lines.get(timeout=START_SECONDS):
                self.layers = {"mode": "process"}
                return
        self.close()
        raise ToolError("the sandbox cannot start: its process ended or hung")

    def alive(self) -> bool:
        """Whether it may go on; one that is at work is not renewed."""
        return self.process.poll() is None and (self.calls < RENEW_AFTER or self.lock.locked())

    def ask(self, request: bytes, wall: float) -> bytes:
        with self.lock:
            self.calls += 1
            assert self.process.stdin is not None
            if self.process.stdin.closed:  # by the call before, which outlived its time
                raise ToolError("the sandbox ended; try again")
            try:
                self.process.stdin.write(request + b"\n")
                self.process.stdin.flush()
                line = self.lines.get(timeout=wall)
            except OSError:
                line = b""
            except queue.Empty:
                self.close()
                raise ToolError("time limit") from None
            if not line.endswith(b"\n"):
                self.close()
                raise ToolError("it crashed" if not line else "bad answer")
            return line

    def close(self) -> None:
        _end(self.process)


def _spawn(
    config: dict[str, Any], *, stdin: int, stdout: int = subprocess.DEVNULL, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """A new interpreter without site, user folders or environment; a fixed hash seed keeps SymPy's order fixed."""
    command = [sys.executable, "-s", "-S", "-P", "-c", _BOOT, json.dumps(config)]
    environment = {"PYTHONHASHSEED": "0"}
    if os.name == "nt":
        environment["SYSTEMROOT"] = os.environ.get("SYSTEMROOT", "")  # Python does not start without it
    return subprocess.Popen(
        command, env=environment, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=pass_fds
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _read(descriptor: int, deadline: float, limit: int) -> bytes:
    """A line, or what came before the other side closed, the deadline passed or `limit` was exceeded."""
    data = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) <= limit and not data.endswith(b"\n"):
        if not poll.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            return data
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        data += piece
    return data


def _checked(line: bytes) -> str:
    """The text of an answer that may have been written by an attacker."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise ToolError("bad answer") from None
    if isinstance(answer, dict) and len(answer) == 1 and len(line) <= MAX_ANSWER:
        ((kind, text),) = answer.items()
        if isinstance(text, str) and _CLEAN.fullmatch(text):
            if kind == "text":
                return text
            if kind == "error":
                raise ToolError(text)
    raise ToolError("bad answer")


def _home(package: str) -> str:
    """The folder that an installed package is imported from, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ToolError(f"the package {package} is missing; pip install {package}")
    return str(Path(spec.origin).parents[1])
