"""Models that write their calls as XML and whose prompts open the thinking, through OpenAI's own client."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from jllm_runtime import Engine, Model, SamplingParams, Tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

# What Qwen3.5 to 3.8 have in common with each other, in fewer words.
TEMPLATE = r"""
{%- set thinks = enable_thinking is undefined or enable_thinking -%}
{%- set effort = reasoning_effort | default('xhigh') -%}
{%- if thinks and effort not in ('low', 'medium', 'xhigh') -%}
    {{- raise_exception('Unexpected reasoning effort ' ~ effort) -}}
{%- endif -%}
{%- if tools or (thinks and effort == 'low') -%}
    {{- '<|im_start|>system\n' -}}
    {%- if thinks and effort == 'low' -%}{{- 'Be quick.\n' -}}{%- endif -%}
    {%- if tools -%}
        {%- for tool in tools -%}{{- tool.function.name + '\n' -}}{%- endfor -%}
        {#- the model is shown: <tool_call><function=name><parameter=key>value</parameter></function></tool_call> -#}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- set kept = preserve_thinking is undefined or preserve_thinking or loop.index0 > ns.last -%}
    {%- if message.role == 'assistant' and kept -%}
        {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- message.content -}}
    {%- for call in message.tool_calls -%}
        {{- '\n<tool_call>\n<function=' + call.function.name + '>\n' -}}
        {%- for name, value in call.function.arguments.items() -%}
            {{- '<parameter=' + name + '>\n' + (value if value is string else value | tojson) + '\n</parameter>\n' -}}
        {%- endfor -%}
        {{- '</function>\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' + ('' if thinks else '\n</think>\n\n') -}}
{%- endif -%}
"""
CALLS = (
    "<tool_call>\n<function=look_up>\n<parameter=city>\nKöln & <Bonn>\n</parameter>\n<parameter=days>\n[1, 2]\n"
    "</parameter>\n</function>\n</tool_call>"
)
CLOCK_CALL = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
SAID = ["Hm?", "</think>", "\n\nWell.\n", CALLS[:40], CALLS[40:], f"\n{CLOCK_CALL}"]
QUESTION: list[Any] = [{"role": "user", "content": "Paris?"}]
DAYS = {"type": "array", "items": {"type": "integer"}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": DAYS, "now": {"type": "boolean"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]


def template_tokenizer(tiny: Any, *added: str) -> Tokenizer:
    raw = RawTokenizer.from_str(tiny.tokenizer.to_json())
    raw.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", *added)])
    return Tokenizer(raw, {"eos_token": "<|end|>"}, TEMPLATE)


@pytest.fixture(scope="module")
def calling(tiny) -> Model:
    """Thinks "Hm?", where the prompt has opened that, says "Well." and makes two calls."""
    tokenizer = template_tokenizer(tiny, *SAID)
    ids = [ord("\n"), *map(tokenizer.token_id, SAID), tiny.im_end]
    return dataclasses.replace(tiny.saying(ids, eos_ids=(tiny.im_end,)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(calling: Model) -> Iterator[Any]:
    from .conftest import served

    with served(calling) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with server.openai() as made:
        yield made


def prompt_of(server: Any, model: Model, messages: list[Any], **fields: Any) -> str:
    tokens = server.post("/tokenize", {"messages": messages, "tools": TOOLS, **fields}).json()["tokens"]
    assert model.tokenizer is not None
    return model.tokenizer.decode(tokens, skip_special_tokens=False)


def whole(client: openai.OpenAI) -> dict[str, Any]:
    [choice] = client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    return choice.message.model_dump()


def streamed(client: openai.OpenAI) -> dict[str, Any]:
    """The deltas put together as agents do it."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    ends = []
    for chunk in client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS, stream=True):
        delta = chunk.choices[0].delta
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.id:
                message["tool_calls"].append(call.model_dump())
            else:
                assert call.function is not None
                message["tool_calls"][call.index]["function"]["arguments"] += call.function.arguments
        ends.append(chunk.choices[0].finish_reason)
    assert ends[-1] == "tool_calls"
    return message


