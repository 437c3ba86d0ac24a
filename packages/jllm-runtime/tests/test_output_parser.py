"""Output parser: thinking, content and tool calls, in a text that may be cut anywhere."""

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jllm_runtime.server.parsing.output_parser import (
    Content,
    Event,
    OutputParser,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    detect_format,
    detect_thinking,
    opens_thinking,
)

from .plain_events import as_plain

WHITE = " \t\r\n"
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<", "</", "<tool", "_call>"),
    *("\n", " ", "\n\n", ";", "; ", "{", "}", '"', "\\", "[", "]", ":", ",", "hm", "größe", "1", "null", "NaN"),
    *('{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}', '{"name": "h"}', '{"age": 3}'),
    *('{"name": "q", "arguments": "{\\"b\\": \\"}\\"}"}', '{"arguments": {"t": "</tool_call>"}, "name": "late"}'),
    *('{"name": "two\nlines", "arguments": {}}', '{"name": "k", "parameters": {"x": "a\nb"}}', '{"na', 'me": "f"'),
    '<tool_call>\n{"name": "f", "arguments": {"deep": [[{"x": "<tool_call>"}]]}}\n</tool_call>',
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def parse(
    pieces: Sequence[str], format: Any = "hermes", thinking: bool = False, cut: bool = False, **options: Any
) -> list[Event]:
    """All events, neighbours of one kind joined, with the ids "0", "1", ..."""
    ids = map(str, itertools.count())
    parser = OutputParser(format, thinking, options.pop("tools", True), new_id=lambda: next(ids), **options)
    return joined([event for piece in pieces for event in parser.feed(piece)] + parser.finish(cut))


def joined(events: list[Event]) -> list[Event]:
    merged: list[Event] = []
    for event in events:
        assert getattr(event, "text", "some"), "an event without text"
        if merged and type(merged[-1]) is type(event) and isinstance(event, Reasoning | Content):
            event = type(event)(merged.pop().text + event.text)  # type: ignore[union-attr]
        merged.append(event)
    return merged


def call(number: int, name: str, arguments: str) -> list[Event]:
    return [ToolCallStart(number, str(number), name), ToolCallArguments(number, arguments)]


# ---- Wherever the text is cut.


