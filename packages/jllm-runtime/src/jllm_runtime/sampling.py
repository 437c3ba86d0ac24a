"""Sampling: from logits to a token, for each row by its own parameters and its own randomness."""

import math
import numbers
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from jllm_core.backends.base import XLA, Backend
from jllm_core.ops.sampling import argmax, draw, thresholds

from jllm_runtime.errors import ModelError, RequestError, check_text
from jllm_runtime.grammar import Grammar

if TYPE_CHECKING:
    from jllm_runtime.model import Model

MAX_SEED = 2**64 - 1

MAX_LOGPROBS = 20
"""Most alternatives to a token whose log-probabilities can be asked for."""

MAX_ANSWERS = 128

NO_NUMBERS = -2
"""In place of a token that the programs could not choose, for its logits are not numbers; -1 is behind the last."""

ENGINE_FIELDS = ("min_tokens", "logprobs", "prompt_logprobs", "n", "grammar")
"""Fields that the Engine alone honours; ``generate`` and ``stream_generate`` honour all others."""

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Fields that choose among the tokens. Publishers recommend values in ``generation_config.json``."""

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that change the logits of tokens in the text. Publishers may recommend these too."""

PUBLISHABLE = (*DRAWING, *PENALTIES)
"""Fields that a publisher may recommend."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    The filters work in the order temperature, top-k, top-p, min-p, each on what the one before it has left, as in
    transformers. Tokens that tie at a filter's edge all stay.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, always.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum, and at least the most probable one; 1 keeps
            all (arXiv:1904.09751).
        min_p: keep tokens at least this fraction as probable as the most probable one; 0 keeps all (arXiv:2407.01082).
        seed: 0 to 2**64 - 1; the same seed gives the same text, whatever else runs. None draws one.
        max_tokens: most tokens to generate.
        stop: texts that end the answer; the answer does not include them. A special token in one ends it by its id.
        ignore_eos: go on after an end-of-text token.
        stop_token_ids: more ids that end the answer, with ``ignore_eos`` too.
        min_tokens: before so many, neither an end-of-text id nor a stop ends the answer; the ids are not drawn.
        repetition_penalty: divides the positive logits of tokens in prompt or answer, multiplies the negative ones.
        presence_penalty: taken off the logits of tokens that are in the answer.
        frequency_penalty: the same, for each time that they are.
        logit_bias: added to the logits of these token ids.
        logprobs: give each token's log-probability, and of as many of the most probable ones, up to 20. They are the
            model's own, before temperature, penalties and filters.
        prompt_logprobs: the same for the tokens of the prompt.
        n: answers; the seed of answer i is ``seed + i``.
        grammar: what the answer must be.
        skip_special_tokens: leave special tokens out of the text; the one that ends it is left out anyway.

    ``generate`` and ``stream_generate`` honour all of them but ``min_tokens``, the log-probabilities, ``n`` and
    ``grammar``, which are for the ``Engine``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._need(_is_number(self.temperature) and 0 <= self.temperature < float("inf"), "temperature", "0 or above")
        self._need(_is_whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number, 0 (off) or above")
        self._need(_is_number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "from 0 to 1 (off)")
        self._need(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        seed_ok = self.seed is None or (_is_whole(self.seed) and 0 <= self.seed <= MAX_SEED)
        self._need(seed_ok, "seed", f"a whole number from 0 to {MAX_SEED}")
        self._need(_is_whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number, 1 or above")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        stop_ok = isinstance(self.stop, Sequence) and all(isinstance(text, str) and text for text in self.stop)
        self._need(stop_ok, "stop", "texts that are not empty")
        object.__setattr__(self, "stop", tuple(self.stop))
        for text in self.stop:
            check_text(text, "stop")
        self._check_engine_fields()

    def _check_engine_fields(self) -> None:
        ids_ok = isinstance(self.stop_token_ids, Sequence) and all(map(_is_whole, self.stop_token_ids))
        self._need(ids_ok, "stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._need(_is_whole(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "a whole number, 0 or above")
        self._need(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})")
        repetition = self.repetition_penalty
        self._need(_is_finite(repetition) and repetition > 0, "repetition_penalty", "above 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._need(_is_finite(getattr(self, name)), name, "a number (0 is off)")
        bias_ok = isinstance(self.logit_bias, Mapping) and all(
            _is_whole(token) and _is_finite(value) for token, value in self.logit_bias.items()
        )
        self._need(bias_ok, "logit_bias", "a number for each of some token ids")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            ok = count is None or (_is_whole(count) and 0 <= count <= MAX_LOGPROBS)
            self._need(ok, name, f"a whole number from 0 to {MAX_LOGPROBS}, or None (off)")
        self._need(_is_whole(self.n) and 1 <= self.n <= MAX_ANSWERS, "n", f"a whole number from 1 to {MAX_ANSWERS}")
        self._need(self.grammar is None or isinstance(self.grammar, Grammar), "grammar", "a Grammar, or None (off)")
        self._need(isinstance(self.skip_special_tokens, bool), "skip_special_tokens", "True or False")

    @classmethod
    def of(cls, model: "Model", **fields: Any) -> Self:
        """The parameters that a model's publisher recommends, with those that are given in their place.

        The publisher's are temperature, top_k, top_p, min_p and the penalties of ``generation_config.json``. It is
        greedy where that has none of them, or says ``do_sample: false``. What the file leaves out is off, as in vLLM
        (transformers would add a top_k of 50).

        Nothing else of the file is read here: ``max_new_tokens`` and ``max_length`` belong to whoever waits for the
        answer, so ``max_tokens`` stays 256 unless it is given.

        Args:
            model: from ``load_model``.
            fields: fields of this class; None takes the publisher's.

        Raises:
            ModelError: a value of the publisher's that is impossible, and that none of ``fields`` replaces.
            RequestError: an impossible value in ``fields``.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        theirs = {name: value for name, value in published(model).items() if name not in given}
        for name, value in theirs.items():
            try:
                cls(**{name: value})
            except RequestError as error:
                folder = "" if model.path is None else f"{model.path}/"
                raise ModelError(
                    f"{folder}generation_config.json: {error}; correct the file, or give {name}"
                ) from error
        return cls(**theirs, **given)

    @property
    def for_engine(self) -> list[str]:
        """The names of the fields that were set and that only the Engine honours."""
        default = SamplingParams()
        return [name for name in ENGINE_FIELDS if getattr(self, name) != getattr(default, name)]

    @property
    def is_penalized(self) -> bool:
        """Whether the logits of its tokens depend on the text so far, or on a bias."""
        default = SamplingParams()
        return bool(self.logit_bias) or any(getattr(self, name) != getattr(default, name) for name in PENALTIES)

    def _need(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def published(model: "Model") -> dict[str, Any]:
    """The fields of SamplingParams that a model's ``generation_config.json`` sets, not checked."""
    settings = model.generation_config
    found = {name: settings[name] for name in PENALTIES if settings.get(name) is not None}
    drawn = {name: settings[name] for name in DRAWING if settings.get(name) is not None}
    if settings.get("do_sample") is False or not (drawn or settings.get("do_sample")):
        return found
    # transformers divides by 1 where the file asks for sampling and names no temperature.
    return {"temperature": 1.0, **drawn, **found}


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


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
    seed: Int[Array | np.ndarray, "B 2"]  # the upper and the lower 32 bits

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "SamplingArrays":
        """The arrays of these requests, in order. A seed is drawn for each that has none."""
        seeds = [draw_seed() if row.seed is None else int(row.seed) for row in rows]
        return cls(
            temperature=np.array([row.temperature for row in rows], np.float32),
            top_k=np.array([min(row.top_k, np.iinfo(np.int32).max) for row in rows], np.int32),
            # Not rounded down to zero, which would keep no token at all.
            top_p=np.array([max(row.top_p, np.finfo(np.float32).tiny) for row in rows], np.float32),
            min_p=np.array([row.min_p for row in rows], np.float32),
            seed=np.array([divmod(seed, 2**32) for seed in seeds], np.uint32),
        )


def draw_seed() -> int:
    """A random seed of 32 bits, the same in every process."""
    # Every process draws, and all take the first one's.
    own = secrets.randbits(32)
    if jax.process_count() == 1:
        return own
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.uint32(own)))


