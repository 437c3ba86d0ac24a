"""The prefix cache: reuse, reference counts and eviction of pages."""

import pytest
from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.cache.snapshots import StateSnapshots, snapshot_count

SIZE = 2


def kept(cache: PrefixCache, *tokens: int) -> list[int]:
    """Pages that hold these tokens, in the tree and held by the caller."""
    pages = cache.match(tokens)
    for at in range(len(pages), len(tokens) // SIZE):
        [page] = cache.allocate(1) or pytest.fail("no page")
        pages.append(cache.insert(pages, page, tokens[at * SIZE : (at + 1) * SIZE]))
    return pages


def test_a_prefix_is_found_in_whole_pages() -> None:
    cache = PrefixCache(8, SIZE)
    pages = kept(cache, 1, 2, 3, 4)
    cache.release(pages)
    assert cache.match([1, 2, 3]) == pages[:1]
    assert cache.match([1, 2, 3, 4, 5, 6]) == pages
    assert cache.match([2, 1]) == cache.match([1]) == cache.match([]) == []
    assert (cache.in_use, cache.idle, cache.available) == (2, 0, 6)


def test_the_same_tokens_behind_another_prefix_are_another_page() -> None:
    cache = PrefixCache(8, SIZE)
    first, second = kept(cache, 1, 1, 7, 7), kept(cache, 2, 2, 7, 7)
    assert not set(first) & set(second)
    assert cache.match([7, 7]) == []


def test_pages_are_taken_over_from_the_tree_where_it_has_them() -> None:
    cache = PrefixCache(8, SIZE)
    first = kept(cache, 1, 2)
    [own] = cache.allocate(1) or []
    assert cache.insert([], own, (1, 2)) == first[0]
    assert cache.in_use == 1
    cache.release(first)
    assert cache.in_use == 1  # the second still holds it
    cache.release(first)
    assert (cache.in_use, cache.idle) == (0, 1)


def test_the_next_page_is_found_behind_pages_that_are_held() -> None:
    cache = PrefixCache(8, SIZE)
    pages = kept(cache, 1, 2, 3, 4)
    assert cache.match((1, 2, 3, 4), behind=pages[:1]) == pages[1:]
    assert cache.match((1, 2, 4, 3), behind=pages[:1]) == cache.match((1, 2, 3, 4), 3, pages[:1]) == []
    [own] = cache.allocate(1) or []
    assert cache.match((5, 6, 1, 2), behind=[own]) == []  # it is not in the tree


def test_with_states_a_prefix_ends_at_a_snapshot() -> None:
    cache = PrefixCache(8, SIZE, StateSnapshots(2))
    text = (1, 2, 3, 4, 5, 6, 7, 8)
    pages = kept(cache, *text)
    assert cache.match(text) == []
    assert cache.take_snapshot(pages[2]) == 0
    assert cache.take_snapshot(pages[0]) == 1
    assert cache.take_snapshot(pages[2]) is None  # it is there already, and now the most recently used
    assert cache.match(text) == pages[:3]
    assert cache.match(text[:4]) == pages[:1]
    assert cache.match(text, behind=pages[:2]) == pages[2:3]
    assert cache.take_snapshot(pages[3]) == 1  # in place of the least recently used
    assert cache.match(text[:4]) == []
    assert cache.match(text) == pages
    [own] = cache.allocate(1) or []
    assert cache.take_snapshot(own) is None  # nobody could find it


def test_a_snapshot_goes_with_its_page() -> None:
    cache = PrefixCache(2, SIZE, StateSnapshots(2))
    pages = kept(cache, 1, 2, 3, 4)
    assert [cache.take_snapshot(page) for page in pages] == [0, 1]
    cache.release(pages)
    cache.allocate(1)
    assert (len(cache.snapshots), cache.match((1, 2))) == (1, pages[:1])
    cache.release(pages[:1])
    cache.clear()
    assert len(cache.snapshots) == 0
    assert sorted(cache.snapshots.take(page) for page in range(2)) == [0, 1]


def test_without_room_for_snapshots_nothing_is_reused() -> None:
    cache = PrefixCache(4, SIZE, StateSnapshots(0))
    pages = kept(cache, 1, 2)
    assert cache.take_snapshot(pages[0]) is None
    assert cache.match((1, 2)) == []


def test_branches_are_other_pages_behind_the_same() -> None:
    cache = PrefixCache(8, SIZE)
    pages = kept(cache, 1, 2, 3, 4)
    assert cache.branches(pages[0], (5, 6))
    assert cache.branches(pages[0], (3,))
    assert not cache.branches(pages[0], (3, 4))
    assert not cache.branches(pages[1], (5, 6))


@pytest.mark.parametrize(
    ("rows", "each", "memory", "taken", "count"),
    [
        (16, 10, 10_000, 0, 16),
        (1, 10, 10_000, 0, 4),
        (16, 10, 400, 0, 10),
        (16, 10, 400, 330, 7),
        (16, 10, 400, 500, 0),
        (16, 0, 1, 0, 0),
        (16, 10, -5, 0, 0),
    ],
)
def test_there_is_a_snapshot_for_each_row_where_the_memory_has_room(
    rows: int, each: int, memory: int, taken: int, count: int
) -> None:
    assert snapshot_count(rows, each, memory, taken) == count


def test_idle_pages_go_by_last_use_and_leaves_before_their_parents() -> None:
    cache = PrefixCache(4, SIZE)
    old, new = kept(cache, 1, 1, 2, 2), kept(cache, 3, 3, 4, 4)
    cache.release(old)
    cache.release(new)
    cache.release(cache.match([1, 1]))  # the parent of the older is used once more, its child is not
    taken = [(cache.allocate(1) or [])[0] for _ in range(4)]
    assert taken == [old[1], new[1], new[0], old[0]]
    assert cache.allocate(1) is None


def test_held_pages_are_never_taken() -> None:
    cache = PrefixCache(3, SIZE)
    held, idle = kept(cache, 1, 1), kept(cache, 2, 2)
    cache.release(idle)
    assert cache.allocate(3) is None
    assert cache.available == 2
    assert set(cache.allocate(2) or []) == {0, 1, 2} - set(held)
    assert cache.match([1, 1]) == held


def test_what_was_taken_is_no_longer_found() -> None:
    cache = PrefixCache(1, SIZE)
    cache.release(kept(cache, 1, 1))
    cache.allocate(1)
    assert cache.match([1, 1]) == []


def test_a_page_is_given_back_once() -> None:
    cache = PrefixCache(2, SIZE)
    pages = cache.allocate(1) or []
    cache.release(pages)
    with pytest.raises(ValueError, match="does not hold"):
        cache.release(pages)


def test_only_full_pages_are_kept() -> None:
    cache = PrefixCache(2, SIZE)
    [page] = cache.allocate(1) or []
    with pytest.raises(ValueError, match="a page of 2 tokens cannot be kept with 1"):
        cache.insert([], page, (1,))


def test_clearing_frees_what_nobody_holds() -> None:
    cache = PrefixCache(6, SIZE)
    held = kept(cache, 1, 1)
    cache.release(kept(cache, 1, 1, 2, 2, 3, 3))
    cache.clear()
    assert (cache.in_use, cache.idle, cache.available) == (1, 0, 5)
    assert cache.match([1, 1, 2, 2]) == held


def test_use_over_and_over_does_not_pile_up() -> None:
    cache = PrefixCache(4, SIZE)
    for _ in range(1000):
        cache.release(kept(cache, 1, 1))
    assert len(cache._leaves) < 20
