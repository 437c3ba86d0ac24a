"""Endpoint /v1/chat/completions, through OpenAI's own client."""

import asyncio
import dataclasses
import json
import math
import re
from typing import Any

import openai
import pydantic
import pytest
from jllm_runtime import Engine, SamplingParams, Tokenizer

CHAT = "/v1/chat/completions"
ANSWER = "Hi, you!"
HELLO = [{"role": "user", "content": "hello"}]


def ask(client: openai.OpenAI, messages: list[dict[str, Any]] = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def text(reply: Any) -> str:
    [choice] = reply.choices
    return choice.message.content


@pytest.fixture
def babble(babbling):
    """Asks the model that says anything, with JLLM's own parameters as any others."""
    ours = {"top_k", "min_p", "min_tokens", "repetition_penalty", "ignore_eos", "stop_token_ids"}
    ours |= {"regex", "choice", "grammar", "chat_template_kwargs"}
    with babbling.openai() as client:

        def ask_it(**fields: Any) -> Any:
            extra = {name: fields.pop(name) for name in ours & fields.keys()}
            return ask(client, **{"max_tokens": 12, "seed": 1, "temperature": 1, **fields}, extra_body=extra)

        yield ask_it


# ---- Answers, whole and streamed.


def test_an_answer(client: openai.OpenAI, tiny) -> None:
    reply = ask(client, temperature=0)
    assert (text(reply), reply.choices[0].finish_reason, reply.choices[0].index) == (ANSWER, "stop", 0)
    assert (reply.object, reply.model, reply.choices[0].message.role) == ("chat.completion", "tiny", "assistant")
    prompt = len(tiny.tokenizer.encode_chat(HELLO))
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, len(ANSWER) + 1)  # and the token that ended it
    assert usage.total_tokens == prompt + len(ANSWER) + 1


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
    assert "".join(choice.delta.content or "" for choice in choices) == ANSWER
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"
    assert len(choices) > 3  # not all at once
    assert {chunk.usage for chunk in chunks} == {None}


def test_a_stream_with_its_usage(client: openai.OpenAI) -> None:
    *chunks, last = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert last.choices == []
    assert last.usage == ask(client).usage
    assert {chunk.usage for chunk in chunks} == {None}


def test_the_helper_that_collects_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        assert text(stream.get_final_completion()) == ANSWER
    assert "content.delta" in kinds


async def stream_beside(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

        async def one() -> str:
            chunks = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        return await asyncio.gather(*(one() for _ in range(20)))


def test_many_streams_at_a_time(server) -> None:
    assert asyncio.run(stream_beside(server.url)) == [ANSWER] * 20
    server.wait_until_empty()


def test_tokens_of_the_prompt_that_were_reused_are_told(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "The same words, once more. " * 6}]
    cold, warm = ask(client, messages).usage, ask(client, messages).usage
    assert (cold.prompt_tokens_details.cached_tokens, warm.prompt_tokens_details.cached_tokens) == (0, 128)
    assert cold.prompt_tokens == warm.prompt_tokens


def test_several_answers(babble) -> None:
    reply = babble(n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) == 3
    assert reply.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in babble(n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in reply.choices]


# ---- How tokens are chosen.


