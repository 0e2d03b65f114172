"""Processes that stand to each other as those of `torchrun` do, for tests of what several ranks do together."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from moss import dist

# Imported once, and not by each rank of each test. Only what is installed: the server that ranks are forked from does
# not know the search path of the tests.
PRELOAD = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "moss.train.ppo", "moss.train.pretrain"]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What `torchrun` tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in names.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` gives on each rank; it is named at the top of a file, and its result is plain values."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port, ranks, results = free_port(), [], list[Any]()
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, theirs, function, args))
        process.start()
        theirs.close()
        ranks.append((process, mine))
    try:
        for process, mine in ranks:
            assert mine.poll(180), f"rank {len(results)} hangs"
            try:
                results.append(mine.recv())
            except EOFError:
                process.join(60)
                raise AssertionError(f"rank {len(results)} ended with exit code {process.exitcode}") from None
        for process, _ in ranks:
            process.join(60)
            assert process.exitcode == 0
        return results
    finally:
        for process, _ in ranks:
            process.kill()


def _rank(rank: int, world: int, port: int, told: Connection, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    with dist.started("cpu"):
        told.send(function(*args))
