"""Rotary embedding (RoPE) of config.json: rope_theta and rope_scaling (transformers 4), or rope_parameters (5)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jllm_core.config import ConfigError, RopeScaling, is_number

from jllm_convert.families.table import Family
from jllm_convert.sources.huggingface.field_types import is_whole, type_problems

# The fields that each kind must have, and those that may be left out, which then have the reference's defaults.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
_OPTIONAL_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "original_max_position_embeddings": ("a whole number", lambda value: is_whole(value, 0)),  # 0 is as good as none
    "truncate": ("true or false", lambda value: isinstance(value, bool)),
}
# Fields that the reference does not read in any kind: a note of the publisher's, and factors of other tools at 1.
_NO_EFFECT = {"finetuned": (True, False), "extrapolation_factor": (1,), "attn_factor": (1,)}
# Kinds for which the reference does not read the length of the first training: "dynamic" takes max_position_embeddings.
_WITHOUT_LENGTH = ("default", "linear", "dynamic")


def read_rope(
    fields: Mapping[str, Any],
    default_theta: float,
    context_length: int,
    where: str,
    ignored: Collection[str] = (),
    harmless: Collection[str] = (),
) -> tuple[float, RopeScaling | None, list[str]]:
    """Read the base and the scaling of the rotary frequencies.

    Args:
        fields: the parsed config.json.
        default_theta: the base where config.json has none.
        context_length: max_position_embeddings, which some kinds depend on.
        where: the file's name, for messages.
        ignored: fields that are not known, and of which the user says that they change nothing.
        harmless: fields of rope_parameters that change nothing in this family, or are read elsewhere.

    Returns:
        The base, the scaling (None for none), and the problems.
    """
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return 0.0, None, [f"{where}: rope_parameters (or rope_scaling) must be an object, got {rope!r}"]
    problems = []
    if fields.get("rope_parameters") and fields.get("rope_scaling") not in (None, fields["rope_parameters"]):
        problems.append(f"{where}: rope_parameters and rope_scaling are both there and differ; leave one of them")
    # transformers 4 has rope_theta at the top, 5 within rope_parameters, and converters write both.
    thetas = [value for value in (rope.get("rope_theta"), fields.get("rope_theta")) if value is not None]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        problems.append(f"{where}: rope_theta is given twice and differs: {thetas}; leave one of them")
    theta = thetas[0] if thetas else default_theta
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" in files of older versions
    if not isinstance(kind, str) or kind not in _NEEDED:
        problems.append(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(_NEEDED)}")
        return 0.0, None, problems
    # As in the reference, the length of the first training may stand at the top of the file, and wins there.
    if (original := fields.get("original_max_position_embeddings")) is not None:
        rope = {**rope, "original_max_position_embeddings": original}
    parent = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    problems += _unknown(kind, {k: v for k, v in rope.items() if k not in harmless}, parent, ignored, where)
    if "partial_rotary_factor" not in harmless and rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']!r}, only 1 is supported")
    problems += type_problems({"rope_theta": theta}, ["rope_theta"], where)
    problems += [
        f"{where}: rope type {kind!r} needs the number {name!r}, got {rope.get(name)!r}"
        for name in _NEEDED[kind]
        if not is_number(rope.get(name))
    ]
    problems += [
        f"{where}: {name!r} of rope type {kind!r} must be {expected}, got {rope[name]!r}"
        for name in _OPTIONAL.get(kind, ())
        for expected, fits in [_OPTIONAL_TYPES.get(name, ("a number", is_number))]
        if rope.get(name) is not None and not fits(rope[name])
    ]
    if problems or kind == "default":
        return theta, None, problems
    try:
        return theta, _scaling(kind, rope, context_length), []
    except ConfigError as error:
        return theta, None, [f"{where}: {error}"]


def read_rotary_dim(fields: Mapping[str, Any], family: Family, head_dim: Any) -> int | None:
    """Read how many features of a head are rotated; None for all of them.

    Raises:
        ConfigError: a factor that is impossible, or stated twice and differently.
    """
    if family.rotary_factor is None:
        return None
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    stated = [each["partial_rotary_factor"] for each in (rope, fields) if each.get("partial_rotary_factor") is not None]
    if stated and stated[0] != stated[-1]:
        raise ConfigError(f"partial_rotary_factor is given twice and differs: {stated}; leave one of them")
    factor = stated[0] if stated else family.rotary_factor
    if not is_number(factor) or not 0 < factor <= 1:
        raise ConfigError(f"partial_rotary_factor must be a number above 0 and at most 1, got {factor!r}")
    rotated = int(head_dim * factor)
    return None if rotated == head_dim else rotated


def _unknown(kind: str, rope: Mapping[str, Any], parent: str, ignored: Collection[str], where: str) -> Iterator[str]:
    """A problem for each field that this kind of rotary embedding does not have."""
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_NEEDED[kind], *_OPTIONAL.get(kind, ())}
    known |= {"original_max_position_embeddings"} if kind in _WITHOUT_LENGTH else set()
    for name, value in rope.items():
        is_off = value is None or value in _NO_EFFECT.get(name, ())
        if not (is_off or name in known or f"{parent}.{name}" in ignored):
            yield (
                f"{where}: rope type {kind!r} has no field {name!r} (got {value!r}); if it does not change the "
                f"model's output, convert with --ignore-field {parent}.{name} (jllm-convert convert)"
            )
    for path in ignored:
        if "." in path and (not path.startswith(f"{parent}.") or path.partition(".")[2] not in rope.keys() - known):
            yield f"{where}: there is no field {path!r} that could be ignored"


def _scaling(kind: str, rope: Mapping[str, Any], context_length: int) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope["factor"])
    if kind == "dynamic":
        # The reference takes max_position_embeddings, which here is the context length of the first training.
        return RopeScaling(kind="dynamic", factor=rope["factor"], original_context_length=context_length)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context_length=rope.get("original_max_position_embeddings") or context_length,
        )
    # As the reference: without the original length, max_position_embeddings is that of the first training.
    original = rope.get("original_max_position_embeddings") or context_length
    factor = context_length / original if rope.get("factor") is None else rope["factor"]
    truncate = rope.get("truncate")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        truncate=True if truncate is None else truncate,
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on cosines and sines: as stated, or derived from the stretching factor (arXiv:2309.00071)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    # DeepSeek's variant, which the reference takes from any family.
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def stretched_context(scaling: RopeScaling | None, context_length: int) -> int:
    """The context length after stretching: with YaRN and dynamic scaling, publishers often state that before it."""
    if scaling is None or scaling.kind not in ("dynamic", "yarn"):
        return context_length
    return max(context_length, int(scaling.factor * (scaling.original_context_length or 0)))
