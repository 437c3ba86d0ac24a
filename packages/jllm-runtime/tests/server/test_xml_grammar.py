"""Grammars of XML tool calls: what they accept reads as a call that the schema takes, and the other way round."""

import itertools
import json
import time
from typing import Any
from urllib.parse import unquote

import jsonschema
import llguidance
import pytest
from jllm_runtime import Grammar, Tokenizer
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.parsing.output_parser import OutputParser, ToolCallArguments, ToolCallStart
from jllm_runtime.server.parsing.tool_calls import write_calls
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.response_format import Thinking, available_tools, output_grammar
from jllm_runtime.server.schemas.chat import ChatCompletionRequest

REQUIRED = {"tool_choice": "required"}


@pytest.fixture(params=["marks that are tokens", "marks that are text"])
def tokenizer(request: pytest.FixtureRequest, marked_tokenizer: Tokenizer, tiny) -> Tokenizer:
    return marked_tokenizer if request.param == "marks that are tokens" else tiny.tokenizer


class Matcher:
    """Tells whether a whole text is one of a grammar's."""

    def __init__(self, grammar: Grammar | None, tokenizer: Tokenizer) -> None:
        assert grammar is not None
        eos = list(tokenizer.eos_ids)
        self._tokenizer = tokenizer
        library = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=eos)
        self._matcher = llguidance.LLMatcher(library, llguidance.LLMatcher.grammar_from_lark(grammar.text))
        assert not self._matcher.is_error(), self._matcher.get_error()

    def __call__(self, text: str) -> bool:
        self._matcher.reset()
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        return all(self._matcher.try_consume_tokens([token]) for token in tokens) and self._matcher.is_accepting()


def tool(schema: dict[str, Any] | None, name: str = "f", **fields: Any) -> dict[str, Any]:
    parameters = {} if schema is None else {"parameters": schema}
    return {"type": "function", "function": {"name": name, **parameters, **fields}}


def grammar_of(
    tokenizer: Tokenizer,
    tools: list[dict[str, Any]],
    ignored: IgnoredFields | None = None,
    thinking: Thinking | None = None,
    **fields: Any,
) -> Grammar | None:
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, **(fields or REQUIRED)}
    )
    return output_grammar(
        body, available_tools(body), "xml", tokenizer, thinking or Thinking(), ignored or IgnoredFields()
    )


def written(*parameters: tuple[str, str], name: str = "f") -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def read(text: str, schema: dict[str, Any]) -> Any:
    """The arguments of the one call that the text is."""
    parser = OutputParser("xml", thinking=False, tools=True, schemas={"f": schema})
    start, *arguments = [*parser.feed(text), *parser.finish()]
    assert isinstance(start, ToolCallStart)
    assert all(isinstance(each, ToolCallArguments) for each in arguments)
    return json.loads("".join(each.text for each in arguments))  # type: ignore[union-attr]


def properties(**named: Any) -> dict[str, Any]:
    return {"type": "object", "properties": named, "required": list(named), "additionalProperties": False}


