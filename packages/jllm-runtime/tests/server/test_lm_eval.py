"""The requests of lm-eval 0.4.13, and what it computes from the responses.

Its own client is run by ``hatch run clients:test``, for it brings some sixty packages. Here are its payloads
(``local-completions`` and ``local-chat-completions``), and what its ``parse_logprobs`` reads: of each choice the
entries from the context's length to the last but one. The last is that of the one token that it has to ask for.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jllm_runtime import Model, SamplingParams, Tokenizer
from tokenizers import Tokenizer as RawTokenizer

EOS = "<|im_end|>"


@pytest.fixture(scope="module")
def scored(tiny) -> Model:
    """Says anything, and often ends: whatever it is asked to score, the token that it has to make may be its EOS."""
    raw = RawTokenizer.from_str(tiny.tokenizer.to_json())
    return dataclasses.replace(
        tiny.plain, tokenizer=Tokenizer(raw, {"eos_token": EOS}, tiny.tokenizer.chat_template), eos_ids=(tiny.im_end,)
    )


def payload(prompts: Any) -> dict[str, Any]:
    return {
        **{"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1},
        **{"logprobs": 1, "seed": 1234, "echo": True},
    }


def computed(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    found = choice["logprobs"]
    tokens, tops = found["token_logprobs"][context:-1], found["top_logprobs"][context:-1]
    return sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))


def expected(model: Model, ids: list[int], context: int) -> tuple[float, bool]:
    filled = [ids + [0] * (model.config.context_length - len(ids))]
    logprobs = np.asarray(jax.nn.log_softmax(np.asarray(model.logits(filled), np.float32)[0]))[
        context - 1 : len(ids) - 1
    ]
    chosen = np.array(ids[context:])
    return float(logprobs[np.arange(len(chosen)), chosen].sum()), bool((logprobs.argmax(1) == chosen).all())


def test_a_continuation_has_the_score_of_all_its_tokens(serve, scored: Model, tiny, prompt) -> None:
    """Also where the model would end after it: that token had no entry, and the last one went without a score."""
    ends = dataclasses.replace(scored, eos_ids=tuple(range(272)))  # every token that it makes ends the answer
    texts = [prompt(12, seed) for seed in range(4)]
    greedy = [*texts[0][:8], *tiny.naive_greedy(scored, texts[0][:8], 4)]
    for model in (scored, ends):
        with serve(model) as server:
            reply = server.post("/v1/completions", payload([*texts, greedy]))
            assert reply.is_success, reply.text
            choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
            for choice, ids in zip(choices, [*texts, greedy], strict=True):
                found, known = computed(choice, 8), expected(model, ids, 8)
                assert found[0] == pytest.approx(known[0], abs=1e-3)
                assert found[1] == known[1] == (ids is greedy)
                assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1


def test_a_text_is_scored_as_its_tokens_are(serve, scored: Model) -> None:
    """With ``tokenized_requests=False`` the client sends texts, one at a time."""
    text = f"{EOS}\nthe other"
    ids = scored.tokenizer.encode(text)
    with serve(scored) as server:
        [of_text] = server.post("/v1/completions", payload(text)).json()["choices"]
        [of_ids] = server.post("/v1/completions", payload([ids])).json()["choices"]
    assert computed(of_text, 3) == computed(of_ids, 3)
    assert computed(of_text, 3)[0] == pytest.approx(expected(scored, ids, 3)[0], abs=1e-3)


@pytest.mark.parametrize("until", [[], ["!"], ["\n\n", "u"]], ids=str)
def test_texts_go_on_until_a_stop(until: list[str], serve, tiny) -> None:
    """The client adds the tokenizer's EOS to each task's stops; its ``do_sample`` it takes away itself."""
    # The EOS of the tokenizer is none of the model's: only the stop ends the text.
    model = tiny.saying([*b"Hi, you!", tiny.im_end, *b"pqr"], eos_ids=(tiny.end,))
    with serve(model) as server:
        asked = {"max_tokens": 12, "temperature": 0, "stop": [*until, EOS], "seed": 1234}
        reply = server.post("/v1/completions", {"model": "tiny", "prompt": [[72], [44]], **asked})
        assert reply.is_success, reply.text
        found = [choice["text"] for choice in sorted(reply.json()["choices"], key=lambda choice: choice["index"])]
    whole = ["i, you!", " you!"]
    assert found == [text[: min([text.find(stop) for stop in until if stop in text], default=None)] for text in whole]


@pytest.mark.parametrize("stop", [[], ["!"], [EOS], [EOS, "u", "\n"]], ids=str)
def test_chats_go_on_until_a_stop(stop: list[str], server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"max_tokens": 256, "temperature": 0, "stop": stop, "seed": 1234}
    reply = server.post("/v1/chat/completions", {"messages": messages, "model": "tiny", **asked})
    assert reply.is_success, reply.text
    said = "Hi, you!"
    ends = [said.find(one) for one in stop if one in said]
    assert reply.json()["choices"][0]["message"]["content"] == said[: min(ends, default=None)]
    expected = server.engine.chat(messages, SamplingParams(max_tokens=256, stop=stop)).text
    assert reply.json()["choices"][0]["message"]["content"] == expected
