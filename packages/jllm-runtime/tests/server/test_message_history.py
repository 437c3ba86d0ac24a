"""Earlier messages that clients send back, and what of them reaches the chat template."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from jllm_runtime import RequestError, Tokenizer
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import OutputParser, ToolCallArguments, ToolCallStart
from jllm_runtime.server.parsing.tool_calls import write_calls
from jllm_runtime.server.requests.chat_prompt import ChatPromptRenderer
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.schemas.chat import ChatCompletionRequest
from jllm_runtime.server.template_processes import TemplateProcesses

USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "look_up"}}]

# All that is told to a template: its own words for each message.
HEADER = "<tool_call>arguments</tool_call>{{ tools | tojson if tools }}"
VERBATIM = HEADER + "{% for m in messages %}{{ m | tojson }}{{ '\\n' }}{% endfor %}"
# As Qwen's, Llama 3.1's (with a check), older ones of vLLM (without), SmolLM3's.
SEVERAL = HEADER + (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}{{ '\\n' }}{% endfor %}"
)
SINGLE = (
    "{% for m in messages if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('single!') }}{% endfor %}"
)
SINGLE += SEVERAL
FIRST_ONLY = SEVERAL.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
NO_CALLS = HEADER + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses()
    yield processes
    processes.close()


@pytest.fixture
def prompt(tiny, processes: TemplateProcesses):
    """Renders a request, as the body of a client has it."""

    def render(
        template: str,
        messages: list[Any],
        tools: list[Any] = TOOLS,
        ignored: IgnoredFields | None = None,
        strict: bool = False,
        **fields: Any,
    ) -> str:
        body = ChatCompletionRequest.model_validate({"model": "tiny", "messages": messages, "tools": tools, **fields})
        renderer = ChatPromptRenderer(Tokenizer(tiny.tokenizer._raw, {}, template), processes)
        opened, continued = body.add_generation_prompt, body.continues(body.messages)
        return renderer.render(body.messages, body.tools, {}, continued, opened, ignored, strict)

    return render


def call(name: str, id: str | None = None, arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    named = {} if id is None else {"id": id}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def result(content: Any, id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, **({} if id is None else {"tool_call_id": id})}


# ---- Fields that clients keep with their messages, and that no prompt has.

FULL = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [call("look_up", "a", '{"city": "Paris"}')]},
    result("It rains.", "a"),
    {"role": "assistant", "content": "It rains."},
]
SAID = (
    '{"content": "Be brief.", "role": "system"}\n{"content": "Hi", "role": "user"}\n'
    '{"content": "", "role": "assistant", "tool_calls": [{"function": {"arguments": {"city": "Paris"}, "name": '
    '"look_up"}, "id": "a", "type": "function"}]}\n'
    '{"content": "It rains.", "name": "look_up", "role": "tool", "tool_call_id": "a"}\n'
    '{"content": "It rains.", "role": "assistant"}\n'
)
ON_MESSAGES = ["cache_control", "prompt_cache_breakpoint", "provider_specific_fields", "extra_content", "annotations"]
ON_MESSAGES += ["id", "type", "timestamp", "metadata"]
# What programs keep of the response: OpenAI's and LiteLLM's dumps, vLLM, Open WebUI, LangChain, Vercel's SDK.
ON_MESSAGES += [
    "object",
    "created",
    "created_at",
    "createdAt",
    "model",
    "index",
    "status",
    "finish_reason",
    "stop_reason",
]
ON_MESSAGES += ["stop_sequence", "logprobs", "usage", "system_fingerprint", "service_tier", "response_metadata"]
ON_MESSAGES += ["usage_metadata", "providerOptions", "providerMetadata", "error"]
ON_ANSWERS = ["thinking_blocks", "reasoning_details", "parsed", "audio", "function_call", "refusal"]
VALUES: list[Any] = [None, "x", {"type": "ephemeral"}, [{"type": "url_citation"}], 3]
ONLY_NULL = {"audio", "function_call", "error"}


def sorted_keys(text: str) -> str:
    lines = text.removeprefix("<tool_call>arguments</tool_call>").splitlines()
    return "".join(json.dumps(json.loads(line), sort_keys=True) + "\n" for line in lines)


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("name", [*ON_MESSAGES, *ON_ANSWERS])
def test_fields_that_no_prompt_has_change_no_prompt(name: str, value: Any, prompt) -> None:
    assert sorted_keys(prompt(VERBATIM, FULL, tools=[])) == SAID
    if (name in ONLY_NULL and value is not None) or (name == "refusal" and not isinstance(value, str | None)):
        return
    roles = {"assistant"} if name in ON_ANSWERS else {"system", "user", "assistant", "tool"}
    # A refusal stands for the content of a message without.
    marked = [{**m, name: value} if m["role"] in roles and (name != "refusal" or m["content"]) else m for m in FULL]
    assert marked != FULL
    assert sorted_keys(prompt(VERBATIM, marked, tools=[])) == SAID


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_marks_on_parts_calls_and_tools_change_no_prompt(value: Any, prompt) -> None:
    marks = dict.fromkeys(["cache_control", "provider_specific_fields", "extra_content"], value)
    part = {"type": "text", "text": "Be brief.", "annotations": value, "prompt_cache_breakpoint": value, **marks}
    function = {"name": "look_up", "arguments": '{"city": "Paris"}', "description": value, "parsed_arguments": value}
    made = {"index": 0, "id": "a", "type": "function", "function": {**function, **marks}, **marks}
    messages = [{"role": "system", "content": [part]}, USER, {"role": "assistant", "tool_calls": [made]}, *FULL[3:]]
    assert sorted_keys(prompt(VERBATIM, messages, tools=[])) == SAID
    tools = [{"type": "function", "function": {"name": "f", "cache_control": value}, "cache_control": value}]
    plain = [{"type": "function", "function": {"name": "f"}}]
    assert prompt(VERBATIM, [USER], tools=tools) == prompt(VERBATIM, [USER], tools=plain)


@pytest.mark.parametrize("name", ["error", "audio", "images", "unheard_of"])
def test_fields_that_say_something_are_refused_by_name(name: str, prompt) -> None:
    with pytest.raises(ValueError, match=name):
        prompt(VERBATIM, [USER, {"role": "assistant", "content": "Hi", name: {"name": "f", "arguments": "{}"}}])


# ---- Fields that are honoured.


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_may_have_several_names(name: str, prompt) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    asked = [USER, {"role": "assistant", "content": "Yes", name: "hm"}]
    assert prompt(template, asked, tools=[]) == "|Hihm|Yes"
    both = [USER, {"role": "assistant", "content": "Yes", "reasoning": "no", "reasoning_content": "hm"}]
    assert prompt(template, both, tools=[]) == "|Hihm|Yes"
    # As in OpenAI's Responses and OpenRouter's requests: no thinking, but what else there is about it.
    for value in ([{"type": "summary_text", "text": "x"}], {"effort": "low"}, []):
        asked = [USER, {"role": "assistant", "content": "Yes", "reasoning": value}]
        assert prompt(template, asked, tools=[]) == "|Hi|Yes"


@pytest.mark.parametrize(
    ("parts", "thought"),
    [
        ([{"type": "thinking", "thinking": "hm", "signature": "x"}], "hm"),  # Anthropic
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": True}], "hm"),  # Mistral
        ([{"type": "reasoning", "text": "hm", "providerOptions": {}}], "hm"),  # Vercel
        ([{"type": "reasoning", "reasoning": "hm"}], "hm"),  # LangChain
        ([{"type": "reasoning", "text": "h"}, {"type": "reasoning", "text": "m"}], "h\nm"),
        ([{"type": "redacted_thinking", "data": "x"}], ""),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x", "id": "rs_1"}], ""),
    ],
    ids=str,
)
def test_thinking_may_be_a_part_of_the_content(parts: list[Any], thought: str, prompt) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    said = {"role": "assistant", "content": [*parts, {"type": "text", "text": "Yes"}]}
    assert prompt(template, [USER, said], tools=[]) == f"|Hi{thought}|Yes"
    assert prompt(template, [USER, said | {"reasoning_content": "so"}], tools=[]) == "|Hiso|Yes"
    assert prompt(template, [USER, {"role": "assistant", "content": parts}], tools=[]) == f"|Hi{thought}|"


def test_function_calls_in_the_older_form(prompt) -> None:
    asked = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "It rains."},
    ]
    newer = [
        USER,
        {"role": "assistant", "tool_calls": [call("f", arguments='{"x": 1}')]},
        result("It rains.") | {"name": "f"},
    ]
    for template in (VERBATIM, SEVERAL, SINGLE, NO_CALLS):
        assert prompt(template, asked) == prompt(template, newer)
    two = asked[1] | {"tool_calls": [call("f")]}
    broken = {"role": "assistant", "function_call": {"name": "f", "arguments": "[]"}}
    for message, param in ((two, "function_call"), (broken, "function_call.arguments")):
        with pytest.raises(ApiError) as caught:
            prompt(VERBATIM, [USER, message])
        assert caught.value.param == f"messages[1].{param}"


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        *(("is_error", None, False), ("is_error", False, False), ("is_error", True, True)),
        *(("status", "success", False), ("status", "error", True)),  # LangChain
    ],
)
def test_whether_a_tool_has_failed_is_for_its_content_to_say(name: str, value: Any, named: bool, prompt) -> None:
    """No template reads it: an error's text is in the content. What is left out is named all the same."""
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a")]}, result("No such city.", "a")]
    marked = [*asked[:2], asked[2] | {name: value}]
    ignored = IgnoredFields()
    assert prompt(VERBATIM, marked, ignored=ignored) == prompt(VERBATIM, asked)
    assert ignored.header() == (f"messages[2].{name}" if named else None)
    if named:
        with pytest.raises(ApiError, match="say in the content") as caught:
            prompt(VERBATIM, marked, strict=True)
        assert caught.value.param == f"messages[2].{name}"


