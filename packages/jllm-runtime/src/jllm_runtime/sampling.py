"""From logits to a token, for each row by its own parameters and its own randomness."""

import numbers
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jllm_runtime.errors import RequestError

MAX_SEED = 2**32 - 1

Filter = Callable[[Array, Array], Array]
Enough = Callable[[Array], Array]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    The filters work in the order temperature, top-k, top-p, min-p, each on what the one before it has left, as in
    transformers. Tokens that tie at a filter's edge all stay.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, always.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum; 1 keeps all (arXiv:1904.09751).
        min_p: keep tokens at least this fraction as probable as the most probable one; 0 keeps all (arXiv:2407.01082).
        seed: 0 to 2**32 - 1; the same seed gives the same text, whatever else runs. None draws one.
        max_tokens: most tokens to generate.
        stop: texts that end the answer; the answer does not include them.
        ignore_eos: go on after an end-of-text token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._need(_is_number(self.temperature) and 0 <= self.temperature < float("inf"), "temperature", "0 or above")
        self._need(_is_whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number, 0 (off) or above")
        self._need(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        self._need(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        seed_ok = self.seed is None or (_is_whole(self.seed) and 0 <= self.seed <= MAX_SEED)
        self._need(seed_ok, "seed", f"a whole number from 0 to {MAX_SEED}")
        self._need(_is_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number, 1 or above")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        stop_ok = isinstance(self.stop, Sequence) and all(isinstance(text, str) and text for text in self.stop)
        self._need(stop_ok, "stop", "texts that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))

    def _need(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The parameters of a batch, an entry a row, so that one compiled step serves any mix of requests."""

    temperature: Float[Array | np.ndarray, " B"]
    top_k: Int[Array | np.ndarray, " B"]
    top_p: Float[Array | np.ndarray, " B"]
    min_p: Float[Array | np.ndarray, " B"]
    seed: Int[Array | np.ndarray, " B"]

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "SamplingArrays":
        """The arrays of these requests, in order. A seed is drawn for each that has none."""
        return cls(
            temperature=np.array([row.temperature for row in rows], np.float32),
            top_k=np.array([min(row.top_k, np.iinfo(np.int32).max) for row in rows], np.int32),
            # Not rounded down to zero, which would keep no token at all.
            top_p=np.array([max(row.top_p, np.finfo(np.float32).tiny) for row in rows], np.float32),
            min_p=np.array([row.min_p for row in rows], np.float32),
            seed=np.array([secrets.randbits(32) if row.seed is None else row.seed for row in rows], np.uint32),
        )


def sample(logits: Float[Array, "B V"], positions: Int[Array, " B"], params: SamplingArrays) -> Int[Array, " B"]:
    """Choose each row's next token.

    Args:
        logits: float32.
        positions: where in its text each new token will stand. With the seed it makes the row's random key, so a
            token depends on nothing but its own request.
        params: each row's parameters.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        kept = filtered_logits(logits, params)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(_key(seed), position))(params.seed, positions)
        # Gumbel-max: the argmax of logits plus Gumbel noise has the distribution of their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        choice = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
        return jnp.where(params.temperature > 0, choice, greedy)

    tokens: Array = jax.lax.cond(jnp.any(params.temperature > 0), drawn, lambda: greedy)
    return tokens


def _key(seed: Array) -> Array:
    # The generator is named, not left to a global setting, so that a seed means the same text everywhere.
    return jax.random.key(seed, impl="threefry2x32")


def filtered_logits(logits: Float[Array, "B V"], params: SamplingArrays) -> Float[Array, "B V"]:
    """The logits over the temperature, with minus infinity for every token that a filter takes out."""
    scaled = logits / jnp.maximum(params.temperature, 1e-6)[:, None]
    scaled = _when(jnp.greater(params.top_k, 0), _keep_top_k, scaled, jnp.asarray(params.top_k))
    scaled = _when(jnp.less(params.top_p, 1), _keep_top_p, scaled, jnp.asarray(params.top_p))
    floor = jnp.max(scaled, axis=-1) + jnp.log(params.min_p)
    return jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)


def _when(rows: Bool[Array, " B"], keep: Filter, logits: Array, limit: Array) -> Array:
    """Apply a filter to the rows that want it; its work is only done when there is one."""

    def apply() -> Array:
        return jnp.where(rows[:, None] & ~keep(logits, limit), -jnp.inf, logits)

    filtered: Array = jax.lax.cond(jnp.any(rows), apply, lambda: logits)
    return filtered


def _keep_top_k(logits: Float[Array, "B V"], k: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """The k largest of each row. A search for the k-th value, bit by bit: no sort of the vocabulary."""
    order = _ordered_bits(logits)
    threshold = _largest_threshold(order, lambda kept: jnp.sum(kept, axis=-1) >= k, logits.shape[0])
    return order >= threshold[:, None]


def _keep_top_p(logits: Float[Array, "B V"], p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The fewest tokens of each row whose probabilities reach p, found like the k-th value."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = _ordered_bits(probabilities)
    threshold = _largest_threshold(
        order, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=-1) >= p, logits.shape[0]
    )
    return order >= threshold[:, None]


def _ordered_bits(x: Float[Array, "B V"]) -> Array:
    """uint32 that compare as the floats do (IEEE 754: flip all bits of a negative, the sign bit of a positive)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(order: Array, enough: Enough, rows: int) -> Array:
    """For each row the largest threshold t with ``enough(order >= t)``, or 0 where none is."""

    def try_bit(step: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(enough(order >= candidate[:, None]), candidate, threshold)

    found: Array = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(rows, jnp.uint32))
    return found