@pytest.mark.parametrize("format", ["hermes", "llama3", None])
@pytest.mark.parametrize(("thinking", "inside"), [(False, False), (True, False), (True, True)])
@given(text=texts, cut=st.booleans(), data=st.data())
def test_the_events_do_not_depend_on_where_the_text_is_cut(
    format: Any, thinking: bool, inside: bool, text: str, cut: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = parse([text], format, thinking, cut, inside_thinking=inside)
    assert parse(pieces, format, thinking, cut, inside_thinking=inside) == whole
    assert parse(list(text), format, thinking, cut, inside_thinking=inside) == whole


# ---- Nothing is lost: each format beside a plain reading of the whole text.


def plain_call(
    text: str, keys: set[str] = frozenset({"arguments", "parameters"})
) -> tuple[tuple[str, Any], int] | None:
    """The call that the text begins with, and its end."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        found, end = json.JSONDecoder(strict=False, parse_constant=refuse).raw_decode(text)
        if not isinstance(found, dict) or not found.keys() <= {"name", "arguments", "parameters", "id", "type"}:
            return None
        given = [found[key] for key in keys if key in found]
        arguments = given[0] if given else None
        if isinstance(arguments, str):
            arguments = json.JSONDecoder(strict=False, parse_constant=refuse).decode(arguments)
    except ValueError:
        return None
    arguments = {} if arguments is None else arguments
    name = found.get("name")
    if not isinstance(name, str) or not name.isprintable() or not name or len(given) > 1:
        return None
    return ((name, arguments), end) if isinstance(arguments, dict) else None


def plain_hermes(text: str) -> Iterator[str | tuple[str, Any]]:
    """The text between the calls, and the calls."""
    at = begun = 0
    while (at := text.find("<tool_call>", at)) >= 0:
        start = at + len("<tool_call>")
        start += len(text[start:]) - len(text[start:].lstrip(WHITE))
        found = plain_call(text[start:])
        if found is not None:
            rest = text[start + found[1] :].lstrip(WHITE)
            if rest.startswith("</tool_call>") or "</tool_call>".startswith(rest):
                yield text[begun:at].rstrip(WHITE)
                yield found[0]
                at = begun = len(text) - len(rest[len("</tool_call>") :])
                continue
        at += len("<tool_call>")
    rest = text[begun:]
    yield "" if begun and not rest.strip(WHITE) else rest


def plain_llama3(text: str) -> Iterator[str | tuple[str, Any]]:
    at, separator = 0, ""
    while start := re.match(rf"[ \t\r\n]*{separator}[ \t\r\n]*(<\|python_tag\|>[ \t\r\n]*)?(?={{)", text[at:]):
        found = plain_call(text[at + start.end() :])
        if found is None or found[0] is None or not re.search('"(parameters|arguments)"', text[at + start.end() :]):
            break
        if (
            not {"parameters", "arguments"}
            & json.JSONDecoder(strict=False).raw_decode(text[at + start.end() :])[0].keys()
        ):
            break
        yield found[0]
        at, separator = at + start.end() + found[1], ";?"
    rest = text[at:]
    yield "" if at and not rest.strip(WHITE) else rest


@given(text=texts)
@example('<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>')
@example('<tool_call>{"name": "f"}</tool_call> and <tool_call>')
@example('<tool_call><tool_call>{"name": "f"}</tool_')
def test_hermes_calls_are_those_of_a_plain_reading(text: str) -> None:
    assert as_plain(parse([text], "hermes")) == [part for part in plain_hermes(text) if part]


@given(text=texts)
@example('{"name": "f", "parameters": {}};{"name": "g", "parameters": {}} ; ')
def test_llama3_calls_are_those_of_a_plain_reading(text: str) -> None:
    assert as_plain(parse([text], "llama3")) == [part for part in plain_llama3(text) if part]


@given(text=texts)
def test_without_tools_or_a_format_every_character_is_content(text: str) -> None:
    expected = [Content(text)] if text else []
    assert parse([text], "hermes", tools=False) == expected
    assert parse(list(text), None) == expected


@given(text=texts, inside=st.booleans())
def test_thinking_and_content_are_all_there_is(text: str, inside: bool) -> None:
    events = parse(list(text), None, thinking=True, inside_thinking=inside)
    opened = re.match(r"[ \t\r\n]*<think>", text)
    if not opened and not inside:
        assert events == ([Content(text)] if text else [])
        return
    body = text[opened.end() :] if opened else text
    reasoning, mark, content = body.partition("</think>")
    reasoning = reasoning.lstrip(WHITE)
    expected = [Reasoning(reasoning.rstrip(WHITE) if mark else reasoning), Content(content.lstrip(WHITE))]
    assert events == [event for event in expected if event.text]


# ---- Thinking.


def test_what_qwen3_says() -> None:
    text = (
        "<think>\nThe user wants <tool_call>s.\n</think>\n\nLet me look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    )
    assert parse(list(text), "hermes", thinking=True) == [
        Reasoning("The user wants <tool_call>s."),
        Content("Let me look."),
        *call(0, "weather", '{"city": "Köln", "days": [1, 2]}'),
        *call(1, "time", "{}"),
    ]


def test_an_empty_thought_is_none() -> None:
    assert parse(["<think>\n\n</think>\n\nHi"], thinking=True) == [Content("Hi")]


def test_the_prompt_may_have_opened_the_thinking() -> None:
    text = "So.\n</think>\n\nHi"
    assert parse([text], thinking=True, inside_thinking=True) == [Reasoning("So."), Content("Hi")]
    assert parse(["<think>\n" + text], thinking=True, inside_thinking=True) == [Reasoning("So."), Content("Hi")]
    assert parse([text], thinking=True) == [Content(text)]


def test_pieces_are_given_as_soon_as_they_are_certain() -> None:
    parser = OutputParser("hermes", thinking=True, tools=True)
    assert parser.feed("<thi") == []
    assert parser.feed("nk>\nSo") == [Reasoning("So")]
    assert parser.feed(" it is. </") == [Reasoning(" it is.")]
    assert parser.feed("b>") == [Reasoning(" </b>")]
    assert parser.feed("</think>\n") == []
    assert parser.feed("\nHi <b") == [Content("Hi <b")]
    assert parser.feed("> <tool") == [Content(">")]
    assert parser.feed("box>") == [Content(" <toolbox>")]
    assert parser.feed("<tool_call>\nno") == [Content("<tool_call>\nno")]
    assert parser.feed('<tool_call>{"city"') == [Content('<tool_call>{"city"')]
    assert parser.feed(" ...\n") == [Content(" ...")]
    assert parser.finish() == [Content("\n")]


# ---- Calls.


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ('{"name": "f", "arguments": {"x": 1.50, "y": 1e400}}', '{"x": 1.50, "y": 1e400}'),
        ('{"arguments": {"x": "}"}, "name": "f"}', '{"x": "}"}'),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', '{"x": 1}'),
        ('{"name": "f", "arguments": {"x": "a\nb"}}', '{"x": "a\\nb"}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "parameters": {}, "type": "function", "id": 7}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', '{"x": "\\ud800"}'),
        ('{"name": "f", "arguments": {"x": "</tool_call>"}}', '{"x": "</tool_call>"}'),
    ],
)
def test_a_call(given: str, arguments: str) -> None:
    assert parse([f"<tool_call>\n{given}\n</tool_call>"]) == call(0, "f", arguments)
    "".join(event.text for event in parse([f"<tool_call>{given}"]) if isinstance(event, ToolCallArguments)).encode()


@pytest.mark.parametrize(
    "broken",
    [
        '{"name": "f", "arguments": {"x": 1}',  # a brace too few
        '{"name": "f", "arguments": {"x": 1}}}',  # and too many
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {}, "parameters": {}}',
        '{"name": "f", "arguments": {}, "mood": "good"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": {},}',
        '{"name" "f"}',
        "{}",
        "f(x)",
        "<function=f>\n</function>",
        '{"name": "f", "arguments": {"x": ' + "[" * 5000 + "]" * 5000 + "}}",
        "",
    ],
    ids=lambda text: text[:40],
)
def test_a_broken_call_is_content_and_the_next_one_counts(broken: str) -> None:
    text = f"<tool_call>\n{broken}\n</tool_call>"
    good = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert parse(list(text)) == [Content(text)]
    assert parse([f"So: {text}\n{good}"]) == [Content(f"So: {text}"), *call(0, "g", "{}")]


def test_a_call_that_the_end_cuts_off_is_content() -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": "y'
    assert parse(list(text)) == [Content(text)]


WHOLE = '{"name": "f", "arguments": {"x": "a\\n}", "y": [1, {"z": null}]}}'


@pytest.mark.parametrize("format", ["hermes", "llama3"])
@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_call_that_a_limit_cuts_off_comes_as_far_as_it_goes(length: int, format: str) -> None:
    """As in OpenAI's API: the arguments end in the middle, and the reason is "length"."""
    marker = "<tool_call>\n" if format == "hermes" else ""
    text = marker + WHOLE[:length]
    # Without a marker, an object with a name may be anything, until it has arguments.
    known, begun = WHOLE.index(",") if marker else WHOLE.index(": {"), WHOLE.index("{", 1)
    if length < known:
        assert parse(list(text), format, cut=True) == ([Content(text)] if text else [])
    else:
        expected = call(0, "f", WHOLE[begun:length])
        assert parse(list(text), format, cut=True) == [event for event in expected if getattr(event, "text", "some")]
    assert parse(list(text), format) == ([Content(text)] if text else [])  # where the model itself has ended there


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ('{"name": "f"', ""),
        ('{"name": "f", "argu', ""),
        ('{"name": "f", "parameters": {"x": 1', '{"x": 1'),
        ('{"arguments": {"x": 1}, "name": "f"', '{"x": 1}'),
        ('{"id": 7, "type": "function", "name": "f", "arguments": {', "{"),
        ('{"name": "f", "arguments": "{\\"x\\": \\"y', '{"x": "y'),
        ('{"name": "f", "arguments": "{\\"x\\": \\"\\\\u00', '{"x": "\\u00'),
        ('{"name": "f", "arguments": "{\\"x\\": \\"y\\u00', '{"x": "y'),
        ('{"name": "f", "arguments": "{\\"x\\": \\"y\\ud800', '{"x": "y'),
        ('{"name": "f", "arguments": "', ""),
        ('{"name": "f", "arguments": nul', ""),
        ('{"name": "f", "arguments": null', "{}"),
        ('{"name": "f", "arguments": {"x": "a\nb', '{"x": "a\nb'),
    ],
)
def test_what_is_known_of_a_call_that_is_cut_off(given: str, arguments: str) -> None:
    found = parse([f"So.\n<tool_call>\n{given}"], cut=True)
    assert found[:2] == [Content("So."), ToolCallStart(0, "0", "f")]
    assert [event.text for event in found[2:]] == ([arguments] if arguments else [])
    arguments.encode()