def test_the_name_of_a_tool_in_the_spelling_of_ollama(prompt) -> None:
    asked = [USER, {"role": "assistant", "tool_calls": [call("f")]}, result("x") | {"tool_name": "g"}]
    assert '"name": "g"' in prompt(VERBATIM, asked)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"refusal": "I cannot."}, "I cannot."),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": "Well.", "refusal": "I cannot."}, "Well."),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        ({"content": [{"type": "output_text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ({"content": []}, ""),
        ({}, ""),
    ],
)
def test_the_text_of_an_answer(fields: dict[str, Any], text: str, prompt) -> None:
    assert prompt("{{ messages[1].content }}", [USER, {"role": "assistant", **fields}], tools=[]) == text


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}], "absent"])
def test_a_tool_may_have_nothing_to_say(content: Any, prompt) -> None:
    said = {"role": "tool", "tool_call_id": "a"} if content == "absent" else result(content, "a")
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a")]}, said]
    assert prompt(SEVERAL, asked).endswith("<assistant>[f {}]\n<tool>\n")


# ---- Arguments.


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"city": "Pâris", "n": [1, 2.50]}', '{"city": "Pâris", "n": [1, 2.5]}'),
        ({"city": "Paris"}, '{"city": "Paris"}'),  # as Ollama and TGI have them
        ("{}", "{}"),
        # Nothing, in the spellings of clients.
        *(("", "{}"), (" \n", "{}"), (None, "{}"), ("null", "{}"), (" null\n", "{}")),
    ],
)
def test_arguments_are_an_object_to_the_template(arguments: Any, given: str, prompt) -> None:
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a", arguments)]}]
    for template in (SEVERAL, SINGLE, NO_CALLS):
        for strict in (False, True):
            ignored = IgnoredFields()
            assert given in prompt(template, asked, ignored=ignored, strict=strict)
            assert ignored.header() is None


