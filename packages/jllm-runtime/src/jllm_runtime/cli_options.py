"""Shared command-line options: sampling, chat template, mesh, processes; and loading a model by them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from jllm_runtime.answer_length import DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS_THINKING

if TYPE_CHECKING:
    from jllm_runtime.distributed.peers import Peers
    from jllm_runtime.model import Model
    from jllm_runtime.sampling import SamplingParams

# Values of other modules, repeated here because importing those would make --help wait for JAX. Tests compare them.
SHARDINGS = ("tensor", "data-tensor", "expert-tensor", "fsdp", "sequence")
"""Names of ``jllm_core.sharding.PRESETS``."""

DEFAULT_DRAFT = 7
"""That of ``jllm_runtime.speculative.prompt_lookup``."""

KV_DTYPES = ("float32", "bfloat16", "float16", "int8")
"""Those of ``jllm_runtime.cache.contiguous``."""

DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights can be loaded as."""

LOADING = (
    *("dtype", "activations", "no_cache", "no_compile_cache", "mesh", "sharding"),
    *("coordinator", "num_processes", "process_id", "distributed"),
)
"""Names of the options for loading a model."""

NO_CACHE = click.option(
    "--no-cache",
    is_flag=True,
    help="Convert MODEL, where that is needed, into a temporary folder (TMPDIR) that is removed at the end.",
)
"""The option of every command that loads a model; ``find_model`` does what it says."""

ACTIVATIONS = click.option(
    "--activations",
    type=click.Choice(["int8"]),
    default=None,
    help="Multiply int8 weights (a scale a channel) with activations rounded to int8, on TPU v5e, v5p and v6e.",
)
"""The option of every command that loads or plans a model."""

KV_DTYPE = click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    default=None,
    help="Type of the KV cache  [default: that of the activations]",
)
"""The option of every command that makes a KV cache, or plans one."""

TEMPLATE_OPTIONS = ("think", "template_var")
"""Names of the options for the chat template."""

GENERATE_OPTIONS = ("lookup", "kv_dtype")
"""Names of the options for ``generate`` and ``stream_generate`` that are no sampling parameters."""

PUBLISHED = "[default: the publisher's, else off]"
MAX_TOKENS = f"[default: {DEFAULT_MAX_TOKENS}; {DEFAULT_MAX_TOKENS_THINKING} for a model that thinks]"

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class LookupOption(click.Option):
    """Option whose value may be left out: what comes next is its value only where it is a number.

    click would take the name of the model in ``jllm chat --lookup MODEL``.
    """

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Give a value that is no number to the argument MODEL, where that has none."""
        value = opts.get("lookup")
        # Arguments come after all options, so MODEL has not been looked at.
        if isinstance(value, str) and not value.lstrip("+-").isdecimal() and not isinstance(opts.get("model"), str):
            cast(dict[str, Any], opts).update(model=value, lookup=str(self.flag_value))
        return super().handle_parse_result(ctx, opts, args)


def _add(options: Sequence[Decorator], command: Callable[..., None]) -> Callable[..., None]:
    # Decorators apply from the last to the first; --help lists them in their order.
    for option in reversed(options):
        command = option(command)
    return command


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every command that generates."""
    options = (
        click.option("--max-tokens", type=int, help=f"Most tokens to generate  {MAX_TOKENS}"),
        click.option("--greedy", is_flag=True, help="Take the most probable token, always: --temperature 0."),
        click.option("--temperature", type=float, help=f"Divides the logits; 0 is greedy  {PUBLISHED}"),
        click.option("--top-k", type=int, help=f"Keep the k most probable tokens; 0 is off  {PUBLISHED}"),
        click.option(
            "--top-p", type=float, help=f"Keep the fewest tokens that reach this much probability  {PUBLISHED}"
        ),
        click.option(
            "--min-p", type=float, help=f"Keep tokens at least this probable, relative to the best  {PUBLISHED}"
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            help=f"Divides the logits of tokens that are in the text already; 1 is off  {PUBLISHED}",
        ),
        click.option("--seed", type=int, default=None, help="The same seed gives the same text."),
        click.option("--stop", multiple=True, help="A text that ends the answer; may be given several times."),
        click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type."),
        ACTIVATIONS,
        NO_CACHE,
        click.option("--no-compile-cache", is_flag=True, help="Do not keep compiled programs on disk."),
        click.option(
            "--lookup",
            cls=LookupOption,
            type=int,
            is_flag=False,
            flag_value=DEFAULT_DRAFT,
            default=0,
            metavar="[N]",
            help="Check up to N tokens at a time where the text repeats itself: the same answer, often sooner. "
            f"{DEFAULT_DRAFT} without a number; 0 is off.",
        ),
        KV_DTYPE,
    )
    return _add(options, command)


def _make_devices(context: click.Context, parameter: click.Parameter, count: int | None) -> None:
    if count is not None and not context.resilient_parsing:
        from jllm_runtime.mesh import make_cpu_devices

        make_cpu_devices(count)


# Done when the command line is read: once JAX has started, it is too late.
devices_option = click.option(
    "--devices",
    type=int,
    expose_value=False,
    callback=_make_devices,
    help="Run on the CPU, seen as so many devices, to try a mesh.",
)


