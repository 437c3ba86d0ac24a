"""Writer of rope_theta and rope_scaling for config.json."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from jllm_core.config import ModelConfig, RopeScaling

from jllm_convert.errors import ConversionError
from jllm_convert.sources.huggingface.rope import read_rope

# The parameters of the published Llama 3.1 to 3.3.
_PUBLISHED_DIVISORS = (8.0, 32.0)
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
# Two ways to compute the same float32 frequencies differ by a few roundings.
_TOLERANCE = 1e-6


def expressible_scaling(config: ModelConfig) -> RopeScaling | None:
    """The scaling of a config in a form that config.json can express: the same frequencies, without unused parameters.

    Raises:
        ConversionError: divisors of single frequencies that no parameters of ``llama3`` give.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "factors":
        return _llama3_of(config)
    # Unused parameters get the defaults that a reader of config.json gives them.
    unused: dict[str, Any] = {}
    if scaling.kind != "yarn":
        unused |= {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    if scaling.kind != "llama3":
        unused |= {"low_freq_factor": None, "high_freq_factor": None}
    if scaling.kind == "linear":
        unused |= {"original_context_length": None}
    return replace(scaling, **unused, factors=None)


def to_hf_rope(config: ModelConfig) -> dict[str, Any]:
    """Make ``rope_theta`` and ``rope_scaling``: transformers 4 reads them, 5 converts them to its rope_parameters."""
    theta, scaling = float(config.rope_theta), config.rope_scaling
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = scaling.original_context_length
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        # Defaults are left out, as publishers leave them out.
        _, default, _ = read_rope({"rope_scaling": fields}, theta, config.context_length, "config.json")
        stated = {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        stated["attention_factor"] = float(scaling.attention_factor)
        fields |= {name: value for name, value in stated.items() if value != getattr(default, name)}
    return {"rope_theta": theta, "rope_scaling": fields}


def _llama3_of(config: ModelConfig) -> RopeScaling:
    """Find the ``llama3`` parameters that give the divisors of a GGUF file.

    Raises:
        ConversionError: there are none.
    """
    from jllm_core.ops.rope import rope_frequencies

    frequencies = rope_frequencies(config)
    plain = rope_frequencies(replace(config, rope_scaling=None))
    divisors = np.asarray(config.rope_scaling.factors if config.rope_scaling else (), np.float64)
    for scaling in _candidates(plain.astype(np.float64), divisors):
        if np.allclose(rope_frequencies(replace(config, rope_scaling=scaling)), frequencies, _TOLERANCE, 0):
            return scaling
    raise ConversionError(
        f"the rotary frequencies are divided by {divisors.min():g} to {divisors.max():g}, one by one, as a GGUF file "
        "states them; no parameters of rope type 'llama3' give these numbers, and config.json has no other way to say "
        "them. Export from a checkpoint that was converted from the Hugging Face files"
    )


def _candidates(frequencies: np.ndarray, divisors: np.ndarray) -> Iterator[RopeScaling]:
    """Parameters to try: the published ones, then a fit to the blended divisors."""
    largest = float(divisors.max())
    for factor in (largest, *_PUBLISHED_DIVISORS):
        yield _llama3(factor, _HIGH, _ORIGINAL)
    blended = (divisors > 1 + _TOLERANCE) & (divisors < largest * (1 - _TOLERANCE))
    if np.count_nonzero(blended) < 2:
        return
    # In the band between the two wavelengths, the share of the unscaled frequency is linear in the turns per position:
    # (original * turns - low) / (high - low). So the slope and the intercept of a line fit give original and high.
    kept = (1 / divisors[blended] - 1 / largest) / (1 - 1 / largest)
    slope, start = np.polyfit(frequencies[blended] / (2 * np.pi), kept, 1)
    if slope > 0 > start:
        width = -_LOW / start
        yield _llama3(largest, round(_LOW + width, 4), round(slope * width))


def _llama3(factor: float, high: float, original: int) -> RopeScaling:
    return RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=_LOW, high_freq_factor=high, original_context_length=original
    )
