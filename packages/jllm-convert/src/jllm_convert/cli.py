"""Command line of ``jllm-convert``: download, convert, inspect, verify, export."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import click
from jllm_core import console
from jllm_core.device_errors import device_errors
from jllm_core.errors import JLLMError

from jllm_convert.__about__ import __version__
from jllm_convert.progress_bar import progress_bar


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
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


_DESTINATIONS = (
    *(
        "--out-dir",
        "--outdir",
        "--output-dir",
        "--output",
        "--out",
        "--outfile",
        "--local-dir",
        "--dst",
        "--dest",
        "-o",
    ),
)
_ELSEWHERE = {
    **dict.fromkeys(("--bits", "--outtype", "--q", "-q"), "--quantize"),
    **dict.fromkeys(("--force", "-f", "--replace"), "--overwrite"),
    **dict.fromkeys(("--torch-dtype", "--precision"), "--dtype"),
    **dict.fromkeys(("--branch", "--commit"), "--revision"),
    **dict.fromkeys(_DESTINATIONS, "--dest"),
}
"""Options of other tools, by what they are called here."""


class Command(click.Command):
    """Command that knows what other tools call its options and its destination."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            name, ours = error.option_name, _ELSEWHERE.get(error.option_name)
            if ours is not None and any(ours in parameter.opts for parameter in self.params):
                raise click.UsageError(f"No such option '{name}'. Did you mean '{ours}'?", context) from None
            arguments = [each.make_metavar(context) for each in self.params if isinstance(each, click.Argument)]
            if name not in _DESTINATIONS or len(arguments) < 2:
                raise
            raise click.UsageError(
                f"No such option '{name}'. The destination is the second argument: "
                f"{context.command_path} {' '.join(arguments)}",
                context,
            ) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jllm-convert")
def cli() -> None:
    """Convert Hugging Face weights (safetensors, GGUF) to a JAX checkpoint and back, without torch.

    Exit codes: 0 when all is well; 1 when a check found something wrong, or what is good could not be done (a full
    disk, a hub that does not answer); 2 for bad input, with a message; 130 after Ctrl-C; 141 when nobody reads the
    output any more.
    """
    # orbax logs details of its own work at warning level.
    logging.getLogger("absl").setLevel(logging.ERROR)


MEMORY = click.option(
    "--memory",
    type=SizeType(),
    default="256MiB",
    show_default=True,
    help="Bytes of weights to hold in memory at a time; the libraries take 150 to 350 MiB besides.",
)

IGNORE_FIELDS = click.option(
    "--ignore-field",
    "ignore_fields",
    multiple=True,
    metavar="NAME",
    help="Field of config.json (or GGUF metadata) that is not known and does not change the output; may be repeated.",
)


@cli.command(cls=Command, short_help="Download a model of the hub.")
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