def test_a_seed_means_a_text(babble) -> None:
    texts = [text(babble(seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    drawn = {text(babble(seed=None)) for _ in range(3)}
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(name: str, babble) -> None:
    reply = babble(**{"max_tokens": None, name: 5, "ignore_eos": True})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 5)


def test_without_a_limit_the_context_is_one(babble, tiny) -> None:
    reply = babble(max_tokens=None, ignore_eos=True, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == tiny.config.context_length
    assert babble(max_tokens=10**30, ignore_eos=True, temperature=0).usage == reply.usage


@pytest.mark.parametrize("stop", ["ou", ["x", "ou"]])
def test_a_stop_ends_an_answer(stop: Any, client: openai.OpenAI) -> None:
    reply = ask(client, stop=stop)
    assert (text(reply), reply.choices[0].finish_reason) == ("Hi, y", "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stop=stop, stream=True)) == "Hi, y"


def test_logits_can_be_biased(babble, tiny) -> None:
    reply = babble(logit_bias={str(ord("a")): 100, str(ord("b")): -100.0}, temperature=0, max_tokens=3)
    assert text(reply) == "aaa"
    penalised = babble(logit_bias={str(ord("a")): 60, str(ord("b")): 59.9}, presence_penalty=2, temperature=0)
    assert set(text(penalised)) == {"a", "b"}
    often = babble(logit_bias={str(ord("a")): 60, str(ord("b")): 59}, frequency_penalty=2, temperature=0)
    assert text(often)[:6] == "ababab"


def test_filters_leave_the_most_probable(babble) -> None:
    greedy = text(babble(temperature=0))
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert text(babble(**fields)) == greedy
    assert text(babble()) != greedy


def test_an_answer_may_not_end_too_soon(babble, tiny) -> None:
    fields = {"logit_bias": {str(tiny.end): 100}, "temperature": 0}
    assert babble(**fields).usage.completion_tokens == 1
    assert babble(**fields, min_tokens=4).usage.completion_tokens == 5
    assert babble(**fields, ignore_eos=True).choices[0].finish_reason == "length"
    assert babble(logit_bias={str(ord("a")): 100}, stop_token_ids=[ord("a")], min_tokens=1).usage.completion_tokens <= 2


# ---- Probabilities.


def test_the_probabilities_of_tokens(client: openai.OpenAI) -> None:
    [choice] = ask(client, logprobs=True, top_logprobs=3).choices
    tokens = choice.logprobs.content
    # As in vLLM, the token that ends the answer has an entry, too.
    assert "".join(token.token for token in tokens) == ANSWER + "<|im_end|>"
    assert b"".join(bytes(token.bytes) for token in tokens[:-1]).decode() == ANSWER
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy, by a model that is sure
        assert math.exp(token.logprob) == pytest.approx(1, abs=1e-3)
    bare = ask(client, logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in bare] == [[]] * (len(ANSWER) + 1)
    assert ask(client).choices[0].logprobs is None


def test_the_probabilities_come_with_the_stream(babble) -> None:
    whole = babble(logprobs=True, top_logprobs=20, max_tokens=40, ignore_eos=True).choices[0].logprobs.content
    assert len(whole) == 40
    chunks = list(babble(logprobs=True, top_logprobs=20, max_tokens=40, ignore_eos=True, stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    streamed = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert streamed == whole
    assert sum(math.exp(one.logprob) for one in whole[0].top_logprobs) <= 1.001


# ---- What an answer must be.


def test_json(babble) -> None:
    reply = babble(response_format={"type": "json_object"}, max_tokens=200, logit_bias={str(ord("}")): 8})
    assert isinstance(json.loads(text(reply)), dict)
    assert babble(response_format={"type": "text"}).choices


def test_json_of_a_schema(babble) -> None:
    schema = {
        "type": "object",
        "properties": {"stars": {"enum": [1, 2, 3]}, "on": {"type": "boolean"}},
        "required": ["stars", "on"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, "strict": True}}
    reply = babble(response_format=wanted, max_tokens=100)
    assert json.loads(text(reply)).keys() == {"stars", "on"}
    assert reply.choices[0].finish_reason == "stop"


class Point(pydantic.BaseModel):
    x: bool
    y: bool | None


def test_the_helper_that_parses(babbling) -> None:
    with babbling.openai() as client:
        reply = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point, max_tokens=100)
    assert isinstance(reply.choices[0].message.parsed, Point)


def test_a_regex_a_choice_and_a_grammar(babble) -> None:
    assert re.fullmatch(r"[ab]{3}-\d", text(babble(regex=r"[ab]{3}-\d")))
    assert text(babble(choice=["yes", "no"])) in {"yes", "no"}
    assert text(babble(grammar='start: "x" | "(" start ")"', logit_bias={str(ord("x")): 50})) == "x"


SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
ODD = {
    "type": "object",
    "properties": {"a": {"$ref": "#"}, "b": {"type": "string", "pattern": "(?=x)"}},
    "required": ["a", "b"],
}
TOOL = {"type": "function", "function": {"name": "f"}}
RELAXED = SCHEMA | {"properties": {"on": {"type": "boolean", "not": {"const": True}}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object", "schema": SCHEMA}},  # Fireworks, Together, llama.cpp
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},  # Together, llama.cpp
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": RELAXED, "strict": False}}},
        {"response_format": {"type": "json", "value": SCHEMA}},  # TGI
        {"response_format": {"type": "json_object", "value": SCHEMA}},  # TGI
        {"guided_json": SCHEMA},  # vLLM until 0.11
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},  # vLLM from 0.11 on
        {"json_schema": SCHEMA},  # llama.cpp
        {"json_schema": json.dumps(SCHEMA)},  # SGLang
    ],
    ids=str,
)
def test_json_of_a_schema_in_the_spellings_of_others(fields: dict[str, Any], babbling) -> None:
    with babbling.openai() as client:
        for seed in range(3):
            asked = {"max_tokens": 50, "seed": seed, "temperature": 1, "extra_body": fields}
            raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, **asked)
            assert json.loads(text(raw.parse())).keys() == {"on"}
            left_out = "response_format.json_schema.schema.properties.on.not" if "strict" in str(fields) else None
            assert raw.headers.get("X-JLLM-Ignored") == left_out


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"[ab]{3}-\d"}, r"[ab]{3}-\d"),
        ({"structured_outputs": {"regex": r"[ab]{3}-\d"}}, r"[ab]{3}-\d"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_grammar": 'start: "x" | "y"'}, "x|y"),
        ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, "x|y"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
        ({"grammar": 'root ::= "a" b{2}\nb ::= [0-9] | "-" # llama.cpp'}, r"a[0-9-]{2}"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"ebnf": 'root ::= "x" | "y"'}, "x|y"),  # SGLang
    ],
    ids=str,
)
def test_grammars_in_the_spellings_of_others(fields: dict[str, Any], pattern: str, babbling) -> None:
    asked = {"model": "tiny", "max_tokens": 20, "seed": 1, "temperature": 1, **fields}
    chat = babbling.post("/v1/chat/completions", {**asked, "messages": HELLO}).json()["choices"][0]["message"][
        "content"
    ]
    completed = babbling.post("/v1/completions", {**asked, "prompt": "hello"}).json()["choices"][0]["text"]
    assert re.fullmatch(pattern, chat)
    assert re.fullmatch(pattern, completed)


