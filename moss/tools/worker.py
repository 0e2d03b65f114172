"""The process behind the sandbox; `sandbox.py` starts it as a program of its own, with an empty environment.

As *zygote* it imports the job, shuts itself in, and then forks one child for each request, so that every call begins
with the same fresh memory and no import. A request arrives on the control socket with two pipe ends: `answer`, which
only the child keeps, and `status`, which the zygote keeps to say how the child ended; and with the payload, if any, as
a file in memory, which the child reads before it gives up its rights. A child that outlives its time is killed here;
the zygote itself ends when the control socket closes or the process that started it is gone.

As *loop* (where there is no fork or no seccomp) it answers one JSON line after the other on standard input, each
followed by its payload.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

try:
    from moss.tools import jail
except ImportError:  # no `resource` on Windows; the loop does without
    jail = None

Job = Callable[..., str]


def main(config: dict[str, Any]) -> None:
    """Load the job, say so (or why not) on the control channel, and serve until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    os.environ.clear()  # of what Python itself needed to start
    control = socket.socket(fileno=config["control"]) if config["kind"] == "zygote" else None
    try:
        if control is None:
            loop(load(config["target"]), config)
            return
        if jail is None or not hasattr(os, "fork"):
            raise OSError("this system has no fork and no seccomp")
        signal.signal(signal.SIGALRM, lambda *_: os.getppid() == config["parent"] or os._exit(1))
        signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)  # loading takes seconds; the loop below watches by itself
        job = load(config["target"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        memory = jail.address_space() + config["memory"]
        parent = _watch(config["parent"])
        gc.collect()
        gc.freeze()
        layers = jail.shut_in()
        jail.try_shut_off(jail.filter_program(), memory=memory, seconds=config["seconds"])
    except (ImportError, OSError, ValueError) as error:
        _send(control, {"failed": f"{type(error).__name__}: {error}"})
        return
    if os.getppid() == config["parent"]:
        Zygote(job, control, parent, memory, config).serve({"layers": layers})
    os._exit(0)  # the kernel kills the children; there is nothing to tidy up


def load(target: str) -> Job:
    """The function "module:name"; its module's `warm_up`, if any, is run."""
    module_name, name = target.split(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    return getattr(module, name)


def answer_to(job: Job, arguments: list[Any]) -> bytes:
    """The job's answer as one JSON line; a failure is an answer too. Nothing may escape: this is a tool call."""
    try:
        answer = {"text": job(*arguments)}
    except MemoryError:
        answer = {"error": "memory limit"}
    except RecursionError:
        answer = {"error": "nested too deep"}
    except Exception as error:
        kind = type(error).__name__
        answer = {"error": str(error) if kind == "ExpressionError" else f"it failed ({kind})"}
    return json.dumps(answer, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def loop(job: Job, config: dict[str, Any]) -> None:
    """Answer requests one by one, in this process."""
    requests: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    _limit_memory(config["memory"])
    output = sys.stdout.buffer
    output.write(json.dumps({"layers": {}}).encode() + b"\n")
    output.flush()
    while True:
        output.write(answer_to(job, requests.get()))
        output.flush()


def _listen(requests: queue.SimpleQueue[list[Any]]) -> None:
    """Pass requests on. When they end, so does the process, even in the middle of a job: nobody is left to kill it."""
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        payload = sys.stdin.buffer.read(request["payload"])
        requests.put([*request["arguments"], *([payload] if payload else [])])
    os._exit(0)


def _limit_memory(memory: int) -> None:
    """Let this process grow by so many bytes; on Windows without a limit."""
    if jail is not None and sys.platform == "linux":
        limit = jail.address_space() + memory
        jail.resource.setrlimit(jail.resource.RLIMIT_AS, (limit, limit))
    elif jail is not None:
        threading.Thread(target=_watch_memory, args=(memory,), daemon=True).start()


def _watch_memory(memory: int) -> None:
    """End this process once it has grown by so many bytes: macOS does not keep the limit on address space."""
    assert jail is not None
    limit = jail.most_memory() + memory
    while jail.most_memory() <= limit:
        time.sleep(0.02)
    os.write(1, b'{"error": "memory limit"}\n')
    os._exit(1)


class Zygote:
    """The loop of the forking process; single-threaded, so a fork copies nothing half-done."""

    def __init__(self, job: Job, control: socket.socket, parent: int, memory: int, config: dict[str, Any]):
        assert jail is not None
        self.job = job
        self.control = control
        self.parent = parent
        self.memory = memory
        self.config = config
        self.children: dict[int, tuple[float, int]] = {}  # pid: when to kill it, where to say how it ended
        self.killed: set[int] = set()
        self.program = jail.filter_program()
        self.pid = os.getpid()

    def serve(self, hello: dict[str, Any]) -> None:
        """Announce readiness and answer requests until nobody can ask any more."""
        wake, alarm = os.pipe()
        for descriptor in (wake, alarm):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        poll = select.poll()
        for descriptor in (self.control.fileno(), wake, *([self.parent] if self.parent >= 0 else [])):
            poll.register(descriptor, select.POLLIN)
        _send(self.control, hello)
        while True:
            ready = dict(poll.poll(self._patience()))
            if self.parent in ready or (self.parent < 0 and os.getppid() != self.config["parent"]):
                return
            if wake in ready:
                os.read(wake, 4096)
            self._end_children()
            if self.control.fileno() in ready and not self._take_request():
                return

    def _patience(self) -> int:
        """Milliseconds until something is due."""
        due = min((deadline for deadline, _ in self.children.values()), default=time.monotonic() + 3600)
        wait = max(0, int((due - time.monotonic()) * 1000) + 1)
        return wait if self.parent >= 0 else min(wait, 250)

    def _take_request(self) -> bool:
        """Fork a child for the next request; False when the control socket is closed."""
        message, descriptors, _, _ = socket.recv_fds(self.control, 65536, 3)
        if not message:
            return False
        answer, status, *payload = descriptors
        arguments = json.loads(message)["arguments"]
        pid = os.fork()
        if pid == 0:
            self._child(answer, arguments, payload)
        for descriptor in (answer, *payload):
            os.close(descriptor)
        self.children[pid] = (time.monotonic() + self.config["wall"], status)
        return True

    def _child(self, answer: int, arguments: list[Any], payload: list[int]) -> None:
        """Compute in the forked process; never returns."""
        assert jail is not None
        code = 1
        try:
            jail.die_with_parent(self.pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            arguments += [os.pread(each, os.fstat(each).st_size, 0) for each in payload]
            os.dup2(answer, jail.ANSWER)
            os.closerange(0, jail.ANSWER)
            os.closerange(jail.ANSWER + 1, 1024)  # the zygote holds a few dozen at most
            jail.shut_off(self.program, memory=self.memory, seconds=self.config["seconds"])
            message = answer_to(self.job, arguments)
            while message:
                message = message[os.write(jail.ANSWER, message) :]
            code = 0
        finally:
            os._exit(code)

    def _end_children(self) -> None:
        """Kill those whose time is over, and report those that ended."""
        now = time.monotonic()
        for pid, (deadline, _) in self.children.items():
            if now >= deadline and pid not in self.killed:
                self.killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        while self.children:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _, status = self.children.pop(pid)
            ended = "time" if pid in self.killed else str(os.waitstatus_to_exitcode(code))
            self.killed.discard(pid)
            with contextlib.suppress(BrokenPipeError):  # the caller has its answer already
                os.write(status, ended.encode())
            os.close(status)


def _watch(parent: int) -> int:
    """A descriptor that becomes readable when the process `parent` ends, -1 where the kernel has none."""
    try:
        return os.pidfd_open(parent)
    except (OSError, AttributeError):
        return -1


def _send(control: socket.socket | None, message: dict[str, Any]) -> None:
    if control is None:
        sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()
    else:
        control.send(json.dumps(message).encode())
