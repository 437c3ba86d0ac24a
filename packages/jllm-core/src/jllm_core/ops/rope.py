"""The rotary position embedding (Su et al., arXiv:2104.09864), in the halves layout of the Hugging Face models."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jllm_core.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of rotated features: float32 ``[F]``, scaled as the config says.

    In numpy and in the reference's order of operations, so that the numbers have the same bits everywhere. Those of
    ``dynamic`` scaling are the ones within the first training; ``rope_angles`` goes on from there.
    """
    # float32 from the first operation on, as torch has it: float64 rounded at the end has other last bits.
    size = config.rotated_features
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "factors":
        return (frequencies / np.asarray(scaling.factors, np.float32)).astype(np.float32)
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, config)
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


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """YaRN: features that turn less than ``beta_slow`` times within the first training are stretched by ``factor``,
    those that turn more than ``beta_fast`` times are kept, and the ones between are blended by their number."""
    size = config.rotated_features

    def feature_of(rotations: float | int) -> float:
        wavelengths = (scaling.original_context_length or 0) / (rotations * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    first, last = feature_of(scaling.beta_fast), feature_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    features = np.arange(size // 2, dtype=np.float32)
    # 0.001: the reference's way out of a band of no width.
    kept = 1 - np.clip((features - first) / (last - first or 0.001), 0, 1)
    stretched = frequencies / np.float32(scaling.factor)
    blended: np.ndarray = stretched * (1 - kept) + frequencies * kept
    return blended.astype(np.float32)


def _dynamic(lengths: Int[Array, "B t"], scaling: RopeScaling, config: ModelConfig) -> Float[Array, "B t F"]:
    """NTK-aware scaling: a text longer than the first training has a base that grows with its length."""
    original = scaling.original_context_length or 1
    beyond = jnp.maximum(lengths, original).astype(jnp.float32) / original
    size = config.rotated_features
    growth = (scaling.factor * beyond - (scaling.factor - 1)) ** (size / (size - 2))
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return 1.0 / (config.rope_theta * growth[..., None]) ** exponents


@jax.named_scope("rope_angles")
@partial(jax.jit, static_argnames="config", inline=True)
def rope_angles(
    positions: Int[Array, "B T"],
    config: ModelConfig,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
) -> tuple[Array, Array]:
    """Cosines and sines for ``apply_rope``, each float32 ``[B, T, 1, F]``.

    They stay in float32 for every model type: bfloat16 cannot tell neighbouring positions apart far into a context.

    Args:
        positions: where in its text each token stands.
        config: the architecture.
        lengths: tokens in each row's whole text, or in what each token is the end of, which ``dynamic`` scaling goes
            by; None is up to the last position that is given.
    """
    scaling = config.rope_scaling
    frequencies = jnp.asarray(rope_frequencies(config))
    if scaling is not None and scaling.kind == "dynamic":
        lengths = jnp.max(positions, axis=-1) + 1 if lengths is None else lengths
        frequencies = _dynamic(lengths.reshape(len(positions), -1), scaling, config)[:, :, None]
    # An axis of size 1 for the heads, which all turn alike.
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    size = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * size, jnp.sin(angles) * size


@jax.named_scope("rope")
@partial(jax.jit, inline=True)
def apply_rope(x: Float[Array, "B T N H"], rotation: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotate each pair ``(x[i], x[i + F])`` of the first 2 F features by its angle; the type stays that of ``x``."""
    cos, sin = rotation
    # Feature i turns with feature i + F (Hugging Face's layout), not with its neighbour (the paper's and Meta's). The
    # converter puts weights that were made for the other order into this one.
    half = cos.shape[-1]
    first, second = (x[..., part : part + half].astype(jnp.float32) for part in (0, half))
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    # F is half of the head's features, or less: what is left of them says nothing of positions.
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
