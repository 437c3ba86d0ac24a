"""Thinking and tool calls, through OpenAI's own client."""

import dataclasses
import json
import string
from typing import Any

import openai
import pytest
from jllm_runtime import Tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

QUESTION = [{"role": "user", "content": "What about Paris?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a city up.",
            "parameters": CITY | {"additionalProperties": False},
        },
    }
]
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def ask(thinking):
    """Asks the model that thinks "Hm?", says "Well. ", and looks Paris up."""
    with thinking.openai() as client:

        def ask_it(messages: list[Any] = QUESTION, **fields: Any) -> Any:
            return client.chat.completions.create(model="tiny", messages=messages, **fields)

        yield ask_it


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


def collected(chunks: Any) -> dict[str, Any]:
    """What a stream says: thoughts, content, calls, and how it ends."""
    found: dict[str, Any] = {"thought": "", "content": "", "calls": [], "end": None}
    for chunk in chunks:
        for choice in chunk.choices:
            found["thought"] += getattr(choice.delta, "reasoning_content", None) or ""
            found["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    found["calls"].append([call.id, call.function.name, ""])
                found["calls"][call.index][2] += call.function.arguments
            found["end"] = choice.finish_reason or found["end"]
    return found


# ---- What the model does of its own accord.


def test_thoughts_and_calls_are_taken_out_of_the_text(ask) -> None:
    [choice] = ask(tools=TOOLS).choices
    message = choice.message
    assert (message.reasoning_content, message.content, choice.finish_reason) == ("Hm?", "Well.", "tool_calls")
    assert calls_of(message) == [("look_up", {"city": "Paris"})]
    assert message.tool_calls[0].type == "function"
    assert message.tool_calls[0].id.startswith("call_")


def test_thoughts_and_calls_in_a_stream(ask) -> None:
    found = collected(ask(tools=TOOLS, stream=True))
    [[_, name, arguments]] = found.pop("calls")
    assert found == {"thought": "Hm?", "content": "Well.", "end": "tool_calls"}
    assert (name, json.loads(arguments)) == ("look_up", {"city": "Paris"})


def test_without_tools_what_looks_like_a_call_is_text(ask) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        [choice] = ask(**fields).choices
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert "<tool_call>" in choice.message.content
        assert choice.message.reasoning_content == "Hm?"


@pytest.fixture
def prompt_tokens(thinking) -> Any:
    """The number of prompt tokens of a request with these fields, and what was ignored of them."""
    with thinking.openai() as client:

        def count(**fields: Any) -> tuple[int, str | None]:
            raw = client.chat.completions.with_raw_response.create(
                model="tiny", messages=QUESTION, max_tokens=1, extra_body=fields
            )
            return raw.parse().usage.prompt_tokens, raw.headers.get("X-JLLM-Ignored")

        yield count


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"enable_thinking": False}, False),  # DashScope, SiliconFlow
        ({"enable_thinking": True}, True),
        ({"think": False}, False),  # Ollama
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "medium"}, True),
        ({"reasoning": {"effort": "none"}}, False),  # OpenRouter, Ollama
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"enabled": True, "exclude": False}}, True),
        ({"thinking": {"type": "disabled"}}, False),  # DeepSeek, Z.ai
        ({"thinking": {"type": "enabled"}}, True),
        # What the client says to the template itself comes first, as in vLLM.
        ({"reasoning_effort": "medium", "chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "none", "enable_thinking": True}, True),
    ],
    ids=str,
)
def test_thinking_can_be_turned_on_and_off(fields: dict[str, Any], thinks: bool, prompt_tokens) -> None:
    on, _ = prompt_tokens()
    assert prompt_tokens(**fields) == (on if thinks else on + 2, None)  # <think></think>


@pytest.mark.parametrize("effort", ["minimal", "low", "high", "xhigh"])
def test_a_switch_knows_no_degree(effort: str, prompt_tokens) -> None:
    """Any effort but "none" turns thinking on, as in vLLM; that they are the same is said."""
    on, _ = prompt_tokens()
    assert prompt_tokens(reasoning_effort=effort) == (on, "reasoning_effort")
    assert prompt_tokens(reasoning={"effort": effort}) == (on, "reasoning.effort")


