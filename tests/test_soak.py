"""Hammering: long use must not grow, slow down or break. Only `make soak` runs these."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from moss.chat import SWITCHES, Dialog
from moss.engine import Engine, Sampling
from moss.screen import Screen
from moss.session import Chat
from moss.terminal import answer_line
from moss.tokenizer import train
from moss.tools.base import standard_tools
from tests.fakes import toy_model


def memory() -> float:
    """Resident memory of this process in MiB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_day_of_chatting_keeps_memory_flat():
    """Something kept per turn (cache rows, history, console) would end a chat that is left open."""
    tok = train(["hello there, add 1+1 and solve x = 1 你好"] * 3, 300)
    rng = random.Random(0)
    with Engine(toy_model(vocab_size=tok.vocab_size, max_length=1200), slots=1) as engine:
        dialog = Dialog("Be kind.", {"thoughts": True, **dict.fromkeys(SWITCHES, True)}, [])
        console = Console(file=io.StringIO(), width=100)
        chat, screen = (
            Chat(dialog, engine, tok, standard_tools(), Sampling(temperature=1.0, max_tokens=40)),
            Screen(console),
        )
        before = 0.0
        for turn in range(400):
            answer_line(
                chat, screen, rng.choice(["hello", "1+1?", "solve x = 1", "/tools solver off", "/tools all", "你好"])
            )
            if turn % 20 == 19:
                answer_line(chat, screen, "/clear")
                console.file = io.StringIO()
            if turn == 100:
                before = memory()
        assert memory() - before < 30
