"""Progress bar on a terminal or in a notebook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jllm_runtime.progress import StatusLine, is_notebook, is_shown, watch_compilation


@contextmanager
def progress_bar(title: str, total: int, progress: bool | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error while the block runs. It says so where programs are compiled meanwhile.

    Args:
        title: what is done.
        total: number of things to do.
        progress: as ``is_shown`` has it.

    Returns:
        A function to be called when one of them is done.
    """
    if not is_shown(progress):
        yield lambda: None
    elif is_notebook():
        # rich draws there with ipywidgets only, which few have installed.
        line, done = StatusLine(), 0

        def advance() -> None:
            nonlocal done
            done += 1
            line.show(f"{title}: {done} of {total}")

        line.show(f"{title}: 0 of {total}")
        with watch_compilation(lambda _: line.show("Compiling ..."), lambda: line.show(f"{title}: {done} of {total}")):
            try:
                yield advance
            finally:
                line.erase()
    else:
        # Imported here: a server never shows a bar, and rich takes a while.
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            with watch_compilation(
                lambda _: bar.update(task, description="Compiling"), lambda: bar.update(task, description=title)
            ):
                yield lambda: bar.advance(task)
