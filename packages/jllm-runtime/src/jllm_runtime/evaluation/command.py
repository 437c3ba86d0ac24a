"""Command: ``jllm eval``."""

import json
from pathlib import Path
from typing import Any

import click
from jllm_core.errors import reason

from jllm_runtime.cli_options import ACTIVATIONS, DTYPES, NO_CACHE, load, mesh_options
from jllm_runtime.errors import RequestError, check_text


@click.command("eval")
@click.argument("model")
@click.option(
    "--text",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    help="The text, a file (UTF-8); - is standard input.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most tokens that a token is predicted from  [default: 2048, or the model's context]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens from one window to the next; a smaller one predicts every token from more, and takes longer  "
    "[default: the context]",
)
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type.")
@ACTIVATIONS
@NO_CACHE
@click.option("--no-compile-cache", is_flag=True, help="Do not keep compiled programs on disk.")
@mesh_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def eval_(model: str, file: Path, context: int | None, stride: int | None, as_json: bool, **loading: Any) -> None:
    """Measure how well MODEL predicts a text: its perplexity, and bits a byte.

    The text goes through the model as it is, without a chat template, in windows of --context tokens. Each token but
    the first counts once. Perplexity compares models with the same tokenizer; bits a byte compare any two.
    """
    text = _read(file)
    loaded, load_s = load(model, loading)

    from jllm_runtime.evaluation.perplexity import perplexity
    from jllm_runtime.model_summary import runs_on
    from jllm_runtime.progress import compile_status

    click.echo(f"{model} on {runs_on(loaded)}", err=True)
    with compile_status():
        result = perplexity(loaded, text, context, stride)
    if as_json:
        click.echo(json.dumps({"model": model, **result.as_dict(), "load_s": load_s, "backend": loaded.backend.name}))
    else:
        click.echo(str(result))


def _read(file: Path) -> str:
    name = "the text from standard input" if str(file) == "-" else f"the text {file}"
    try:
        # Bytes, for a text is measured as it is: no line break is made another one.
        with click.open_file(str(file), "rb") as stream:
            text = str(stream.read(), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{name} cannot be read: {reason(error)}") from error
    if not text:
        raise RequestError(f"{name} is empty")
    check_text(text, name)
    return text
