"""Snapshots of recurrent states: which pages of the prefix cache have one, and where. No array library is used.

Keys and values of a page serve any prompt that begins with its text. A delta net also needs the states that the text
has left, which a sequence overwrites as it goes on: so copies are kept behind some pages, in a pool of their own.
"""

MIN_SNAPSHOTS = 4
"""Least number that an engine keeps by itself: a chat needs those of its last turns."""

MEMORY_SHARE = 0.25
"""Most of the memory for cache and states that an engine gives to snapshots by itself."""


class StateSnapshots:
    """Allocation of snapshots to pages, by the pages' numbers. Where none is free, the least recently used is given up.

    Nobody holds one: it is copied to the states of a sequence at once, or not at all.

    Args:
        count: number of snapshots; they are numbered from 0.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        # By page, the least recently used first.
        self._taken: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def __contains__(self, page: int) -> bool:
        return page in self._taken

    def use(self, page: int) -> int:
        """The snapshot behind a page that has one; it is now the most recently used."""
        snapshot = self._taken[page] = self._taken.pop(page)
        return snapshot

    def take(self, page: int) -> int | None:
        """A snapshot for the states behind a page.

        Returns:
            Its number, for the caller to fill; None where the page has one already, or there are none at all.
        """
        if page in self._taken:
            self.use(page)
            return None
        if not self.count:
            return None
        snapshot = self._free.pop() if self._free else self._taken.pop(next(iter(self._taken)))
        self._taken[page] = snapshot
        return snapshot

    def forget(self, page: int) -> None:
        """Free the snapshot behind a page, if it has one."""
        if page in self._taken:
            self._free.append(self._taken.pop(page))


def snapshot_count(rows: int, each: int, memory: int, taken: int = 0) -> int:
    """The number of snapshots that an engine keeps by itself: one for each row, where the memory has room.

    Args:
        rows: most sequences that run at a time.
        each: bytes of one, on a device; 0 in models without states.
        memory: bytes for pages and snapshots together, on a device.
        taken: bytes of pages whose number is given, on a device.
    """
    room = max(0, min(int(memory * MEMORY_SHARE), memory - taken))
    return min(max(MIN_SNAPSHOTS, rows), room // each) if each else 0