def test_variables_that_the_template_does_not_read_change_nothing(prompt_tokens, thinking) -> None:
    on, _ = prompt_tokens()
    for value in (True, {"a": 1}):
        unread = {"thinking": value, "reasoning_effort": value, "custom": value}
        names = [f"chat_template_kwargs.{name}" for name in unread]
        assert prompt_tokens(chat_template_kwargs=unread) == (on, ", ".join(names))
        reply = thinking.post("/tokenize", {"messages": QUESTION, "chat_template_kwargs": unread})
        assert (reply.json()["count"], reply.headers["X-JLLM-Ignored"].split(", ")) == (on, names)
    with pytest.raises(openai.BadRequestError, match="has no variable 'messages'; it has enable_thinking"):
        prompt_tokens(chat_template_kwargs={"messages": [], "custom": 1})


def test_an_effort_goes_to_a_template_that_reads_it(serve, thinker, marked_tokenizer) -> None:
    template = "{{ reasoning_effort | default('-') }}{{ verbosity }}" + (marked_tokenizer.chat_template or "")
    raw = RawTokenizer.from_str(marked_tokenizer.to_json())
    model = dataclasses.replace(thinker, tokenizer=Tokenizer(raw, {"eos_token": "<|end|>"}, template))
    with serve(model) as server:
        said: set[int] = set()
        for effort in ("none", "low", "high", "minimal"):
            body = {"model": "tiny", "messages": QUESTION, "reasoning_effort": effort, "max_tokens": 1}
            reply = server.post("/v1/chat/completions", body)
            assert "X-JLLM-Ignored" not in reply.headers
            said.add(reply.json()["usage"]["prompt_tokens"] - len(effort))
        assert len(said) == 2  # with "none" the thoughts are closed, too