def sample(
    logits: Float[Array, "B V"], positions: Int[Array, " B"], params: SamplingArrays, backend: Backend | None = None
) -> Int[Array, " B"]:
    """Choose each row's next token.

    Args:
        logits: float32.
        positions: where in its text each new token will stand. With the seed it makes the row's random key, so a
            token depends on nothing but its own request.
        params: each row's parameters.
        backend: where this runs; XLA when None.
    """
    backend = backend or XLA()
    greedy: Array = (backend.argmax or argmax)(logits)

    def drawn() -> Array:
        kept = filtered_logits(logits, params, backend)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(_key(seed), position))(params.seed, positions)
        choice = (backend.draw or draw)(kept, keys)
        return jnp.where(params.temperature > 0, choice, greedy)

    tokens: Array = jax.lax.cond(jnp.any(params.temperature > 0), drawn, lambda: greedy)
    return tokens


def not_numbers(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Rows whose logits, before penalties and masks, hold NaN or infinity. XLA shares the maximum with ``argmax``."""
    return ~jnp.isfinite(jnp.max(logits, axis=-1))


def _key(seed: Array) -> Array:
    # The generator is named, not left to a global setting, so that a seed means the same text everywhere. These are the
    # bits of jax.random.key, which without JAX's 64-bit mode takes seeds of 32 bits only.
    key: Array = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return key


def filtered_logits(
    logits: Float[Array, "B V"], params: SamplingArrays, backend: Backend | None = None
) -> Float[Array, "B V"]:
    """The logits over the temperature, with minus infinity for every token that a filter takes out."""
    scaled = logits / jnp.maximum(params.temperature, 1e-6)[:, None]
    k, p = jnp.asarray(params.top_k), jnp.asarray(params.top_p)
    nothing_out = jnp.full(len(scaled), -jnp.inf, scaled.dtype)
    find = (backend and backend.thresholds) or thresholds
    edge = jax.lax.cond(jnp.any((k > 0) | (p < 1)), lambda: find(scaled, k, p), lambda: nothing_out)
    floor = jnp.maximum(edge, jnp.max(scaled, axis=-1) + jnp.log(params.min_p))
    return jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