def template_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the variables of the chat template."""
    options = (
        click.option(
            "--think/--no-think",
            default=None,
            help="Let the model think before it answers, or not; for templates that have enable_thinking "
            "[default: the template's]",
        ),
        click.option(
            "--template-var",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_assignments,
            help="A variable of the model's chat template; JSON such as true is taken as such. May be given several "
            "times.",
        ),
    )
    return _add(options, command)


def _assignments(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"expected NAME=VALUE, such as enable_thinking=false, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def mesh_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the devices that a model runs on, and its layout over them."""
    options = (
        click.option("--mesh", help="Devices along each axis, such as data=2,tensor=4  [default: as suits the model]"),
        click.option(
            "--sharding",
            type=click.Choice(SHARDINGS),
            default=SHARDINGS[0],
            show_default=True,
            help="Layout of weights and activations over the mesh.",
        ),
        devices_option,
    )
    return _add(options, command)


def process_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that make this process one of several."""
    options = (
        click.option(
            "--coordinator", metavar="HOST:PORT", help="Run with other processes; the address of the first one."
        ),
        click.option("--num-processes", type=int, help="Number of processes."),
        click.option("--process-id", type=int, help="Number of this process, from 0."),
        click.option(
            "--distributed",
            is_flag=True,
            help="Run with the other processes that JAX finds by itself (Cloud TPU, Slurm, Open MPI). A Slurm step of "
            "several tasks, or a TPU slice of several named hosts, needs no flag.",
        ),
    )
    return _add(options, command)


def pop_options(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Take the options of these names out."""
    return {name: options.pop(name) for name in names if name in options}


def check_sampling(options: Mapping[str, Any]) -> None:
    """Refuse impossible sampling options, before a model is loaded.

    Args:
        options: as for ``sampling_params``.

    Raises:
        RequestError: a value that is impossible.
        click.UsageError: options that exclude each other.
    """
    from jllm_runtime.sampling import SamplingParams

    SamplingParams(**_given(options))


def sampling_params(
    model: "Model", options: Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> "SamplingParams":
    """The sampling parameters of a command: what was given, and the publisher's in place of what was not.

    Args:
        model: the loaded model.
        options: those of ``sampling_options`` that are left when LOADING and GENERATE_OPTIONS are taken out.
        variables: of the chat template, which may turn off the thinking; None for a text without a template.

    Raises:
        RequestError: a value that is impossible.
        ModelError: one of the publisher's is.
        click.UsageError: options that exclude each other.
    """
    from jllm_runtime.answer_length import default_max_tokens
    from jllm_runtime.sampling import SamplingParams

    thinks = variables is not None and model.tokenizer is not None and model.tokenizer.thinks(**variables)
    return SamplingParams.of(model, **{"max_tokens": default_max_tokens(thinks), **_given(options)})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    if given.pop("greedy"):
        if given.get("temperature"):
            raise click.UsageError("--greedy means --temperature 0; give one of the two")
        given["temperature"] = 0.0
    return given


def template_variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that a command sets; ``Tokenizer.check_variables`` knows whether there are
    such.

    Args:
        options: those of TEMPLATE_OPTIONS.

    Raises:
        click.UsageError: ``--think`` and its variable contradict each other.
    """
    given = dict(options["template_var"])
    think = options["think"]
    if think is not None and given.setdefault("enable_thinking", think) is not think:
        raise click.UsageError("--think and --template-var enable_thinking contradict each other; give one of them")
    return given


def join_processes(loading: Mapping[str, Any]) -> "Peers":
    """Join the other processes, where the options or the environment ask for it.

    Args:
        loading: the options of ``process_options``, among others.
    """
    from jllm_runtime.distributed.peers import Peers
    from jllm_runtime.distributed.processes import Processes, is_cluster, join

    named = {name: loading[name] for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name.replace('_', '-')}" for name, value in named.items() if value is None]
    # All three or none: JAX could find out some of them, but on clusters only.
    if 0 < len(missing) < len(named):
        raise click.UsageError(
            f"several processes need --coordinator, --num-processes and --process-id; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    if not missing:
        return join(Processes(named["coordinator"], named["num_processes"], named["process_id"]))
    return join(None) if loading["distributed"] or is_cluster() else Peers()


def find_model(model: str, no_cache: bool) -> str | Path:
    """The model itself, or with ``no_cache`` its checkpoint, which is removed when the command ends."""
    if not no_cache:
        return model
    from jllm_runtime.loading import temporary_checkpoint

    return click.get_current_context().with_resource(temporary_checkpoint(model))


def load(model: str, loading: Mapping[str, Any]) -> tuple["Model", float]:
    """Load a model; the model, and the seconds that it took.

    Args:
        model: a folder, or a name for a resolver.
        loading: the options ``dtype``, ``activations``, ``no_cache``, ``no_compile_cache``, ``mesh`` and ``sharding``.
    """
    from jllm_runtime.progress import status

    with status(f"loading {model} ..."):  # JAX itself takes a while
        from jllm_core.sharding import PRESETS

        from jllm_runtime.loading import load_model
        from jllm_runtime.mesh import make_mesh, parse_mesh

    start = time.perf_counter()
    mesh = None if loading["mesh"] is None else make_mesh(parse_mesh(loading["mesh"]))
    rules, compile_cache = PRESETS[loading["sharding"]], not loading["no_compile_cache"]
    folder, activations = find_model(model, loading["no_cache"]), loading["activations"]
    loaded = load_model(folder, mesh, loading["dtype"], rules, compile_cache, activations=activations)
    return loaded, time.perf_counter() - start
