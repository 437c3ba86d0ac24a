"""Quantised keys and values of a KV cache: int8 features, and a scale for each token and head.

A key of float32 takes 4 bytes a feature, here it takes 1, and 4 more for each head of each token. Attention needs no
copy in a wider type: scales of keys multiply the scores, scales of values the probabilities.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

MAX_INT8_VALUE = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedSlots:
    """Stands for ``values * scales[..., None]``.

    Attributes:
        values: int8 ``[B, K, S, H]``, from -127 to 127.
        scales: float32 ``[B, K, S]``, what 1 stands for; 0 where all values are 0.
    """

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what this stands for."""
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return int(self.values.nbytes + self.scales.nbytes)


Slots = Float[Array, "_ K _ H"] | QuantizedSlots
"""Keys or values of a cache: rows or pages, kv heads, slots, features."""


def quantize_slots(x: Float[Array, "*tokens H"]) -> tuple[Int8[Array, "*tokens H"], Float[Array, "*tokens"]]:
    """The values and scales of keys or values: the largest feature of each is 127 or -127."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / MAX_INT8_VALUE
    values = jnp.round(wide / jnp.where(scales > 0, scales, 1.0)[..., None])
    return values.astype(jnp.int8), scales


def split_slots(slots: Any, dtype: Any) -> tuple[Array, Array | None]:
    """Numbers of this type, and the scales ``[B, K, S]`` that they are still to be multiplied by, if any."""
    if isinstance(slots, QuantizedSlots):
        return slots.values.astype(dtype), slots.scales
    return slots, None