def test_a_regex_as_a_response_format(babbling) -> None:
    """TGI's spelling."""
    body = {"model": "tiny", "messages": HELLO, "response_format": {"type": "regex", "value": "[ab]{3}"}}
    assert re.fullmatch("[ab]{3}", babbling.post(CHAT, body).json()["choices"][0]["message"]["content"])
    error = babbling.post(CHAT, body | {"regex": "a"}).json()["error"]
    assert error["message"] == "regex and response_format exclude each other"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"guided_json": {}, "response_format": {"type": "json_object"}},
            "response_format",
            "guided_json and response_format exclude each other",
        ),
        ({"guided_regex": "a", "regex": "a"}, "guided_regex", "regex and guided_regex exclude each other"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.choice",
            "structured_outputs.regex and structured_outputs.choice exclude each other",
        ),
        ({"guided_json": "{"}, "guided_json", "guided_json: the JSON schema is not JSON"),
        ({"guided_choice": [""]}, "guided_choice", "choices must be some texts"),
        ({"grammar": "root ::= ("}, "grammar", "grammar: the GBNF grammar cannot be read: Expected"),
        ({"grammar": "root ::= " + "(" * 9999}, "grammar", "the GBNF grammar cannot be read"),
        ({"guided_grammar": "root ::= other"}, "guided_grammar", "Rule 'other' not found"),
        ({"guided_json": {"not": {}}}, "guided_json", "guided_json: what the schema says in not ("),
        ({"guided_json": json.dumps({"not": {}})}, "guided_json", "guided_json: what the schema says in not ("),
        ({"guided_json": "[" * 9999}, "guided_json", "guided_json: the JSON schema is not JSON"),
        ({"structured_outputs": {"json": ODD}}, "structured_outputs.json", "properties.a.$ref (it leads back to"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex: the grammar cannot be used: unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"guided_grammar": "start: other"}, "guided_grammar", 'unknown name: "other"'),
        ({"regex": "a", "tools": [TOOL]}, "tools", "regex and tools exclude each other"),
        ({"guided_regex": "a", "tools": [TOOL]}, "tools", "guided_regex and tools exclude each other"),
        ({"guided_choice": ["a"], "tools": [TOOL]}, "tools", "guided_choice and tools exclude each other"),
        ({"response_format": {"type": "regex", "value": "a"}, "tools": [TOOL]}, "tools", "response_format and tools"),
        (
            {"structured_outputs": {"json": {}}, "response_format": {"type": "json_object"}},
            "response_format",
            "structured_outputs.json and response_format exclude each other",
        ),
        ({"structured_outputs": {"x": 1}}, "structured_outputs.x", "there is no parameter structured_outputs.x"),
    ],
    ids=str,
)
def test_grammars_that_cannot_be_honoured(
    fields: dict[str, Any], param: str | None, message: str, thinking, babbling
) -> None:
    server = thinking if "tools" in fields else babbling
    for path, prompt in ((CHAT, {"messages": HELLO}), ("/v1/completions", {"prompt": "x"})):
        if path == CHAT or not {"tools", "response_format"} & fields.keys():
            reply = server.post(path, {"model": "tiny", **prompt, **fields})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param)
            assert message in error["message"]


