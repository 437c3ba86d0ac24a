"""Command: ``jllm``, with ``generate``."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from jllm_core.errors import JLLMError

from jllm_runtime.__about__ import __version__
from jllm_runtime.benchmarking.command import bench
from jllm_runtime.chat.command import chat
from jllm_runtime.cli_options import (
    GENERATE_OPTIONS,
    LOADING,
    join_processes,
    load,
    mesh_options,
    pop_options,
    process_options,
    sampling_options,
    sampling_params,
)
from jllm_runtime.disk_cache.command import cache
from jllm_runtime.errors import RequestError
from jllm_runtime.planner.command import plan
from jllm_runtime.server.command import serve

if TYPE_CHECKING:
    from jllm_runtime.model import Model
    from jllm_runtime.outputs import GenerationOutput
    from jllm_runtime.sampling import SamplingParams


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jllm")
def cli() -> None:
    """Run Qwen3 and Llama models in JAX, on CPU, GPU or TPU.

    MODEL is a folder that `jllm-convert convert` made or, with jllm-convert installed, a Hugging Face folder or a .gguf
    file.
    """
    # orbax and XLA log internals as warnings.
    logging.getLogger("absl").setLevel(logging.ERROR)


cli.add_command(bench)
cli.add_command(cache)
cli.add_command(chat)
cli.add_command(plan)
cli.add_command(serve)


@cli.command()
@click.argument("model")
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from this file (UTF-8).")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Pass the prompt to the model as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with token ids and timings.")
@sampling_options
@mesh_options
@process_options
def generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt."""
    text = _prompt_text(prompt, prompt_file)
    if raw and system is not None:
        raise click.UsageError("--system is part of a conversation, and --raw means there is none")
    loading, running = pop_options(options, LOADING), pop_options(options, GENERATE_OPTIONS)
    peers = join_processes(loading)

    from jllm_runtime.distributed.processes import output_of_first, run_together

    def answer() -> None:
        # Before the model is loaded, which may print. Only the first process has the output.
        printed_to = output_of_first()
        loaded, load_s = load(model, loading)
        source: str | list[int] = text if raw else _encode_chat(loaded, _conversation(system, text))
        _answer(loaded, load_s, source, sampling_params(loaded, options), running, as_json, printed_to)

    run_together(answer, peers)


def _answer(
    model: "Model",
    load_s: float,
    prompt: str | list[int],
    params: "SamplingParams",
    running: dict[str, Any],
    as_json: bool,
    to: TextIO | None,
) -> None:
    """Generate and print. ``to`` is None in processes other than the first one, which compute and print nothing."""
    from jllm_runtime.generation import generate as generate_all
    from jllm_runtime.generation import stream_generate

    if as_json:
        output = _as_json(generate_all(model, prompt, params, **running)[0], load_s)
        if to is not None:
            click.echo(json.dumps(output, ensure_ascii=False), file=to)
        return
    last = None
    for piece in stream_generate(model, prompt, params, **running):
        if to is not None:
            click.echo(piece.text, nl=False, file=to)
            to.flush()
        last = piece.output
    if to is not None and last is not None:
        click.echo(file=to)
        click.echo(_summary(last, load_s), err=True)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with --prompt TEXT or with --prompt-file FILE, one of the two")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the prompt file {prompt_file} cannot be read: {error}") from error
    if not prompt:
        raise RequestError(f"the prompt{f' in {prompt_file}' if prompt_file else ''} is empty")
    return prompt


def _conversation(system: str | None, text: str) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def _encode_chat(model: "Model", messages: list[dict[str, str]]) -> list[int]:
    if model.tokenizer is None:
        raise RequestError("the model has no tokenizer, so it takes no texts; use the library with token ids")
    return model.tokenizer.encode_chat(messages)


def _as_json(output: "GenerationOutput", load_s: float) -> dict[str, Any]:
    timings = output.timings
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_token_ids": output.prompt_token_ids,
        "finish_reason": output.finish_reason,
        "timings": {
            "load_s": load_s,
            "compile_s": timings.compile_s,
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }


def _summary(output: "GenerationOutput", load_s: float) -> str:
    timings = output.timings
    return (
        f"[load {load_s:.1f} s, compile {timings.compile_s:.1f} s, "
        f"prefill {len(output.prompt_token_ids)} tokens at {timings.prefill_tokens_per_s:.0f}/s, "
        f"decode {len(output.token_ids)} tokens at {timings.decode_tokens_per_s:.1f}/s, {output.finish_reason}]"
    )


def main() -> None:
    """Run the command. The exit code is 2 after bad input, with a message, and 130 after Ctrl-C."""
    try:
        # click would end Ctrl-C with exit code 1 and bad input of ours with a traceback.
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
