"""Attention inside the documents of packed rows, against PyTorch's own under a mask.

`packed_mask` is the slow reference; layers and models that use it are tested in test_model.py and test_loop.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moss.attention import BLOCK, CONTINUES, Documents, document_attention, packed_mask, pick
from moss.model import Decoder, ModelConfig


def test_packed_mask_by_hand():
    """Prevents: a document that sees its neighbour or its own future, and padding rows with nothing to see."""
    mask = packed_mask(torch.tensor([[1, 1, 2, 0, 0]]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_documents_by_hand():
    """Prevents: a token counted to the wrong document or row, padding taken for one, a lost or wrong beginning."""
    after = 2 + CONTINUES * 1
    documents = Documents.of(torch.tensor([[1, 1, after, after, 0], [0, 1, 1, 3, 0]]))
    assert documents.places.tolist() == [0, 1, 2, 3, 6, 7, 8]
    (block,) = documents.blocks
    assert (block.begin, block.end, block.first) == (0, 7, 0)
    assert (block.mask == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert documents.find(torch.tensor([8, 1])).tolist() == [6, 1]
    with pytest.raises(ValueError, match="padding"):
        documents.find(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="row 0: document 1 lies in several pieces"):
        Documents.of(torch.tensor([[1, 2, 1]]))
    assert Documents.of(torch.zeros(2, 3, dtype=torch.long)).blocks == []


def test_blocks_by_hand():
    """Prevents: masks over keys that all may see, long documents in one block, a block for each short one."""
    sizes = {1: BLOCK + 5, 2: 20, 3: 30, 4: BLOCK - 10, 5 + CONTINUES * 1: 15}
    segments = torch.cat([torch.full((size,), name) for name, size in sizes.items()])[None]
    blocks = Documents.of(segments).blocks
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    assert [(block.begin, block.end, block.first) for block in blocks] == [
        (0, BLOCK, 0),
        (BLOCK, ends[2], 0),  # the rest of the first, and two short ones
        (ends[2], ends[3], ends[2]),
        (ends[3], ends[4], 0),
    ]
    assert blocks[0].mask.shape == (BLOCK, BLOCK - 1)  # all see the first token
    assert blocks[3].mask.shape == (15, ends[4] - ends[0])


def rows(length: int) -> Tensor:
    """Two rows: documents shorter and longer than a block, two that go on from the first; and padding."""
    cuts = torch.tensor([0, length // 5, length // 2, (3 * length) // 4, length - 3])
    first = torch.bucketize(torch.arange(length), cuts, right=True)
    names = torch.tensor([0, 1, 2 + CONTINUES, 3 + CONTINUES, 4, 0])
    return torch.stack((names[first], (torch.arange(length) < length - 1).long()))


@pytest.mark.parametrize(("groups", "length"), [(4, 128), (2, 300), (1, 16), (4, 2 * BLOCK + 1)])
def test_documents_equal_masked_attention(groups, length):
    """Prevents: a block that misses keys, sees later ones or other documents, or mixes up the groups of heads; a
    gradient that one of several documents leaves out or counts twice."""
    draw = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes)
    segments = rows(length)
    documents = Documents.of(segments)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[documents.places].transpose(0, 1)  # (H, N, E)

    expected = flat(F.scaled_dot_product_attention(q, k, v, attn_mask=packed_mask(segments), enable_gqa=True))
    got = document_attention(flat(q), flat(k), flat(v), documents)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    slope = torch.randn(got.shape, generator=draw, dtype=torch.float64)
    for mine, right in zip(
        torch.autograd.grad(got, (q, k, v), slope), torch.autograd.grad(expected, (q, k, v), slope), strict=True
    ):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=0)


def test_documents_stay_exact_enough_in_bfloat16():
    """Prevents: a softmax in half precision, or a rounding more, in the attention that trains every model on a CPU."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 512, 64, generator=draw).bfloat16().requires_grad_() for _ in range(3))
    segments = (torch.arange(512) * 3 // 512 + 1)[None]
    inputs = [x.detach().double()[None].requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*inputs, attn_mask=packed_mask(segments))[0]
    ours = document_attention(q, k, v, Documents.of(segments))
    assert 1e-4 < float(((ours - exact).std() / exact.std()).detach()) < 4e-3
    slope = torch.randn(exact.shape, generator=draw)
    for mine, right in zip(
        torch.autograd.grad(ours, (q, k, v), slope.bfloat16()),
        torch.autograd.grad(exact, inputs, slope.double()),
        strict=True,
    ):
        assert 1e-4 < float((mine - right[0]).std() / right.std()) < 1e-2


@pytest.mark.parametrize("family", ["llama", "moss"])
def test_hidden_at_places_equals_hidden(family):
    """Prevents: states of other tokens than were asked for, and gradients that miss what those tokens looked at."""
    model = Decoder(ModelConfig(vocab_size=50, num_layers=3, hidden=32, num_heads=4, family=family)).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2, generator=draw)
    segments, ids = rows(40), torch.randint(0, 50, (2, 40), generator=draw)
    places = torch.tensor([3, 0, 17, 41, 60])
    grads = []
    for asked in (None, places):
        model.zero_grad()
        hidden = model.hidden(ids, segments=segments, places=asked)
        picked = hidden.flatten(0, 1)[places] if asked is None else hidden
        picked.square().sum().backward()
        grads.append([picked, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)
    assert not model.hidden(ids, segments=segments)[segments == 0].any()
    one = model.hidden(ids[1:], places=torch.tensor([2]))
    torch.testing.assert_close(one, model.hidden(ids[1:])[0, 2:3])


def test_pick_by_hand():
    """Prevents: a gradient that lands at another place."""
    x = torch.arange(8.0).view(1, 4, 2).requires_grad_()
    y = pick(x, torch.tensor([2, 0]))
    assert y.tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    (grad,) = torch.autograd.grad(y, x, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    assert grad.tolist() == [[[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]]
