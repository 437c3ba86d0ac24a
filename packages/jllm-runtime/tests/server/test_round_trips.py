"""Answers that clients send back as they came, and answers that go on from a text, through OpenAI's own client."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from jllm_runtime import Model, Tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

QUESTION = [{"role": "user", "content": "Paris?"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": name}} for name in ("look_up", "clock")]
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }}"
    "{% for name, value in c.function.arguments | items %} {{ name }}={{ value }}{% endfor %}]{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
ONE_A_TURN = "{% for m in messages if m.tool_calls and m.tool_calls[1:] %}{{ raise_exception('one!') }}{% endfor %}"
HERMES = "{% if tools %}<tool_call>arguments</tool_call>{% endif %}"
LLAMA = '{% if tools %}{# <|start_header_id|> #}{"name": , "parameters": }{% endif %}'
NO_CALLS = TURNS.replace("in m.tool_calls", "in []")
# By what the model writes and what its template takes: the template, the calls, and the next prompt's end.
SPLIT = "<assistant>[look_up city=Rome]<tool>one<assistant>[clock]<tool>two<assistant>\n"
CASES = {
    "hermes": (HERMES + TURNS, "<assistant>[look_up city=Rome][clock]<tool>one<tool>two<assistant>\n"),
    "hermes, one a turn": (HERMES + ONE_A_TURN + TURNS, SPLIT),
    "hermes in the content": (
        HERMES.replace("tools", "xml_tools") + NO_CALLS,
        '<assistant><tool_call>\n{"name": "look_up", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "clock", "arguments": {}}\n</tool_call><tool>one<tool>two<assistant>\n',
    ),
    "llama3": (LLAMA + TURNS, "<assistant>[look_up city=Rome][clock]<tool>one<tool>two<assistant>\n"),
    "llama3, one a turn": (LLAMA + ONE_A_TURN + TURNS, SPLIT),
}
WRITTEN = {
    "hermes": [
        '<tool_call>{"name": "look_up", "arguments": {"city": "Rome"}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {}}</tool_call>',
    ],
    "llama3": ['{"name": "look_up", "parameters": {"city": "Rome"}}', '; {"name": "clock"', ', "parameters": {}}'],
}


@pytest.fixture(scope="module", params=CASES)
def calling(request: pytest.FixtureRequest, tiny) -> tuple[Model, str]:
    """A model that looks Rome up and asks for the time, and how its next prompt must end."""
    template, prompt = CASES[request.param]
    raw = RawTokenizer.from_str(tiny.tokenizer.to_json())
    written = WRITTEN[request.param.split(",")[0].split()[0]]
    raw.add_tokens([AddedToken(text, normalized=False) for text in written])
    tokenizer = Tokenizer(raw, {"eos_token": "<|end|>"}, template)
    said = tokenizer.encode("\n" + "".join(written) + "<|im_end|>", add_special_tokens=False)
    return dataclasses.replace(tiny.saying(said, eos_ids=(tiny.im_end,)), tokenizer=tokenizer), prompt


def whole(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(model="tiny", messages=QUESTION, tools=TOOLS).choices[0].message  # type: ignore[arg-type]


def dumped(client: openai.OpenAI) -> Any:
    return whole(client).model_dump()


def as_json(client: openai.OpenAI) -> Any:
    return json.loads(whole(client).model_dump_json())


def streamed(client: openai.OpenAI) -> Any:
    """The deltas put together as agents do it: with the index of each call."""
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    asked: Any = {"model": "tiny", "messages": QUESTION, "tools": TOOLS}
    for chunk in client.chat.completions.create(stream=True, **asked):
        delta = chunk.choices[0].delta.model_dump()
        for call in delta.pop("tool_calls") or []:
            if call["id"]:
                message["tool_calls"].append(call)
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message |= {name: value for name, value in delta.items() if value}
    return message


def accumulated(client: openai.OpenAI) -> Any:
    """By the client's own helper for streams."""
    asked: Any = {"model": "tiny", "messages": QUESTION, "tools": TOOLS}
    with client.chat.completions.stream(**asked) as stream:
        return stream.get_final_completion().choices[0].message.model_dump()


def framed(client: openai.OpenAI) -> Any:
    """With what gateways add, as LiteLLM does."""
    message = whole(client).model_dump()
    calls = [{**call, "provider_specific_fields": None, "index": n} for n, call in enumerate(message["tool_calls"])]
    added = {
        "provider_specific_fields": {"refusal": None},
        "thinking_blocks": [],
        "cache_control": {"type": "ephemeral"},
    }
    return {**message, "tool_calls": calls, **added, "annotations": [], "type": "message"}


@pytest.mark.parametrize("answer", [whole, dumped, as_json, streamed, accumulated, framed])
def test_calls_can_be_sent_back_with_their_results(
    answer: Callable[[openai.OpenAI], Any], calling: tuple[Model, str], serve
) -> None:
    model, prompt = calling
    with serve(model) as server, server.openai() as client:
        message = answer(client)
        calls = message["tool_calls"] if isinstance(message, dict) else message.model_dump()["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["look_up", "clock"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": text}
            for call, text in zip(calls, ("one", "two"), strict=True)
        ]
        reply = client.chat.completions.create(model="tiny", messages=[*QUESTION, message, *results], tools=TOOLS)
        body = {
            "messages": [*QUESTION, *([message] if isinstance(message, dict) else [message.model_dump()]), *results]
        }
        tokens = server.post("/tokenize", {**body, "tools": TOOLS}).json()["tokens"]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(tokens)
        assert model.tokenizer is not None
        assert model.tokenizer.decode(tokens, skip_special_tokens=False).endswith(f"Paris?{prompt}")


