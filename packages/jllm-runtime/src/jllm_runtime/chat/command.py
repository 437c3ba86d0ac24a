"""Command: ``jllm chat``."""

from typing import Any

import click
from click.core import ParameterSource

from jllm_runtime.cli_options import (
    GENERATE_OPTIONS,
    LOADING,
    TEMPLATE_OPTIONS,
    check_sampling,
    load,
    mesh_options,
    pop_options,
    sampling_options,
    sampling_params,
    template_options,
    template_variables,
)
from jllm_runtime.errors import RequestError

REMOTE = frozenset({"max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop"})
"""Names of the sampling options that a server takes under the same names."""


@click.command()
@click.argument("model", required=False)
@click.option(
    "--server", metavar="URL", help="Chat with a server; MODEL is then one of its model names  [default: its first]"
)
@click.option("--api-key", envvar="JLLM_API_KEY", show_envvar=True, help="Key for the server.")
@click.option("--system", help="A system message that opens the conversation.")
@template_options
@sampling_options
@mesh_options
@click.pass_context
def chat(
    context: click.Context,
    /,
    model: str | None,
    server: str | None,
    api_key: str | None,
    system: str | None,
    **options: Any,
) -> None:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer."""
    from jllm_runtime.chat.terminal import run_chat

    variables = template_variables(pop_options(options, TEMPLATE_OPTIONS))
    if server is not None:
        from jllm_runtime.chat.remote import TEMPLATE_FIELD, RemoteSession

        params = _remote_params(context) | ({TEMPLATE_FIELD: variables} if variables else {})
        remote = RemoteSession(server, model, params, system, api_key)
        run_chat(remote, f"{remote.model} at {server}: {remote.describe()}")
        return
    if model is None:
        raise click.UsageError("give a MODEL, or a server with --server URL")
    loading, running = pop_options(options, LOADING), pop_options(options, GENERATE_OPTIONS)
    check_sampling(options)
    loaded, _ = load(model, loading)
    settings = sampling_params(loaded, options, variables)
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise RequestError(f"{model} has no chat template; use `jllm generate {model} --raw --prompt TEXT`")

    from jllm_runtime.chat.local import ChatSession
    from jllm_runtime.model_summary import runs_on

    session = ChatSession(loaded, settings, system, variables=variables, **running)
    run_chat(session, f"{model} on {runs_on(loaded)}: {session.describe()}")


def _remote_params(context: click.Context) -> dict[str, Any]:
    """Request fields of the sampling options. Those that are not given are left out, for servers without them."""
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    }
    for name in given.keys() - REMOTE - {"model", "server", "api_key", "system", "greedy", *TEMPLATE_OPTIONS}:
        raise click.UsageError(f"--{name.replace('_', '-')} is for a model that is loaded here, not for --server")
    always = {"temperature": 0.0} if context.params["greedy"] else {}
    return always | {name: list(value) if name == "stop" else value for name, value in given.items() if name in REMOTE}