POINT = properties(x={"type": "integer"}, y={"type": "integer"})
STRING, INTEGER, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
VALUES = [
    *(
        "",
        "a",
        "abc",
        "abcdef",
        "two\nlines",
        " a ",
        "null",
        "None",
        "true",
        "True",
        "5",
        "7",
        "50",
        "-5",
        "5.5",
        "1e3",
    ),
    *(
        '{"x": 1, "y": 2}',
        '{"x": 1}',
        '{"x": "1", "y": 2}',
        "[1, 2]",
        "[]",
        '["a", "b"]',
        "{a}",
        "[b",
        "05",
        " 5",
        "NaN",
    ),
    *("<b>a < b</b>", "</parameter>", "a</parameter>b", "a\n</parameter", "</function>", "2026-11-29", "/a/b", "Köln"),
    *("2026-13-01", "23:59:60.5+01:00", "24:00:00Z", "2026-02-28T00:00:00Z", "10.0.255.1", "10.0.256.1", "1.2.3"),
    *("123e4567-e89b-12d3-A456-426614174000", "123e4567e89b12d3a456426614174000"),
    *("a</parameter>\n<parameter=v>\nb", "a\n</parameter>\n</function>\n</tool_call>", '"a"', "\\", "a-b", "ab-cd"),
]
SHORT = {text for text in VALUES if len(text) <= 4 and text != "None"}
SHORTER = {text for text in VALUES if len(text) <= 3}
NUMBERED = {"5", "5.5", "2026-11-29", "2026-13-01", "23:59:60.5+01:00", "24:00:00Z", "2026-02-28T00:00:00Z"}
NUMBERED |= {"10.0.255.1", "10.0.256.1", "1.2.3", "123e4567-e89b-12d3-A456-426614174000", "05"}
NUMBERED |= {"123e4567e89b12d3a456426614174000"}
# For each schema of a value, the texts that its grammar accepts of VALUES; all others are refused.
TYPES: dict[str, tuple[Any, set[str]]] = {
    "integer": (INTEGER, {"5", "7", "50", "-5"}),
    "number": ({"type": "number"}, {"5", "7", "50", "-5", "5.5", "1e3"}),
    "range": ({"type": "integer", "minimum": 6, "maximum": 10}, {"7"}),
    "boolean": ({"type": "boolean"}, {"true"}),
    "null": (NULL, {"null"}),
    "object": (POINT, {'{"x": 1, "y": 2}'}),
    "any object": ({"type": "object"}, {'{"x": 1, "y": 2}', '{"x": 1}', '{"x": "1", "y": 2}'}),
    "array": ({"type": "array", "items": INTEGER}, {"[1, 2]", "[]"}),
    "enum": ({"enum": ["abc", "5", "/a/b"]}, {"abc", "5", "/a/b"}),
    "typed enum": ({"type": "string", "enum": ["abc", 5]}, {"abc"}),
    "mixed enum": ({"enum": ["abc", 5, None, True]}, {"abc", "5", "null", "true"}),
    "const": ({"const": "two\nlines"}, {"two\nlines"}),
    "one word begins as the other": ({"enum": ["a", "abc", "abcdef"]}, {"a", "abc", "abcdef"}),
    "number enum": ({"enum": [5, 5.5]}, {"5", "5.5"}),
    "long": ({"type": "string", "minLength": 5, "maxLength": 6}, {"abcdef", "ab-cd", "[1, 2]", "1.2.3"}),
    "pattern": ({"type": "string", "pattern": "^[a-z]+-[a-z]+$"}, {"a-b", "ab-cd"}),
    "pattern anywhere": ({"type": "string", "pattern": "b-c"}, {"ab-cd"}),
    "pattern with a slash": ({"type": "string", "pattern": "^/a/"}, {"/a/b"}),
    "pattern and length": ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, {"a", "abc"}),
    "date": ({"type": "string", "format": "date"}, {"2026-11-29"}),
    "time": ({"type": "string", "format": "time"}, {"23:59:60.5+01:00"}),
    "date-time": ({"type": "string", "format": "date-time"}, {"2026-02-28T00:00:00Z"}),
    "uuid": ({"type": "string", "format": "uuid"}, {"123e4567-e89b-12d3-A456-426614174000"}),
    "ipv4": ({"type": "string", "format": "ipv4"}, {"10.0.255.1"}),
    "object or null": ({"anyOf": [POINT, NULL]}, {'{"x": 1, "y": 2}', "null"}),
    "reference": ({"$ref": "#/$defs/point"}, {'{"x": 1, "y": 2}'}),
    "references inside": ({"type": "array", "items": {"$ref": "#/$defs/word"}}, {"[]", '["a", "b"]'}),
    "integer or array": ({"type": ["integer", "array"], "items": STRING}, {"5", "7", "50", "-5", "[]", '["a", "b"]'}),
    "word or range": ({"anyOf": [{"enum": ["abc"]}, {"type": "integer", "minimum": 6}]}, {"abc", "7", "50"}),
    "short or integer": (
        {"anyOf": [{"type": "string", "maxLength": 1}, INTEGER]},
        {"", "a", "\\", "5", "7", "50", "-5"},
    ),
    "short or null": ({"type": ["string", "null"], "maxLength": 4}, {"", "a", " a ", "abc", "null", "true"} | SHORT),
    "short or boolean": ({"type": ["string", "boolean"], "maxLength": 3}, {"", "a", " a ", "abc", "true"} | SHORTER),
    "word or boolean": ({"type": ["string", "boolean"], "pattern": "^[a-d]+$"}, {"a", "abc", "true"}),
    "text or some numbers": ({"anyOf": [{"enum": [5, 5.5]}, {"type": "string", "pattern": "^[0-9]"}]}, NUMBERED),
    "pattern without a type": ({"pattern": "^[a-z]+-[a-z]+$"}, {"a-b", "ab-cd"}),
    "pattern without a type or a list": (
        {"anyOf": [{"pattern": "^two"}, {"enum": ["abc", "5"]}]},
        {"two\nlines", "abc", "5"},
    ),
    "several parts": ({"allOf": [{"type": "string"}, {"maxLength": 3}, {"pattern": "^[a-z]"}]}, {"a", "abc", "a-b"}),
    "object of several parts": (
        {"allOf": [{**POINT, "additionalProperties": True}, {"properties": {"x": INTEGER}, "required": ["x"]}]},
        {'{"x": 1, "y": 2}'},
    ),
}
ANY_TEXT = {text for text in VALUES if "</parameter>\n<" not in text}
TYPES |= {
    "string": (STRING, ANY_TEXT),
    "anything": ({"description": "any"}, ANY_TEXT),
    "true": (True, ANY_TEXT),
    "string or null": ({"type": ["string", "null"]}, ANY_TEXT),
    "string or integer": ({"anyOf": [STRING, INTEGER]}, ANY_TEXT),
    "string or any object": ({"anyOf": [STRING, {"type": "object"}]}, ANY_TEXT),
    # What begins as an object does is one.
    "string or object": (
        {"anyOf": [STRING, {"$ref": "#/$defs/point"}]},
        {text for text in ANY_TEXT if not text.strip().startswith("{")} | {'{"x": 1, "y": 2}'},
    ),
    "two patterns": (
        {"anyOf": [{"type": "string", "pattern": "^[a-z]+$"}, {"type": "string", "pattern": "^[a-z]+-[a-z]+$"}]},
        {"a", "abc", "abcdef", "null", "true", "a-b", "ab-cd"},
    ),
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_value_is_what_its_schema_takes(kind: str, tokenizer: Tokenizer) -> None:
    value, expected = TYPES[kind]
    schema = {**properties(v=value), "$defs": {"point": POINT, "word": {"enum": ["a", "b"]}}}
    ignored = IgnoredFields()
    accepts = Matcher(grammar_of(tokenizer, [tool(schema)], ignored), tokenizer)
    assert ignored.header() is None
    accepted = {text for text in VALUES if accepts(written(("v", text)))}
    assert accepted == expected
    for text in accepted:
        jsonschema.validate(read(written(("v", text)), schema), schema)


MANY: dict[str, Any] = {
    "type": "object",
    "$defs": {"point": POINT},
    "properties": {
        "a": STRING,
        "b": INTEGER,
        "c": {"$ref": "#/$defs/point"},
        "d": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/point"}}, NULL]},
    },
    "required": ["b", "other"],
}


def test_required_parameters_are_there_and_others_may_be(tokenizer: Tokenizer) -> None:
    accepts = Matcher(grammar_of(tokenizer, [tool(MANY)]), tokenizer)
    texts = {"a": "x", "b": "5", "c": '{"x": 1, "y": 2}', "d": "null", "other": "anything"}
    for names in itertools.chain.from_iterable(itertools.combinations(texts, n) for n in range(6)):
        text = written(*((name, texts[name]) for name in names))
        assert accepts(text) == ({"b", "other"} <= set(names)), text
        if accepts(text):
            jsonschema.validate(read(text, MANY), MANY)
    assert not accepts(written(("b", "5"), ("b", "5"), ("other", "")))
    assert not accepts(written(("b", "5"), ("other", ""), ("more", "")))
    assert not accepts(written(("b", "5"), ("other", ""), name="g"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"b": 5, "other": "x"},
        {"a": "two\n\nlines, <b>", "b": -1, "c": {"x": 1, "y": 2}, "d": [{"x": 1, "y": 2}], "other": ""},
        {"b": 0, "d": None, "other": "5"},
    ],
)
def test_calls_as_the_model_was_taught_them_are_accepted(arguments: dict[str, Any], tokenizer: Tokenizer) -> None:
    text = write_calls("xml", [("f", arguments)])
    assert Matcher(grammar_of(tokenizer, [tool(MANY)]), tokenizer)(text)
    assert read(text, MANY) == arguments


