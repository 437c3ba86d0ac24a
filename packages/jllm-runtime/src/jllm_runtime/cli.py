"""Command: ``jllm``, with ``generate``."""

import dataclasses
import inspect
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from jllm_core import console
from jllm_core.device_errors import device_errors
from jllm_core.errors import JLLMError, reason

from jllm_runtime.__about__ import __version__
from jllm_runtime.benchmarking.command import bench
from jllm_runtime.chat.command import chat
from jllm_runtime.cli_options import (
    GENERATE_OPTIONS,
    LOADING,
    TEMPLATE_OPTIONS,
    check_sampling,
    join_processes,
    load,
    mesh_options,
    pop_options,
    process_options,
    sampling_options,
    sampling_params,
    template_options,
    template_variables,
)
from jllm_runtime.compile_command import compile_
from jllm_runtime.disk_cache.command import cache
from jllm_runtime.errors import RequestError, check_text
from jllm_runtime.evaluation.command import eval_
from jllm_runtime.planner.command import plan
from jllm_runtime.server.command import serve

if TYPE_CHECKING:
    from jllm_runtime.model import Model
    from jllm_runtime.outputs import GenerationOutput, Piece
    from jllm_runtime.reasoning import ReasoningParser
    from jllm_runtime.sampling import SamplingParams

