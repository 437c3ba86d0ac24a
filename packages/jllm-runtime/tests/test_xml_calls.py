"""XML tool calls: values by their schemas, values that hold code, calls that are cut off or broken."""

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
)
from jllm_runtime.server.parsing.tool_calls import write_calls

from .plain_events import as_plain

WHITE = " \t\r\n"
POINT = {"type": "object", "properties": {"x": {"type": "number"}}}
SCHEMAS: dict[str, Any] = {
    "f": {
        "type": "object",
        "$defs": {
            "point": POINT,
            "size": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/word"}]},
            "word": {"enum": ["big", "small"]},
            "loop": {"$ref": "#/$defs/loop"},
        },
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "flag": {"type": "boolean"},
            "list": {"type": "array", "items": {"type": "string"}},
            "point": {"$ref": "#/$defs/point"},
            "size": {"allOf": [{"$ref": "#/$defs/size"}], "description": "how large"},
            "maybe": {"type": ["string", "null"]},
            "count_or_none": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "choice": {"enum": ["1", "2"]},
            "number_choice": {"enum": [1, 2.5]},
            "anything": {"description": "of any type"},
            "loop": {"$ref": "#/$defs/loop"},
            "lost": {"$ref": "#/$defs/none"},
            "never": False,
            "shaped": {"properties": {"a": {}}},
        },
    },
    "g": {"type": "object", "additionalProperties": {"type": "integer"}},
    "h": {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"n": {"type": "integer"}}}}},
}


def parse(pieces: Sequence[str], cut: bool = False, **options: Any) -> list[Event]:
    """All events, neighbours of one kind joined, with the ids "0", "1", ..."""
    ids = map(str, itertools.count())
    options = {"thinking": False, "schemas": SCHEMAS, **options}
    parser = OutputParser("xml", tools=True, new_id=lambda: next(ids), **options)
    merged: list[Event] = []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish(cut):
        assert getattr(event, "text", "some"), "an event without text"
        if merged and type(merged[-1]) is type(event) and isinstance(event, Reasoning | Content):
            event = type(event)(merged.pop().text + event.text)  # type: ignore[union-attr]
        merged.append(event)
    return merged


def written(name: str, **arguments: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


# ---- Values.


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "Köln", "Köln"),
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "", ""),
        ("text", " two\n\nlines \n", " two\n\nlines \n"),
        ("text", 'quotes " and \\n', 'quotes " and \\n'),
        ("count", "5", 5),
        ("count", " 5\n", 5),
        ("count", "five", "five"),
        ("count", "05", "05"),
        ("count", "[1]", [1]),  # the client is to see what the model has said
        ("ratio", "-1.5e3", -1500.0),
        ("ratio", "3", 3),
        ("ratio", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "yes", "yes"),
        ("count", "None", None),
        ("list", "null", None),
        ("list", '["a", "b"]', ["a", "b"]),
        ("list", '[\n  "a",\n  "b\nc"\n]', ["a", "b\nc"]),
        ("list", "a, b", "a, b"),
        ("point", '{"x": 1}', {"x": 1}),
        ("size", "5", 5),
        ("size", "big", "big"),
        ("size", "5.5", "5.5"),
        ("maybe", "null", None),
        ("maybe", "None", None),
        ("maybe", "none", "none"),
        ("maybe", "5", "5"),
        ("count_or_none", "None", None),
        ("count_or_none", "7", 7),
        ("choice", "1", "1"),
        ("number_choice", "2.5", 2.5),
        ("anything", "5", "5"),
        ("loop", "5", "5"),
        ("lost", "5", "5"),
        ("never", "5", "5"),
        ("shaped", '{"a": 1}', {"a": 1}),
        ("unknown", "5", "5"),
    ],
)
def test_a_value_is_of_the_type_that_the_schema_says(key: str, text: str, value: Any) -> None:
    assert as_plain(parse(list(written("f", **{key: text})))) == [("f", {key: value})]


def test_schemas_of_other_arguments_and_behind_references() -> None:
    assert as_plain(parse([written("g", n="1")])) == [("g", {"n": 1})]
    assert as_plain(parse([written("h", n="1", m="1")])) == [("h", {"n": 1, "m": "1"})]
    assert as_plain(parse([written("unknown", n="1")])) == [("unknown", {"n": "1"})]
    assert as_plain(parse([written("f", count="1")], schemas=None)) == [("f", {"count": "1"})]


