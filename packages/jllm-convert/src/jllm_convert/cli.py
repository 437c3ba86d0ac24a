"""Command line of ``jllm-convert``: download, convert, inspect, verify, export."""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from jllm_core.errors import JLLMError

from jllm_convert.__about__ import __version__

if TYPE_CHECKING:
    from jllm_convert.writing.progress import Progress


class SizeType(click.ParamType[int]):
    """Click parameter type: a number of bytes, such as ``256MiB``, ``5GB`` or ``1000000``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kmgt]?)(i?)b)?", value.strip().lower())
        if match is None:
            self.fail(
                f"{value!r} is not a size; expected a number of bytes, such as 1000000, 256MiB or 5GB", param, context
            )
        number, prefix, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jllm-convert")
def cli() -> None:
    """Hugging Face weights (safetensors, GGUF) to a JAX checkpoint and back, without torch."""
    # orbax logs details of its own work at warning level.
    logging.getLogger("absl").setLevel(logging.ERROR)


MEMORY = click.option(
    "--memory",
    type=SizeType(),
    default="256MiB",
    show_default=True,
    help="Bytes of weights to hold in memory at a time; the libraries take 200 MiB besides.",
)


@cli.command()
@click.argument("model_id", metavar="ID")
@click.option("--dest", type=click.Path(path_type=Path), help="Folder to put the files in  [default: the hub's cache]")
@click.option("--revision", help="Branch, tag or commit  [default: main]")
def download(model_id: str, dest: Path | None, revision: str | None) -> None:
    """Download ID, a model of the Hugging Face hub: owner/name, or owner/name/file.gguf.

    Only the files that a conversion reads are downloaded, all of one commit. An interrupted download is resumed.
    """
    # In all commands, heavy modules are imported here, so that --help does not wait for JAX.
    from jllm_convert.hub import downloading
    from jllm_convert.writing.progress import byte_progress

    with progress_bar(f"downloading {model_id}") as show:
        click.echo(downloading.download(model_id, dest, revision, on_progress=byte_progress(show)))


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16"]),
    default="keep",
    show_default=True,
    help="Element type of the weights. 'keep' keeps bfloat16 and converts everything else to float32.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Store the weight matrices in 8 or 4 bits, and measure the effect on the model's predictions.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Inputs that share a scale  [default: all for int8, 32 for int4, or as the source has them]",
)
@click.option("--offsets", is_flag=True, help="Give each group of int4 an offset: finer, half a bit more per weight.")
@click.option(
    "--embedding",
    type=click.Choice(["keep", "int8"]),
    default="keep",
    show_default=True,
    help="With --quantize: 'int8' stores the embedding in 8 bits too, with a scale for each row.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is at DST.")
@click.option("--revision", help="Branch, tag or commit, where SRC is a model on the hub  [default: main]")
@MEMORY
def convert(src: str, dst: str, dtype: str, quantize: str | None, group: str | None, **options: Any) -> None:
    """Convert SRC to the checkpoint folder DST.

    SRC is a Hugging Face folder, a .gguf file, a model's name on the hub, or a checkpoint to quantise.
    An interrupted conversion is resumed.
    """
    from jllm_convert import conversion

    with progress_bar("converting") as show:
        result = conversion.convert(
            src, dst, dtype, quantize, group=None if group is None else int(group), on_progress=show, **options
        )
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    arrays = len(result.manifest.arrays)
    stored = result.manifest.quantization
    kind = result.manifest.dtype if stored is None else f"{stored.name} and {result.manifest.dtype}"
    click.echo(f"{result.path}: {arrays} arrays, {kind}, {result.config.model_type}")
    if result.receipt is not None:
        click.echo(f"receipt: {result.receipt}")


@cli.command()
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: str, tensors: bool, as_json: bool) -> None:
    """Show what PATH holds, and the problems that prevent a conversion.

    PATH is a Hugging Face folder, a .gguf file or a checkpoint. Only headers are read.
    """
    from jllm_convert import inspection

    result = inspection.inspect(path)
    click.echo(json.dumps(result.as_dict(), indent=2) if as_json else result.text(tensors))


@cli.command()
@click.argument("path")
@click.option("--against", metavar="SRC", help="The source of the conversion: compare every value with it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@MEMORY
@click.pass_context
def verify(context: click.Context, path: str, against: str | None, as_json: bool, memory: int) -> None:
    """Verify the checkpoint PATH: all of its checksums and hashes. Exit code 1 if anything is wrong."""
    from jllm_convert import verification

    with progress_bar("verifying") as show:
        result = verification.verify(path, against, memory=memory, on_progress=show)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        for damage in result.damages:
            click.echo(f"{path}: {damage.problem}", err=True)
        found = "nothing is wrong" if result.ok else f"{len(result.damages)} problems"
        compared = "" if against is None else f", compared with {against}"
        click.echo(f"{path}: {result.arrays} arrays, {result.nbytes:,} bytes{compared}: {found}")
    if not result.ok:
        context.exit(1)


@cli.command()
@click.argument("checkpoint")
@click.argument("hf_dir")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Element type of the tensors  [default: the source's own]",
)
@click.option("--shard-size", type=SizeType(), default="5GB", show_default=True, help="The most bytes of a file.")
@click.option("--overwrite", is_flag=True, help="Replace the Hugging Face folder that is at HF_DIR.")
@MEMORY
def export(checkpoint: str, hf_dir: str, shard_size: int, **options: Any) -> None:
    """Export CHECKPOINT to HF_DIR, a folder that transformers loads, with the tensors that it was converted from."""
    from jllm_convert.exporting.export import export as export_checkpoint

    with progress_bar("exporting") as show:
        result = export_checkpoint(checkpoint, hf_dir, shard_bytes=shard_size, on_progress=show, **options)
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    files = f"{len(result.files)} file{'s' if len(result.files) > 1 else ''}"
    click.echo(f"{result.path}: {result.tensors} tensors, {result.dtype}, {result.nbytes:,} bytes in {files}")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[["Progress"], None] | None]:
    """Draw a progress bar on standard error while the block runs.

    Yields:
        The callback to report progress to; None where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    # Imported only where a bar is drawn.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda progress: bar.update(task, completed=progress.nbytes, total=progress.total_nbytes)


def main() -> None:
    """Run the command. Bad input prints a message and exits with code 2, Ctrl-C with code 130."""
    try:
        # Not standalone: click would print exceptions and choose exit codes itself.
        code = cli(standalone_mode=False)
        if code:
            sys.exit(code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        click.echo("Stopped.", err=True)
        # click raises Abort from the KeyboardInterrupt, which has the notes.
        _print_notes(error.__cause__ or error)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except JLLMError as error:
        click.echo(f"Error: {error}", err=True)
        _print_notes(error)
        sys.exit(2)


def _print_notes(error: BaseException) -> None:
    """Print the notes of an error: that finished work is kept, and where."""
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


if __name__ == "__main__":
    main()
