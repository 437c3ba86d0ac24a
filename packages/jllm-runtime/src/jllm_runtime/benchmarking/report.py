"""Benchmark report: tables and JSON."""

from dataclasses import dataclass
from typing import Any

import jax
from jllm_core.quantization.arrays import quantization_of
from rich.console import Console
from rich.table import Table

from jllm_runtime.benchmarking.cases import Case
from jllm_runtime.benchmarking.costs import bytes_of_decode, flops_of_prefill, local_bytes
from jllm_runtime.benchmarking.device_limits import Limits
from jllm_runtime.benchmarking.measuring import Measurement
from jllm_runtime.model import Model
from jllm_runtime.planner.memory import parameter_count


@dataclass(frozen=True)
class Result:
    """The result of one case.

    Attributes:
        case: what was measured.
        prefill, decode: the measurements.
        bytes_of_decode: the least that each device reads in the decode steps.
        flops_of_prefill: what each device computes in a prefill.
        peak_rss_bytes: peak memory of this process; None where the system does not tell.
        peak_device_bytes: peak memory of an accelerator so far; None where it does not tell.
    """

    case: Case
    prefill: Measurement
    decode: Measurement
    bytes_of_decode: int
    flops_of_prefill: int
    peak_rss_bytes: int | None
    peak_device_bytes: int | None

    @classmethod
    def of(
        cls,
        model: Model,
        case: Case,
        prefill: Measurement,
        decode: Measurement,
        peak_rss: int | None,
        peak_device: int | None,
    ) -> "Result":
        """The result, with the case's costs for this model."""
        needs = bytes_of_decode(model, case), flops_of_prefill(model, case)
        return cls(case, prefill, decode, *needs, peak_rss, peak_device)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens of the whole batch in a second."""
        return self.case.batch * self.case.prompt_tokens / self.prefill.median_s

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens of the whole batch in a second."""
        return self.case.batch * self.case.decode_tokens / self.decode.median_s

    @property
    def step_bytes(self) -> int:
        """Bytes that each device reads in a decode step, on average."""
        return self.bytes_of_decode // self.case.decode_tokens

    @property
    def best_read(self) -> tuple[int, float]:
        """Those bytes, and bytes per second in the fastest repetition."""
        return self.step_bytes, self.bytes_of_decode / min(self.decode.seconds)

    @property
    def best_flops_per_s(self) -> float:
        """FLOPs of each device in a second of the fastest prefill."""
        return self.flops_of_prefill / min(self.prefill.seconds)

    @property
    def bytes_per_s(self) -> float:
        """Bytes that each device reads in a second of decoding."""
        return self.bytes_of_decode / self.decode.median_s

    @property
    def flops_per_s(self) -> float:
        """FLOPs of each device in a second of prefill."""
        return self.flops_of_prefill / self.prefill.median_s


def describe(model: Model, name: str, limits: Limits) -> dict[str, Any]:
    """The model and the device, as JSON values."""
    quantization = quantization_of(model.weights.layers[0].attn.q, model.weights.embedding)
    return {
        "device": model.mesh.devices.flat[0].device_kind,
        "devices": model.mesh.size,
        "jax": jax.__version__,
        "model": name,
        "parameters": parameter_count(model.config),
        "dtype": model.weights.dtype.name,
        "quantize": None if quantization is None else quantization.name,
        "weights_bytes": local_bytes(model.weights),
        "backend": model.backend.name,
        "limits": {
            "gigabytes_per_s": limits.bytes_per_s / 1e9,
            "gigaflops_per_s": limits.flops_per_s / 1e9,
            "source": limits.source,
        },
    }