def test_types_of_several_parts() -> None:
    parts = [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]
    assert as_plain(parse([written("f", a="1", b="2")], schemas={"f": {"allOf": parts}})) == [("f", {"a": 1, "b": 2})]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["string", "integer", "#/a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "a", "anyOf", "oneOf", "allOf", "$ref", "$defs", "enum", "const", "items"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(
    schema=ANY_JSON.filter(lambda schema: isinstance(schema, dict)), text=st.sampled_from(["1", "x", "", "{}", "null"])
)
def test_any_schema_gives_some_value(schema: dict[str, Any], text: str) -> None:
    """A request may send anything as a schema, which must not end the answer."""
    [(name, arguments)] = as_plain(parse([written("f", a=text)], schemas={"f": schema}))
    assert name == "f"
    assert arguments.keys() <= {"a"}


def test_numbers_keep_their_spelling() -> None:
    [_, arguments] = parse([written("f", ratio="1.50", list="[1e400, 2]")])
    assert arguments == ToolCallArguments(0, '{"ratio": 1.50, "list": [1e400, 2]}')


def test_a_schema_that_multiplies_takes_no_time() -> None:
    twice = {"anyOf": [{"$ref": "#/$defs/more"}, {"$ref": "#/$defs/more"}, False]}
    schema = {"properties": {"a": twice}, "$defs": {"more": twice}}
    start = time.process_time()
    assert as_plain(parse([written("f", a="5")], schemas={"f": schema})) == [("f", {"a": "5"})]
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("key", "arguments"),
    [("count", {}), ("list", {}), ("point", {}), ("count_or_none", {"count_or_none": None}), ("text", {"text": ""})],
)
def test_an_empty_value_is_none_where_there_is_no_empty_text(key: str, arguments: dict[str, Any]) -> None:
    for text in (f"<parameter={key}></parameter>", f"<parameter={key}>\n\n</parameter>"):
        assert as_plain(parse([f"<tool_call><function=f>{text}</function></tool_call>"])) == [("f", arguments)]


# ---- Where a value ends.

CODE = """\
if a<b and c > d:
    print("<tag>", '</parameter>')
<config>
  <parameter name="a">1</parameter>
  <parameter name="b">2</parameter>
</config>
<function=x>
</function>
<tool_call>{}</tool_call>
"""


@pytest.mark.parametrize("text", [CODE, "</parameter> and on", "a</function> b", "<", "</", "x\n</parameter>\ny"])
def test_values_may_hold_code(text: str) -> None:
    expected = [("f", {"text": text, "count": 1})]
    assert as_plain(parse(list(written("f", text=text, count="1")))) == expected
    assert as_plain(parse([written("f", text=text, count="1")])) == expected


@pytest.mark.parametrize(
    "inside",
    [
        "<function=f><parameter=text>Hi</parameter><parameter=count>5</parameter></function>",
        "\n\n<function=f>\n\n <parameter=text>\nHi\n</parameter>  <parameter=count>5</parameter>\n\n</function>\n\n",
        "\n<function=f>\n<parameter=text>\nHi\n</parameter>\n<parameter=count>\n5\n</function>\n",
    ],
    ids=["on one line", "with much space", "without the last closing tag"],
)
def test_the_space_between_tags_is_free(inside: str) -> None:
    assert as_plain(parse(list(f"<tool_call>{inside}</tool_call>"))) == [("f", {"text": "Hi", "count": 5})]


def test_of_a_name_that_is_given_twice_the_last_counts() -> None:
    text = written("f", text="one").replace("</function>", "<parameter=text>\ntwo\n</parameter>\n</function>")
    assert as_plain(parse([text])) == [("f", {"text": "two"})]


# ---- Around calls.


def test_what_qwen_says() -> None:
    text = (
        f"So <tool_call>s.\n</think>\n\nLet me look.\n\n{written('f', text='Köln', list='[1, 2]')}\n{written('time')}\n"
    )
    events = parse(list(text), thinking=True, inside_thinking=True)
    assert events == [
        Reasoning("So <tool_call>s."),
        Content("Let me look."),
        ToolCallStart(0, "0", "f"),
        ToolCallArguments(0, '{"text": "Köln", "list": [1, 2]}'),
        ToolCallStart(1, "1", "time"),
        ToolCallArguments(1, "{}"),
    ]


