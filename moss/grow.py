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
from torch import nn

from moss.model import Decoder
from moss.tokenizer import Tokenizer


@torch.no_grad()
def grow(model: Decoder, old: Tokenizer, new: Tokenizer) -> Decoder:
    """The model, made to fit `new` in place: weights as they were, new ids with the mean of their pieces' rows.

    The ids of `old` must be the first of `new`. A base whose table has spare rows keeps its size where they suffice.
    """
    if new.vocab_size < old.vocab_size:
        raise ValueError(f"the new tokenizer has {new.vocab_size} ids, fewer than the {old.vocab_size} of the old one")
    for i in range(old.vocab_size):
        if new.decode_bytes([i], markers=True) != old.decode_bytes([i], markers=True):
            raise ValueError(f"{new.origin} does not extend {old.origin}: the id {i} is another token there")
    if new.vocab_size == old.vocab_size:
        return model
    size = max(model.config.vocab_size, new.vocab_size)
    fresh = range(old.vocab_size, new.vocab_size)
    pieces = dict(zip(fresh, pieces_of([new.decode_bytes([i], markers=True) for i in fresh], old)))
    head = model.head if model.head_kind == "lm" else None
    for layer in (model.embed, head):
        for name, table in list(layer.named_parameters()) if layer is not None else ():
            rows = table.new_zeros(size, *table.shape[1:])
            rows[: len(table)] = table
            for new_id, parts in pieces.items():
                rows[new_id] = table[parts].float().mean(dim=0).to(table.dtype)
            setattr(layer, name, nn.Parameter(rows, requires_grad=table.requires_grad))
    model.embed.num_embeddings = size
    if head is not None:
        head.out_features = size
    model.config = dataclasses.replace(model.config, vocab_size=size)
    return model


def pieces_of(tokens: Sequence[bytes], old: Tokenizer) -> list[list[int]]:
    """The old tokenizer's ids of each token: of its text, or of its bytes where it ends within a character."""
    found = []
    for token in tokens:
        try:
            found.append(old.encode(token.decode()))
        except UnicodeDecodeError:
            found.append(old.pieces(token))
    return found
