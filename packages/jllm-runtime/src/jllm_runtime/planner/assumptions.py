"""Types that a plan assumes: those of the model, unless the command says otherwise, and where they are from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from jllm_core.quantization.arrays import Quantization

from jllm_runtime.planner.model_configs import FoundModel

QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType(
    {"int8": Quantization(8), "int4": Quantization(4, group=32)}
)
"""Grids by the names that ``--quantize`` takes, as `jllm-convert convert --quantize` stores them by itself."""
UNQUANTIZED = "none"
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Assumptions:
    """Types of a model, and their origin.

    Attributes:
        dtype: element type of activations, and arrays that are not quantised.
        quantization: how the matrices are stored; None is ``dtype``.
        words: what is planned with and where it comes from, by what it is about: ``config``, ``dtype``, ``quantize``,
            and ``types`` for the latter two in one sentence.
    """

    dtype: str
    quantization: Quantization | None
    words: Mapping[str, str]


def assume(
    found: FoundModel,
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    group: int | None = None,
    offsets: bool = False,
    embedding: Literal[8] | None = None,
) -> Assumptions:
    """The types to plan with.

    Args:
        found: the model; its own types hold where nothing else is said.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None is the model's own, or else bfloat16.
        quantize: a name of ``QUANTIZATIONS``, or ``"none"``; None is the model's own.
        kv_dtype: what keys and values are kept as; None is ``dtype``.
        group: inputs that share a scale, with ``quantize``; None is what ``QUANTIZATIONS`` says.
        offsets: as ``Quantization`` has it, with ``quantize``.
        embedding: the same.

    Raises:
        QuantizationError: there is no such grid.
    """
    chosen, why = (dtype, "as --dtype says") if dtype else (found.dtype or DEFAULT_DTYPE, found.origin)
    if quantize is None:
        quantization, why_quantized = found.quantization, found.origin
    else:
        quantization, why_quantized = QUANTIZATIONS.get(quantize), "as --quantize says"
        if quantization is not None:
            quantization = replace(
                quantization, group=group or quantization.group, offsets=offsets, embedding=embedding
            )
    grid = grid_words(quantization)
    apart = []  # what is not of the chosen type, and why
    if quantization is not None:
        apart.append((f"weight matrices in {grid}", why_quantized))
    if kv_dtype is not None:
        apart.append((f"keys and values in {kv_dtype}", "as --kv-dtype says"))
    others = f"all else in {chosen}" if apart else f"weights, activations and cache in {chosen}"
    told = [*apart, (others, why)]
    if {reason for _, reason in told} == {why}:
        types = f"{', '.join(what for what, _ in told)}, {why}."
    else:
        types = f"{'; '.join(f'{what}, {reason}' for what, reason in told)}."
    words = {
        "config": found.known_by,
        "dtype": f"{chosen}, {why}",
        "quantize": f"{grid}, {why_quantized}",
        "types": types[0].upper() + types[1:],
    }
    return Assumptions(chosen, quantization, MappingProxyType(words))


def grid_words(quantization: Quantization | None) -> str:
    """A grid in words: ``int4 in groups of 32 with offsets, the embedding in int8``."""
    if quantization is None:
        return "not quantised"
    group = "with a scale a channel" if quantization.group is None else f"in groups of {quantization.group}"
    embedding = "" if quantization.embedding is None else f", the embedding in int{quantization.embedding}"
    return f"int{quantization.bits} {group}{' with offsets' if quantization.offsets else ''}{embedding}"
