"""Who holds which page of the KV cache, and which pages hold a prefix that somebody may ask for again.

A page is a number; what lies in it is the business of ``paged_cache``. Nothing here knows an array library.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Node:
    """A page of the tree: the tokens in it, behind those of its parents."""

    page: int
    parent: "_Node | None"
    tokens: tuple[int, ...]
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)
    last_used: int = 0


class PrefixCache:
    """Pages, counted by their users, and a radix tree of the full pages that prompts have left.

    A page is in one of three states: free; held by one or more users; or idle, which is in the tree and held by
    nobody. Idle pages are taken, those used longest ago first, when the free ones run out. Who holds a page of the
    tree holds its parents as well, so whatever is idle has only idle pages below it.

    Args:
        pages: how many there are, numbered from 0.
        page_size: tokens in each.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self._free = list(range(pages - 1, -1, -1))
        self._users: dict[int, int] = {}
        self._root = _Node(-1, None, ())
        self._nodes: dict[int, _Node] = {}
        self._idle = 0
        # Leaves that were idle when they came here, by last use; entries that are out of date are passed over.
        self._leaves: list[tuple[int, int]] = []
        self._clock = 0

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give: the free and the idle ones."""
        return len(self._free) + self._idle

    @property
    def in_use(self) -> int:
        """Pages that somebody holds."""
        return len(self._users)

    @property
    def idle(self) -> int:
        """Pages that nobody holds, kept for a prompt that begins like them."""
        return self._idle

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest prefix, in whole pages, that is in the tree. The caller now holds them."""
        pages: list[int] = []
        node = self._root
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            child = node.children.get(tuple(tokens[start : start + self.page_size]))
            if child is None:
                break
            self._hold(child.page)
            pages.append(child.page)
            node = child
        return pages

    def next_page(self, pages: Sequence[int], tokens: Sequence[int]) -> int | None:
        """The page of these tokens behind a prefix whose pages the caller holds, or None. The caller now holds it."""
        parent = self._node_behind(pages)
        child = None if parent is None else parent.children.get(tuple(tokens))
        if child is None:
            return None
        self._hold(child.page)
        return child.page

    def allocate(self, count: int) -> list[int] | None:
        """That many pages for the caller alone, or None, and then nothing has changed."""
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def keep(self, pages: Sequence[int], page: int, tokens: Sequence[int]) -> int:
        """Put a page that the caller holds alone into the tree.

        Args:
            pages: the pages of the tokens before it, which the caller holds.
            page: the page.
            tokens: what is in it, a full page.

        Returns:
            The page to go on with. It is another one, held instead, where the tree had these tokens already: both
            hold the same bits, and one is enough.
        """
        if len(tokens) != self.page_size:
            raise ValueError(f"a page of {self.page_size} tokens cannot be kept with {len(tokens)}")
        parent = self._node_behind(pages)
        if parent is None:  # the prefix was computed by nobody who may share it
            return page
        known = parent.children.get(tuple(tokens))
        if known is not None:
            self._hold(known.page)
            self.release([page])
            return known.page
        node = _Node(page, parent, tuple(tokens))
        parent.children[node.tokens] = node
        self._nodes[page] = node
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give back pages that the caller holds. Those of the tree stay in it until they are needed."""
        for page in pages:
            if page not in self._users:
                raise ValueError(f"page {page} is given back by someone who does not hold it")
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            node = self._nodes.get(page)
            if node is None:
                self._free.append(page)
                continue
            self._idle += 1
            self._clock += 1
            node.last_used = self._clock
            self._offer(node)

    def clear(self) -> None:
        """Forget every idle page."""
        self._free += [self._evict() for _ in range(self._idle)]

    def _node_behind(self, pages: Sequence[int]) -> _Node | None:
        return self._nodes.get(pages[-1]) if pages else self._root

    def _hold(self, page: int) -> None:
        if page not in self._users:
            self._idle -= 1
        self._users[page] = self._users.get(page, 0) + 1

    def _offer(self, node: _Node) -> None:
        if node.children:
            return
        heapq.heappush(self._leaves, (node.last_used, node.page))
        if len(self._leaves) > 4 * self.pages:
            self._leaves = sorted(entry for entry in set(self._leaves) if self._is_idle_leaf(*entry))

    def _is_idle_leaf(self, last_used: int, page: int) -> bool:
        node = self._nodes.get(page)
        return node is not None and not node.children and page not in self._users and node.last_used == last_used

    def _evict(self) -> int:
        """Take the idle leaf that was used longest ago out of the tree."""
        entry = heapq.heappop(self._leaves)
        while not self._is_idle_leaf(*entry):
            entry = heapq.heappop(self._leaves)
        _, page = entry
        node = self._nodes[page]
        parent = node.parent or self._root
        del self._nodes[page], parent.children[node.tokens]
        self._idle -= 1
        if parent is not self._root and parent.page not in self._users:
            self._offer(parent)
        return page
