"""Delivery of a source on the hub, one shard after the other."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from jllm_core.config import ModelConfig

from jllm_convert.errors import DestinationError
from jllm_convert.files.disk_space import free_space, stored_under
from jllm_convert.matching.rules import Match
from jllm_convert.shards.hub_source import HubSource, shards_of
from jllm_convert.shards.schedule import Schedule, Use
from jllm_convert.writing import partial_checkpoint
from jllm_convert.writing.plan import ConversionPlan
from jllm_convert.writing.progress import Progress, ProgressCounter
from jllm_convert.writing.tensor_jobs import stored_nbytes
from jllm_convert.writing.writer import ArrayWriter

HUB_FOLDER = "hub"
"""Folder of the source's files in a partial checkpoint."""
STEP = "from the hub"
"""The name of the step in ``Progress``: bytes are those that come from the hub, arrays those that are written."""


class ShardByShard:
    """Delivery that fetches a shard, writes the arrays that it completes, and deletes it.

    While arrays are written the next shard comes, where the disk has room for it.

    Args:
        source: the model on the hub. The checkpoint's name is locked: its files are beside the checkpoint's.
    """

    kept = HUB_FOLDER

    def __init__(self, source: HubSource) -> None:
        self.source, self._shards = source, source.shards
        self._ahead, self._step = 0, -1

    def locked(self, dst: Path, wait: bool) -> AbstractContextManager[None]:
        """Nothing to lock any more."""
        return nullcontext()

    def check_space(self, dst: Path, plan: ConversionPlan, compared: bool) -> None:
        """Refuse a conversion that the disk has no room for, at its fullest."""
        self._ahead = check_streamed_space(dst, self.source, plan, compared)

    def handed_over(self) -> AbstractContextManager[None]:
        """Hand the downloaded files over to the block that renames the folder that they are in."""
        return self.source.handed_over()

    def start(
        self,
        writer: ArrayWriter,
        plan: ConversionPlan,
        compared: bool,
        report: Callable[[Progress], None] | None,
        check: Callable[[], None],
    ) -> None:
        """Start, or go on after an interrupted run: keep what is written, and delete what nothing needs any more.

        The writer's counter reports the bytes of the download beside the arrays; ``check`` is called after the arrays
        of each shard.
        """
        self._writer, self._check, self._last = writer, check, plan.config.num_layers + 1
        self._jobs = {job.array: job for job in plan.jobs}
        self._uses = {use.array: use for use in uses_of(plan)}
        self._schedule = Schedule(list(self._uses.values()), compared, self._shards.here)
        # Damaged arrays are not kept: they are made again in their turn, and what they need is fetched again.
        kept = writer.keep(list(self._jobs.values()))
        self._schedule.forget(kept)
        self._release(0)
        nbytes = sum(self._shards.sizes[shard] for shard in self._schedule.coming)
        both = ProgressCounter(len(self._jobs), nbytes, report, STEP)
        self._shards.count, writer.counter = both.add, ArraysOnly(both)
        writer.counter.add(0, len(kept))

    def ready(self, name: str) -> None:
        """Convert what comes before an array in the forward pass, and the array."""
        array = name if name in self._uses else name.rpartition(".")[0]
        # Not back: an embedding that is the head too is asked for at the beginning and at the end. And only once:
        # each slab of a matrix is asked for by itself.
        if self._uses[array].first > self._step:
            self._advance(self._uses[array].first)

    def receipt_report(self, report: Callable[[Progress], None] | None) -> None:
        """Nothing: the receipt is measured while the shards come, and how far that is the download says."""

    def finish(self) -> None:
        """Convert all that is left, and delete the source's files."""
        self._advance(self._last)
        self.source.remove()

    def _advance(self, step: int) -> None:
        self._step = step
        self._release(step)
        while not self._schedule.is_ready(step):
            if self._schedule.coming:
                shard, *others = self._schedule.coming
                self._shards.begin(shard)
                self._shards.ensure(shard)
                self._schedule.fetched(shard)
                for other in others[: self._ahead]:
                    self._shards.begin(other)
            self._writer.write([self._jobs[array] for array in self._schedule.take_ready()])
            self._check()
            self._release(step)

    def _release(self, step: int) -> None:
        self._schedule.release(step)
        # What comes ahead may be here already.
        for shard in self._shards.here - self._schedule.held - set(self._schedule.coming[: self._ahead]):
            self._shards.release(shard)


class ArraysOnly:
    """Counter of arrays for a conversion whose bytes are those of the download."""

    def __init__(self, counter: ProgressCounter) -> None:
        self._counter = counter

    def add(self, nbytes: int, arrays: int = 0) -> None:
        """Count arrays that are complete now."""
        if arrays:
            self._counter.add(0, arrays)


def uses_of(plan: ConversionPlan) -> list[Use]:
    """The shards that each array of a plan needs, and when."""
    return [_use(match, stored_nbytes([job]), plan.config) for match, job in zip(plan.matches, plan.jobs, strict=True)]


def _use(match: Match, nbytes: int, config: ModelConfig) -> Use:
    head = config.num_layers + 1
    if match.array == "embedding":
        first, last = 0, head if config.tie_embeddings else 0
    elif match.array.startswith("layers."):
        first = last = int(match.array.split(".")[1]) + 1
    else:
        first = last = head
    shards = frozenset(shard for part in match.parts for shard in shards_of(part.tensor))
    return Use(match.array, shards, first, last, nbytes)


def check_streamed_space(dst: Path, source: HubSource, plan: ConversionPlan, compared: bool) -> int:
    """Refuse a conversion that the disk has no room for, at its fullest. An interrupted one's files count as room.

    Args:
        dst: the checkpoint's name.
        source: the model on the hub.
        plan: how it is converted.
        compared: as ``ShardByShard`` has it.

    Returns:
        How many shards may be fetched while others are converted: 1 where there is room, else 0.

    Raises:
        DestinationError: there is no room; the message has the numbers.
    """
    uses, sizes, begun = uses_of(plan), source.shards.sizes, source.shards.begun()
    folder = partial_checkpoint.partial_folder(dst)
    done = partial_checkpoint.finished(folder, plan.fingerprint(source))
    # Small files lie there twice: as the hub has them, and in the checkpoint.
    beside = 2 * source.small_nbytes

    def needs(compared: bool, ahead: int) -> int:
        schedule = Schedule(uses, compared, source.shards.here)
        schedule.forget(done)
        return schedule.peak(sizes, ahead, begun) + beside

    parent, free = free_space(dst.absolute().parent)
    free += stored_under(folder)
    for ahead in (1, 0):
        needed = needs(compared, ahead)
        if needed <= free:
            return ahead
    stored, needed_shards = stored_nbytes(plan.jobs), {shard for use in uses for shard in use.shards}
    largest = max(sizes[shard] for shard in needed_shards)
    without = needs(compared=False, ahead=0)
    advice = (
        f"; without the receipt (--no-receipt) {without:,} bytes are enough" if compared and without <= free else ""
    )
    raise DestinationError(
        f"{dst} needs {needed:,} bytes at its fullest: up to {stored:,} of the checkpoint, and beside it the files of "
        f"the source that are in use ({len(needed_shards)} in all, the largest of {largest:,} bytes). {parent} has "
        f"{free:,} free; make room, or convert to another disk{advice}"
    )
