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
# # 8. Delta nets: a state in place of a cache
#
# Qwen3.5 and Qwen3-Next keep keys and values in every fourth layer only. At the end of this chapter you will have built
# what stands in the others, a gated delta net: token by token, then many tokens at a time, and found it equal to the
# library's. You will know what it saves at a long context, and what it costs.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"

# %% [markdown]
# ## A matrix that remembers
#
# Attention keeps every key and value, and compares each new query with all of them: exact, and more work with every
# token. A **recurrent state** is the other way: one matrix M for each head, `[dk, dv]` for keys of dk features
# and values of dv. A token writes by adding an outer product, and reads by a product:
#
# - write value v under key k: $M \leftarrow M + k v^T$
# - read with query q: $y = M^T q$
#
# Whatever the text's length, M has the same size. With keys of length one that stand at right angles to each other,
# every value comes back exactly.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

rng = np.random.default_rng(0)
size = 8
keys, values = np.eye(size), rng.standard_normal((size, size))

memory = np.zeros((size, size))
for k, v in zip(keys, values, strict=True):
    memory += np.outer(k, v)
print("largest error of a value read by its key:", np.abs(memory.T @ keys[3] - values[3]).max())

memory += np.outer(keys[3], values[0])  # another value under a key that has one already
error = np.abs(memory.T @ keys[3] - values[0]).max()
print("after a second write under key 3, the new value is missed by", error)