@pytest.mark.parametrize(
    "given",
    [
        '{{"a": 1}: 2',  # keys that are none
        '{[1]: {"name": "f"}',
        '{1: "name"',
        "",
        "{",
        '{"name',
        '{"name": "get_wea',
        '{"name": 1, "arguments": {"x',
        '{"name": "", "arguments": {"x',
        '{"name": "f", "arguments": [1',
        '{"name": "f", "arguments": "no',
        '{"name": "f", "arguments": 1, "x',
        '{"name": "f", "arguments": {}, "parameters": {',
        '{"name": "f", "mood": "good", "arguments": {',
        '{"arguments": {"x": 1}, "na',
        '{"name": "f", "arguments": {"x": 1}}}</tool_call>',
        '{"name": "f", "arguments": {"x": ' + "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_so_far_is_content_though_a_limit_cuts_it_off(given: str) -> None:
    text = f"<tool_call>{given}"
    assert parse([text], cut=True) == [Content(text)]


def test_calls_before_the_one_that_is_cut_off_are_whole() -> None:
    whole = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n'
    text = whole + '<tool_call>{"name": "g", "arguments": {"y'
    assert parse([text], cut=True) == [*call(0, "f", '{"x": 1}'), *call(1, "g", '{"y')]
    text = '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"y'
    assert parse([text], "llama3", cut=True) == [*call(0, "f", '{"x": 1}'), *call(1, "g", '{"y')]


@pytest.mark.parametrize(("format", "mark"), [("hermes", "<tool_call>\n"), ("llama3", "")])
@pytest.mark.parametrize("length", range(9))
def test_what_can_only_be_calls_is_never_content(length: int, format: Any, mark: str) -> None:
    for cut in (True, False):
        parser = OutputParser(format, thinking=True, tools=True, only_calls=True)
        thought = parser.feed("<think>So.</think>\n\n")
        found = [event for letter in (mark + WHOLE)[:length] for event in parser.feed(letter)]
        assert [*thought, *found, *parser.finish(cut)] == [Reasoning("So.")]


@pytest.mark.parametrize("end", ["", "\n", "\n</tool"])
def test_only_the_closing_mark_may_be_cut_off(end: str) -> None:
    assert parse([f'<tool_call>\n{{"name": "f"}}{end}']) == call(0, "f", "{}")


def test_text_around_calls() -> None:
    text = 'One.\n\n<tool_call>{"name": "f"}</tool_call>\nTwo.\n<tool_call>{"name": "g"}</tool_call>\n\n'
    assert parse(list(text)) == [Content("One."), *call(0, "f", "{}"), Content("\nTwo."), *call(1, "g", "{}")]


@pytest.mark.parametrize("tag", ["", "<|python_tag|>", "\n<|python_tag|> "])
@pytest.mark.parametrize("separator", [";", "; ", "\n"])
def test_what_llama3_says(tag: str, separator: str) -> None:
    one, two = '{"name": "f", "parameters": {"q": "a; b"}}', '{"name": "g", "parameters": {}}'
    expected = [*call(0, "f", '{"q": "a; b"}'), *call(1, "g", "{}")]
    assert parse(list(tag + one + separator + two), "llama3") == expected
    assert parse([f"{tag}{one}{separator}{tag}{two}\n"], "llama3") == expected
    assert parse([f"{tag}{one}\nDone."], "llama3") == [*expected[:2], Content("\nDone.")]


@pytest.mark.parametrize(
    "text",
    [
        'I would say {"name": "f", "parameters": {}}',
        '{"name": "Ann", "id": 3}',
        '{"city": "Köln"}',
        '<|python_tag|>search.call(query="x")',
        '{"name": "f", "parameters": {}',
        "<|python",
    ],
)
def test_what_llama3_does_not_call(text: str) -> None:
    assert parse(list(text), "llama3") == [Content(text)]


def test_json_that_is_no_call_is_not_held_back() -> None:
    parser = OutputParser("llama3", thinking=False, tools=True)
    assert parser.feed('{"city": ') == [Content('{"city": ')]


def test_ids_differ() -> None:
    parser = OutputParser("hermes", thinking=False, tools=True)
    events = parser.feed('<tool_call>{"name": "f"}</tool_call>' * 3)
    ids = {event.id for event in events if isinstance(event, ToolCallStart)}
    assert len(ids) == 3
    assert all(re.fullmatch("call_[0-9a-f]{24}", one) for one in ids)


@pytest.mark.parametrize(
    "piece",
    ["<tool_call>", '<tool_call>{"name":"', '<tool_call>{"name":1,', '{"', "\n", '<tool_call>{"name":"\\', "[", "<"],
)
def test_long_texts_take_time_in_proportion(piece: str) -> None:
    """A model can be asked to say anything, so nothing that it says may hold up a server."""
    start = time.process_time()
    for format in ("hermes", "llama3"):
        parse(['{"name": "f", "parameters": ["' + piece] + [piece] * 20_000, format)
        parse(['<tool_call>{"name": "f", "arguments": ["' + piece] + [piece] * 20_000, format)
    assert time.process_time() - start < 20


# ---- Chat templates.


def test_the_format_of_a_template(qwen3_template: str) -> None:
    assert detect_format(qwen3_template) == "hermes"
    llama = """{{- '<|start_header_id|>' }}{{- '{"name": "' + call.name + '", "parameters": ' }}"""
    assert detect_format(llama) == "llama3"
    assert detect_format("{{ '<|start_header_id|>' + message.role }}") is None
    assert detect_format("<tool_call>\\n<function=name>{{ arguments }}") is None
    assert detect_format("<tool_call>{name}\n<arg_key>{{ arguments }}") is None
    assert detect_format("{{ messages }}") is None


def test_thinking_in_a_template(qwen3_template: str) -> None:
    assert detect_thinking(qwen3_template)
    assert not detect_thinking("{{ messages }}")
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("What is <think>?<|im_start|>assistant\n")


@pytest.fixture
def qwen3_template() -> str:
    """What matters of it."""
    return r"""
{{- "# Tools ... within <tool_call></tool_call> XML tags:\n<tool_call>\n" }}
{{- "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
"""