@pytest.mark.parametrize("arguments", ['{"city": "Par', '{"city": ', "no JSON at all", "{'city': 1}", "{} {}", "nul"])
def test_arguments_that_are_no_json_are_left_out_and_named(arguments: str, prompt) -> None:
    """As in vLLM, but said: a call that was cut off, or that a model has written wrongly."""
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a"), call("g", "b", arguments)]}]
    ignored, where = IgnoredFields(), "messages[1].tool_calls[1].function.arguments"
    assert "[g {}]" in prompt(SEVERAL, asked, ignored=ignored)
    assert ignored.header() == where
    with pytest.raises(ApiError, match="this is no JSON: ") as caught:
        prompt(SEVERAL, asked, strict=True)
    assert (caught.value.status_code, caught.value.param) == (400, where)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"n": ' + "1" * 4301 + "}", "cannot be read: Exceeds the limit"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nests too deep"),
        ('{"a": "\\ud800"}', "is half of a surrogate pair"),
        ('{"\\udfff": 1}', "is half of a surrogate pair"),
    ],
    ids=lambda text: text[:20],
)
def test_arguments_that_cannot_be_read_are_refused_with_their_place(arguments: str, message: str, prompt) -> None:
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a", arguments)]}]
    with pytest.raises(ApiError, match=message) as caught:
        prompt(SEVERAL, asked)
    where = "messages[1].tool_calls[0].function.arguments"
    assert (caught.value.status_code, caught.value.param) == (400, where)
    assert caught.value.message.startswith(f"{where} ")