# %% tags=["figure"]
# Figure: attention keeps a key and a value for every token; a delta net changes one matrix with every token.
fig, (upper, lower) = plt.subplots(2, 1, figsize=(6, 3.4))
for token in range(6):
    for cell in range(token + 1):
        place = (token * 2 + cell % 3 * 0.5, 2.4 - cell // 3 * 0.9)
        upper.add_patch(plt.Rectangle(place, 0.44, 0.75, fc="#56b4e9", ec="#666666"))
    shade = plt.cm.Blues(0.25 + 0.1 * token)
    lower.add_patch(plt.Rectangle((token * 2, 1.5), 1.44, 1.65, fc=shade, ec="#666666"))
    lower.text(token * 2 + 0.72, 2.3, "[dk, dv]", ha="center", va="center", size=9)
    for ax in (upper, lower):
        ax.text(token * 2 + 0.7, 3.4, f"token {token}", ha="center", size=9)
        ax.set(xlim=(-0.2, 11.8), ylim=(1.2, 4.2))
        ax.axis("off")
upper.set_title("attention: a key [k] and a value [v] more with every token", size=11)
lower.set_title("delta net: one matrix [dk, dv], which changes with every token", size=11)
fig.tight_layout()
plt.show()

# %% [markdown]
# The second write left the sum of both values. That is what plain sums do: nothing is ever replaced.
#
# ## The delta rule
#
# The remedy: look first what stands under the key, and write only the difference. This is the **delta rule**. A
# number $\beta$ between 0 and 1, which the token computes from its own features, says how much of the difference is
# written. And before each token the whole matrix **decays**: it is multiplied by $e^g$ with $g \le 0$, so that what
# is old makes room. With both it is a *gated* delta net.
#
# $$M \leftarrow e^{g} M; \qquad M \leftarrow M + k\,\bigl(\beta\,(v - M^T k)\bigr)^T; \qquad y = M^T q$$


# %%
def token_by_token(q, k, v, g, beta, memory):
    """One head: q, k [T, dk], v [T, dv], g, beta [T], memory [dk, dv]. Returns y [T, dv] and the memory."""
    outputs = []
    for t in range(len(q)):
        memory = memory * np.exp(g[t])
        change = beta[t] * (v[t] - memory.T @ k[t])
        memory = memory + np.outer(k[t], change)
        outputs.append(memory.T @ q[t])
    return np.stack(outputs), memory


twice = np.stack([keys[3], keys[3]])
written = np.stack([values[3], values[0]])
read, _ = token_by_token(twice, twice, written, np.zeros(2), np.ones(2), np.zeros((size, size)))
print("after the second write it reads the new value, to", np.abs(read[1] - values[0]).max())

# %% tags=["figure"]
# Figure: how much of a value is left after so many tokens, for several decays.
fig, ax = plt.subplots(figsize=(6, 3))
tokens = np.arange(200)
for g, colour in ((-0.1, "#d55e00"), (-0.02, "#e69f00"), (-0.005, "#56b4e9"), (0.0, "#0072b2")):
    ax.plot(tokens, np.exp(g * tokens), color=colour, lw=2, label=f"g = {g}")
ax.set(xlabel="tokens since it was written", ylabel="share that is left", ylim=(0, 1.05))
ax.legend(frameon=False, loc="center right")
fig.tight_layout()
plt.show()

# %% [markdown]
# Every token computes its own g and $\beta$, in every head: at a word that begins a new topic a head may let everything
# go, at another one nothing.
#
# ## Many tokens at a time
#
# Decode has one token at a time, and this loop is all it needs. For a prompt it is slow: T small steps, one after
# another, where a device wants large products. But the loop can be written as products. Take a **chunk** of C tokens.
# Let $G_t = g_1 + \dots + g_t$, so that $e^{G_t - G_s}$ is the decay from token s to token t. What token t writes,
# $u_t$, depends on what the tokens before it in the chunk have written, and on the memory M at the chunk's beginning:
#
# $$u_t = \beta_t \Bigl(v_t - e^{G_t} M^T k_t - \sum_{s<t} e^{G_t-G_s} (k_t \cdot k_s)\, u_s\Bigr)$$
#
# That is a system of equations $(I + A)\,u = b$ with $A_{ts} = \beta_t\, e^{G_t-G_s} (k_t \cdot k_s)$ for $s < t$: A is
# triangular, so it can be solved. The rest are products of matrices.


# %%
def chunk_by_chunk(q, k, v, g, beta, memory, chunk: int):
    """The same as ``token_by_token``, ``chunk`` tokens at a time."""
    outputs = []
    for start in range(0, len(q), chunk):
        here = slice(start, start + chunk)
        total = np.cumsum(g[here])  # G
        past = np.tril(np.exp(np.minimum(total[:, None] - total[None, :], 0)))  # decay from s to t, for s <= t
        A = np.tril(beta[here, None] * past * (k[here] @ k[here].T), -1)
        b = beta[here, None] * (v[here] - np.exp(total)[:, None] * (k[here] @ memory))
        u = np.linalg.solve(np.eye(len(total)) + A, b)  # what each token writes
        outputs.append(np.exp(total)[:, None] * (q[here] @ memory) + (past * (q[here] @ k[here].T)) @ u)
        memory = np.exp(total[-1]) * memory + k[here].T @ (past[-1][:, None] * u)
    return np.concatenate(outputs), memory


T, dk, dv = 200, 16, 12


def unit(x):
    """Rows of length one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


q, k = unit(rng.standard_normal((T, dk))) * dk**-0.5, unit(rng.standard_normal((T, dk)))
v = rng.standard_normal((T, dv))
g, beta = -rng.exponential(0.05, T), rng.uniform(0, 1, T)
zeros = np.zeros((dk, dv))

one, end_one = token_by_token(q, k, v, g, beta, zeros)
for chunk in (1, 16, 64):
    many, end_many = chunk_by_chunk(q, k, v, g, beta, zeros, chunk)
    steps, differs = -(-T // chunk), max(np.abs(many - one).max(), np.abs(end_many - end_one).max())
    print(f"chunks of {chunk:2}: {steps:3} steps, output and memory differ by at most {differs:.1e}")

# %% [markdown]
# Equal, but for rounding. The library has both as `recurrent_delta_rule` and `chunked_delta_rule` in
# `jllm_core.ops.delta_net`, over rows B and heads H (which is no width in this chapter), in float32, with chunks of 64.
# For the equations it has a solver made of products, for a TPU is slow at anything else.

# %%
from jllm_core.ops import delta_net as library

batched = [jnp.asarray(array, jnp.float32)[None, :, None] for array in (q, k, v, g, beta)]  # [B, T, H, ...]
empty = jnp.zeros((1, 1, dk, dv))  # [B, H, dk, dv]

y, state = library.chunked_delta_rule(*batched, empty)
print("chunked:  ", np.abs(np.asarray(y[0, :, 0]) - one).max(), np.abs(np.asarray(state[0, 0]) - end_one).max())

first, state = library.recurrent_delta_rule(*(array[:, :1] for array in batched), empty)
print("recurrent:", np.abs(np.asarray(first[0, 0, 0]) - one[0]).max())

# %% [markdown]
# ## The layer around it
#
# A layer makes q, k and v from its input by linear maps, as attention does. Then each feature goes through a
# **convolution** over the last four tokens: a weighted sum of what the feature was at these tokens, and then silu. It
# lets a head see a few neighbours before it writes, and its last three inputs are a part of the state. q and k are
# scaled to length one, and q is divided by the root of its width. $g = -e^{a} \cdot \log(1 + e^{\dots})$ is never
# positive, $\beta = 1 / (1 + e^{-\dots})$ is between 0 and 1. In the end the output is normalised and multiplied by a
# gate, and goes back to D features. Here it is whole, and beside the library's, on random weights.

# %%
from jllm_core import DeltaNetConfig, ModelConfig, init_weights

config = ModelConfig(
    model_type="qwen3_5",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=1024,
    rope_theta=1e4,
    qk_norm=True,
    rotary_dim=4,
    output_gate=True,
    centered_norm=True,
    mixers=("delta_net", "delta_net", "delta_net", "attention"),
    delta_net=DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=16),
)
weights = init_weights(config, jax.random.key(0))
w = jax.tree.map(np.asarray, weights.layers[0].attn)
print(weights.layers[0].attn)


# %%
def silu(x):
    return x / (1 + np.exp(-x))


def convolve(x, kernel):
    """H heads of width K, [T, H, K], and [W, H, K]: token t sees t - W + 1 to t."""
    padded = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), x])
    return silu(sum(padded[i : i + len(x)] * kernel[i] for i in range(len(kernel))))


def layer(x, w, eps):
    """x [T, D] -> [T, D]."""
    project = partial(np.einsum, "td,dhk->thk", x)
    q, k, v = (convolve(project(m), c) for m, c in ((w.q, w.conv_q), (w.k, w.conv_k), (w.v, w.conv_v)))
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    beta = 1 / (1 + np.exp(-(x @ w.b)))
    g = -np.exp(w.a_log) * np.log1p(np.exp(x @ w.a + w.dt_bias))
    heads, shared = v.shape[1], v.shape[1] // k.shape[1]  # each key head serves as many value heads
    zeros = np.zeros((k.shape[-1], v.shape[-1]))
    y = [
        token_by_token(q[:, h // shared], k[:, h // shared], v[:, h], g[:, h], beta[:, h], zeros)[0]
        for h in range(heads)
    ]
    y = np.stack(y, axis=1)  # [T, H, v]
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * w.gamma * silu(project(w.z))
    return np.einsum("thk,hkd->td", y, w.o)


x = rng.standard_normal((50, config.hidden_size)).astype(np.float32)
theirs, state = library.delta_net(jnp.asarray(x)[None], weights.layers[0].attn, None, None, config.rms_norm_eps)
ours = layer(x, w, config.rms_norm_eps)
print("differs by", np.abs(np.asarray(theirs[0]) - ours).max(), "of", np.abs(ours).max())
print({name: array.shape for name, array in vars(state).items()})

# %% [markdown]
# ## A whole model of this kind
#
# The config above is a small Qwen3.5, a **hybrid**: three delta nets, then attention, as `mixers` says. Its weights
# are random, so it says nothing of interest, but its cache and states do their work: `generate` feeds the prompt once
# and then one token at a time, and chooses the same tokens as a run over the whole text for each of them, without any
# memory.

# %%
from jllm_core import ShardingRules, abstract_weights, forward
from jllm_runtime import Model, SamplingParams, generate, make_mesh

mesh, rules = make_mesh(devices=jax.devices()[:1]), ShardingRules()
placed = jax.device_put(weights, rules.tree_shardings(abstract_weights(config), mesh))
model = Model(config, placed, mesh, rules)

prompt = rng.integers(0, config.vocab_size, 100).tolist()
[output] = generate(model, [prompt], SamplingParams(max_tokens=8), progress=False)

text = list(prompt)
run = jax.jit(lambda tokens: forward(tokens, jnp.arange(tokens.shape[1])[None], weights, config)[0])
for _ in range(8):
    padded = jnp.array([text + [0] * (108 - len(text))])  # behind the text: no token sees those after it
    text.append(int(run(padded)[0, len(text) - 1].argmax()))
print("with states:   ", output.token_ids)
print("without memory:", text[100:])

# %% [markdown]
# ## What it saves
#
# The sizes are in the configs. `jllm plan` knows those of the published models, so we can ask its catalogue, and draw
# the memory of one text: keys and values in bfloat16 (two bytes a number) for the layers of attention, states in
# float32 for the delta nets. (35B-A3B has 35 billion weights, of which a token uses 3.)

# %%
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.memory import states_info


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of a token, in bfloat16."""
    return 2 * len(config.layers_with("attention")) * config.num_kv_heads * config.head_dim * 2


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the states of a text, in float32."""
    return sum(info.size * 4 for info in jax.tree.leaves(states_info(config, rows=1)))


names = ["Qwen/Qwen3-4B", "Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-35B-A3B"]
print(f"{'':22}{'KiB a token':>12}{'states, MiB':>12}{'at 262,144 tokens, GiB':>24}")
for name in names:
    published = PUBLISHED[name].config
    total = kv_bytes(published) * 2**18 + state_bytes(published)
    print(f"{name:22}{kv_bytes(published) / 2**10:12.0f}{state_bytes(published) / 2**20:12.1f}{total / 2**30:24.1f}")

# %% tags=["figure"]
# Figure: memory of one text by its length, for a model with attention in all layers and for two hybrids of 4B and 27B.
fig, ax = plt.subplots(figsize=(6, 3.6))
lengths = 2 ** np.arange(6, 19)
for name, colour in zip(names[:1] + names[2:4], ("#d55e00", "#0072b2", "#56b4e9"), strict=True):
    published = PUBLISHED[name].config
    total = (kv_bytes(published) * lengths + state_bytes(published)) / 2**20
    ax.loglog(lengths, total, color=colour, lw=2, base=2, label=name.removeprefix("Qwen/"))
ax.set_xticks([64, 1024, 16384, 262144], ["64", "1,024", "16,384", "262,144"])
ax.set_yticks([8, 64, 512, 4096, 32768], ["8 MiB", "64 MiB", "512 MiB", "4 GiB", "32 GiB"])
ax.set(xlabel="tokens of the text", ylabel="memory of its past")
ax.legend(frameon=False)
ax.grid(color="#eeeeee")
fig.tight_layout()
plt.show()

# %% [markdown]
# A short text costs more than with attention alone: its states are there from the first token. From some length on the
# hybrid is far below, and a decode step has as much less to read.
#
# What it costs: a state cannot be cut. Keys and values of the first hundred tokens are a part of those of two
# hundred, so the prefix cache of chapter 7 has them for free. The state after a hundred tokens is gone once the next
# token is in. So the engine keeps copies of states at chosen places, **snapshots**, from which prompts that begin
# alike go on. And what all states have forgotten is lost to the delta nets. Every fourth layer is attention, which can
# still look it up.

# %% [markdown]
# ## Exercises

# %% [markdown]
# ### Exercise 8.1: half of it
#
# A head should have half of a value left after n tokens in which nothing is written under its key. Which g does it
# need?


# %% tags=["exercise"]
def decay_for(n: float) -> float:
    """The logarithm of the decay before each token."""
    ...  # your turn


# %% tags=["check"]
if decay_for(10) is None:
    print("Exercise 8.1: your turn.")
else:
    for n in (1, 10, 1000):
        g_n = decay_for(n)
        assert g_n <= 0, f"a decay above one would let the memory grow; got g = {g_n}"
        assert abs(np.exp(g_n * n) - 0.5) < 1e-6, f"after {n} tokens {np.exp(g_n * n):.3f} are left, expected a half"
    print("Exercise 8.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def decay_for(n):
#     return -np.log(2) / n
# ```
#
# </details>

# %% [markdown]
# ### Exercise 8.2: the triangular system
#
# `np.linalg.solve` does not know that A is triangular. Solve $(I + A)\,u = b$ by hand, row after row: row t needs only
# the rows before it. A is `[C, C]` with zeros on and above its diagonal, b is `[C, v]`.


# %% tags=["exercise"]
def solve(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """u [C, v] with (I + A) u = b."""
    ...  # your turn


# %% tags=["check"]
A, b = np.tril(rng.standard_normal((6, 6)), -1), rng.standard_normal((6, 3))
if solve(A.copy(), b.copy()) is None:
    print("Exercise 8.2: your turn.")
else:
    u = solve(A.copy(), b.copy())
    assert np.allclose(u[0], b[0]), "the first token of a chunk writes b[0]: nobody was before it"
    assert np.allclose(u + A @ u, b), "these u do not solve the equations: does each row use the rows that are solved?"
    print("Exercise 8.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def solve(A, b):
#     u = np.zeros_like(b)
#     for t in range(len(b)):
#         u[t] = b[t] - A[t, :t] @ u[:t]
#     return u
# ```
#
# </details>

# %% [markdown]
# ### Exercise 8.3: from which length on
#
# For a hybrid and a model with attention in all layers: from how many tokens on does a text of the hybrid take less
# memory (keys, values and states)? Use `kv_bytes` and `state_bytes`; give the smallest whole number.


# %% tags=["exercise"]
def break_even(hybrid: ModelConfig, attention: ModelConfig) -> int:
    """The fewest tokens with which the hybrid takes less."""
    ...  # your turn


# %% tags=["check"]
small, plain = PUBLISHED["Qwen/Qwen3.5-4B"].config, PUBLISHED["Qwen/Qwen3-4B"].config
if break_even(small, plain) is None:
    print("Exercise 8.3: your turn.")
else:
    n = break_even(small, plain)
    less = [state_bytes(small) + kv_bytes(small) * count < kv_bytes(plain) * count for count in (n - 1, n)]
    assert less[1], f"with {n} tokens the hybrid still takes as much or more"
    assert not less[0], f"it takes less with {n - 1} tokens already"
    print("Exercise 8.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def break_even(hybrid, attention):
#     saved = kv_bytes(attention) - kv_bytes(hybrid)  # by each token
#     return state_bytes(hybrid) // saved + 1
# ```
#
# </details>
