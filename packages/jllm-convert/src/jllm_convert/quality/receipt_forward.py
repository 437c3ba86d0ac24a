"""The forward pass of the quality receipt: jllm_core.model on weights that are read slab by slab.

All is numpy, where nothing has to be compiled and what is in memory is known, but for the products. The tests hold it
to ``jllm_core.forward``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jllm_core.config import ModelConfig, MoEConfig
from jllm_core.ops.rope import rope_frequencies
from jllm_core.weights import AttentionLayer, MLPLayer, MoELayer, Weights

from jllm_convert.quality.receipt_slabs import Matrix, Read, runs

HEADS_AT_ONCE = 8
"""Query heads whose scores, ``[T, T]`` each, are in memory at once."""


@dataclass(frozen=True)
class SlabModel:
    """A model that reads a text of T tokens, and never holds a whole weight matrix.

    Attributes:
        config: the architecture.
        infos: the description of the weights, plain or quantised, as they are read.
        read: gives boxes of them.
        length: T, the tokens of the text.
        memory: bytes that the weights in memory stay within. The activations, ``[T, D]``, ``[T, N, H]`` and ``[T, F]``,
            come on top.
    """

    config: ModelConfig
    infos: Weights
    read: Read
    length: int
    memory: int

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """The embeddings of tokens, ``[T, D]``; no other row is read."""
        own = np.unique(ids)
        columns = slice(0, self.config.hidden_size)
        rows = np.concatenate([self.read("embedding", (run, columns)).astype(np.float32) for run in runs(own)])
        embedded: np.ndarray = rows[np.searchsorted(own, ids)]
        return embedded

    def block(self, x: np.ndarray, number: int) -> np.ndarray:
        """One layer, ``[T, D]`` to ``[T, D]``: attention and the feed-forward part, each added to what came in."""
        layer, name = self.infos.layers[number], f"layers.{number}"
        out: np.ndarray = x + self._attention(self._norm(x, f"{name}.attn_pre_gamma"), layer.attn, number)
        normed = self._norm(out, f"{name}.attn_post_gamma")
        if isinstance(layer.ffw, MLPLayer):
            out += self._mlp(normed, layer.ffw, f"{name}.ffw")
        else:
            out += self._moe(normed, layer.ffw, f"{name}.ffw")
        return out

    def final(self, x: np.ndarray) -> np.ndarray:
        """The normalised last hidden state, ``[T, D]``."""
        return self._norm(x, "gamma_final")

    def head(self) -> tuple[Matrix, int]:
        """What makes logits of it, and the axis of its vocabulary: ``[D, V]``, or the tied embedding ``[V, D]``."""
        if self.infos.lm_head is None:
            return self._matrix("embedding", self.infos.embedding), 0
        return self._matrix("lm_head", self.infos.lm_head), 1

    def _attention(self, x: np.ndarray, layer: AttentionLayer, number: int) -> np.ndarray:
        name = f"layers.{number}.attn"
        q, k, v = (self._by_heads(x, f"{name}.{which}", getattr(layer, which)) for which in "qkv")
        for states, which in ((q, "q"), (k, "k"), (v, "v")):
            if getattr(layer, f"{which}_bias") is not None:
                states += self._vector(f"{name}.{which}_bias")
        if layer.q_gamma is not None and layer.k_gamma is not None:
            q, k = self._norm(q, f"{name}.q_gamma"), self._norm(k, f"{name}.k_gamma")
        if self.config.rotates(number):
            q, k = rotate(q, *self._rotation), rotate(k, *self._rotation)
        attended = attend(q, k, v, self.config.window(number))
        out = np.zeros_like(x)
        for own, slab in self._matrix(f"{name}.o", layer.o).slabs(0):
            out += product(attended[:, own].reshape(len(x), -1), slab.reshape(-1, x.shape[1]))
        return out if layer.o_bias is None else out + self._vector(f"{name}.o_bias")

    def _by_heads(self, x: np.ndarray, name: str, info: Any) -> np.ndarray:
        """The product with a matrix ``[D, N, H]``, head after head."""
        out = np.empty((len(x), *info.shape[1:]), np.float32)
        for own, slab in self._matrix(name, info).slabs(1):
            out[:, own] = product(x, slab.reshape(len(slab), -1)).reshape(len(x), -1, info.shape[2])
        return out

    def _mlp(self, x: np.ndarray, layer: MLPLayer, name: str) -> np.ndarray:
        hidden = np.empty((len(x), layer.w_gate.shape[1]), np.float32)
        for own, gate in self._columns(x, f"{name}.w_gate", layer.w_gate, f"{name}.b_gate", layer.b_gate):
            hidden[:, own] = silu(gate)
        for own, up in self._columns(x, f"{name}.w_up", layer.w_up, f"{name}.b_up", layer.b_up):
            hidden[:, own] *= up
        out = np.zeros_like(x)
        for own, slab in self._matrix(f"{name}.w_down", layer.w_down).slabs(0):
            out += product(hidden[:, own], slab)
        return out if layer.b_down is None else out + self._vector(f"{name}.b_down")

    def _columns(
        self, x: np.ndarray, name: str, info: Any, bias_name: str, bias: Any
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The product with a matrix ``[D, F]`` and its bias, some columns at a time."""
        added = np.zeros(info.shape[1], np.float32) if bias is None else self._vector(bias_name)
        for own, slab in self._matrix(name, info).slabs(1):
            yield own, product(x, slab) + added[own]

    def _moe(self, x: np.ndarray, layer: MoELayer, name: str) -> np.ndarray:
        """Each token through its own experts. Those that no token goes to are not read."""
        config = self.config.moe
        if config is None:
            raise ValueError("the weights have a mixture of experts, the config says nothing of one")
        weights, experts = route(x, self._vector(f"{name}.w_router"), config)
        order = np.argsort(experts, axis=None, kind="stable")
        tokens, by_expert = order // experts.shape[1], experts.reshape(-1)[order]
        used, first, counts = np.unique(by_expert, return_index=True, return_counts=True)
        rows = {int(e): slice(f, f + c) for e, f, c in zip(used, first, counts, strict=True)}
        hidden = np.empty((len(tokens), config.intermediate_size), np.float32)
        for expert, own, slab in self._matrix(f"{name}.we_gate", layer.we_gate).slabs_of(used, 2):
            hidden[rows[expert], own] = silu(few_rows_product(x[tokens[rows[expert]]], slab))
        for expert, own, slab in self._matrix(f"{name}.we_up", layer.we_up).slabs_of(used, 2):
            hidden[rows[expert], own] *= few_rows_product(x[tokens[rows[expert]]], slab)
        hidden *= weights.reshape(-1)[order][:, None]
        out = np.zeros_like(x)
        for expert, own, slab in self._matrix(f"{name}.we_down", layer.we_down).slabs_of(used, 1):
            out[tokens[rows[expert]]] += few_rows_product(hidden[rows[expert], own], slab)  # each token is there once
        return out

    def _matrix(self, name: str, info: Any) -> Matrix:
        return Matrix(name, info, self.read, self.memory)

    def _vector(self, name: str) -> np.ndarray:
        """A small array, whole: a norm's weights, a bias, a router."""
        return self.read(name).astype(np.float32, copy=False)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        normed: np.ndarray = x * scale * self._vector(name)
        return normed

    @cached_property
    def _rotation(self) -> tuple[np.ndarray, np.ndarray]:
        return rotation(self.config, self.length)