class Answer(pydantic.BaseModel):
    a: bool


def test_a_parsed_answer_can_be_sent_back(serve, babbler: Model) -> None:
    with serve(babbler) as server, server.openai() as client:
        asked: Any = {"model": "tiny", "max_tokens": 60, "seed": 1}
        reply = client.chat.completions.parse(messages=QUESTION, response_format=Answer, **asked)
        message: Any = reply.choices[0].message.model_dump(warnings=False)
        assert message["parsed"] is not None
        client.chat.completions.create(messages=[*QUESTION, message, *QUESTION], **asked)


def test_thinking_can_be_sent_back_under_each_name(thinking) -> None:
    with thinking.openai() as client:
        asked: Any = {"model": "tiny", "messages": QUESTION}
        message = client.chat.completions.create(**asked).choices[0].message.model_dump()
        assert message["reasoning_content"] == "Hm?"
        for name in ("reasoning_content", "reasoning", "thinking"):
            again = {**message, name: message["reasoning_content"]}
            client.chat.completions.create(model="tiny", messages=[*QUESTION, again, *QUESTION])


# ---- Named templates.


def test_tools_choose_the_template_for_tools(serve, tiny) -> None:
    named = {
        "default": "chat",
        "tool_use": "<tool_call>arguments</tool_call>{{ tools[0].function.name }}{{ in_tools }}",
    }
    model = dataclasses.replace(tiny.plain, tokenizer=Tokenizer(tiny.tokenizer._raw, {}, named), eos_ids=(tiny.end,))
    with serve(model) as server:
        assert server.get("/v1/models").json()["data"][0]["abilities"]["tools"] is True

        def prompt(**fields: Any) -> str:
            body = server.post("/tokenize", {"messages": QUESTION, **fields}).json()
            return str(model.tokenizer.decode(body["tokens"])) if "tokens" in body else body["error"]["message"]

        assert prompt() == prompt(tools=[]) == "chat"
        assert prompt(tools=TOOLS) == "<tool_call>arguments</tool_call>look_up"
        given = {"chat_template_kwargs": {"in_tools": "!"}}
        assert prompt(tools=TOOLS, **given) == "<tool_call>arguments</tool_call>look_up!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages }}", "the model's chat template knows no tools"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "the model writes tool calls in a format that this server cannot"),
        ("<tool_call><function=f></function>arguments</tool_call>{{ tools }}", "a format that this server cannot read"),
        ("<code>{{ python_tools }}</code>", "a format that this server cannot read; it reads those of Hermes"),
    ],
)
def test_tools_that_cannot_be_called_are_refused_with_the_cause(template: str, message: str, serve, tiny) -> None:
    tokenizer = Tokenizer(tiny.tokenizer._raw, {}, template)
    with serve(dataclasses.replace(tiny.plain, tokenizer=tokenizer, eos_ids=(tiny.end,))) as server:
        reply = server.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "tools": TOOLS})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
        assert message in reply.json()["error"]["message"]


# ---- Answers that go on from a text.


@pytest.fixture(scope="module")
def finishing(tiny) -> Model:
    """Says "Hi, you!", from wherever it is in that."""
    return tiny.saying([*b"\nHi, you!", tiny.im_end], eos_ids=(tiny.im_end,))


@pytest.fixture
def go_on(serve, finishing: Model) -> Iterator[Callable[..., Any]]:
    with serve(finishing) as server, server.openai() as client:

        def ask(text: str, stream: bool = False, **fields: Any) -> Any:
            messages: Any = [*QUESTION, {"role": "assistant", "content": text}]
            return client.chat.completions.create(model="tiny", messages=messages, extra_body=fields, stream=stream)

        yield ask


CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(
    ("text", "fields", "answer"),
    [
        ("Hi, ", CONTINUE, "you!"),
        ("Hi, ", {"continue_final_message": True}, "you!"),
        ("Hi", CONTINUE, ", you!"),
        ("Hi, ", {}, "Hi, you!"),
        ("Hi, ", {"continue_final_message": False, "add_generation_prompt": True}, "Hi, you!"),
    ],
)
def test_an_answer_goes_on_from_the_last_message(text: str, fields: Any, answer: str, go_on) -> None:
    [choice] = go_on(text, **fields).choices
    assert (choice.message.content, choice.finish_reason) == (answer, "stop")
    chunks = [chunk.choices[0].delta.content or "" for chunk in go_on(text, stream=True, **fields) if chunk.choices]
    assert "".join(chunks) == answer


def test_both_flags_at_once_are_refused(go_on) -> None:
    with pytest.raises(openai.BadRequestError, match="exclude each other") as caught:
        go_on("Hi, ", continue_final_message=True, add_generation_prompt=True)
    assert caught.value.param == "continue_final_message"


def test_thoughts_go_on_as_thoughts(serve, tiny, marked_tokenizer: Tokenizer) -> None:
    said = marked_tokenizer.encode("Hm?</think>Well. <|im_end|>", add_special_tokens=False)
    model = dataclasses.replace(tiny.saying([ord(":"), *said], eos_ids=(tiny.im_end,)), tokenizer=marked_tokenizer)
    with serve(model) as server:

        def ask(text: str) -> tuple[Any, Any]:
            messages = [*QUESTION, {"role": "assistant", "content": text}]
            body = {"model": "tiny", "messages": messages, **CONTINUE}
            message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
            return message.get("reasoning_content"), message["content"]

        assert ask("<think>So:") == ("Hm?", "Well. ")
        assert ask("So:") == (None, "Hm?</think>Well. ")
        assert ask("<think></think>So:") == (None, "Hm?</think>Well. ")