@pytest.mark.parametrize(
    ("schema", "inside", "right"),
    [
        (None, (), True),
        (None, (("a", "x"),), False),
        ({"type": "object", "properties": {}, "additionalProperties": False}, (("a", "x"),), False),
        ({}, (("a", "x"), ("b", "y")), True),
        ({"type": "object"}, (("a", "x"),), True),
        ({"type": "object", "additionalProperties": INTEGER}, (("a", "5"),), True),
        ({"type": "object", "additionalProperties": INTEGER}, (("a", "x"),), False),
        ({"$ref": "#/$defs/p", "$defs": {"p": properties(a=INTEGER)}}, (("a", "5"),), True),
        ({"$ref": "#/$defs/p", "$defs": {"p": properties(a=INTEGER)}}, (), False),
        ({"anyOf": [properties(a=INTEGER), properties(b=INTEGER)]}, (("b", "5"),), True),
        ({"anyOf": [properties(a=INTEGER), properties(b=INTEGER)]}, (("a", "5"), ("b", "5")), False),
    ],
)
def test_the_parameters_of_a_schema(schema: Any, inside: Any, right: bool, tokenizer: Tokenizer) -> None:
    assert Matcher(grammar_of(tokenizer, [tool(schema)]), tokenizer)(written(*inside)) == right


# ---- Around the calls.

TWO = [tool(properties(a=INTEGER), name="one"), tool(None, name="two")]
ONE_CALL, TWO_CALL = written(("a", "5"), name="one"), written(name="two")
THOUGHT = "<think>\nHm, <tool_call>?\n</think>\n\n"


