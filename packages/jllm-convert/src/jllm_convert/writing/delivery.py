"""Delivery of a source's weights to the writer: all at once, where its files are on this disk."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from jllm_convert.sources.base import Source
from jllm_convert.writing import partial_checkpoint
from jllm_convert.writing.destination import check_space
from jllm_convert.writing.plan import ConversionPlan
from jllm_convert.writing.progress import Progress, ProgressCounter
from jllm_convert.writing.tensor_jobs import stored_nbytes
from jllm_convert.writing.writer import ArrayWriter

Report = Callable[[Progress], None]


class Delivery(Protocol):
    """How the weights of an open source come to the writer of a checkpoint."""

    kept: str
    """Entry of the partial checkpoint's folder that holds the source's own files, or nothing."""

    @property
    def source(self) -> Source:
        """The source."""
        ...

    def locked(self, dst: Path, wait: bool) -> AbstractContextManager[None]:
        """Lock the checkpoint's name, unless whoever opened the source had to."""
        ...

    def check_space(self, dst: Path, plan: ConversionPlan, compared: bool) -> None:
        """Refuse a conversion that the disk has no room for.

        Args:
            dst: the checkpoint's name.
            plan: how the source is converted.
            compared: whether a receipt compares the source with the checkpoint.

        Raises:
            DestinationError: there is no room.
        """
        ...

    def handed_over(self) -> AbstractContextManager[None]:
        """Hand the source's files over to the block that writes the checkpoint."""
        ...

    def start(
        self,
        writer: ArrayWriter,
        plan: ConversionPlan,
        compared: bool,
        report: Report | None,
        check: Callable[[], None],
    ) -> None:
        """Write what can be written before anything is compared.

        Args:
            writer: writes the arrays; gets a counter.
            plan: how the source is converted.
            compared: whether each array is asked for (``ready``) afterwards, in the order of the forward pass.
            report: called with the progress.
            check: called when arrays are written; may raise.
        """
        ...

    def ready(self, name: str) -> None:
        """Return when an array (or a stored part of it, such as its scales) can be compared with the source."""
        ...

    def receipt_report(self, report: Report | None) -> Report | None:
        """What the receipt reports its progress to."""
        ...

    def finish(self) -> None:
        """Write all that is left. Nothing is read from the source afterwards."""
        ...


class LocalDelivery:
    """Delivery from files on this disk."""

    kept = ""

    def __init__(self, source: Source) -> None:
        self.source = source

    def locked(self, dst: Path, wait: bool) -> AbstractContextManager[None]:
        """Lock the checkpoint's name."""
        return partial_checkpoint.locked(dst, wait=wait)

    def check_space(self, dst: Path, plan: ConversionPlan, compared: bool) -> None:
        """Refuse a checkpoint that the disk has no room for."""
        check_space(dst, plan.jobs)

    def handed_over(self) -> AbstractContextManager[None]:
        """Nothing to hand over: the files are the user's."""
        return nullcontext()

    def start(
        self,
        writer: ArrayWriter,
        plan: ConversionPlan,
        compared: bool,
        report: Report | None,
        check: Callable[[], None],
    ) -> None:
        """Write all arrays."""
        writer.counter = ProgressCounter(len(plan.jobs), stored_nbytes(plan.jobs), report, "converting")
        writer.write(plan.jobs)
        check()

    def ready(self, name: str) -> None:
        """Return: every array is written."""

    def receipt_report(self, report: Report | None) -> Report | None:
        """The report itself: measuring is a step of its own."""
        return report

    def finish(self) -> None:
        """Nothing is left."""