def accumulated(client: openai.OpenAI) -> dict[str, Any]:
    """By the client's own helper for streams."""
    with client.chat.completions.stream(model="tiny", messages=QUESTION, tools=TOOLS) as stream:
        return stream.get_final_completion().choices[0].message.model_dump()


@pytest.mark.parametrize("ask", [whole, streamed, accumulated])
def test_thoughts_and_calls_are_taken_out_of_the_text_and_can_be_sent_back(
    ask: Any, calling: Model, server, client
) -> None:
    message = ask(client)
    assert (message["reasoning_content"], message["content"]) == ("Hm?", "Well.")
    calls = [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in message["tool_calls"]]
    assert calls == [("look_up", {"city": "Köln & <Bonn>", "days": [1, 2]}), ("clock", {})]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": text}
        for call, text in zip(message["tool_calls"], ("one", "two"), strict=True)
    ]
    prompt = prompt_of(server, calling, [*QUESTION, message, *results])
    assert f"<think>\nHm?\n</think>\n\nWell.\n{CALLS}\n{CLOCK_CALL}<|im_end|>\n<|im_start|>tool\none" in prompt
    assert prompt.endswith("<think>\n")
    reply = client.chat.completions.create(model="tiny", messages=[*QUESTION, message, *results], tools=TOOLS)
    assert reply.choices[0].message.tool_calls


def test_without_tools_calls_are_text(client) -> None:
    [choice] = client.chat.completions.create(model="tiny", messages=QUESTION).choices
    assert (choice.message.content, choice.finish_reason) == (f"Well.\n{CALLS}\n{CLOCK_CALL}", "stop")
    assert choice.message.reasoning_content == "Hm?"


def test_the_server_says_what_the_model_can(server) -> None:
    abilities = server.get("/v1/models").json()["data"][0]["abilities"]
    assert (abilities["tools"], abilities["thinking"]) == (True, True)


def test_a_call_that_max_tokens_cuts_off_comes_as_far_as_it_goes(client) -> None:
    [choice] = client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS, max_tokens=4).choices
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("look_up", "")
    assert (choice.message.content, choice.finish_reason) == ("Well.", "length")


# ---- Thinking of earlier turns, and how much of it there is.

HISTORY = [*QUESTION, {"role": "assistant", "content": "Yes.", "reasoning_content": "So?"}, *QUESTION]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({}, True), ({"preserve_thinking": True}, True), ({"preserve_thinking": False}, False)],
)
def test_earlier_thinking_is_kept_as_the_template_is_told(fields: dict[str, Any], kept: bool, calling, server) -> None:
    prompt = prompt_of(server, calling, HISTORY, chat_template_kwargs=fields)
    assert ("<think>\nSo?\n</think>\n\nYes." in prompt) == kept


@pytest.mark.parametrize(
    ("fields", "end", "ignored"),
    [
        ({}, "<think>\n", None),
        ({"reasoning_effort": "low"}, "Be quick.", None),
        ({"reasoning_effort": "minimal"}, "Be quick.", "reasoning_effort"),
        ({"reasoning_effort": "medium"}, "<think>\n", None),
        ({"reasoning_effort": "high"}, "<think>\n", "reasoning_effort"),
        ({"reasoning_effort": "max"}, "<think>\n", "reasoning_effort"),
        ({"reasoning": {"effort": "high"}}, "<think>\n", "reasoning.effort"),
        ({"reasoning_effort": "none"}, "</think>\n\n", None),
        ({"enable_thinking": False}, "</think>\n\n", None),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            "</think>\n\n",
            "reasoning_effort",
        ),
        ({"reasoning_effort": "max", "chat_template_kwargs": {"reasoning_effort": "low"}}, "Be quick.", None),
    ],
    ids=str,
)
def test_an_effort_becomes_one_that_the_template_takes(fields: Any, end: str, ignored: str | None, server) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1, **fields}
    reply = server.post("/v1/chat/completions", body)
    assert reply.is_success, reply.text
    assert reply.headers.get("X-JLLM-Ignored") == ignored
    plain = "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    prompt = {
        "<think>\n": plain,
        "Be quick.": f"<|im_start|>system\nBe quick.\n<|im_end|>\n{plain}",
        "</think>\n\n": f"{plain}\n</think>\n\n",
    }[end]
    tokens = server.post("/tokenize", {"prompt": prompt}).json()["count"]
    assert reply.json()["usage"]["prompt_tokens"] == tokens