BARE = written("f", text="a <b>", count="1").removeprefix("<tool_call>\n")


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("closing", [True, False])
def test_the_markers_may_be_missing_around_a_function_of_the_request(closing: bool, end: str) -> None:
    """Qwen3-Coder leaves the opening one out, above all after a text."""
    bare = BARE if closing else BARE.removesuffix("\n</tool_call>")
    call = ("f", {"text": "a <b>", "count": 1})
    assert as_plain(parse(list(f"{bare}{end}"))) == [call]
    assert as_plain(parse(list(f"So:\n\n{bare}{end}"))) == ["So:", call]
    assert as_plain(parse(list(f"{bare}\n{bare}\nDone."))) == [call, call, "\nDone."]
    assert as_plain(parse(list(f"{bare}\n{written('time')}{end}"))) == [call, ("time", {})]
    wrapped = f"<tool_call>\n{bare.removesuffix('</tool_call>')}\n{written('time')}"
    assert as_plain(parse(list(wrapped))) == [call, ("time", {})]
    assert parse([f"So: {bare[:30]}"], cut=True)[:2] == [Content("So:"), ToolCallStart(0, "0", "f")]


@pytest.mark.parametrize(
    "text", ["<function=other>\n</function>", "<function=f>", "Say <function=f>: it is a tag.", "<f"]
)
def test_what_is_no_function_of_the_request_is_text(text: str) -> None:
    assert parse(list(text)) == [Content(text)]


def test_a_closing_marker_that_never_comes() -> None:
    for end in ("", "\n", "\n</tool"):
        text = written("f", count="1").removesuffix("\n</tool_call>") + end
        assert as_plain(parse(list(text))) == [("f", {"count": 1})]


@pytest.mark.parametrize(
    "broken",
    [
        "f(x)",
        '{"name": "f", "arguments": {}}',
        "<function f>\n</function>",
        "<function=>\n</function>",
        "<function=a\nb>\n</function>",
        "<function=a<b>\n</function>",
        f"<function={'x' * 300}>\n</function>",
        "<function=f>\nhm\n</function>",
        "<function=f>\n<parameter=>\n1\n</parameter>\n</function>",
        "<function=other>\n</function>\nhm",
        "<function=other>\n</function>\n</function>",
        "<function=f>\n<parameter=x>\n1\n</parameter>\nhm",
        "",
    ],
    ids=lambda text: text[:40],
)
def test_a_broken_call_is_content_and_the_next_one_counts(broken: str) -> None:
    text = f"<tool_call>\n{broken}\n</tool_call>"
    good = written("time")
    if "parameter=x" not in broken:  # whose value has not ended
        assert parse([f"So: {text}\n{good}"])[0] == Content(f"So: {text}")
        assert as_plain(parse(list(f"So: {text}\n{good}"))) == [f"So: {text}", ("time", {})]
    assert parse(list(text)) == [Content(text)]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = OutputParser("xml", thinking=False, tools=True)
    assert parser.feed("Hi <tool_call>\n<fun") == [Content("Hi")]
    assert parser.feed("ny>") == [Content(" <tool_call>\n<funny>")]
    assert parser.feed("<tool_call><function=a b\n") == [Content("<tool_call><function=a b")]


# ---- In the thinking.

F_CALL = [ToolCallStart(0, "0", "f"), ToolCallArguments(0, '{"count": 1}')]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_call_that_ends_thinking_without_an_end_is_a_call(end: str) -> None:
    """Qwen3.5 forgets to end its thinking at times."""
    inside = {"thinking": True, "inside_thinking": True}
    text = f"So.\n\n{written('f', count='1')}{end}"
    assert parse(list(text), **inside) == [Reasoning("So."), *F_CALL]
    assert parse([f"<think>\n{text}"], thinking=True) == [Reasoning("So."), *F_CALL]
    both = parse([f"{text}\n{written('f', count='1')}"], **inside)
    assert [type(event) for event in both] == [Reasoning, *[ToolCallStart, ToolCallArguments] * 2]
    hermes = OutputParser("hermes", True, True, inside_thinking=True, new_id=lambda: "0", schemas=SCHEMAS)
    found = hermes.feed('So. <tool_call>{"name": "f", "arguments": {"count": 1}}</tool_call>')
    assert [*found, *hermes.finish()] == [Reasoning("So."), *F_CALL]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (f"So: {written('f', count='1')}\nNo.", False),
        (f"So: {written('other', count='1')}", False),  # no tool of the request
        (f"So: {written('f', count='1')}\n{written('other')}", False),
        (f"So: {written('f', count='1')}", True),
        ("So: <tool_call>\n<function=f>\n<parameter=count>\n1", True),
        ("So: <tool_call>\n<function=f>\n<parameter=count>\n1", False),
        ("So: <tool_call>", False),
    ],
)
def test_calls_that_the_model_only_thinks_about_are_thinking(text: str, cut: bool) -> None:
    inside = {"thinking": True, "inside_thinking": True}
    assert parse(list(text), cut=cut, **inside) == [Reasoning(text)]
    ended = parse(list(f"{text}\n</think>\n\n{written('f', count='1')}"), **inside)
    assert ended == [Reasoning(text), *F_CALL]