FROM_STDIN = "-"
"""The prompt, or the name of its file, that stands for standard input."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 a plan that does not fit, or a run that could not go on (a taken port, a full disk, a lost "
    "process, a hub that does not answer); 2 bad input; 130 Ctrl-C; 141 nobody reads the output any more."
)


ELSEWHERE = {
    "run": "`jllm generate` or `jllm chat`",
    "download": "`jllm-convert download`",
    "convert": "`jllm-convert convert`",
    "quantize": "`jllm-convert convert --quantize`",
    "verify": "`jllm-convert verify`",
    "inspect": "`jllm-convert inspect`",
    "export": "`jllm-convert export`",
}
"""Commands that somebody may look for here, and what does it."""


PROMPT_GOES = {
    "generate": "The prompt goes with --prompt TEXT.",
    "chat": "Messages are typed once it runs; `jllm generate MODEL --prompt TEXT` answers one.",
}
"""Advice for a prompt that is given behind MODEL."""

MODEL_HELP = (
    "MODEL is a folder that `jllm-convert convert` made or, with jllm-convert installed, a Hugging Face folder, a "
    ".gguf file or a name on the hub."
)


class Commands(click.Group):
    """Group of commands. click itself would end a command that nobody reads any more with exit code 1."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the arguments; ``--help`` prints here."""
        with console.closed_pipe():
            return super().make_context(*arguments, **options)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command. Where there is none, name what may have been meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if meant := ELSEWHERE.get(args[0]):
                raise click.UsageError(f"{error.message} Use {meant}.", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Where a prompt stands behind MODEL, say where it belongs."""
        with console.closed_pipe():
            try:
                return super().invoke(ctx)
            except click.UsageError as error:
                command = error.ctx.command.name if error.ctx else None
                if command in PROMPT_GOES and "unexpected extra argument" in error.message:
                    raise click.UsageError(f"{error.message}. {PROMPT_GOES[command]}", error.ctx) from error
                raise


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Run Qwen and Llama models in JAX, on CPU, GPU or TPU.\n\n{MODEL_HELP}",
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="jllm")
def cli() -> None:
    """Run Qwen and Llama models in JAX, on CPU, GPU or TPU."""
    # orbax and XLA log internals as warnings.
    logging.getLogger("absl").setLevel(logging.ERROR)


@cli.command()
@click.argument("model")
@click.option("--prompt", help="The prompt; - reads it from standard input, as a pipe does without this option.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read the prompt from this file (UTF-8); - is standard input.",
)
@click.option("--system", help="A system message before the prompt.")
@click.option("--prefill", metavar="TEXT", help="The beginning of the answer; what is printed goes on from it.")
@click.option("--raw", is_flag=True, help="Pass the prompt to the model as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with token ids, seed and timings.")
@template_options
@sampling_options
@mesh_options
@process_options
def generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    prefill: str | None,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt."""
    text = _prompt_text(prompt, prompt_file)
    loading, running = pop_options(options, LOADING), pop_options(options, GENERATE_OPTIONS)
    variables = template_variables(pop_options(options, TEMPLATE_OPTIONS))
    if system is not None:
        check_text(system, "the system message")
    if prefill is not None:
        check_text(prefill, "the prefill")
        if not prefill:
            raise click.UsageError("--prefill is empty; leave it out, or give the text that the answer begins with")
    for name, given in (("--system", system), ("--prefill", prefill)):
        if raw and given is not None:
            raise click.UsageError(f"{name} is part of a conversation, and --raw means there is none")
    if raw and variables:
        raise click.UsageError("--think and --template-var are for the chat template, and --raw means there is none")
    check_sampling(options)
    peers = join_processes(loading)

    from jllm_runtime.distributed.processes import output_of_first, run_together
    from jllm_runtime.model_summary import runs_on
    from jllm_runtime.sampling import draw_seed

    def answer() -> None:
        # Before the model is loaded, which may print. Only the first process has the output.
        printed_to = output_of_first()
        loaded, load_s = load(model, loading)
        if printed_to is not None:
            click.echo(f"{model} on {runs_on(loaded)}", err=True)
        params = sampling_params(loaded, options, None if raw else variables)
        if params.seed is None:
            # Drawn here, so that it can be told.
            params = dataclasses.replace(params, seed=draw_seed())
        source: str | list[int] = text
        thinking: ReasoningParser | None = None
        if not raw:
            source, thinking = _encode_chat(loaded, _conversation(system, text), variables, prefill)
        _answer(loaded, load_s, source, params, running, thinking, as_json, printed_to)

    run_together(answer, peers)


for _command in (bench, cache, chat, compile_, eval_, plan, serve):
    cli.add_command(_command)
for _command in cli.commands.values():
    # Else click cuts it off at the width of its column.
    _command.short_help = re.split(r"(?<=[.])\s", _command.help or "", maxsplit=1)[0]
    if any(_parameter.name == "model" for _parameter in _command.params):
        _command.help = f"{inspect.cleandoc(_command.help or '')}\n\n{MODEL_HELP}"


def _answer(
    model: "Model",
    load_s: float,
    prompt: str | list[int],
    params: "SamplingParams",
    running: dict[str, Any],
    thinking: "ReasoningParser | None",
    as_json: bool,
    to: TextIO | None,
) -> None:
    """Generate and print. ``to`` is None in processes other than the first one, which compute and print nothing."""
    from jllm_runtime.generation import generate as generate_all
    from jllm_runtime.generation import stream_generate

    if as_json:
        output = _as_json(generate_all(model, prompt, params, **running)[0], params, model, thinking, load_s)
        if to is not None:
            click.echo(json.dumps(output, ensure_ascii=not console.has_all_letters(to)), file=to)
        return
    last = None
    # A program that reads the output gets the text as the model writes it.
    dimmed = thinking if to is not None and to.isatty() else None
    for piece, text in _shown(stream_generate(model, prompt, params, **running), dimmed):
        if to is not None:
            click.echo(text, nl=False, file=to)
            to.flush()
        last = piece.output
    if to is not None and last is not None:
        click.echo(file=to)
        click.echo(_summary(last, params, model, load_s), err=True)


def _shown(pieces: "Iterator[Piece]", thinking: "ReasoningParser | None") -> "Iterator[tuple[Piece, str]]":
    """The pieces with the text that is shown of each: thinking in a fainter colour, and a blank line behind it."""
    has_thought = False
    for piece in pieces:
        if thinking is None:
            yield piece, piece.text
            continue
        thought, said = thinking.feed(piece.text)
        if piece.output is not None:
            ends = thinking.finish()
            thought, said = thought + ends[0], said + ends[1]
        has_thought = has_thought or bool(thought)
        gap = "\n\n" if said and has_thought else ""
        has_thought = has_thought and not said
        yield piece, (click.style(thought, dim=True) if thought else "") + gap + said


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give the prompt with --prompt TEXT or with --prompt-file FILE, one of the two")
    is_missing = prompt is None and prompt_file is None
    if is_missing and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("give the prompt with --prompt TEXT or with --prompt-file FILE, or pipe it in")
    name = "the prompt"
    try:
        if is_missing or FROM_STDIN in (prompt, str(prompt_file)):
            name = "the prompt from standard input"
            prompt = _read_stdin()
        elif prompt_file is not None:
            name = f"the prompt file {prompt_file}"
            prompt = prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{name} cannot be read: {reason(error)}") from error
    if not prompt:
        raise RequestError(f"{name} is empty")
    check_text(prompt, name)
    return prompt


def _read_stdin() -> str:
    # Whatever the locale's encoding is: files are UTF-8, too.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    # The last line break is the end of a line that was echoed, and no part of a prompt.
    return sys.stdin.read().removesuffix("\n")


def _conversation(system: str | None, text: str) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def _encode_chat(
    model: "Model", messages: list[dict[str, str]], variables: dict[str, Any], prefill: str | None
) -> "tuple[list[int], ReasoningParser | None]":
    """The conversation's token ids, and a parser of the answer where the model may think first."""
    from jllm_runtime.reasoning import ReasoningParser, room_for_thinking

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise RequestError("the model has no tokenizer, so it takes no texts; use the library with token ids")
    tokenizer.check_variables(variables)
    begun = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    text = tokenizer.render_chat([*messages, *begun], continue_final_message=prefill is not None, **variables)
    allowed, inside = room_for_thinking(text, prefill)
    thinking = ReasoningParser(inside) if allowed and tokenizer.thinks(**variables) else None
    return tokenizer.encode_rendered(text, continued=prefill is not None), thinking


def _as_json(
    output: "GenerationOutput",
    params: "SamplingParams",
    model: "Model",
    thinking: "ReasoningParser | None",
    load_s: float,
) -> dict[str, Any]:
    from jllm_runtime.sampling import DRAWING, PENALTIES

    timings = output.timings
    thoughts = "" if thinking is None else thinking.feed(output.text)[0] + thinking.finish()[0]
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
        # The part of the text that is thinking, without its markers.
        "reasoning": thoughts or None,
        # With these the same text comes again.
        "sampling": {name: getattr(params, name) for name in (*DRAWING, *PENALTIES, "seed", "max_tokens", "stop")},
        "backend": model.backend.name,
    }