@cli.command(cls=Command, short_help="Convert a model to a checkpoint.")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Element type of the weights. 'keep' keeps bfloat16 and converts everything else to float32; float16 is for "
    "GPUs without bfloat16 (T4).",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Store the weight matrices in 8 or 4 bits, and measure the effect on the model's predictions.",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Inputs that share a scale; 32 loses least, GPUs and TPU v2 like 128  "
    "[default: all for int8, 32 for int4, or as the source has them]",
)
@click.option("--offsets", is_flag=True, help="Give each group of int4 an offset: finer, half a bit more per weight.")
@click.option(
    "--embedding",
    type=click.Choice(["keep", "int8"]),
    default="keep",
    show_default=True,
    help="With --quantize: 'int8' stores the embedding in 8 bits too, with a scale for each row.",
)
@click.option(
    "--receipt/--no-receipt", default=True, help="Measure what quantising (or float16) does  [default: --receipt]"
)
@click.option(
    "--adapter", metavar="DIR", help="Merge this LoRA, a folder of PEFT (adapter_config.json), into the weights."
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is at DST.")
@click.option("--exist-ok", is_flag=True, help="Do nothing where DST is this conversion already.")
@click.option("--revision", help="Branch, tag or commit, where SRC is a model on the hub  [default: main]")
@click.option(
    "--stream-from-hub",
    is_flag=True,
    help="Convert a model on the hub while it is downloaded, and delete each of its files when it is used: the disk "
    "holds the checkpoint and a file or two.",
)
@IGNORE_FIELDS
@click.option(
    "--allow-nonfinite", is_flag=True, help="Take weights (in float16: activations) that are NaN or infinite."
)
@MEMORY
def convert(src: str, dst: str, group: str | None, **options: Any) -> None:
    """Convert SRC to the checkpoint folder DST.

    SRC is a Hugging Face folder, a .gguf file, a model's name on the hub, or a checkpoint to quantise, to store in
    another type or to merge an adapter into.
    An interrupted conversion is resumed.
    """
    from jllm_convert import conversion

    with progress_bar("converting") as show:
        options["group"] = None if group is None else int(group)
        result = conversion.convert(src, dst, on_progress=show, **options)
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if result.receipt is not None:
        click.echo(f"receipt: {result.receipt}")
    click.echo(f"{result}{'' if result.is_new else ' (it was there)'}")


@cli.command(cls=Command, short_help="Show what a model holds.")
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--diagram",
    "as_diagram",
    is_flag=True,
    help="Print the tree of its weights, with shapes and shardings, as a Mermaid flowchart; config.json will do.",
)
@IGNORE_FIELDS
def inspect(path: str, tensors: bool, as_json: bool, as_diagram: bool, ignore_fields: tuple[str, ...]) -> None:
    """Show what PATH holds, and the problems that prevent a conversion.

    PATH is a Hugging Face folder, a .gguf file or a checkpoint. Only headers are read.
    """
    from jllm_convert import inspection

    if as_diagram:
        if tensors or as_json:
            raise click.UsageError("--diagram is a form of its own; leave out --tensors and --json")
        click.echo(inspection.diagram(path, ignore_fields))
        return
    result = inspection.inspect(path, ignore_fields)
    click.echo(json.dumps(result.as_dict(), indent=2) if as_json else result.text(tensors))


@cli.command(cls=Command, short_help="Verify a checkpoint.")
@click.argument("path")
@click.option("--against", metavar="SRC", help="The source of the conversion: compare every value with it.")
@click.option("--adapter", metavar="DIR", help="With --against: the adapter that was merged.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@MEMORY
@click.pass_context
def verify(
    context: click.Context, path: str, against: str | None, adapter: str | None, as_json: bool, memory: int
) -> None:
    """Verify the checkpoint PATH: all of its checksums and hashes. Exit code 1 if anything is wrong."""
    from jllm_convert import verification

    with progress_bar("verifying") as show:
        result = verification.verify(path, against, adapter=adapter, memory=memory, on_progress=show)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        for damage in result.damages:
            click.echo(f"{path}: {damage.problem}", err=True)
        click.echo(str(result))
    if not result.ok:
        context.exit(1)


@cli.command(cls=Command, short_help="Export a checkpoint to Hugging Face's form.")
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
    click.echo(str(result))


def main() -> None:
    """Run the command, and leave with an exit code: see the help of ``cli``."""
    console.write_any_letter()
    with console.leave_where_unwritable():
        _run()


def _run() -> None:
    try:
        with console.interrupts(), device_errors():
            # Not standalone: click would print exceptions and choose exit codes itself.
            code = cli(standalone_mode=False)
        # Here, where an error is still told; at Python's end it would be a traceback.
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        click.echo("Stopped.", err=True)
        # click raises Abort from the KeyboardInterrupt, which has the notes.
        _print_notes(error.__cause__ or error)
        sys.exit(console.STOPPED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except JLLMError as error:
        click.echo(f"Error: {error}", err=True)
        _print_notes(error)
        sys.exit(error.exit_code)
    # Nobody reads, as after `jllm-convert inspect ... | head`. Not standalone, click leaves by itself only then.
    except SystemExit as end:
        raise console.ClosedPipe from end
    if code:
        sys.exit(code)


def _print_notes(error: BaseException) -> None:
    """Print the notes of an error: that finished work is kept, and where."""
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


if __name__ == "__main__":
    main()