def as_json(result: Result, limits: Limits) -> dict[str, Any]:
    """A result as JSON values. Rates are of the whole batch and the median repetition, gigabytes and gigaflops of each
    device; ``seconds`` has all repetitions. Shares are of the limits beside them: what the device reads of as many
    bytes, and what it multiplies."""
    case = result.case
    return {
        "prompt_tokens": case.prompt_tokens,
        "context": case.context,
        "decode_tokens": case.decode_tokens,
        "batch": case.batch,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "prefill_seconds": list(result.prefill.seconds),
        "prefill_gigaflops_per_s": result.flops_per_s / 1e9,
        "prefill_limit_gigaflops_per_s": limits.flops_per_s / 1e9,
        "prefill_share_of_limit": result.flops_per_s / limits.flops_per_s,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "decode_seconds": list(result.decode.seconds),
        "decode_gigabytes_per_s": result.bytes_per_s / 1e9,
        "decode_bytes_per_step": result.step_bytes,
        "decode_limit_gigabytes_per_s": limits.bytes_per_s_of(result.step_bytes) / 1e9,
        "decode_share_of_limit": result.bytes_per_s / limits.bytes_per_s_of(result.step_bytes),
        "compile_s": result.prefill.compile_s + result.decode.compile_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "peak_device_bytes": result.peak_device_bytes,
    }


def print_results(heading: dict[str, Any], results: list[Result], limits: Limits, console: Console) -> None:
    """Print the results as tables."""
    weights = heading["quantize"] or heading["dtype"]
    console.print(
        f"[bold]{heading['model']}[/], {heading['parameters'] / 1e9:.2f}B parameters, weights {weights}, on "
        f"{heading['devices']} x {heading['device']}, by {heading['backend']}",
        highlight=False,
    )
    console.print(_prefill_table(results, limits), _decode_table(results, limits), sep="\n")
    console.print(
        f"Limit of {'each device' if heading['devices'] > 1 else 'the device'}: {limits.bytes_per_s / 1e9:,.1f} GB/s, "
        f"{limits.flops_per_s / 1e9:,.0f} GFLOP/s ({limits.source}). What a step reads may lie in caches, which are "
        f'faster than memory: "can read" is what the device reads of as many bytes, again and again, and "of limit" '
        f"is the share of that. Rates are of the whole batch, by the median repetition; ± is half "
        f"of the spread over the {len(results[0].prefill.seconds)} repetitions.",
        highlight=False,
    )


def _prefill_table(results: list[Result], limits: Limits) -> Table:
    table = _table("prefill", "batch", "prompt", "tokens/s", "±", "GFLOP/s", "of limit", "compile s")
    for result in results:
        table.add_row(
            f"{result.case.batch}",
            f"{result.case.prompt_tokens:,}",
            f"{result.prefill_tokens_per_s:,.1f}",
            _spread(result.prefill),
            f"{result.flops_per_s / 1e9:,.1f}",
            f"{result.flops_per_s / limits.flops_per_s:.0%}",
            f"{result.prefill.compile_s:.1f}",
        )
    return table


def _decode_table(results: list[Result], limits: Limits) -> Table:
    table = _table(
        "decode", "batch", "context", "tokens/s", "±", "GB/s", "can read", "of limit", "compile s", "peak RSS MiB"
    )
    for result in results:
        peak = result.peak_rss_bytes
        table.add_row(
            f"{result.case.batch}",
            f"{result.case.context:,}",
            f"{result.decode_tokens_per_s:,.1f}",
            _spread(result.decode),
            f"{result.bytes_per_s / 1e9:,.1f}",
            f"{limits.bytes_per_s_of(result.step_bytes) / 1e9:,.1f}",
            f"{result.bytes_per_s / limits.bytes_per_s_of(result.step_bytes):.0%}",
            f"{result.decode.compile_s:.1f}",
            "?" if peak is None else f"{peak / 2**20:,.0f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        # A word a line, so that the wider table fits a terminal of 80 columns.
        table.add_column(column.replace(" ", "\n"), justify="right")
    return table


def _spread(timed: Measurement) -> str:
    return f"{(max(timed.seconds) - min(timed.seconds)) / 2 / timed.median_s:.0%}"
