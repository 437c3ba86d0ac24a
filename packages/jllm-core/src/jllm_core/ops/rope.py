"""The rotary position embedding (Su et al., arXiv:2104.09864), in the halves layout of the Hugging Face models."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jllm_core.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of features: float32 ``[H / 2]``, scaled as the config says.

    In numpy and in the reference's order of operations, so that the numbers have the same bits everywhere.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "factors":
        return (frequencies / np.asarray(scaling.factors, np.float32)).astype(np.float32)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths beyond the first training are stretched, short ones kept, a band between is blended."""
    # RopeScaling has checked that they are there.
    low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
    original = scaling.original_context_length or 0
    wavelengths = 2 * math.pi / frequencies
    slow = np.where(wavelengths > original / low, frequencies / scaling.factor, frequencies)
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * slow / scaling.factor + blend * slow
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return np.where(between, blended, slow).astype(np.float32)


def rope_angles(positions: Int[Array, "B T"], config: ModelConfig) -> tuple[Array, Array]:
    """Cosines and sines for ``apply_rope``, each float32 ``[B, T, 1, H / 2]``.

    They stay in float32 for every model type: bfloat16 cannot tell neighbouring positions apart far into a context.
    """
    frequencies = jnp.asarray(rope_frequencies(config))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T N H"], rotation: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotate each pair ``(x[i], x[i + H/2])`` by its angle; the result has the type of ``x``."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