def test_what_is_demanded(tokenizer: Tokenizer) -> None:
    accepts = Matcher(grammar_of(tokenizer, TWO), tokenizer)
    for text in (ONE_CALL, TWO_CALL, f"{ONE_CALL}\n{TWO_CALL}\n{ONE_CALL}"):
        assert accepts(text)
    for text in ("", "Hi", f"Hi {ONE_CALL}", f"{ONE_CALL}!", f"{ONE_CALL}{TWO_CALL}", written(("a", "x"), name="one")):
        assert not accepts(text)
    named = {"type": "function", "function": {"name": "two"}}
    accepts = Matcher(grammar_of(tokenizer, TWO, tool_choice=named, parallel_tool_calls=False), tokenizer)
    assert [accepts(text) for text in (TWO_CALL, ONE_CALL, f"{TWO_CALL}\n{TWO_CALL}")] == [True, False, False]


def test_strict_functions_leave_text_free(tokenizer: Tokenizer) -> None:
    strict = [tool(properties(a=INTEGER), name="one", strict=True), TWO[1]]
    accepts = Matcher(grammar_of(tokenizer, strict, tool_choice="auto"), tokenizer)
    for text in ("Hi, <function=x>!", f"Well.\n\n{ONE_CALL}", f"{ONE_CALL}\n{TWO_CALL}"):
        assert accepts(text)
    for text in (f"Well.\n{written(('a', 'x'), name='one')}", "<tool_call>", "<function=one>", "Hi <function=two>"):
        assert not accepts(text)
    assert grammar_of(tokenizer, TWO, tool_choice="auto") is None


def test_thoughts_may_come_first(tokenizer: Tokenizer) -> None:
    thought = THOUGHT.replace("<tool_call>", "<b>")
    opened = grammar_of(tokenizer, TWO, thinking=Thinking(allowed=True, opened=True))
    accepts = Matcher(opened, tokenizer)
    assert accepts(thought.removeprefix("<think>") + ONE_CALL)
    assert not accepts(ONE_CALL)
    accepts = Matcher(grammar_of(tokenizer, TWO, thinking=Thinking(allowed=True)), tokenizer)
    assert accepts(thought + ONE_CALL)
    assert accepts(ONE_CALL)


# ---- What XML cannot say.


@pytest.mark.parametrize(
    ("schema", "places"),
    [
        (properties(a={"type": "string", "format": "email"}), ["properties.a.format"]),
        (properties(a={"type": "string", "pattern": "(?=x)y"}), ["properties.a.pattern"]),
        (properties(a={"type": "string", "pattern": "a$|^b"}), ["properties.a.pattern"]),
        ({**properties(a=INTEGER), "minProperties": 1}, ["minProperties"]),
        (properties(a={"enum": ["abc"], "maxLength": 3}), ["properties.a.maxLength"]),
        ({"type": "object", "patternProperties": {"^a": INTEGER}}, ["patternProperties"]),
        ({**properties(a=INTEGER), "properties": {"a": INTEGER, "b>c": STRING}}, ["properties.b>c"]),
        (
            properties(a={"anyOf": [{"enum": ["5", "b"]}, {"type": "integer", "minimum": 7}]}),
            ["properties.a.enum"],
        ),
        (
            properties(a={"maxLength": 3, "description": "x", "anyOf": [{"type": "string", "maxLength": 5}, NULL]}),
            ["properties.a.maxLength"],
        ),
    ],
)
def test_what_cannot_be_said_is_named(schema: dict[str, Any], places: list[str], marked_tokenizer: Tokenizer) -> None:
    ignored = IgnoredFields()
    Matcher(grammar_of(marked_tokenizer, [tool(schema)], ignored), marked_tokenizer)
    named = [f"tools[0].function.parameters.{place}" for place in places]
    assert unquote(ignored.header() or "") == ", ".join(named)
    with pytest.raises(ApiError, match="is strict, and what its schema says in") as caught:
        grammar_of(marked_tokenizer, [tool(schema, strict=True)], tool_choice="auto")
    assert places[0] in str(caught.value.message)


def test_references_are_not_written_without_end(marked_tokenizer: Tokenizer) -> None:
    shared = {"type": "object", "properties": {f"p{n}": STRING for n in range(2000)}}
    several = properties(**{f"a{n}": {"type": "array", "items": {"$ref": "#/$defs/s"}} for n in range(300)})
    ignored = IgnoredFields()
    start = time.process_time()
    grammar = grammar_of(marked_tokenizer, [tool({**several, "$defs": {"s": shared}})], ignored)
    assert grammar is not None
    assert len(grammar.text) < 2**22
    assert ignored.header()
    assert time.process_time() - start < 20
