"""Command: ``jllm bench``."""

import json
from typing import TYPE_CHECKING, Any

import click

from jllm_runtime.cli_options import ACTIVATIONS, DTYPES, NO_CACHE, devices_option, find_model

if TYPE_CHECKING:
    from jllm_core.checkpoint import Dtype
    from jllm_core.quantization.device_form import Activations

    from jllm_runtime.benchmarking.cases import Case
    from jllm_runtime.benchmarking.report import Result
    from jllm_runtime.model import Model


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """Option type: whole numbers from 1 up, with commas between them."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
            self.fail(f"expected whole numbers from 1 up with commas between them, such as 1,4,16, got {value!r}")
        # Each value once, in the given order.
        return tuple(dict.fromkeys(map(int, words)))


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=Counts(), default="512", show_default=True, help="Tokens of each prompt.")
@click.option("--decode-tokens", type=Counts(), default="64", show_default=True, help="Steps to time after the prompt.")
@click.option("--batch", type=Counts(), default="1", show_default=True, help="Sequences side by side.")
@click.option("--context", type=Counts(), help="Tokens of each sequence before the first step  [default: the prompt's]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed repetitions of each measurement.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default=None, help="Load the weights as this type.")
@ACTIVATIONS
@click.option("--mesh", help="Devices along each axis, such as data=2,tensor=4  [default: as suits the model]")
@devices_option
@NO_CACHE
@click.option("--no-compile-cache", is_flag=True, help="Do not keep compiled programs on disk.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model: str,
    prompt_tokens: tuple[int, ...],
    decode_tokens: tuple[int, ...],
    batch: tuple[int, ...],
    context: tuple[int, ...] | None,
    repeats: int,
    dtype: "Dtype | None",
    activations: "Activations | None",
    mesh: str | None,
    no_cache: bool,
    no_compile_cache: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode of a model on this machine, beside what its device can do.

    Each option with N,N,... takes several values; all combinations are measured, on random tokens. Decoding is compared
    with the memory's bandwidth: each step must read the weights and the filled part of the cache. Prefill is compared
    with the rate of products. For accelerators that `jllm plan` knows, both limits are the published ones; for other
    devices they are measured in the same run. JLLM_KERNELS=xla in the environment measures XLA without the CPU kernels.
    """
    from jllm_core import checkpoint
    from rich.console import Console

    from jllm_runtime.benchmarking.cases import make_cases
    from jllm_runtime.benchmarking.costs import check_memory
    from jllm_runtime.benchmarking.device_limits import find_limits
    from jllm_runtime.benchmarking.report import as_json as result_as_json
    from jllm_runtime.benchmarking.report import describe, print_results
    from jllm_runtime.compile_cache import use_compile_cache
    from jllm_runtime.loading import load_model, resolve_model
    from jllm_runtime.mesh import make_mesh, parse_mesh

    folder = resolve_model(str(find_model(model, no_cache)))
    # From the config alone: a case that cannot be is refused before the weights are loaded.
    cases = make_cases(checkpoint.read_config(folder), prompt_tokens, decode_tokens, batch, context)
    if not no_compile_cache:
        use_compile_cache()
    loaded = load_model(folder, None if mesh is None else make_mesh(parse_mesh(mesh)), dtype, activations=activations)
    check_memory(loaded, cases)
    results = []
    with Console(stderr=True).status("") as status:
        for case in cases:
            status.update(case.name)
            results.append(_measured(loaded, case, repeats))
        status.update("the device's limits")
        # After the cases, whose peak of memory it would raise.
        sizes, computed_in = [result.step_bytes for result in results], loaded.weights.dtype.name
        limits = find_limits(loaded.mesh.devices.flat[0], loaded.backend, sizes, computed_in)
    # A limit that the model itself exceeds was measured too low.
    limits = limits.including([result.best_read for result in results], max(r.best_flops_per_s for r in results))
    heading = describe(loaded, model, limits)
    if as_json:
        measured = [result_as_json(result, limits) for result in results]
        click.echo(json.dumps({**heading, "results": measured}, ensure_ascii=False))
    else:
        print_results(heading, results, limits, Console())


def _measured(model: "Model", case: "Case", repeats: int) -> "Result":
    import numpy as np

    from jllm_runtime.benchmarking.measuring import measure_decode, measure_prefill
    from jllm_runtime.benchmarking.peak_memory import peak_device_bytes, peak_rss, reset_peak_rss
    from jllm_runtime.benchmarking.report import Result

    longest = max(case.prompt_tokens, case.context)
    # Random tokens cost what real ones do; the fixed seed makes runs comparable.
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (case.batch, longest))
    # The peak of this case alone, where the system can.
    reset_peak_rss()
    prefill = measure_prefill(model, tokens[:, : case.prompt_tokens], repeats)
    decode = measure_decode(model, tokens[:, : case.context], case.decode_tokens, repeats)
    return Result.of(model, case, prefill, decode, peak_rss(), peak_device_bytes(model.mesh.devices.flat[0]))