def test_thinking_is_given_until_a_call_begins() -> None:
    parser = OutputParser("xml", thinking=True, tools=True, inside_thinking=True, schemas=SCHEMAS)
    assert parser.feed("So <b> <") == [Reasoning("So <b>")]
    assert parser.feed("tool_call> is") == [Reasoning(" <tool_call> is")]
    assert parser.feed(f" it.\n{written('f')}") == [Reasoning(" it.")]
    assert parser.feed(" And") == []
    assert parser.feed("</think>") == [Reasoning(f"\n{written('f')} And")]


# ---- Cut off by a limit.

WHOLE = "<function=f>\n<parameter=text>\nab\n</parameter>\n<parameter=count>\n12\n</parameter>\n</function>"


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_call_that_a_limit_cuts_off_comes_as_far_as_it_goes(length: int) -> None:
    text = f"Well.\n<tool_call>\n{WHOLE[:length]}"
    assert parse(list(text)) == [Content(text)]  # where the model itself has ended there
    found = parse(list(text), cut=True)
    if length < WHOLE.index(">") + 1:
        assert found == [Content(text)]
        return
    assert found[:2] == [Content("Well."), ToolCallStart(0, "0", "f")]
    arguments = "".join(event.text for event in found[2:] if isinstance(event, ToolCallArguments))
    assert '{"text": "ab", "count": 12'.startswith(arguments)
    if length > WHOLE.index("<parameter=count>"):
        assert arguments.startswith('{"text": "ab"')


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", ""),
        ("<parameter=te", ""),
        ("<parameter=text>", '{"text": "'),
        ('<parameter=text>\na "b"\nc', '{"text": "a \\"b\\"\\nc'),
        ("<parameter=text>\na\n</param", '{"text": "a'),
        ("<parameter=text>\na\n</parameter>", '{"text": "a"'),
        ("<parameter=text>\na\n</parameter>\n<param", '{"text": "a"'),
        ("<parameter=text>\na</parameter>b", '{"text": "a</parameter>b'),
        ("<parameter=list>\n[1, ", '{"list": [1,'),
        ("<parameter=flag>\ntrue\n</parameter>\n<parameter=size>\nb", '{"flag": true'),
        ("<parameter=text>\na\n</parameter>\n</function>", '{"text": "a"}'),
    ],
)
def test_what_is_known_of_a_call_that_is_cut_off(text: str, arguments: str) -> None:
    found = parse([f"<tool_call><function=f>{text}"], cut=True)
    assert found[0] == ToolCallStart(0, "0", "f")
    assert [event.text for event in found[1:]] == ([arguments] if arguments else [])


@pytest.mark.parametrize("length", range(11))
def test_what_can_only_be_calls_is_never_content(length: int) -> None:
    for cut in (True, False):
        assert parse(list(("<tool_call>\n" + WHOLE)[:length]), cut=cut, only_calls=True) == []


# ---- Wherever the text is cut, and nothing is lost.

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=text>", "<parameter=count>"),
    *(
        "</parameter>",
        "<function=",
        "<parameter=",
        ">",
        "<",
        "</",
        "\n",
        " ",
        "\n\n",
        "hm",
        "12",
        "größe",
        '"',
        "{",
        "\\",
    ),
    *(
        "<think>",
        "</think>",
        "</para",
        "meter>",
        "\r",
        "<function=other>",
        written("f", text="a", count="1"),
        written("time"),
    ),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@pytest.mark.parametrize(("thinking", "inside"), [(False, False), (True, False), (True, True)])
