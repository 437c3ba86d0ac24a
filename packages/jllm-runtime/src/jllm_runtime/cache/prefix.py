"""Prefix cache: reference-counted pages, and a radix tree of the full pages of earlier prompts.

A page is only a number here; ``cache/paged.py`` has its contents. No array library is used.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from jllm_runtime.cache.snapshots import StateSnapshots


@dataclass(eq=False)
class _Node:
    """A page in the tree: its tokens, which follow those of its parents."""

    page: int
    parent: "_Node | None"
    tokens: tuple[int, ...]
    # By the tokens themselves and not by a hash of them: two prompts must never be mistaken for each other.
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)
    last_used: int = 0


class PrefixCache:
    """Allocation of pages, and reuse of those that hold the beginning of a prompt.

    A page is in one of three states: free; held, by one or more sequences; or idle, which is in the tree and held by
    nobody. Where the free pages run out, idle ones are evicted, the least recently used first. Who holds a page of the
    tree also holds its parents, so an idle page has only idle pages below it, and some leaf can always be evicted.

    Args:
        pages: number of pages; they are numbered from 0.
        page_size: tokens in each.
        snapshots: of the states behind pages, in a model that has states: a prefix is reused up to the last page with
            one. None in other models.
    """

    def __init__(self, pages: int, page_size: int, snapshots: StateSnapshots | None = None) -> None:
        self.pages = pages
        self.page_size = page_size
        self.snapshots = snapshots
        self._free = list(range(pages - 1, -1, -1))
        self._ref_counts: dict[int, int] = {}
        self._root = _Node(-1, None, ())
        self._nodes: dict[int, _Node] = {}
        self._idle = 0
        # A heap of leaves by last use, for eviction. Entries are not removed when a leaf is held or gets a child; those
        # that are out of date are skipped when they are popped, which is cheaper than a search.
        self._leaves: list[tuple[int, int]] = []
        # Counts releases. A real clock could give two of them the same time.
        self._clock = 0

    @property
    def available(self) -> int:
        """Number of pages that ``allocate`` can give: free and idle ones."""
        return len(self._free) + self._idle

    @property
    def in_use(self) -> int:
        """Number of pages that are held."""
        return len(self._ref_counts)

    @property
    def idle(self) -> int:
        """Number of pages that nobody holds, kept for prompts that begin like them."""
        return self._idle

    @property
    def shares(self) -> bool:
        """Whether prompts can take pages over from each other: with states, only if there are snapshots."""
        return self.snapshots is None or self.snapshots.count > 0

    def match(self, tokens: Sequence[int], end: int | None = None, behind: Sequence[int] = ()) -> list[int]:
        """Find the longest prefix of a text in the tree, in whole pages. The caller now holds these pages.

        Args:
            tokens: the text.
            end: number of its tokens that may be reused; None for all.
            behind: its first pages, which the caller holds already: only those behind them are looked for.
        """
        pages: list[int] = []
        node, end = self._node_behind(behind), len(tokens) if end is None else end
        for start in range(len(behind) * self.page_size, end - self.page_size + 1, self.page_size):
            node = None if node is None else node.children.get(tuple(tokens[start : start + self.page_size]))
            if node is None:
                break
            pages.append(node.page)
        while self.snapshots is not None and pages and pages[-1] not in self.snapshots:
            pages.pop()
        # Held at once: the caller allocates next, which may evict what nobody holds.
        for page in pages:
            self._hold(page)
        return pages

    def branches(self, page: int, tokens: Sequence[int]) -> bool:
        """Whether an earlier prompt has gone on otherwise behind a page than with the page of ``tokens``."""
        node = self._nodes.get(page)
        return node is not None and any(other != tuple(tokens) for other in node.children)

    def take_snapshot(self, page: int) -> int | None:
        """A snapshot for the states behind a page of the tree, which the caller fills; None where there is none to be
        had, or no need of it (``StateSnapshots.take``)."""
        return self.snapshots.take(page) if self.snapshots is not None and page in self._nodes else None

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` pages for the caller alone.

        Returns:
            The pages; None where there are not enough, and then nothing has changed.
        """
        if count > self.available:
            return None
        # Free pages first, since each eviction forgets a prefix.
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def insert(self, pages: Sequence[int], page: int, tokens: Sequence[int]) -> int:
        """Put a page that the caller holds alone into the tree.

        Args:
            pages: the pages of the tokens before it, which the caller holds.
            page: the page.
            tokens: its contents, a full page.

        Returns:
            The page to use from now on. Where the tree has these tokens already it is the tree's page, held in place of
            the caller's: both hold the same bits, and one is enough.

        Raises:
            ValueError: the tokens are not a full page.
        """
        if len(tokens) != self.page_size:
            raise ValueError(f"a page of {self.page_size} tokens cannot be kept with {len(tokens)}")
        parent = self._node_behind(pages)
        if parent is None:  # the page before it is private, so nobody could find this one
            return page
        known = parent.children.get(tuple(tokens))
        if known is not None:  # another sequence has computed the same page at the same time
            self._hold(known.page)
            self.release([page])
            return known.page
        node = _Node(page, parent, tuple(tokens))
        parent.children[node.tokens] = node
        self._nodes[page] = node
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give back pages that the caller holds. Those of the tree stay in it until they are evicted.

        Raises:
            ValueError: nobody holds one of them.
        """
        for page in pages:
            if page not in self._ref_counts:
                raise ValueError(f"page {page} is given back by someone who does not hold it")
            self._ref_counts[page] -= 1
            if self._ref_counts[page]:
                continue
            del self._ref_counts[page]
            node = self._nodes.get(page)
            if node is None:  # what decode has written, or the last part of a prompt
                self._free.append(page)
                continue
            self._idle += 1
            self._clock += 1
            node.last_used = self._clock
            self._offer(node)

    def clear(self) -> None:
        """Evict every idle page."""
        self._free += [self._evict() for _ in range(self._idle)]

    def _node_behind(self, pages: Sequence[int]) -> _Node | None:
        return self._nodes.get(pages[-1]) if pages else self._root

    def _hold(self, page: int) -> None:
        if page not in self._ref_counts:
            self._idle -= 1
        self._ref_counts[page] = self._ref_counts.get(page, 0) + 1

    def _offer(self, node: _Node) -> None:
        """Let an idle node be evicted, if it is a leaf. A parent is offered when its last child is evicted."""
        if node.children:
            return
        heapq.heappush(self._leaves, (node.last_used, node.page))
        # Pages that are used again and again leave an entry each time; without this the heap would grow for ever. A
        # sorted list is a heap.
        if len(self._leaves) > 4 * self.pages:
            self._leaves = sorted(entry for entry in set(self._leaves) if self._is_idle_leaf(*entry))

    def _is_idle_leaf(self, last_used: int, page: int) -> bool:
        node = self._nodes.get(page)
        return node is not None and not node.children and page not in self._ref_counts and node.last_used == last_used

    def _evict(self) -> int:
        """Take the least recently used idle leaf out of the tree, and return its page."""
        entry = heapq.heappop(self._leaves)
        while not self._is_idle_leaf(*entry):
            entry = heapq.heappop(self._leaves)
        _, page = entry
        node = self._nodes[page]
        parent = node.parent or self._root
        del self._nodes[page], parent.children[node.tokens]
        if self.snapshots is not None:
            self.snapshots.forget(page)
        self._idle -= 1
        if parent is not self._root and parent.page not in self._ref_counts:
            self._offer(parent)
        return page