def test_an_effort_of_the_template_s_own_variable_is_the_client_s_matter(server) -> None:
    body = {"model": "tiny", "messages": QUESTION, "chat_template_kwargs": {"reasoning_effort": "high"}}
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status_code, "Unexpected reasoning effort high" in reply.text) == (400, True)


def test_a_model_that_always_thinks_says_so_itself(serve, calling: Model) -> None:
    refusing = "{% if not thinks %}{{ raise_exception('Disabling thinking is not supported.') }}{% endif %}"
    template = TEMPLATE.replace("{%- set effort", refusing + "{%- set effort", 1)
    assert calling.tokenizer is not None
    tokenizer = Tokenizer(calling.tokenizer._raw, {"eos_token": "<|end|>"}, template)
    with serve(dataclasses.replace(calling, tokenizer=tokenizer)) as server:
        for fields in ({"reasoning_effort": "none"}, {"enable_thinking": False}):
            reply = server.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, **fields})
            assert (reply.status_code, "Disabling thinking is not supported." in reply.text) == (400, True)
        assert server.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION}).is_success


# ---- In the library.


def test_the_library_splits_the_answer(calling: Model) -> None:
    from .conftest import SIZES

    answer = calling.chat("Paris?")
    assert (answer.reasoning, answer.content) == ("Hm?", f"Well.\n{CALLS}\n{CLOCK_CALL}")
    assert answer.text == "".join(SAID)
    with Engine(calling, SIZES) as engine:
        assert engine.chat("Paris?").reasoning == "Hm?"
        short = engine.chat("Paris?", SamplingParams(max_tokens=1))
        assert (short.reasoning, short.content, short.finish_reason) == ("Hm?", "", "length")
    off = calling.chat("Paris?", SamplingParams(max_tokens=1), enable_thinking=False)
    assert (off.reasoning, off.content) == (None, off.text)
    begun = [*QUESTION, {"role": "assistant", "content": "<think>\nSo\n"}]
    continued = calling.chat(begun, continue_final_message=True)
    assert (continued.reasoning, continued.content[:5]) == ("Hm?", "Well.")


# ---- What it must do. The model says anything.


@pytest.fixture(scope="module")
def forced(tiny) -> Iterator[Any]:
    from .conftest import served

    marks = template_tokenizer(tiny, "</think>", "<tool_call>", "</tool_call>")
    model = dataclasses.replace(tiny.plain, tokenizer=marks, eos_ids=(tiny.end,))
    with served(model) as running, running.openai() as client:
        yield client


CITY = {"city": {"enum": ["Köln", "Rome"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}}
STRICT: Any = {
    "name": "look_up",
    "parameters": {"type": "object", "properties": CITY, "required": ["city"], "additionalProperties": False},
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_demanded(choice: Any, stream: bool, forced) -> None:
    for seed in range(4):
        asked = {
            "model": "tiny",
            "messages": QUESTION,
            "tools": [{"type": "function", "function": STRICT}],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "max_tokens": 300,
            "seed": seed,
            "extra_body": {"enable_thinking": False},
        }
        if stream:
            with forced.chat.completions.stream(**asked) as events:
                [answer] = events.get_final_completion().choices
        else:
            [answer] = forced.chat.completions.create(**asked).choices
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        [call] = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "look_up"
        assert arguments["city"] in ("Köln", "Rome")
        assert arguments.get("count", 0) in range(100)


def test_a_strict_tool_that_xml_cannot_hold_is_refused(forced) -> None:
    schema = {**STRICT["parameters"], "minProperties": 1}
    tool: Any = {"type": "function", "function": {**STRICT, "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="minProperties"):
        forced.chat.completions.create(model="tiny", messages=QUESTION, tools=[tool])