@pytest.mark.parametrize("depth", [64, 128, 200, 400, 700, 960])
def test_deep_arguments_are_rendered_or_refused(depth: int, prompt) -> None:
    """The template's process has a limit of its own, which ends no other request."""
    arguments = '{"n": ' + "[" * depth + "]" * depth + "}"
    with contextlib.suppress(ApiError, RequestError):
        assert arguments in prompt(SEVERAL, [USER, {"role": "assistant", "tool_calls": [call("f", "a", arguments)]}])
    assert prompt(SEVERAL, [USER])


@pytest.mark.parametrize("arguments", ["[1]", "3", '"text"', "true", "[null]"])
def test_arguments_that_are_no_object_are_refused_with_their_place(arguments: str, prompt) -> None:
    asked = [USER, {"role": "assistant", "tool_calls": [call("f", "a"), call("f", "b", arguments)]}]
    with pytest.raises(ApiError) as caught:
        prompt(SEVERAL, asked)
    where = "messages[1].tool_calls[1].function.arguments"
    assert (caught.value.status_code, caught.value.param) == (400, where)
    assert caught.value.message == f"{where} must be a JSON object, got {arguments!r}"


# ---- Several calls in one turn.

TURN = [
    USER,
    {"role": "assistant", "content": "Well.", "reasoning": "hm", "tool_calls": [call("f", "a"), call("g", "b")]},
]
AS_TEXT = "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>' for name in "fg")
NAMELESS = [USER, {"role": "assistant", "content": "Well.", "tool_calls": [call("f"), call("g")]}]


@pytest.mark.parametrize("tools", [TOOLS, []], ids=["with tools", "without tools"])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (SEVERAL, "<assistant>Well.[f {}][g {}]\n<tool>one\n<tool>two\n<user>Hi\n"),
        (SINGLE, "<assistant>Well.[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n<user>Hi\n"),
        (FIRST_ONLY, "<assistant>Well.[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n<user>Hi\n"),
        (NO_CALLS, f"<assistant>Well.\n{AS_TEXT}\n<tool>one\n<tool>two\n<user>Hi\n"),
    ],
)
def test_a_turn_of_several_calls_is_told_as_the_template_can(
    template: str, text: str, tools: list[Any], prompt
) -> None:
    assert prompt(template, [*TURN, result("one", "a"), result("two", "b"), USER], tools=tools).endswith(text)
    assert prompt(template, [*NAMELESS, result("one"), result("two"), USER], tools=tools).endswith(text)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([result("two", "b"), result("one", "a")], "[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n"),
        ([result("two", "b")], "[f {}]\n<assistant>[g {}]\n<tool>two\n"),
        ([], "[f {}]\n<assistant>[g {}]\n"),
        ([result("one"), result("two", "b")], "[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n"),
        ([result("one", "other"), result("two")], "[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n"),
        (
            [result("one", "a"), result("two", "b"), result("more", "a")],
            "[f {}]\n<tool>one\n<tool>more\n<assistant>[g {}]\n<tool>two\n",
        ),
        (
            [result("one"), result("two"), result("more")],
            "[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n<tool>more\n",
        ),
        (
            [result("one", "a"), result("two", "b"), *TURN, result("one", "a"), result("two", "b")],
            "[f {}]\n<tool>one\n<assistant>[g {}]\n<tool>two\n<user>Hi\n<assistant>Well.[f {}]\n<tool>one\n"
            "<assistant>[g {}]\n<tool>two\n",
        ),
    ],
)
def test_each_call_has_its_result_behind_it(results: list[Any], text: str, prompt) -> None:
    assert prompt(SINGLE, [*TURN, *results]).endswith(f"<user>Hi\n<assistant>Well.{text}")


