"""The command ``jllm-convert``."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from jllm_core.errors import JLLMError

from jllm_convert.__about__ import __version__

if TYPE_CHECKING:
    from jllm_convert.conversion import Progress


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jllm-convert")
def cli() -> None:
    """Hugging Face weights (safetensors, GGUF) to a JAX checkpoint, without torch."""
    # orbax tells of its inner workings at warning level.
    logging.getLogger("absl").setLevel(logging.ERROR)


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Element type of the weights. 'keep' leaves bfloat16 as it is and makes float32 of everything else.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Store the weight matrices in so many bits, and measure what that does to the model's predictions.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Inputs that share a scale  [default: all for int8, 32 for int4, or as the source has them]",
)
@click.option("--offsets", is_flag=True, help="Give each group of int4 an offset: half a bit a weight more, and finer.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is at DST.")
def convert(
    src: str, dst: str, dtype: str, quantize: str | None, group: str | None, offsets: bool, overwrite: bool
) -> None:
    """Convert SRC, a Hugging Face folder or a .gguf file, to the checkpoint folder DST."""
    from jllm_convert import conversion

    with progress_bar("converting") as on_progress:
        result = conversion.convert(
            src,
            dst,
            dtype,
            quantize,
            overwrite,
            group=None if group is None else int(group),
            offsets=offsets,
            on_progress=on_progress,
        )
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    arrays = len(result.manifest.arrays)
    stored = result.manifest.quantization
    kind = result.manifest.dtype if stored is None else f"{stored.name} and {result.manifest.dtype}"
    click.echo(f"{result.path}: {arrays} arrays, {kind}, {result.config.model_type}")
    if result.receipt is not None:
        click.echo(f"receipt: {result.receipt}")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[["Progress"], None] | None]:
    """A callback that draws a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda progress: bar.update(task, completed=progress.nbytes, total=progress.total_nbytes)


def main() -> None:
    """Run the command; bad input ends it with a message and exit code 2, Ctrl-C with 130."""
    try:
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except JLLMError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