def _summary(output: "GenerationOutput", params: "SamplingParams", model: "Model", load_s: float) -> str:
    from jllm_runtime.sampling_summary import describe

    timings = output.timings
    seed = f", seed {params.seed}" if params.temperature else ""
    return (
        f"[{describe(params, model)}{seed}; {model.backend.name}; "
        f"load {load_s:.1f} s, compile {timings.compile_s:.1f} s, "
        f"prefill {len(output.prompt_token_ids)} tokens at {timings.prefill_tokens_per_s:.0f}/s, "
        f"decode {len(output.token_ids)} tokens at {timings.decode_tokens_per_s:.1f}/s, {output.finish_reason}]"
    )


def main() -> None:
    """Run the command, and leave with an exit code of EXIT_CODES."""
    console.write_any_letter()
    with console.leave_where_unwritable():
        _run()


def _run() -> None:
    try:
        with console.interrupts(), device_errors():
            # click would end Ctrl-C with exit code 1 and bad input of ours with a traceback.
            code = cli(standalone_mode=False)
            if sys.stdout is not None:
                with console.closed_pipe():
                    sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(console.STOPPED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except JLLMError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    else:
        # What a command gave to click's Context.exit.
        if isinstance(code, int) and code:
            sys.exit(code)


if __name__ == "__main__":
    main()
