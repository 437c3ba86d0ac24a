"""Layers with a delta net on a CPU: the call of their kernel, with its operands."""

from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jllm_core.backends.cpu import ffi
from jllm_core.backends.cpu.layer_calls import closing, matrices_of, rounds_prompts
from jllm_core.backends.slot_cache import StateSlotCache
from jllm_core.config import ModelConfig
from jllm_core.model import Call
from jllm_core.ops.delta_net import no_state
from jllm_core.recurrent_state import RecurrentState
from jllm_core.weights import DeltaNetLayer, Layer


def nets_fit(config: ModelConfig) -> bool:
    """Whether the kernel takes the model's delta nets: heads of whole vectors, of which some columns have room."""
    from jllm_core.backends.cpu.delta_net_kernel import MAX_KEY_FEATURES
    from jllm_core.backends.cpu.llvm_builder import LANES

    net = config.delta_net
    if net is None:
        return True
    return not (net.key_head_dim % LANES or net.value_head_dim % LANES) and net.key_head_dim <= MAX_KEY_FEATURES


def apply_layer(
    x: Float[Array, "B T D"], layer: Layer, number: int, cache: Any, call: Call
) -> tuple[Float[Array, "B T D"], Any]:
    """``model.apply_layer`` of a layer with a delta net; of one with experts, without these. Sums are in float32."""
    from jllm_core.backends.cpu.delta_net_convolution import Convolution
    from jllm_core.backends.cpu.delta_net_kernel import DeltaNet

    w = cast(DeltaNetLayer, layer.attn)
    batch, tokens, _ = x.shape
    rows = x.astype(jnp.float32).reshape(batch * tokens, -1)
    close, weights, workspaces = closing(rows, w.o, None, layer, call)
    given = (("q", w.q), ("k", w.k), ("v", w.v), ("z", w.z), ("a", w.a), ("b", w.b))
    rounded = rounds_prompts(layer, call)
    projections, matrices = matrices_of(*((name, matrix, None) for name, matrix in given), rounded=rounded)
    kernel = DeltaNet(projections, Convolution(w.conv_q.shape[0], w.conv_q.dtype.name), close)
    in_place, counts = isinstance(cache, StateSlotCache), cache.counts
    if in_place:
        state, (state_rows, begins) = cache.states_of(number), cache.state_places()
    else:
        state, state_rows, begins = cache.state(number), jnp.arange(batch), jnp.zeros(batch)
        state = no_state(batch, w) if state is None else state
    counts = jnp.full(batch, tokens) if counts is None else counts
    texts = {"state_rows": state_rows, "begins": begins, "counts": counts}
    operands = {"memory": state.memory, "q_tail": state.q, "k_tail": state.k, "v_tail": state.v, **matrices, **weights}
    operands |= {"x": rows, "pre_gamma": layer.attn_pre_gamma}
    operands |= {name: array.astype(jnp.int32) for name, array in texts.items()}
    operands |= {"conv_q": w.conv_q, "conv_k": w.conv_k, "conv_v": w.conv_v}
    floats = {"a_log": w.a_log, "dt_bias": w.dt_bias, "net_gamma": w.gamma}
    operands |= {name: array.astype(jnp.float32) for name, array in floats.items()}
    kept = [operands[name] for name in kernel.state]
    widths = [int(np.prod(matrix.shape[1:])) for _, matrix in given]
    y, memory, q, k, v, *_ = ffi.call(
        kernel,
        operands,
        [rows.shape, *kept, rows.shape, *((len(rows), width) for width in widths), *workspaces],
        {place: place + 1 for place in range(len(kept))},
        eps=np.float32(call.config.rms_norm_eps),
    )
    moved = RecurrentState(memory, q, k, v)
    cache = cache.with_states(number, moved) if in_place else cache.set_state(number, moved)
    return y.reshape(x.shape).astype(x.dtype), cache