def product(x: np.ndarray, slab: np.ndarray, transposed: bool = False) -> np.ndarray:
    """``x [M, K]`` by a slab ``[K, R]``, or ``[R, K]`` where it is transposed.

    By XLA and not by numpy, whose BLAS has threads that spin until the last of them is done: on a machine that has
    other work as well, that takes several times as long.
    """
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return np.asarray(jax.lax.dot_general(x, slab, dimensions, precision=jax.lax.Precision.HIGHEST))


def few_rows_product(x: np.ndarray, slab: np.ndarray) -> np.ndarray:
    """``product``, which compiles for each number of rows, by way of a power of two of them."""
    padded = np.zeros((1 << (len(x) - 1).bit_length(), x.shape[1]), np.float32)
    padded[: len(x)] = x
    return product(padded, slab)[: len(x)]


def rotation(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the positions 0 to ``length``, ``[T, 1, H / 2]``, as ``rope_angles`` of jllm_core."""
    frequencies, scaling = rope_frequencies(config), config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        beyond = max(length / (scaling.original_context_length or 1), 1.0)
        growth = (scaling.factor * beyond - (scaling.factor - 1)) ** (config.head_dim / (config.head_dim - 2))
        frequencies = frequencies / growth ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(length, dtype=np.float32)[:, None, None] * frequencies.astype(np.float32)
    size = np.float32(1.0 if scaling is None else scaling.attention_factor)
    return np.cos(angles) * size, np.sin(angles) * size


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads ``[T, N, H]``, turned by their positions: feature i together with feature ``i + H/2``."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Causal attention of ``[T, N, H]`` to ``[T, K, H]``, a few heads that share their keys at a time."""
    length, heads, size = q.shape
    group = heads // k.shape[1]
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    out = np.empty_like(q)
    for first in (kv * group + head for kv in range(k.shape[1]) for head in range(0, group, HEADS_AT_ONCE)):
        kv = first // group
        own = slice(first, min(first + HEADS_AT_ONCE, (kv + 1) * group))
        scores = product(q[:, own].reshape(-1, size), k[:, kv], transposed=True).reshape(length, -1, length)
        scores = np.where(seen[:, None], scores * np.float32(size**-0.5), -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out[:, own] = product(scores.reshape(-1, length), v[:, kv]).reshape(length, -1, size)
    return out


def route(x: np.ndarray, router: np.ndarray, config: MoEConfig) -> tuple[np.ndarray, np.ndarray]:
    """The weights and the numbers of each token's experts, ``[T, X]``, as ``route`` of jllm_core."""
    scores = product(x, router)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    experts = np.argsort(-scores, axis=-1, kind="stable")[:, : config.experts_per_token]
    weights = np.take_along_axis(scores, experts, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True) if config.normalize_weights else weights, experts


def silu(x: np.ndarray) -> np.ndarray:
    """``x / (1 + e^-x)``."""
    with np.errstate(over="ignore"):  # far below zero, where the result is zero
        result: np.ndarray = x / (1 + np.exp(-x))
    return result