@pytest.mark.parametrize(
    ("results", "texts"),
    [
        ([result("one", "a"), result("two", "b")], "one two"),
        ([result("two", "b"), result("one", "a")], "one two"),
        ([result("two", "b"), result("one")], "one two"),  # without an id, of the call that is left
        ([result("two", "b"), result("one", "other")], "one two"),
        ([result("two", "b")], "two"),
        ([result("two", "b"), result("more", "b"), result("one", "a")], "one two more"),
        ([result("one", "other"), result("two"), result("more", "c")], "one two more"),
        # Those of a later turn are not of this one.
        ([result("two", "b"), USER, result("one", "a")], "two Hi one"),
        ([result("two", "b"), result("one", "a"), *TURN, result("two", "b"), result("one", "a")], "one two Hi one two"),
    ],
)
def test_results_are_in_the_order_of_their_calls(results: list[Any], texts: str, prompt) -> None:
    """The API pairs them by ids; Qwen's templates and others show no id, so that the n-th result is the n-th call's."""
    template = HEADER + "{% for m in messages[2:] if m.role != 'assistant' %}{{ m.content }} {% endfor %}"
    text = prompt(template, [*TURN, *results], tools=[])
    assert text.removeprefix("<tool_call>arguments</tool_call>").strip() == texts


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([result("1", "a"), result("2", "b")], "fg"),
        ([result("2", "b"), result("1", "a")], "fg"),
        ([result("1"), result("2")], "fg"),
        ([result("2", "b"), result("1", "unknown")], "fg"),
        ([{**result("1", "a"), "name": "own"}, result("2", "b")], "owng"),
        ([result("1", "a"), result("2", "b"), USER, result("3", "a")], "fg"),
    ],
)
def test_a_result_has_the_name_of_its_tool(results: list[Any], names: str, prompt) -> None:
    """Hermes' templates refuse a result without one, which OpenAI's API does not have."""
    template = HEADER + "{% for m in messages if m.role == 'tool' %}{{ m.name }}{% endfor %}"
    assert prompt(template, [*TURN, *results], tools=[]).removeprefix("<tool_call>arguments</tool_call>") == names


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ({"name": "f"}, "f - {}"),
        ({"name": "f", "description": "does"}, "f - does{}"),
        ({"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}, 'f - {"a": {}}'),
        ({"name": "f", "description": "does", "parameters": {"type": "object"}}, "f - does{}"),
        ({"name": "f", "description": "does", "parameters": {}}, "f - does{}"),
    ],
)
def test_a_tool_may_be_a_name_alone(function: dict[str, Any], text: str, prompt) -> None:
    """A template may read more of a tool than there is; what is given is given as it is where it does not."""
    template = (
        "<tool_call>arguments</tool_call>{% for t in tools %}{{ t.function.name + ' - ' + t.function.description }}"
        "{{ t.function.parameters.properties | tojson }}{% endfor %}"
    )
    tools = [{"type": "function", "function": function}]
    assert prompt(template, [USER], tools=tools).removeprefix("<tool_call>arguments</tool_call>") == text
    with pytest.raises(RequestError, match="no such thing"):
        prompt(template + "{{ raise_exception('no such thing') }}", [USER], tools=tools)
    assert json.loads(prompt(HEADER, [USER], tools=tools).removeprefix("<tool_call>arguments</tool_call>")) == tools


