"""Where tools do their work: text goes into a process that can do nothing but compute, text comes back.

    box = Sandbox("moss.tools.arithmetic:evaluate")
    box.call("37*12")                                    # '444'
    box.call("https://…", payload=page)                  # for a job that takes bytes too, such as one that reads HTML

`MOSS_SANDBOX` chooses how:

* `strict` (Linux, the default there): a zygote, started by a new interpreter with an empty environment, forks a child
  per call; seccomp and resource limits must hold or nothing runs (`jail.py` has the layers, `layers` says which hold).
* `process` (the default elsewhere, with a warning): one long-lived process with an empty environment, killed when a
  call outlives its time and renewed after many calls. The grammar and the bounded arithmetic are then the wall, not the
  kernel; memory is limited on Linux and macOS.
* `inline`: the calculator in this very process, for evaluation and training on our own material; Solve is refused.

Covered: hangs, memory, floods, crashes, forged answers, reading this process's memory and environment, files, network,
other processes. The answer is parsed as untrusted. Not covered: timing side channels, kernel bugs, a full machine.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss.tools.base import ToolError

MODES = ("strict", "process", "inline")
WALL_SECONDS = 3.0  # of a call; two thirds of them may be processor time
MEMORY = 256 << 20  # bytes on top of what the process needs to start
ANSWER = 16 << 10  # bytes of text
MAX_REQUEST = 8 << 10
MAX_PAYLOAD = 4 << 20
AT_ONCE, QUEUED = 4, 64  # calls that run side by side (in `process` mode one), and that may wait
PATIENCE = 3  # how many times as long as a call may take it may wait
START_SECONDS = 30.0
GRACE = 2.0  # seconds in which a zygote on a busy machine must have ended a call whose time is over, or is ended itself
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

    `target` is "module:function" that returns str and imports nothing later; it takes str arguments, and as the last
    one bytes when a call has a payload. `packages` names what it needs beyond the standard library, `path` further
    folders to import from. A call may take `wall` seconds and `memory` bytes, its answer `answer` bytes of UTF-8.
    """

    def __init__(
        self,
        target: str,
        *,
        packages: tuple[str, ...] = (),
        path: tuple[str, ...] = (),
        wall: float = WALL_SECONDS,
        memory: int = MEMORY,
        answer: int = ANSWER,
    ):
        self.target = target
        self.packages = packages
        self.path = path
        self.wall = wall
        self.memory = memory
        self.answer = answer
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        self._forget()

    def _forget(self) -> None:
        """Begin anew, without a process: a fork of this program must not talk to its parent's."""
        self._worker: _Zygote | _Loop | None = None
        self._lock = threading.Lock()  # of the worker
        self._count = threading.Lock()  # of `_waiting`
        self._side_by_side = threading.BoundedSemaphore(AT_ONCE)
        self._one_by_one = threading.BoundedSemaphore(1)
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

    def call(self, *arguments: str, payload: bytes = b"") -> str:
        """The job's answer; `ToolError` with the reason when there is none."""
        request = json.dumps({"arguments": arguments, "payload": len(payload)}).encode()
        if len(request) > MAX_REQUEST:
            raise ToolError(f"{sum(map(len, arguments))} characters are too many")
        if len(payload) > MAX_PAYLOAD:
            raise ToolError(f"{len(payload)} bytes are too many; at most {MAX_PAYLOAD}")
        with self._turn():
            line = self._ready().ask(request, payload)
        return _checked(line, self.answer)

    def close(self) -> None:
        """End the process; the next call starts a new one."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            self._worker = None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the places to run, or "busy"."""
        places = self._side_by_side if mode() == "strict" else self._one_by_one
        with self._count:
            if self._waiting >= AT_ONCE + QUEUED:
                raise ToolError("busy: too many calls at once; try again")
            self._waiting += 1
        try:
            self._ready()  # a start takes longer than calls do: it is no part of the waiting
            if not places.acquire(timeout=PATIENCE * self.wall):
                raise ToolError("busy: too many calls at once; try again")
            try:
                yield
            finally:
                places.release()
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
            config |= {"seconds": math.ceil(self.wall * 2 / 3), "answer": self.answer}
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
        self.wall, self.room = config["wall"], _room(config["answer"])
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

    def ask(self, request: bytes, payload: bytes) -> bytes:
        """The raw answer line; raises `ToolError` with how the child ended when it gave none."""
        deadline = time.monotonic() + self.wall + GRACE
        answer, answer_end = os.pipe()
        status, status_end = os.pipe()
        theirs = [answer_end, status_end]
        try:
            try:
                if payload:
                    theirs.append(_in_memory(payload))
                socket.send_fds(self.control, [request], theirs)
            except OSError:
                raise ToolError("the sandbox ended; try again") from None
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            line = _read(answer, deadline, self.room)
            if line.endswith(b"\n"):
                return line
            if len(line) > self.room:
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
    """This end of a worker that answers one request after the other in one process; one call at a time."""

    def __init__(self, config: dict[str, Any]):
        if not os.environ.get("MOSS_SANDBOX"):
            warnings.warn("tools are less isolated here than on Linux: MOSS_SANDBOX=process", stacklevel=2)
        self.wall, self.room = config["wall"], _room(config["answer"])
        self.process = _spawn({**config, "kind": "loop"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.layers: dict[str, Any] = {}
        self.requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.calls = 0
        threading.Thread(target=self._talk, daemon=True, name="sandbox").start()

    def _talk(self) -> None:
        """Write requests and read lines: neither has a time limit on every system, so `ask` waits for them here."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it ended, or was closed
            while line := self.process.stdout.readline(self.room):
                self.lines.put(line)
                self.process.stdin.write(self.requests.get())
                self.process.stdin.flush()
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
        return self.process.poll() is None

    def ask(self, request: bytes, payload: bytes) -> bytes:
        self.calls += 1
        self.requests.put(request + b"\n" + payload)
        try:
            line = self.lines.get(timeout=self.wall)
        except queue.Empty:
            self.close()
            raise ToolError("time limit") from None
        if not line.endswith(b"\n") or self.calls >= RENEW_AFTER:
            self.close()
        if not line:
            raise ToolError("it crashed")
        return line

    def close(self) -> None:
        _end(self.process)
        self.requests.put(b"")  # for the thread that talks: there is nobody any more


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


def _in_memory(payload: bytes) -> int:
    """The descriptor of a file without a name that holds the payload."""
    descriptor = os.memfd_create("payload")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(payload)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _room(answer: int) -> int:
    """Bytes of a line with an answer: JSON writes quotes and line breaks with two."""
    return 2 * answer + 64


def _checked(line: bytes, limit: int) -> str:
    """The text of an answer that may have been written by an attacker."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise ToolError("bad answer") from None
    if isinstance(answer, dict) and len(answer) == 1:
        ((kind, text),) = answer.items()
        if isinstance(text, str) and _CLEAN.fullmatch(text) and len(text.encode()) <= limit:
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
