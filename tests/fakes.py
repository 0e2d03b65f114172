"""Stand-ins for tests: a toy model whose weights are far from zero, and an engine that replays given ids."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from moss.engine import Grammar, Sampling, Stream, Token
from moss.model import Decoder, ModelConfig
from moss.tokenizer import Tokenizer
from moss.weights import save_model


def toy_model(*, seed: int = 0, vocab_size: int = 97, max_length: int = 600, **values: Any) -> Decoder:
    """A small decoder with random weights everywhere, so that every layer and position matters to the next token.

    The head is its own: tied to the embedding, an untrained model would repeat its last token for ever.
    """
    values = {"tie_embeddings": False, **values}
    model = Decoder(ModelConfig.from_depth(2, vocab_size, max_length, **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if name == "embed.weight" else 2 * weight.shape[1] ** -0.5, generator=generator)
    return model.eval()


class ScriptedEngine:
    """Answers each `submit` with the next list of ids, whatever the prompt; keeps what it was asked.

    As the real one does, it ends at the first stop id (delivered) or after `max_tokens`.
    """

    def __init__(self, answers: Sequence[Sequence[int]], *, max_length: int = 100_000) -> None:
        self.answers = [list(ids) for ids in answers]
        self.max_length = max_length
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.conversations: list[Hashable | None] = []
        self.grammars: list[Grammar | None] = []
        self.prefixes: list[int] = []
        self.streams: list[Stream] = []
        self.forgotten: list[Hashable] = []

    def forget(self, conversation: Hashable) -> None:
        self.forgotten.append(conversation)

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        conversation: Hashable | None = None,
        grammar: Grammar | None = None,
        prefix: int = 0,
    ) -> Stream:
        """Replay the next answer; running out of answers is a test's mistake."""
        self.prompts.append(list(ids))
        self.samplings.append(sampling)
        self.conversations.append(conversation)
        self.grammars.append(grammar)
        self.prefixes.append(prefix)
        stream = Stream(len(ids))
        self.streams.append(stream)
        finish = "length"
        for id in self.answers.pop(0)[: sampling.max_tokens]:
            stream._tokens.put(Token(id, 0.0))
            if id in sampling.stop_ids:
                finish = "stop"
                break
        stream._end(finish)
        return stream


def toy_folder(tok: Tokenizer, folder: Path) -> Path:
    """The folder, with a toy model and its tokenizer in it."""
    save_model(toy_model(vocab_size=tok.vocab_size), folder)
    tok.save(folder)
    return folder
