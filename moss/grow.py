"""More rows for a model whose tokenizer has learnt new ids.

What    `grow` gives embedding and head a row for every id that the new tokenizer has beyond the old one. Each new row
        is the mean of the rows of the pieces into which the old tokenizer splits the new token's text.
Why     A random row would begin far from everything the model knows; the mean begins where the text has stood so far.
How     new = add_markers(old); model = grow(model, old, new)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moss.model import Decoder
from moss.tokenizer import Tokenizer


@torch.no_grad()
def grow(model: Decoder, old: Tokenizer, new: Tokenizer) -> Decoder:
    """A model for `new`: every weight of `model` as it was, new ids with the mean of their pieces' rows.

    The ids of `old` must be the first of `new`. A base whose table has spare rows keeps its size where they suffice.
    """
    if new.vocab_size < old.vocab_size:
        raise ValueError(f"the new tokenizer has {new.vocab_size} ids, fewer than the {old.vocab_size} of the old one")
    if new.vocab_size == old.vocab_size:
        return model
    size = max(model.config.vocab_size, new.vocab_size)
    config = dataclasses.replace(model.config, vocab_size=size)
    with torch.device("meta"):
        grown = Decoder(config, model.head_kind)
    fresh = range(old.vocab_size, new.vocab_size)
    pieces = dict(zip(fresh, pieces_of([new.decode_bytes([i], markers=True) for i in fresh], old)))
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        table = parameter.detach()
        if name.split(".")[0] in ("embed", "head") and len(table) == model.config.vocab_size:
            rows = table.new_zeros(size, *table.shape[1:])
            rows[: len(table)] = table
            for new_id, parts in pieces.items():
                rows[new_id] = table[parts].float().mean(dim=0).to(table.dtype)
            table = rows
        tensors[name] = table
    grown.load_state_dict(tensors, assign=True)
    return grown.to(model.embed.weight.device)


def pieces_of(tokens: Sequence[bytes], old: Tokenizer) -> list[list[int]]:
    """The old tokenizer's ids of each token: of its text, or of its bytes where these are half a character."""
    alone = {old.decode_bytes([i]): i for i in range(old.vocab_size - 1, -1, -1)}
    found = []
    for token in tokens:
        try:
            found.append(old.encode(token.decode()))
        except UnicodeDecodeError:
            found.append([alone[token[at : at + 1]] for at in range(len(token))])
    return found