@pytest.mark.parametrize(
    ("response_format", "place"),
    [
        ({"type": "json_schema", "json_schema": {"schema": ODD}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": ODD, "strict": None}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": ODD, "strict": True}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "schema": ODD}, "response_format.schema"),
        ({"type": "json_object", "schema": ODD}, "response_format.schema"),
        ({"type": "json_object", "value": ODD}, "response_format.value"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(
    response_format: dict[str, Any], place: str, babbling
) -> None:
    reply = babbling.post(CHAT, {"model": "tiny", "messages": HELLO, "response_format": response_format})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, place)
    said = f"{place}: what the schema says in properties.a.$ref (it leads back to itself without an end), "
    assert error["message"].startswith(f"{said}properties.b.pattern (look-around")


# ---- Special tokens in the text.


def test_special_tokens_can_be_shown(serve, tiny) -> None:
    """As in vLLM: those in the middle, and not the one that ends the answer."""
    model = tiny.saying([*b"\nHi", tiny.im_end + -1, *b"!", tiny.end], eos_ids=(tiny.end,))
    marker = tiny.tokenizer.decode([tiny.im_end - 1], skip_special_tokens=False)
    with serve(model) as server:
        for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "\n"})):

            def ask_it(path: str = path, body: dict[str, Any] = body, **fields: Any) -> str:
                asked = {"model": "tiny", "max_tokens": 20, **body, **fields}
                [choice] = server.post(f"/v1/{path}", asked).json()["choices"]
                found: str = choice["text"] if "text" in choice else choice["message"]["content"]
                return found

            assert ask_it() == ask_it(skip_special_tokens=True) == "Hi!"
            assert ask_it(skip_special_tokens=False) == f"Hi{marker}!"
            assert ask_it(skip_special_tokens=False, ignore_eos=True, max_tokens=6).startswith(f"Hi{marker}!<|end|>")
            assert ask_it(skip_special_tokens=False, stop="!") == f"Hi{marker}"


# ---- Conversations.


def test_the_model_is_given_the_conversation(server, client: openai.OpenAI, tiny) -> None:
    said = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four", "name": "Ann"},
    ]
    meant = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    tokens = server.post("/tokenize", {"messages": said}).json()["tokens"]
    assert tokens == tiny.tokenizer.encode_chat(meant)
    assert ask(client, said).usage.prompt_tokens == len(tokens)


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    message = ask(client).choices[0].message
    for again in (message, message.model_dump()):
        assert text(ask(client, [*HELLO, again, *HELLO])) == ANSWER