def test_thinking_stands_before_the_first_call(prompt) -> None:
    template = SINGLE.replace("<{{ m.role }}>", "<{{ m.role }}>{{ m.reasoning_content }}")
    assert prompt(template, TURN).endswith("<assistant>hmWell.[f {}]\n<assistant>[g {}]\n")


def test_a_template_that_takes_no_calls_at_all_says_so_itself(prompt) -> None:
    template = SEVERAL.replace(
        "{% for c in m.tool_calls %}", "{% for c in m.tool_calls %}{{ raise_exception('no calls') }}"
    )
    with pytest.raises(RequestError, match="no calls"):
        prompt(template, TURN)


@pytest.mark.parametrize("format", ["hermes", "llama3"])
def test_written_calls_are_read_as_the_same_calls(format: Any) -> None:
    calls = [("f", {"city": "Pâris", "text": 'a "quote"</tool_call>'}), ("g", {}), ("h", {"n": [1, None, True]})]
    parser = OutputParser(format, thinking=False, tools=True)
    events = [*parser.feed(write_calls(format, calls)), *parser.finish()]
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, ToolCallArguments)]
    assert list(zip(names, arguments, strict=True)) == calls
    assert len(events) == 2 * len(calls)


# ---- Going on with the last message.

OPENED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST = [USER, {"role": "assistant", "content": "It "}]
CLOSED, CONTINUED = "<user>Hi<end><assistant>It <end>", "<user>Hi<end><assistant>It "


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, CLOSED + "<assistant>"),
        ({"add_generation_prompt": True, "continue_final_message": False}, CLOSED + "<assistant>"),
        ({"add_generation_prompt": None, "continue_final_message": None}, CLOSED + "<assistant>"),
        ({"add_generation_prompt": False}, CLOSED),
        ({"add_generation_prompt": False, "continue_final_message": True}, CONTINUED),
        ({"continue_final_message": True}, CONTINUED),
        ({"messages": [USER, {**LAST[1], "prefix": True}]}, CONTINUED),  # as with DeepSeek and Mistral
        ({"messages": [USER, {**LAST[1], "prefix": False}]}, CLOSED + "<assistant>"),
        ({"messages": [USER, {**LAST[1], "partial": True}]}, CONTINUED),  # as with Kimi
        ({"messages": [USER, {**LAST[1], "partial": False}]}, CLOSED + "<assistant>"),
    ],
)
def test_the_end_of_the_prompt(fields: dict[str, Any], text: str, prompt) -> None:
    assert prompt(OPENED, **{"messages": LAST, "tools": [], **fields}) == text


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        # As in vLLM and transformers.
        (LAST, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ([USER, {**LAST[1], "prefix": True}], {"add_generation_prompt": True}, "messages[1].prefix"),
        ([{**LAST[1], "prefix": True}, USER], {}, "messages[0].prefix"),
        ([{**LAST[1], "partial": True}, USER], {}, "messages[0].partial"),
        ([USER, {"role": "assistant", "function_call": {"name": "f"}, "partial": True}], {}, "messages[1].partial"),
        (TURN, {"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: Any, fields: dict[str, Any], param: str, prompt) -> None:
    with pytest.raises(ApiError) as caught:
        prompt(OPENED, messages, tools=[], **fields)
    assert (caught.value.status_code, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("continued", "thinking"),
    [
        (None, (True, False)),
        ("", (True, False)),  # nothing said yet: as a new answer
        ("It ", (False, False)),
        ("<think>\nhm", (True, True)),
        ("<think>\nhm</think>It", (False, False)),
    ],
)
def test_the_room_for_thinking_behind_what_is_continued(continued: Any, thinking: tuple[bool, bool], tiny) -> None:
    renderer = ChatPromptRenderer(Tokenizer(tiny.tokenizer._raw, {}, OPENED + "{# </think> #}"), TemplateProcesses())
    found = renderer.thinking(f"<user>Say <think>!<end><assistant>{continued or ''}", continued)
    assert (found.allowed, found.opened) == thinking
