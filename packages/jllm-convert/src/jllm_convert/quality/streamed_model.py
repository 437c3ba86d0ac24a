"""Streamed model: the forward pass of jllm_core, layer by layer, on weights that stay on the disk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jllm_core.array_info import path_name
from jllm_core.backends.base import XLA
from jllm_core.config import ModelConfig
from jllm_core.kv_cache import NoCache
from jllm_core.model import Call, apply_layer, embed, final_norm
from jllm_core.ops.attention import attention
from jllm_core.ops.linear import linear
from jllm_core.ops.rope import rope_angles
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.weights import Layer, MoELayer, Weights

from jllm_convert.quality.streamed_matrix import Read, StreamedMatrix, is_matrix, on_device

HEADS_AT_ONCE = 8
"""Query heads whose scores, ``[T, T]`` each, are in memory at once."""


class StreamedXLA(XLA):
    """XLA outside of jit, which keeps little in memory: a few heads, and one expert, at a time."""

    def attention(
        self, q: jax.Array, k: jax.Array, v: jax.Array, q_positions: Any, k_positions: Any, window: int | None
    ) -> jax.Array:
        """``ops.attention.attention``, a few heads that share their keys at a time."""
        # Cut in numpy, where nothing is compiled for each range.
        queries, keys, values = (np.asarray(x) for x in (q, k, v))
        group, parts = q.shape[2] // k.shape[1], []
        for kv in range(k.shape[1]):
            shared = on_device(keys[:, kv : kv + 1]), on_device(values[:, kv : kv + 1])
            for first in range(kv * group, (kv + 1) * group, HEADS_AT_ONCE):
                own = on_device(queries[:, :, first : min(first + HEADS_AT_ONCE, (kv + 1) * group)])
                parts.append(np.asarray(attention(own, *shared, q_positions, k_positions, window)))
        return on_device(np.concatenate(parts, axis=2))

    def experts(self, x: jax.Array, sizes: jax.Array, layer: MoELayer) -> jax.Array:
        """``Backend.experts``, one after another, matrix by matrix. Those that no token goes to are not read."""
        counts = np.asarray(sizes)
        ends, used = np.cumsum(counts), np.flatnonzero(counts)
        rows = {int(expert): slice(int(ends[expert] - counts[expert]), int(ends[expert])) for expert in used}

        def product(
            equation: str, inputs: np.ndarray, expert: int, matrix: StreamedMatrix, activation: Any = None
        ) -> np.ndarray:
            own = inputs[rows[expert]]
            # XLA compiles for each number of rows: a power of two, so that they are few.
            padded = np.zeros((1 << (len(own) - 1).bit_length(), own.shape[1]), np.float32)
            padded[: len(own)] = own
            y = linear(equation, on_device(padded), matrix)
            return np.asarray(y if activation is None else activation(y))[: len(own)]

        inputs, done = np.asarray(x), np.zeros(x.shape, np.float32)
        hidden = np.zeros((len(inputs), layer.we_down.shape[1]), np.float32)
        for expert, gate in layer.we_gate.entries(used):
            hidden[rows[expert]] = product("RD,DF->RF", inputs, expert, gate, jax.nn.silu)
        for expert, up in layer.we_up.entries(used):
            hidden[rows[expert]] *= product("RD,DF->RF", inputs, expert, up)
        for expert, down in layer.we_down.entries(used):
            done[rows[expert]] = product("RF,FD->RD", hidden, expert, down)
        return on_device(done)


@dataclass(frozen=True)
class StreamedModel:
    """A model that reads one text of T tokens, and never holds a whole weight matrix.

    Attributes:
        config: the architecture.
        infos: the description of the weights, plain or quantised, as they are read.
        read: gives boxes of them.
        length: T, the tokens of the text.
        memory: bytes that the weights in memory stay within. The activations, ``[T, D]``, ``[T, N, H]`` and ``[T, F]``,
            come on top.
        observe: called with the name, in words, and the numbers of activations: the residual stream behind each layer,
            and what goes into each matrix and comes out.
    """

    config: ModelConfig
    infos: Weights
    read: Read
    length: int
    memory: int
    observe: Callable[[str, Any], None] | None = None

    def embed(self, ids: np.ndarray) -> jax.Array:
        """The embeddings of tokens, float32 ``[1, T, D]``; no other row is read."""
        # No norm is read for it: where the shards of a model come one by one, that is in the last.
        no_norm = on_device(np.zeros(0, np.float32))
        return embed(on_device(ids[None]), Weights([], self._matrix("embedding", self.infos.embedding), no_norm))

    def layer(self, x: jax.Array, number: int) -> jax.Array:
        """One layer, ``[1, T, D]`` to ``[1, T, D]``."""
        x = apply_layer(x, self._layer_weights(number), number, NoCache(), self._call)[0]
        if self.observe is not None:
            self.observe(f"the residual stream behind layer {number}", x)
        return x

    def final_norm(self, x: jax.Array) -> jax.Array:
        """The normalised last hidden state, ``[1, T, D]``."""
        embedding, gamma = self._matrix("embedding", self.infos.embedding), self._small_array("gamma_final")
        return final_norm(x, Weights([], embedding, gamma), self.config)

    def head(self) -> tuple[StreamedMatrix, int]:
        """What makes logits of it, and the axis of its vocabulary: ``[D, V]``, or the tied embedding ``[V, D]``."""
        if self.infos.lm_head is None:
            return self._matrix("embedding", self.infos.embedding), 0
        return self._matrix("lm_head", self.infos.lm_head), 1

    @cached_property
    def _call(self) -> Call:
        positions = on_device(np.arange(self.length, dtype=np.int32)[None])
        return Call(self.config, positions, rope_angles(positions, self.config), StreamedXLA())

    def _layer_weights(self, number: int) -> Layer:
        def leaf(path: tuple[Any, ...], info: Any) -> Any:
            name = f"layers.{number}.{path_name(path)}"
            return self._matrix(name, info) if is_matrix(info) else self._small_array(name)

        layer: Layer = jax.tree_util.tree_map_with_path(
            leaf, self.infos.layers[number], is_leaf=lambda info: isinstance(info, QuantizedArray)
        )
        return layer

    def _matrix(self, name: str, info: Any) -> StreamedMatrix:
        return StreamedMatrix(name, info, self.read, self.memory, observe=self.observe)

    def _small_array(self, name: str) -> jax.Array:
        """A norm's weights, a bias, a router: whole."""
        return on_device(self.read(name).astype(np.float32, copy=False))