def test_fields_that_have_no_effect_are_taken(client: openai.OpenAI) -> None:
    fields = {"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}
    more = {"modalities": ["text"], "prompt_cache_key": "k", "parallel_tool_calls": True, "frequency_penalty": None}
    assert text(ask(client, **fields, **more)) == ANSWER


# ---- Values at the edges, which mean what they mean elsewhere.


def said(reply: Any) -> list[Any]:
    return [(choice.message.content, choice.finish_reason) for choice in reply.choices]


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"top_p": 0}, {"temperature": 0}),
        ({"top_p": 0.0, "top_k": 7}, {"temperature": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": -1}, {}),
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5.0, "max_tokens": 5}, {"max_tokens": 5}),
        ({"top_k": 3.0, "min_tokens": 2.0, "n": 2.0, "seed": 4.0}, {"top_k": 3, "min_tokens": 2, "n": 2, "seed": 4}),
        ({"stop_token_ids": [101.0]}, {"stop_token_ids": [101]}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"stop": ""}, {}),
        ({"stop": ["", ""]}, {"stop": []}),
        ({"stop": ["", "e"]}, {"stop": ["e"]}),
        ({"stop": [*(f"never {number}" for number in range(254)), "e"]}, {"stop": "e"}),
        ({"tools": []}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tool_choice": "auto"}, {}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {}),
        ({"top_logprobs": 0}, {}),
    ],
    ids=str,
)
def test_a_value_at_the_edge(fields: dict[str, Any], same: dict[str, Any], babble) -> None:
    """``top_p: 0`` as in OpenAI's API, ``-1`` and seeds of 64 bits as in vLLM, empty stops as in llama.cpp."""
    assert said(babble(**{"max_tokens": 20, **fields})) == said(babble(**{"max_tokens": 20, **same}))


@pytest.mark.parametrize("seed", [2**32, 2**53, 2**63 - 1, 2**64 - 1, -2])
def test_all_bits_of_a_seed_count(seed: int, babble) -> None:
    one, again, other = (said(babble(seed=value)) for value in (seed, seed, seed % 2**32))
    assert one == again != other


def test_a_seed_of_minus_one_is_drawn(babble) -> None:
    assert len({said(babble(seed=-1))[0] for _ in range(6)}) > 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_minus_one_is_no_limit(name: str, serve, babbler) -> None:
    """Not even that of the server, which is for requests that do not say; the context remains."""
    body = {"model": "tiny", "messages": HELLO, "ignore_eos": True, name: -1}
    with serve(babbler, max_tokens=6) as server:
        reply = server.post("/v1/chat/completions", body).json()
        assert reply["usage"]["total_tokens"] == 300
        assert reply["choices"][0]["finish_reason"] == "length"
        text = server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": -1, "ignore_eos": True})
        assert text.json()["usage"]["total_tokens"] == 300


