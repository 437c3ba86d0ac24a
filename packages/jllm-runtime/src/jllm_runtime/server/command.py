"""Command: ``jllm serve``."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import click

from jllm_runtime.cli_options import (
    ACTIVATIONS,
    DTYPES,
    KV_DTYPE,
    LOADING,
    MAX_TOKENS,
    NO_CACHE,
    TEMPLATE_OPTIONS,
    join_processes,
    load,
    mesh_options,
    pop_options,
    process_options,
    template_options,
    template_variables,
)
from jllm_runtime.server.config import LOOPBACK, ServerConfig

if TYPE_CHECKING:
    from jllm_runtime.distributed.peers import Peers
    from jllm_runtime.engine.config import EngineConfig
    from jllm_runtime.engine.engine import Engine

KEYS_VARIABLE = "JLLM_API_KEYS"
# Options of the same names as fields of EngineConfig.
ENGINE_FIELDS = (
    "max_batch",
    "page_size",
    "pages",
    "snapshots",
    "chunk_tokens",
    "step_tokens",
    "decode_steps",
    "kv_dtype",
    "warm_up",
)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServerConfig)}


def _default(name: str) -> dict[str, Any]:
    return {"default": DEFAULTS[name], "show_default": True}


@click.command()
@click.argument("model")
@click.option("--host", **_default("host"), help="The address to listen at; 0.0.0.0 is all addresses of this machine.")
@click.option("--port", type=int, **_default("port"), help="The port; 0 takes a free one.")
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Name of the model in requests; may be given several times  [default: MODEL, of a path its last part]",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help=f"A key that requests need; may be given several times. Other users of this machine can see the options of a "
    f"command, but not the variable {KEYS_VARIABLE}, which takes keys with commas between them.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Allow web pages of this origin, such as https://example.org, or of any with *. May be given several times.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="HOST",
    help="A host name that a server without keys accepts, besides localhost. May be given several times.",
)
@click.option("--max-batch", type=int, default=16, show_default=True, help="Most answers that run at a time.")
@click.option(
    "--max-queue", type=int, **_default("max_queue"), help="Most answers that wait; further requests get 429."
)
@click.option("--max-prompt", type=int, help="Most tokens of a prompt  [default: what the context leaves room for]")
@click.option(
    "--max-tokens", type=int, help=f"Most tokens of an answer in a chat where the request names none  {MAX_TOKENS}"
)
@click.option("--max-body", type=int, **_default("max_body"), help="Most bytes of a request's body.")
@click.option("--request-timeout", type=float, **_default("request_timeout"), help="Seconds that a request may take.")
@click.option(
    "--receive-timeout",
    type=float,
    **_default("receive_timeout"),
    help="Seconds for the head of a request to arrive, and again for its body.",
)
@click.option(
    "--stall-timeout", type=float, **_default("stall_timeout"), help="Seconds that a client may read or send nothing."
)
@click.option(
    "--drain-timeout",
    type=float,
    **_default("drain_timeout"),
    help="Seconds that running requests may go on after SIGTERM or Ctrl-C; a second signal ends them.",
)
@click.option("--page-size", type=int, default=64, show_default=True, help="Tokens in a page of the KV cache.")
@click.option("--pages", type=int, help="Pages of the KV cache  [default: by the free memory]")
@click.option(
    "--snapshots",
    type=int,
    help="Copies of recurrent states behind pages, for prompts that begin alike (Qwen3.5 and its kin); 0 computes "
    "every prompt in full  [default: one for each answer, in at most a quarter of the cache's memory]",
)
@click.option(
    "--chunk-tokens",
    type=int,
    help="Prompt tokens that one program takes, in whole pages  [default: a page on a CPU and for models with "
    "recurrent states, more on accelerators]",
)
@click.option("--step-tokens", type=int, help="Most prompt tokens between two decode steps  [default: one chunk]")
@click.option(
    "--warmup/--no-warmup",
    "warm_up",
    default=None,
    help="Compile the programs before the first request, and fit the pages to them; on a CPU those of texts of up to "
    "256 tokens  [default: on accelerators]",
)
@click.option("--decode-steps", type=int, default=4, show_default=True, help="Most tokens of an answer in one step.")
@KV_DTYPE
@template_options
@click.option(
    "--strict", is_flag=True, help="Refuse fields of other servers that change nothing, instead of ignoring them."
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write a trace of the engine's steps, for https://ui.perfetto.dev; a file that is there is replaced.",
)
@click.option("--access-log", is_flag=True, help="Log every request.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Level of the log, on standard error.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type.")
@ACTIVATIONS
@NO_CACHE
@click.option("--no-compile-cache", is_flag=True, help="Do not keep compiled programs on disk.")
@mesh_options
@process_options
def serve(model: str, trace: str | None, access_log: bool, log_level: str, **options: Any) -> None:
    """Serve a model over HTTP with the OpenAI API, and a page to chat at /.

    By default only this machine can reach the server. After SIGTERM or Ctrl-C running requests may end first.

    Of several processes, all started with the same command, the first one serves and the others compute with it.
    """
    try:
        # Imported here: FastAPI and uvicorn come with the extra "serve", and JAX is slow to load.
        from jllm_runtime.server.server import PortTakenError
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"serving needs {error.name}, which is not installed: pip install 'jllm-runtime[serve]'"
        ) from error
    from jllm_runtime.distributed.processes import is_alone, is_first, run_together
    from jllm_runtime.engine.config import EngineConfig

    loading, template = pop_options(options, LOADING), pop_options(options, TEMPLATE_OPTIONS)
    engine_config = EngineConfig(**{name: options.pop(name) for name in ENGINE_FIELDS})
    options["template_vars"] = template_variables(template)
    options["api_keys"] += tuple(_keys_from_environment())
    config = ServerConfig(**options)
    peers = join_processes(loading)

    def work() -> None:
        if is_alone() or is_first():
            _serve(model, loading, engine_config, config, peers, log_level, access_log, trace)
        else:
            _compute_along(model, loading, peers)

    try:
        run_together(work, peers)
    # As a click error, so that the exit code is 1: the arguments are valid, and another try may succeed.
    except PortTakenError as error:
        raise click.ClickException(str(error)) from error


def _serve(
    model: str,
    loading: dict[str, Any],
    engine_config: "EngineConfig",
    config: ServerConfig,
    peers: "Peers",
    log_level: str,
    access_log: bool,
    trace: str | None,
) -> None:
    from jllm_runtime.engine.engine import Engine
    from jllm_runtime.engine.trace import check_trace
    from jllm_runtime.model_summary import runs_on
    from jllm_runtime.progress import compile_status
    from jllm_runtime.server.server import bind, listen, run

    if not config.names:
        config = dataclasses.replace(config, names=(served_name(model),))
    # Before the model is loaded: a wrong path and a taken port are errors at once and not after a minute.
    check_trace(trace)
    with bind(config) as listener:
        loaded, load_s = load(model, loading)
        click.echo(f"{model} on {runs_on(loaded)}", err=True)
        with Engine(loaded, engine_config, peers, trace) as engine:
            with compile_status():
                _warm_up(engine)
            host, port = listener.getsockname()[:2]
            # An IPv6 address in a URL has brackets.
            shown = f"[{host}]" if ":" in host else host
            how = f"loaded in {load_s:.1f} s; runs on {loaded.backend.name}"
            listen(config, listener)  # before the line that invites
            named = "" if config.names == (model,) else f" as {', '.join(config.names)}"
            click.echo(f"Serving {model}{named} at http://{shown}:{port} ({how})", err=True)
            if not config.api_keys and config.host not in LOOPBACK:
                click.echo("Warning: whoever can reach this address is answered; see --api-key", err=True)
            run(engine, config, listener, log_level, access_log)
            # Not drained, as it would be at the end of the block: the server has drained, and ended what was left.
            engine.close()


def served_name(model: str) -> str:
    """The name of a model in requests: its name on the hub, or the last part of its path, as it was given."""
    # Not that of its folder: of a file that was converted, that is the cache's.
    return os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model


def _compute_along(model: str, loading: dict[str, Any], peers: "Peers") -> None:
    """Run a process other than the first one. It ends when the first one does; its own first signal changes nothing."""
    import signal

    from jllm_runtime.engine.protocol import follow

    def on_first_signal(number: int, _: Any) -> None:
        # A terminal sends Ctrl-C to all processes at once. The first one drains then, and needs the others for it.
        signal.signal(number, signal.SIG_DFL)
        click.echo("This process ends when the first one does; a second signal ends it, and the run, at once", err=True)

    loaded, load_s = load(model, loading)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_first_signal)
    click.echo(f"Computing along with the process that serves {model} (loaded in {load_s:.1f} s)", err=True)
    follow(loaded, peers)


def _keys_from_environment() -> list[str]:
    import os

    return [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]


def _warm_up(engine: "Engine") -> None:
    """Answer a tiny request, so that the programs that all requests need are compiled before the first client comes."""
    from jllm_runtime.sampling import SamplingParams

    engine.submit([0] * 2, SamplingParams(max_tokens=2)).result()
