"""The cache: what rows hold, who gets which, and that rows which decode together stay side by side."""

from __future__ import annotations

import pytest
import torch

from moss.engine.cache import PREFIXES, Cache, Slot, common_prefix


def make(slots: int = 4, max_length: int = 1000) -> Cache:
    return Cache(2, 1, 2, slots=slots, max_length=max_length)


def fill(cache: Cache, slot: Slot, ids: list[int]) -> None:
    """Read the ids a slot lacks; the key of an id is (id, id) in layer 0 and (-id, -id) in layer 1."""
    new = ids[len(slot.ids) :]
    window = cache.window(slot.row, [len(slot.ids)], len(new))
    kv = torch.tensor(new, dtype=torch.float32)[None, None, :, None].expand(1, 1, -1, 2)
    for layer, sign in enumerate((1, -1)):
        window.append(layer, sign * kv, sign * kv)
    slot.ids = ids.copy()


def held(cache: Cache, slot: Slot) -> list[int]:
    """The ids that the stored keys say the row holds; fails when layers, keys and values do not agree."""
    rows = [store[slot.row, 0, : len(slot.ids), 0] for store in (cache.keys[0], cache.values[0])]
    rows += [-store[slot.row, 0, : len(slot.ids), 0] for store in (cache.keys[1], cache.values[1])]
    assert all(torch.equal(row, rows[0]) for row in rows)
    return [int(x) for x in rows[0].tolist()]


def get(cache: Cache, prompt: list[int], conversation: object = None) -> Slot:
    slot = cache.acquire("user", conversation)
    assert slot is not None
    assert cache.reuse(slot, prompt) == len(slot.ids) < len(prompt)
    return slot


def test_common_prefix() -> None:
    """An off-by-one here would reuse a key of another token or read everything again."""
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([1, 2, 4], []) == 0
    assert common_prefix([9], [1]) == 0


def test_conversation_keeps_its_row() -> None:
    """A second turn must find the first one's keys, cut where the prompt departs from them."""
    cache = make()
    slot = get(cache, [1, 2, 3, 4, 5], "a")
    fill(cache, slot, [1, 2, 3, 4, 5])
    cache.release(slot)
    again = get(cache, [1, 2, 3, 9, 9], "a")
    assert again is slot and again.ids == [1, 2, 3]


def test_last_prompt_id_is_always_read() -> None:
    """With the whole prompt cached there would be no hidden state to choose the next token from."""
    cache = make()
    slot = get(cache, [1, 2, 3], "a")
    fill(cache, slot, [1, 2, 3])
    cache.release(slot)
    assert get(cache, [1, 2, 3], "a").ids == [1, 2]


def test_long_common_beginning_is_copied() -> None:
    """Another conversation with the same meta instruction must get its keys, not the other way round."""
    cache = make()
    meta = list(range(40))
    first = get(cache, [*meta, 50, 51], "a")
    fill(cache, first, [*meta, 50, 51])
    second = get(cache, [*meta, 60, 61], "b")
    assert second is not first and second.ids == meta and held(cache, second) == meta
    fill(cache, second, [*meta, 60, 61])
    assert held(cache, first) == [*meta, 50, 51] and held(cache, second) == [*meta, 60, 61]


def test_a_row_that_is_read_takes_what_others_read() -> None:
    """Two prompts that begin alike and are read by turns: each goes on where the other is, and loses nothing."""
    cache = make()
    meta = list(range(100))
    one, two = [*meta, 200, 201], [*meta, 210, 211]
    a, b = get(cache, one), get(cache, two)
    fill(cache, a, one[:30])
    for slot, ids, held_before, read_to in ((b, two, 30, 60), (a, one, 60, 90), (b, two, 90, 91), (a, one, 90, 101)):
        assert cache.reuse(slot, ids) == len(slot.ids) == held_before
        fill(cache, slot, ids[:read_to])
        assert held(cache, slot) == ids[:read_to]
    assert cache.reuse(a, one) == 101  # what b has is shorter
    assert cache.reuse(b, two) == 91 and held(cache, b) == two[:91]  # nine more are cheaper read than copied
    assert held(cache, a) == one[:101]


def test_kept_beginning_outlives_its_row() -> None:
    """With one row, the next conversation overwrites the meta instruction, which must then come from what was kept."""
    cache = make(slots=1)
    meta = list(range(40))
    slot = get(cache, [*meta, 50, 51], "a")
    fill(cache, slot, [*meta, 50, 51])
    cache.keep(slot, 40)
    cache.keep(slot, 5)  # too short to be worth a copy
    cache.release(slot)
    slot = get(cache, [7, 8, 9], "b")
    fill(cache, slot, [7, 8, 9] * 20)
    cache.release(slot)
    again = get(cache, [*meta, 60], "c")
    assert again.ids == meta == held(cache, again) and len(cache.prefixes) == 1