# ---- What is refused, by name.


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"extra_body": {"best": 1}}, "best", "there is no parameter best"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "there is no parameter audio"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "reads neither reasoning_effort nor enable_thinking"),
        ({"store": True}, "store", "store: should be False, got True"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
        ({"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"extra_body": {"top_k": -2}}, "top_k", "greater than or equal to -1"),
        ({"n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"n": True}, "n", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "must be 1 or above"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "two names of one thing"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"max_tokens": 4.5}, "max_tokens", "valid integer"),
        ({"max_tokens": "40"}, "max_tokens", "valid integer"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be 1 or above"),
        ({"seed": 2**64}, "seed", f"should be from {-(2**63)} to {2**64 - 1}, got {2**64}"),
        ({"seed": -(2**63) - 1}, "seed", f"should be from {-(2**63)} to"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"stop": ["x"] * 257}, "stop", "at most 256 items"),
        ({"stop": 5}, "stop", "valid string or should be a valid list, got 5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "must have token ids as its keys, got 'x'"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "less than or equal to 100"),
        ({"logit_bias": {"272": 1}}, None, "token id 272 is outside the vocabulary"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "no parameter stream_options.x"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "should be one of 'text', 'json_object', 'json', 'json_schema', 'regex', got 'xml'",
        ),
        ({"response_format": {}}, "response_format.type", "response_format.type is missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
            "cannot be enforced; leave it out, or send strict: false",
        ),
        ({"extra_body": {"regex": "a", "choice": ["b"]}}, "choice", "regex and choice exclude each other"),
        ({"extra_body": {"regex": "("}}, "regex", "cannot be used"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 3}, "min_tokens", "at most max_tokens"),
        ({"extra_body": {"min_tokens": 2, "regex": "a"}}, "min_tokens", "cannot be combined with a grammar"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs", "has no variable 'tools'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []},
            "tool_choice",
            "needs tools",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "knows no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "messages[0].role",
            "should be one of 'system', 'developer', 'user', 'assistant', 'tool', 'function', got 'robot'",
        ),
        ({"messages": [{"content": ""}]}, "messages[0].role", "messages[0].role is missing"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "should be one of 'text', 'input_text', 'output_text', 'refusal', 'thinking', 'reasoning', "
            "'redacted_thinking', got 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0].type",
            "should be 'text', 'input_text' or 'output_text', got 'thinking'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "text"),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "no parameter"),
        ({"messages": [{"role": "user", "content": "long " * 80}]}, "messages", "419 tokens, at most 299 are taken"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str | None, message: str, babbling) -> None:
    with babbling.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    error = caught.value
    assert message in error.body["message"]
    assert (error.param, error.type) == (param, "invalid_request_error")


def test_a_model_that_is_not_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9', this server has tiny") as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_without_a_chat_template(serve, tiny) -> None:
    bare = Tokenizer(tiny.tokenizer._raw, {}, None)
    model = dataclasses.replace(tiny.plain, tokenizer=bare)
    with serve(model) as server, server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="no chat template, so it holds no conversations"):
            ask(client)
        assert client.models.list().data[0].abilities["chat"] is False


def test_a_template_that_fails_is_the_request_s_fault(serve, tiny) -> None:
    template = "{{ raise_exception('only questions') }}"
    model = dataclasses.replace(tiny.plain, tokenizer=Tokenizer(tiny.tokenizer._raw, {}, template))
    with (
        serve(model) as server,
        server.openai() as client,
        pytest.raises(openai.BadRequestError, match="only questions"),
    ):
        ask(client)


# ---- What a request does not say.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters of all requests that engines get."""
    params: list[SamplingParams] = []
    submit = Engine.submit

    def record(engine: Engine, prompt: Any, given: SamplingParams | None = None) -> Any:
        params.append(given)
        return submit(engine, prompt, given)

    monkeypatch.setattr(Engine, "submit", record)
    return params


def test_fields_that_are_not_given_are_the_publisher_s(serve, talker, asked: list[SamplingParams]) -> None:
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    with serve(dataclasses.replace(talker, generation_config=settings)) as server:
        for body in (chat, chat | {"temperature": 0, "top_k": None, "repetition_penalty": 1, "max_tokens": 7}):
            assert server.post("/v1/chat/completions", body).is_success
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "Hi", "top_k": 3}).is_success
    drawn, greedy, completed = asked
    room = 300 - len(talker.tokenizer.encode_chat(chat["messages"]))
    assert (drawn.temperature, drawn.top_k, drawn.repetition_penalty, drawn.max_tokens) == (0.6, 20, 1.05, room)
    assert (greedy.temperature, greedy.top_k, greedy.repetition_penalty, greedy.max_tokens) == (0, 20, 1, 7)
    assert (completed.temperature, completed.top_k, completed.max_tokens) == (0.6, 3, 16)


def test_without_a_recommendation_it_is_greedy(server, asked: list[SamplingParams]) -> None:
    server.post("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]})
    assert asked[0].temperature == 0


def test_an_answer_that_nobody_limits_ends_at_the_server_s_limit(serve, babbler, asked: list[SamplingParams]) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    with serve(babbler, max_tokens=6) as server:
        reply = server.post("/v1/chat/completions", chat).json()
        assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 6)
        reply = server.post("/v1/chat/completions", chat | {"max_completion_tokens": 9}).json()
        assert reply["usage"]["completion_tokens"] == 9


def test_template_variables_of_the_server_hold_unless_a_request_sets_them(serve, thinker) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    with serve(thinker, template_vars={"enable_thinking": False}) as server:
        off = server.post("/tokenize", chat).json()["count"]
        on = server.post("/tokenize", chat | {"chat_template_kwargs": {"enable_thinking": True}}).json()["count"]
    assert off == on + 2  # <think></think>
