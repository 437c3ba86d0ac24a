"""Schedule of a source's shards: the order in which they are fetched, and when each is not needed any more."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """Use of shards by one array of the model.

    Attributes:
        array: its dotted name.
        shards: the files that hold it: several where a matrix and its scales, or the experts of a mixture, are apart.
        first: the step of the forward pass that reads it first; 0 is the embedding, then the layers, then the head.
        last: the step that reads it last: the head, for an embedding that is the head too.
        nbytes: its bytes in the checkpoint.
    """

    array: str
    shards: frozenset[str]
    first: int
    last: int
    nbytes: int


class Schedule:
    """Shards that are fetched, held, and released, by the arrays that need them.

    Shards come in the order of the forward pass, which is that of most publishers. An array is converted as soon as all
    of its shards are held. A shard is released when all of its arrays are converted and, where the source is compared
    with the checkpoint (the receipt), when the forward pass is past them too. A comparison reads arrays that an earlier
    run has converted as well: their shards come again, in their turn.

    Args:
        uses: the use of each array.
        compared: whether the forward pass reads the source beside the checkpoint.
        held: shards that are held from the start.

    Attributes:
        held: the shards that are there.
        coming: the shards to fetch, in this order.
        pending: the arrays that are not converted.
    """

    def __init__(self, uses: Sequence[Use], compared: bool, held: Iterable[str] = ()) -> None:
        self._uses, self._compared = {use.array: use for use in uses}, compared
        self.pending = dict.fromkeys(self._uses)
        self.held = set(held)
        in_order = sorted(uses, key=lambda use: use.first)
        self.coming = [
            shard
            for shard in dict.fromkeys(s for use in in_order for s in sorted(use.shards))
            if shard not in self.held
        ]

    def forget(self, arrays: Collection[str]) -> None:
        """Take arrays for converted, as an earlier run has them; shards that only they need are not fetched."""
        for array in arrays:
            self.pending.pop(array, None)
        self._skip(self._needed(0))

    def is_ready(self, step: int) -> bool:
        """Whether the arrays of all steps up to this one are converted and, if compared, this step's can be read."""
        if any(self._uses[array].first <= step for array in self.pending):
            return False
        return not self._compared or all(
            use.shards <= self.held for use in self._uses.values() if use.first <= step <= use.last
        )

    def fetched(self, shard: str) -> None:
        """Note that a shard is there."""
        self.held.add(shard)
        if shard in self.coming:
            self.coming.remove(shard)

    def take_ready(self) -> list[str]:
        """The arrays that can be converted now; they are taken for converted from here on."""
        ready = [array for array in self.pending if self._uses[array].shards <= self.held]
        for array in ready:
            del self.pending[array]
        return ready

    def release(self, step: int) -> list[str]:
        """The held shards that nothing from this step on needs; they are not held any more."""
        needed = self._needed(step)
        spent = sorted(self.held - needed)
        self.held -= set(spent)
        self._skip(needed)
        return spent

    def _skip(self, needed: set[str]) -> None:
        self.coming = [shard for shard in self.coming if shard in needed]

    def _needed(self, step: int) -> set[str]:
        return {
            shard
            for use in self._uses.values()
            if use.array in self.pending or (self._compared and use.last >= step)
            for shard in use.shards
        }

    def peak(self, sizes: Mapping[str, int], ahead: int, begun: Mapping[str, int] | None = None) -> int:
        """The most bytes of shards and converted arrays that are on the disk at a time.

        Args:
            sizes: the bytes of each shard.
            ahead: how many shards are fetched while others are converted.
            begun: the bytes of shards to come that an earlier run has fetched: they stay until the rest is fetched.
        """
        plan, most, begun = copy.deepcopy(self), 0, begun or {}
        steps = sorted({use.first for use in self._uses.values()} | {use.last for use in self._uses.values()})
        written = sum(use.nbytes for use in self._uses.values() if use.array not in plan.pending)
        for step in steps if self._compared else steps[-1:]:
            plan.release(step)
            while not plan.is_ready(step):
                if plan.coming:
                    plan.fetched(plan.coming[0])
                written += sum(self._uses[array].nbytes for array in plan.take_ready())
                here = plan.held | set(plan.coming[:ahead])
                waiting = sum(begun.get(shard, 0) for shard in plan.coming if shard not in here)
                most = max(most, written + sum(sizes[shard] for shard in here) + waiting)
                plan.release(step)
        return most