def test_least_recently_used_beginning_goes_first() -> None:
    """The meta instruction of every new conversation must not be thrown out by eight that came once."""
    cache = make(slots=1)
    slot = get(cache, [0])
    for n in [*range(PREFIXES), 0, PREFIXES]:  # 0 is used again before there is one too many
        slot.ids = []
        fill(cache, slot, [n] * 20)
        cache.keep(slot, 20)
    assert [prefix.ids[0] for prefix in cache.prefixes] == [*range(2, PREFIXES), 0, PREFIXES]


def test_least_recently_used_goes_first() -> None:
    """Evicting the newest conversation would throw away what is needed next."""
    cache = make(slots=2)
    for name in "ab":
        slot = get(cache, [1, 2], name)
        fill(cache, slot, [ord(name), 2])
        cache.release(slot)
    cache.release(get(cache, [ord("a"), 2, 3], "a"))  # now b is the oldest
    get(cache, [7, 8], "c")
    assert {slot.conversation for slot in cache.slots} == {"a", "c"}


def test_unowned_rows_go_before_conversations() -> None:
    """One-off requests must neither evict conversations nor make the cache grow to its limit."""
    cache = make(slots=3)
    cache.release(get(cache, [1, 2], "a"))
    for n in range(5):
        cache.release(get(cache, [n + 10, 3]))
    assert [slot.conversation for slot in cache.slots] == ["a", None]


def test_forgotten_conversation_goes_first() -> None:
    """`forget` must give the row back, or evaluation would fill the cache with dead conversations."""
    cache = make(slots=2)
    for name in "ab":
        cache.release(get(cache, [1, 2], name))
    cache.forget("b")
    get(cache, [7, 8], "c")
    assert {slot.conversation for slot in cache.slots} == {"a", "c"}


def test_no_row_while_all_are_busy() -> None:
    """Handing out a busy row would mix two answers."""
    cache = make(slots=2)
    rows = {get(cache, [1, 2]).row, get(cache, [3, 4]).row}
    assert rows == {0, 1} and not cache.room and cache.acquire("user") is None


def test_busy_conversation_gets_another_row() -> None:
    """Two requests of one conversation at once must not write into one row."""
    cache = make()
    assert get(cache, [1, 2], "a") is not get(cache, [1, 2], "a")


def test_live_rows_stay_neighbours() -> None:
    """A gap between live rows would make a step read and write rows of others; a bad swap would lose content."""
    cache = make(slots=6)
    slots = [get(cache, [n, n, n]) for n in range(6)]
    for n, slot in enumerate(slots):
        fill(cache, slot, [n * 10 + k for k in range(n + 1)])
    for action, n in [*zip("jjjjjj", (4, 1, 5, 0, 2, 3)), *zip("lljljl", (5, 1, 1, 4, 5, 0))]:
        (cache.join if action == "j" else cache.leave)(slots[n])
        rows = [slot.row for slot in cache.live]
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        for number, slot in enumerate(slots):
            assert cache.slots[slot.row] is slot
            assert held(cache, slot) == slot.ids == [number * 10 + k for k in range(number + 1)]
    assert {slots.index(slot) for slot in cache.live} == {1, 2, 3, 5}


def test_growth_keeps_content() -> None:
    """Growing in length and rows must move keys along, and stop at the limits."""
    cache = make(slots=3, max_length=700)
    slot = get(cache, [1] * 200, "a")
    fill(cache, slot, list(range(200)))
    for _ in range(2):
        get(cache, [5, 6])
    fill(cache, slot, list(range(690)))
    assert held(cache, slot) == list(range(690))
    assert cache.keys[0].shape == (3, 1, 700, 2)


def test_mask_of_ragged_rows() -> None:
    """Rows of different lengths: each sees itself up to its own new token and nothing of the longer row."""
    cache = make()
    for _ in range(2):
        get(cache, [1, 2])
    window = cache.window(0, [2, 0], 2)
    assert window.positions.tolist() == [[2, 3], [0, 1]]
    assert (window.starts, window.rows, window.num_new, window.length) == ([2, 0], slice(0, 2), 2, 4)
    assert window.mask(2).int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]], [[[1, 0, 0, 0], [1, 1, 0, 0]]]]
    k = torch.arange(8.0).view(2, 1, 2, 2)
    keys, values = window.append(1, k, -k)
    assert keys.shape == (2, 1, 4, 2) and torch.equal(keys, -values)
    assert torch.equal(keys[0, 0, 2:], k[0, 0]) and torch.equal(keys[1, 0, :2], k[1, 0])


def test_no_slots() -> None:
    """A cache without rows would wait for ever."""
    with pytest.raises(ValueError, match="slots is 0"):
        make(slots=0)
