"""Log-probabilities of continuations: grouped and batched as each alone, and no more computed than is shared."""

from __future__ import annotations

import random

import pytest
import torch

from moss.evals import likelihood
from moss.evals.likelihood import Continuation, groups, likelihoods
from moss.model import Decoder, ModelConfig

SIZES = {"vocab_size": 97, "num_layers": 2, "hidden": 32, "num_heads": 4, "max_length": 128}


def decoder(**more: object) -> Decoder:
    """A toy whose scores are far apart."""
    model = Decoder(ModelConfig(**(SIZES | more)))  # type: ignore[arg-type]
    model.init_weights(3)
    return model.eval()


def alone(model: Decoder, each: Continuation) -> float:
    """The definition: one forward of the whole, without a batch, a cache or a group."""
    ids = [*each.prompt, *each.answer]
    read = ids[:-1][-model.config.max_length :]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([read]))[0].double(), dim=-1)[-len(each.answer) :]
    return float(scores.gather(1, torch.tensor(each.answer)[:, None]).sum())


def questions(seed: int = 0) -> list[Continuation]:
    """As of benchmarks: subjects with examples, questions with choices, of one token and of several."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(97) for _ in range(count)]

    found = []
    for _ in range(3):
        examples = ids(rng.randrange(30, 80))
        for _ in range(7):
            asked = examples + ids(rng.randrange(1, 20))
            choices = rng.choice([[[1], [2], [3], [4]], [ids(rng.randrange(1, 9)) for _ in range(4)]])
            found += [Continuation(asked, each) for each in choices]
    return found


@pytest.mark.parametrize("family", ["llama", "moss"])
def test_grouped_is_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a row that sees padding or its neighbour, a choice read off a place too early or too late, a beginning
    that is shared and is not, and answers in another order; batches of a few places, and logits of a few rows."""
    more = {"family": "moss", "rotary_dim": 4} if family == "moss" else {}
    model, asked = decoder(**more), questions()
    random.Random(1).shuffle(asked)
    expected = [alone(model, each) for each in asked]
    for places, scores in ((4096, 64), (50, 0.0005)):
        monkeypatch.setattr(likelihood, "AT_ONCE", places)
        monkeypatch.setattr(likelihood, "LOGITS", scores)
        assert likelihoods(model, asked) == pytest.approx(expected, rel=1e-5)


def test_too_long_and_empty() -> None:
    """Prevents an answer that is cut in silence; of a prompt the oldest part may go."""
    model = decoder()
    long = Continuation(list(range(90)) * 2, [5, 6, 7])
    assert likelihoods(model, [long]) == pytest.approx([alone(model, long)], rel=1e-5)
    assert likelihoods(model, []) == []
    for wrong, words in ((Continuation([1], [2] * 129), "129 tokens"), (Continuation([], [1]), "at least one")):
        with pytest.raises(ValueError, match=words):
            likelihoods(model, [wrong])


def test_what_is_shared_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a beginning that is read for each question again, or one that is left out."""
    computed: list[int] = []
    hidden = Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, ids, **more: [computed.append(ids.numel()), hidden(self, ids, **more)][1]
    )
    examples = [list(range(70)), list(range(20, 90))]
    asked = [Continuation([*start, at], [choice]) for start in examples for at in range(20) for choice in range(4)]
    likelihoods(decoder(), asked)
    assert sum(computed) == 2 * 70 + 2 * 20


def test_groups_are_cut_where_it_pays() -> None:
    """Prevents one group for two subjects, and a group for each question."""
    a, b = tuple(range(100)), tuple(range(200, 300))
    rows = sorted([(*start, at) for start in (a, b) for at in range(5)])
    assert [len(group) for group in groups(rows)] == [5, 5]
    assert [len(group) for group in groups([(1, at) for at in range(9)])] == [9]
    assert groups([]) == []