@given(text=texts, cut=st.booleans(), data=st.data())
def test_the_events_do_not_depend_on_where_the_text_is_cut(
    thinking: bool, inside: bool, text: str, cut: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = parse([text], cut, thinking=thinking, inside_thinking=inside)
    assert parse(pieces, cut, thinking=thinking, inside_thinking=inside) == whole
    assert parse(list(text), cut, thinking=thinking, inside_thinking=inside) == whole


WS = f"[{WHITE}]*"
NAME = "([^<>\n\r]+)"
START = re.compile(f"<tool_call>|<function=(?:{'|'.join(SCHEMAS)})>")
END = "</tool_call>"


def plain_call(text: str) -> tuple[str, list[tuple[str, str]], str] | None:
    """The call that the text begins with: name, values, and the text behind it."""
    found = re.match(rf"(?:<tool_call>{WS})?<function={NAME}>{WS}", text)
    values: list[tuple[str, str]] = []
    rest = text[found.end() :] if found else ""
    while found and not rest.startswith("</function>"):
        opened = re.match(f"<parameter={NAME}>", rest)
        if opened is None:
            return None
        for tag in re.finditer("</parameter>|</function>", rest):
            behind = rest[tag.end() :].lstrip(WHITE)
            if behind.startswith(("<parameter=", "</function>") if tag[0] == "</parameter>" else END):
                values.append((opened[1], rest[opened.end() : tag.start()]))
                rest = behind if tag[0] == "</parameter>" else rest[tag.start() :]
                break
        else:
            return None
    return (found[1], values, rest.removeprefix("</function>")) if found else None


def plain_calls(text: str) -> Iterator[str | tuple[str, Any]]:
    """The text between the calls, and the calls, by a reading of the whole text."""
    at = begun = 0
    while start := START.search(text, at):
        found = plain_call(text[start.start() :])
        behind = "" if found is None else found[2].lstrip(WHITE)
        closed = behind.startswith(END) or END.startswith(behind)
        if found is None or not (closed or found[0] in SCHEMAS):
            at = start.end()
            continue
        yield text[begun : start.start()].rstrip(WHITE)
        arguments = {key: typed(key, value.removeprefix("\n").removesuffix("\n")) for key, value in found[1]}
        yield found[0], {key: json.loads(value) for key, value in arguments.items() if value}
        at = begun = len(text) - len(behind[len(END) :] if closed else found[2])
    rest = text[begun:]
    yield "" if begun and not rest.strip(WHITE) else rest


def typed(key: str, text: str) -> str:
    if key != "count":
        return json.dumps(text)
    number = re.fullmatch(rf"{WS}(-?(0|[1-9][0-9]*)){WS}", text)
    string = re.fullmatch(rf'{WS}("[^"\\]*"){WS}', text)  # any JSON is taken
    return (number or string or [None, json.dumps(text) if text.strip(WHITE) else ""])[1]


@given(text=texts)
@example("<tool_call><function=f><parameter=text>a</parameter>b</parameter></function></tool_call>")
@example("<tool_call><tool_call><function=f></function></tool_")
@example("<function=f></function> <function=other></function>")
@example("<tool_call><function=other></function> <function=f></function> so")
def test_calls_are_those_of_a_plain_reading(text: str) -> None:
    assert as_plain(parse([text])) == [part for part in plain_calls(text) if part]


@given(
    name=st.from_regex(r"[a-zA-Z0-9_.-]{1,64}", fullmatch=True),
    arguments=st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,20}", fullmatch=True), st.text(st.characters(exclude_categories=["Cs"]))
    ),
)
def test_written_calls_are_read_back(name: str, arguments: dict[str, str]) -> None:
    text = write_calls("xml", [(name, arguments)] * 2)
    assert as_plain(parse([text], schemas={name: {}})) == [(name, arguments)] * 2


def test_written_values_are_json_where_they_are_no_texts() -> None:
    given = {"count": 5, "flag": True, "list": ["a"], "point": {"x": 1.5}, "maybe": None, "text": "5"}
    assert as_plain(parse([write_calls("xml", [("f", given)])])) == [("f", given)]


@pytest.mark.parametrize(
    "piece",
    [
        *("<tool_call>", "<tool_call><function=", "<tool_call><function=f>", "<tool_call><function=f>\n", "\n", "<"),
        *("</parameter>", "</parameter>\n", "</function>", "</function>\n", "</parameter><parameter=a>"),
    ],
)
def test_long_texts_take_time_in_proportion(piece: str) -> None:
    start = time.process_time()
    parse(["<tool_call><function=f><parameter=text>\n" + piece] + [piece] * 20_000)
    parse(["<tool_call><function=f>", *[piece] * 20_000])
    assert time.process_time() - start < 20


# ---- Chat templates.


@pytest.mark.parametrize("example", [r"<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>"])
def test_the_format_of_a_template(example: str) -> None:
    assert detect_format(f"{{{{- '{example}' }}}}{{{{ tool_call.arguments|items }}}}") == "xml"
    assert detect_format("<tool_call>{name}\n<arg_key>{{ arguments }}") is None
