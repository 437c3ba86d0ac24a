"""Progress bars, on a terminal or in a notebook."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jllm_convert.writing.progress import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

OnProgress = Callable[[Progress], None]


def can_draw() -> bool:
    """Whether somebody watches: standard error is a terminal, or this is a notebook."""
    if sys.stderr.isatty():
        return True
    # Only where IPython runs is it worth the import.
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


@contextlib.contextmanager
def progress_bar(title: str, draw: bool | None = None) -> Iterator[OnProgress | None]:
    """Draw a progress bar on standard error, or in a notebook's cell, while the block runs: one for each step.

    Args:
        title: what is shown until the first step is reported, and for steps without a name.
        draw: whether to draw; None draws where somebody watches.

    Yields:
        The callback to report progress to; None where nothing is drawn.
    """
    if not (can_draw() if draw is None else draw):
        yield None
        return
    # Imported only where a bar is drawn.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    # Titles have names of files in them, which are no markup.
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        first = bar.add_task(title, total=None)
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            step = progress.step or title
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=None) if tasks else first
            done, total = progress.nbytes, progress.total_nbytes
            bar.update(tasks[step], description=step, completed=done, total=total)

        yield show


@contextlib.contextmanager
def reporting(title: str, progress: bool, on_progress: OnProgress | None) -> Iterator[OnProgress | None]:
    """Report to a bar where ``progress`` asks for one, and to the caller's own callback.

    Yields:
        The callback to report progress to; None where nobody wants to know.
    """
    if not progress:
        yield on_progress
        return
    with progress_bar(title, draw=True) as show:

        def both(state: Progress) -> None:
            if show is not None:
                show(state)
            if on_progress is not None:
                on_progress(state)

        yield both