def test_a_model_that_cannot_be_told_how_much_to_think(serve, server, thinker, marked_tokenizer) -> None:
    def ask_it(server: Any, **fields: Any) -> Any:
        return server.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "max_tokens": 1, **fields})

    # It never thinks: "none" is how it is.
    assert ask_it(server, reasoning_effort="none").is_success
    assert ask_it(server, reasoning_effort="none").json()["usage"] == ask_it(server).json()["usage"]
    assert ask_it(server, reasoning_effort="high").json()["error"]["param"] == "reasoning_effort"
    for value in (True, False):
        reply = ask_it(server, enable_thinking=value)
        assert (reply.json()["usage"], reply.headers["X-JLLM-Ignored"]) == (
            ask_it(server).json()["usage"],
            "enable_thinking",
        )
    # It always thinks.
    template = "{% for message in messages %}{{ message.content }}{% endfor %}<think></think>?"
    raw = RawTokenizer.from_str(marked_tokenizer.to_json())
    model = dataclasses.replace(thinker, tokenizer=Tokenizer(raw, {"eos_token": "<|end|>"}, template))
    with serve(model) as always:
        for effort in ("none", "high"):
            error = ask_it(always, reasoning={"effort": effort}).json()["error"]
            assert (error["param"], "reads neither" in error["message"]) == ("reasoning.effort", True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "thinking"),
        ({"enable_thinking": True, "reasoning": {"enabled": False}}, "reasoning.enabled"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
        ({"reasoning": {"exclude": True}}, "reasoning.exclude"),
        ({"reasoning": {"x": True}}, "reasoning.x"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_said_of_thinking(fields: dict[str, Any], param: str, thinking) -> None:
    reply = thinking.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_probabilities_are_those_of_all_tokens(ask) -> None:
    [choice] = ask(tools=TOOLS, logprobs=True).choices
    said = "".join(token.token for token in choice.logprobs.content)
    assert said.startswith("<think>Hm?</think>Well. <tool_call>")
    assert said.endswith("</tool_call><|im_end|>")


def test_what_tools_answer_goes_back_to_the_model(ask, thinking, marked_tokenizer) -> None:
    message = ask(tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It rains."}
    reply = ask([*QUESTION, message, result], tools=TOOLS)
    body = {"messages": [*QUESTION, message.model_dump(), result], "tools": TOOLS}
    tokens = thinking.post("/tokenize", body).json()["tokens"]
    assert reply.usage.prompt_tokens == len(tokens)
    prompt = marked_tokenizer.decode(tokens, skip_special_tokens=False)
    assert "look_up: Looks a city up." in prompt
    assert "Well.Paris<|im_end|>\n<|im_start|>tool\nIt rains." in prompt  # arguments are an object to the template


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_arguments_that_are_no_json_are_named_in_the_header(path: str, thinking) -> None:
    def asked(arguments: str) -> Any:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        said = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "It rains."}]
        return thinking.post(path, {"model": "tiny", "messages": said, "tools": TOOLS})

    assert "X-JLLM-Ignored" not in asked("{}").headers
    reply = asked('{"city": "Par')
    where = "messages[1].tool_calls[0].function.arguments"
    assert (reply.status_code, reply.headers["X-JLLM-Ignored"]) == (200, where)
    error = asked('{"city": "\\ud83d"}').json()["error"]
    assert (error["param"], error["message"].startswith(f"{where} is not valid text")) == (where, True)


# ---- What it must do. The model says anything, or would rather say something else.


@pytest.fixture
def force(serve, babbler, marked_tokenizer, tiny):
    """Asks a model that says anything."""
    model = dataclasses.replace(babbler, tokenizer=marked_tokenizer)
    with serve(model) as server, server.openai() as client:

        def ask_it(**fields: Any) -> Any:
            asked = {"max_tokens": 200, "tools": TOOLS, **fields}
            return client.chat.completions.create(model="tiny", messages=QUESTION, **asked)

        yield ask_it


OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_can_be_demanded(choice: Any, force) -> None:
    for seed in range(3):
        reply = force(tool_choice=choice, seed=seed, extra_body=OFF, parallel_tool_calls=False)
        [answer] = reply.choices
        [(name, arguments)] = calls_of(answer.message)
        assert (name, arguments["city"] in ("Paris", "Rome")) == ("look_up", True)
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")


def test_a_function_without_parameters_takes_none(force) -> None:
    chosen = {"type": "function", "function": {"name": "clock"}}
    reply = force(tools=[*TOOLS, CLOCK], tool_choice=chosen, extra_body=OFF, parallel_tool_calls=False)
    assert calls_of(reply.choices[0].message) == [("clock", {})]


def test_what_is_demanded_leaves_room_for_thoughts(force, marked_tokenizer) -> None:
    opened, closed = (str(marked_tokenizer._raw.token_to_id(mark)) for mark in ("<think>", "</think>"))
    for seed in range(6):
        bias = {opened: 100 if seed % 2 else -100, closed: 20}
        fields = {"parallel_tool_calls": False, "logit_bias": bias, "logprobs": True}
        [choice] = force(tool_choice="required", seed=seed, **fields).choices
        assert calls_of(choice.message)
        assert choice.logprobs.content[0].token == ("<think>" if seed % 2 else "<tool_call>")


def test_a_strict_function_is_called_as_its_schema_says(force, marked_tokenizer) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    bias = {str(marked_tokenizer._raw.token_to_id("<tool_call>")): 11}
    ends = set()
    for seed in range(8):
        reply = force(tools=strict, seed=seed, extra_body=OFF, logit_bias=bias)
        ends.add(reply.choices[0].finish_reason)
        if reply.choices[0].finish_reason == "tool_calls":
            assert {arguments["city"] for _, arguments in calls_of(reply.choices[0].message)} <= {"Paris", "Rome"}
    assert "tool_calls" in ends


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("max_tokens", [21, 38, 44, 50])
def test_a_call_that_max_tokens_cuts_off_comes_as_far_as_it_goes(max_tokens: int, parallel: bool, force) -> None:
    """As OpenAI gives it: a call with arguments that are no JSON yet, and the reason "length"."""
    whole = '\n{"name": "look_up", "arguments": {"city": "Paris"}}'
    bias = {"80": 50}  # "P"
    asked = {"tool_choice": "required", "max_tokens": max_tokens, "logit_bias": bias, "extra_body": OFF, "seed": 3}
    reply = force(**asked, parallel_tool_calls=parallel)
    [choice] = reply.choices
    [one] = choice.message.tool_calls
    said = whole[: max_tokens - 1]  # each character is a token, behind that of the marker
    arguments = said[said.index("{", 5) :] if "{" in said[5:] else ""
    assert (one.function.name, one.function.arguments) == ("look_up", arguments)
    assert (choice.message.content, choice.finish_reason, reply.usage.completion_tokens) == (None, "length", max_tokens)
    found = collected(force(**asked, parallel_tool_calls=parallel, stream=True))
    assert [call[1:] for call in found["calls"]] == [["look_up", arguments]]
    assert (found["content"], found["end"]) == ("", "length")


@pytest.mark.parametrize("max_tokens", [1, 8, 15, 19, 53, 55, 66, 75])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_the_beginning_of_a_demanded_call_is_no_content(choice: Any, max_tokens: int, force) -> None:
    """The grammar allows calls alone, so what is cut off before its name is known cannot have become a text."""
    asked = {"tool_choice": choice, "max_tokens": max_tokens, "extra_body": OFF, "seed": 3}
    asked["logit_bias"] = {"80": 50, "10": 50}  # "P", and the line between two calls
    [answer] = force(**asked).choices
    # From 53 on the first call is whole, and a second one may have begun.
    assert [call.function.name for call in answer.message.tool_calls or []] == ["look_up"] * (max_tokens >= 53)
    assert (answer.message.content, answer.finish_reason) == (None, "length")
    chunks = list(force(**asked, stream=True))
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert chunks[0].choices[0].delta.content is None
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_call_or_json(force) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    kinds = set()
    for seed in range(12):
        bias = {"123": 9.0 if seed % 2 else -9.0}
        message = force(response_format=wanted, seed=seed, extra_body=OFF, logit_bias=bias).choices[0].message
        if message.tool_calls:
            assert calls_of(message)
        else:
            assert json.loads(message.content).keys() == {"a"}
        kinds.add(bool(message.tool_calls))
    assert kinds == {True, False}


def test_one_call_is_enough_where_more_are_not_wanted(serve, tiny, marked_tokenizer) -> None:
    """The model would go on with a second one."""
    raw = RawTokenizer.from_str(marked_tokenizer.to_json())
    second = '<tool_call>{"name": "clock"}</tool_call>'
    raw.add_tokens([AddedToken(second, normalized=False)])
    tokenizer = Tokenizer(raw, {"eos_token": "<|end|>"}, marked_tokenizer.chat_template)
    first = '\n<tool_call>{"name": "look_up", "arguments": {"city": "Paris"}}</tool_call>'
    # On a busy machine some more tokens are there before the answer is stopped.
    ids = tokenizer.encode(
        first + second + string.ascii_letters + string.digits + "<|im_end|>", add_special_tokens=False
    )
    model = dataclasses.replace(tiny.saying(ids, eos_ids=(tiny.im_end,)), tokenizer=tokenizer)
    with serve(model) as server, server.openai() as client:

        def ask(**fields: Any) -> Any:
            return client.chat.completions.create(model="tiny", messages=QUESTION, tools=[*TOOLS, CLOCK], **fields)

        both = ask()
        assert [name for name, _ in calls_of(both.choices[0].message)] == ["look_up", "clock"]
        assert both.usage.completion_tokens == len(ids) - 1  # the first stands in the prompt
        one = ask(parallel_tool_calls=False)
        assert [name for name, _ in calls_of(one.choices[0].message)] == ["look_up"]
        assert one.choices[0].finish_reason == "tool_calls"
        assert one.usage.completion_tokens < len(ids) - 1  # it was stopped there, and counted to the last token
        streamed = collected(ask(parallel_tool_calls=False, stream=True))
        assert ([name for _, name, _ in streamed["calls"]], streamed["end"]) == (["look_up"], "tool_calls")
        server.wait_until_empty()
