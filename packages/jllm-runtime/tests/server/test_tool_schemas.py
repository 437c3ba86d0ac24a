"""Schemas of tool arguments: always objects, relaxed where they cannot be enforced, or refused for strict tools."""

import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import llguidance
import pytest
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests import tool_schemas
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.schema_references import cut_endless_references
from jllm_runtime.server.requests.tool_schemas import arguments_schema, relax
from jllm_runtime.server.schemas.chat_messages import FunctionDefinition

PLACE = "tools[0].function.parameters"


def of(**schema: Any) -> dict[str, Any]:
    """The schema of arguments with one of this schema, and one beside it."""
    return {"type": "object", "properties": {"a": schema, "b": {"enum": [1, 2]}}, "required": ["a", "b"]}


# A schema, the keywords of it that cannot be enforced, arguments that still fit, and some that do not.
ODD: list[tuple[dict[str, Any], list[str], str, str]] = [
    (of(type="string", pattern="^(?=.*[A-Z]).+$"), ["properties.a.pattern"], '{"a": "x", "b": 1}', '{"a": 1, "b": 1}'),
    (of(type="string", pattern=r"(x)\1"), ["properties.a.pattern"], '{"a": "x", "b": 1}', '{"a": 1, "b": 1}'),
    (of(type="string", format="phone"), ["properties.a.format"], '{"a": "x", "b": 1}', '{"a": 1, "b": 1}'),
    (
        of(type="array", items={"type": "integer"}, uniqueItems=True),
        ["properties.a.uniqueItems"],
        '{"a": [1, 1], "b": 1}',
        '{"a": ["x"], "b": 1}',
    ),
    (of(type="integer", **{"not": {"const": 3}}), ["properties.a.not"], '{"a": 3, "b": 1}', '{"a": "x", "b": 1}'),
    (
        of(oneOf=[{"type": "string"}, {"type": "string", "maxLength": 3}]),
        ["properties.a.oneOf"],
        '{"a": "x", "b": 1}',
        '{"a": 1, "b": 1}',
    ),
    (of(type="STRING"), ["properties.a.type"], '{"a": [], "b": 1}', '{"a": [], "b": "x"}'),
    (of(**{"$ref": "#/$defs/none"}), ["properties.a.$ref"], '{"a": [], "b": 1}', '{"a": [], "b": "x"}'),
    (
        of(**{"$ref": "#/$defs/code"}) | {"$defs": {"code": {"type": "string", "pattern": "(?!x)"}}},
        ["$defs.code.pattern"],
        '{"a": "x", "b": 1}',
        '{"a": 1, "b": 1}',
    ),
    (
        of(type="array", items={"anyOf": [{"type": "string", "format": "phone"}, {"type": "null"}]}),
        ["properties.a.items.anyOf.0.format"],
        '{"a": ["x", null], "b": 1}',
        '{"a": [1], "b": 1}',
    ),
    (of(type="integer") | {"if": {}, "then": {}}, ["if", "then"], '{"a": 1, "b": 1}', '{"a": "x", "b": 1}'),
    (of(type="integer") | {"propertyNames": {}}, ["propertyNames"], '{"a": 1, "b": 1}', '{"a": "x", "b": 1}'),
    (of(type="integer") | {"$schema": "https://x.example/y"}, ["$schema"], '{"a": 1, "b": 1}', '{"a": "x", "b": 1}'),
    (of(**{"$ref": "#"}), ["properties.a.$ref"], '{"a": [], "b": 1}', '{"a": [], "b": "x"}'),
    (
        of(**{"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/a"}}},
        ["$defs.a.$ref"],
        '{"a": [], "b": 1}',
        '{"a": [], "b": "x"}',
    ),
    (of(type="array", items={"$ref": "#"}, minItems=1), ["properties.a.items.$ref"], '{"a": [1], "b": 1}', '{"a": []}'),
    ({"type": "object", "properties": []}, ["properties"], '{"a": 1}', "[]"),
    ({"type": "string"}, ["type"], '{"a": 1}', '"x"'),
]


def names(rows: list[tuple[dict[str, Any], list[str], str, str]]) -> list[str]:
    return [f"{number}-{keywords[0]}" for number, (_, keywords, _, _) in enumerate(rows)]


def accepts(schema: dict[str, Any], text: str, tokenizer: Any) -> bool:
    """Whether a JSON text follows the schema, as llguidance sees it."""
    library = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=[259])
    styled = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}, **schema}
    matcher = llguidance.LLMatcher(library, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(styled)))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(("schema", "keywords", "fits", "does_not"), ODD, ids=names(ODD))
def test_what_cannot_be_enforced_is_left_out_alone(
    schema: dict[str, Any], keywords: list[str], fits: str, does_not: str, tiny
) -> None:
    ignored, before = IgnoredFields(), copy.deepcopy(schema)
    relaxed = arguments_schema(FunctionDefinition(name="f", parameters=schema), PLACE, ignored)
    assert ignored.header() == ", ".join(f"{PLACE}.{keyword}" for keyword in keywords)
    assert accepts(relaxed, fits, tiny.tokenizer)
    assert not accepts(relaxed, does_not, tiny.tokenizer)
    assert schema == before  # the template shows the model the client's own


@pytest.mark.parametrize(("schema", "keywords", "fits", "does_not"), ODD, ids=names(ODD))
def test_a_strict_tool_is_refused_by_its_name_and_the_keyword(
    schema: dict[str, Any], keywords: list[str], fits: str, does_not: str
) -> None:
    del fits, does_not
    function = FunctionDefinition(name="look_up", parameters=schema, strict=True)
    with pytest.raises(ApiError, match="the tool 'look_up' is strict") as caught:
        arguments_schema(function, PLACE, IgnoredFields())
    assert (caught.value.status_code, caught.value.param) == (400, PLACE)
    assert all(f"{keyword} (" in caught.value.message for keyword in keywords)


@pytest.mark.parametrize(
    ("schema", "fits"),
    [
        ({}, '{"x": [1]}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}'),
        ({"type": ["object", "null"]}, "{}"),
        ({"anyOf": [{"properties": {"a": {"type": "integer"}}}, {"type": "array"}]}, '{"a": 1}'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {"type": "integer"}}}}}, '{"a": 1}'),
        ({"enum": [{"a": 1}, 3]}, '{"a": 1}'),
        ({"description": "Nothing said."}, "{}"),
    ],
    ids=str,
)
def test_arguments_are_an_object(schema: dict[str, Any], fits: str, tiny) -> None:
    ignored = IgnoredFields()
    for strict in (False, True):
        relaxed = arguments_schema(FunctionDefinition(name="f", parameters=schema, strict=strict), PLACE, ignored)
        assert accepts(relaxed, fits, tiny.tokenizer)
        assert not any(accepts(relaxed, text, tiny.tokenizer) for text in ("3", "[]", "null", '"x"', "true"))
    assert ignored.header() is None


def test_a_schema_that_is_right_stays_as_it_is() -> None:
    schema = of(type="string", pattern="^[a-z]+$") | {"additionalProperties": False}
    ignored = IgnoredFields()
    assert arguments_schema(FunctionDefinition(name="f", parameters=schema, strict=True), PLACE, ignored) == schema
    assert ignored.header() is None


def test_a_large_schema_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_schemas, "MAX_CHECKED", 20_000)
    wrong = {f"p{number}": {"type": "string", "pattern": "(?=x)"} for number in range(500)}
    ignored, began = IgnoredFields(), time.thread_time()
    relaxed = arguments_schema(FunctionDefinition(name="f", parameters=of() | {"properties": wrong}), PLACE, ignored)
    assert time.thread_time() - began < 1
    assert relaxed == {"type": "object"}
    assert ignored.header() == f"{PLACE}.properties"


SELF = {"$ref": "#"}


@pytest.mark.parametrize(
    ("schema", "references"),
    [
        # What must be followed comes back to itself.
        ({"properties": {"next": SELF}, "required": ["next"], "type": "object"}, ["properties.next"]),
        ({"properties": {"next": SELF}, "allOf": [{"required": ["next"]}], "type": "object"}, ["properties.next"]),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, ["$defs.a"]),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/properties/a"}}}, ["properties.b"]),
        ({"allOf": [SELF]}, ["allOf.0"]),
        ({"anyOf": [SELF, {"allOf": [SELF]}]}, ["anyOf.0"]),
        ({"type": "array", "prefixItems": [SELF], "minItems": 1}, ["prefixItems.0"]),
        ({"type": "object", "minProperties": 1, "additionalProperties": SELF}, ["additionalProperties"]),
        ({"type": "object", "required": ["z"], "patternProperties": {"z": SELF}}, []),
        ({"type": "object", "required": ["z"], "additionalProperties": SELF}, ["additionalProperties"]),
        # Only the circle is cut, not what leads to it.
        (
            {
                "properties": {"x": {"$ref": "#/definitions/x~1y"}},
                "required": ["x"],
                "definitions": {"x/y": of(**{"$ref": "#/definitions/x~1y"})},
            },
            ["definitions.x/y.properties.a"],
        ),
        # What ends: trees, lists, what may be null, what may be left out, what nothing leads to.
        ({"type": "object", "properties": {"all": {"type": "array", "items": SELF}}, "required": ["all"]}, []),
        ({"type": "object", "properties": {"up": {"anyOf": [SELF, {"type": "null"}]}}, "required": ["up"]}, []),
        ({"properties": {"next": SELF}, "required": ["next"]}, []),  # it may be a number
        ({"type": "object", "properties": {"next": SELF}}, []),
        ({"type": "object", "$defs": {"a": {"$ref": "#/$defs/a"}}}, []),
        ({"type": "object", "properties": {"a": False, "b": {"enum": []}, "c": {"$ref": "#none"}}}, []),
    ],
    ids=str,
)
def test_references_without_an_end(schema: dict[str, Any], references: list[str]) -> None:
    before = copy.deepcopy(schema)
    cut, found = cut_endless_references(schema)
    assert sorted(".".join(path) for path in found) == [f"{reference}.$ref" for reference in references]
    assert schema == before
    assert cut_endless_references(cut) == (cut, [])


def test_references_are_followed_in_bounded_time() -> None:
    def chain(end: Any) -> dict[str, Any]:
        steps = {f"s{number}": of(**{"$ref": f"#/$defs/s{number + 1}"}) for number in range(3000)}
        return {"properties": {"a": {"$ref": "#/$defs/s0"}}, "$defs": {**steps, "s3000": end}}

    began = time.thread_time()
    assert cut_endless_references(chain(True))[1] == []
    assert len(cut_endless_references(chain({"$ref": "#/$defs/s0"}))[1]) == 1
    circles = {f"p{number}": {"$ref": f"#/properties/p{number}"} for number in range(3000)}
    deep: dict[str, Any] = SELF
    for _ in range(2000):
        deep = {"properties": {"a": deep}}
    for schema in ({"properties": circles}, {"properties": {"a": deep}}):
        assert relax({"type": "object", **schema})[0] == {"type": "object"}
    assert time.thread_time() - began < 8


# ---- In requests.

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "x"}]
GOOD = {"type": "function", "function": {"name": "good", "parameters": of(type="boolean")}}


def odd(**fields: Any) -> dict[str, Any]:
    schema, *_ = ODD[0]
    parameters = schema | {"additionalProperties": False}
    return {"type": "function", "function": {"name": "odd", "parameters": parameters, **fields}}


@pytest.fixture
def forced(serve, babbler, marked_tokenizer) -> Iterator[Any]:
    """Serves a model that says anything, and knows thoughts and calls."""
    with serve(dataclasses.replace(babbler, tokenizer=marked_tokenizer)) as server:
        yield server


OFF = {"chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": False, "temperature": 1}


def test_one_odd_schema_does_not_fail_the_others(forced) -> None:
    body = {"model": "tiny", "messages": QUESTION, "tools": [GOOD, odd()], "max_tokens": 200, **OFF}
    left_out = "tools[1].function.parameters.properties.a.pattern"
    called = set()
    for seed, choice in enumerate(
        ["required"] * 3 + [{"type": "function", "function": {"name": name}} for name in ("odd", "good")]
    ):
        bias = {str(ord('"')): 9}  # so that texts end
        reply = forced.post(CHAT, body | {"tool_choice": choice, "seed": seed, "logit_bias": bias})
        assert reply.is_success, reply.text
        # Only what is called for has a schema in the grammar.
        assert reply.headers.get("X-JLLM-Ignored") == (None if "good" in str(choice) else left_out)
        [call] = reply.json()["choices"][0]["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert isinstance(arguments["b"], int)
        assert isinstance(arguments["a"], bool if call["function"]["name"] == "good" else str)
        called.add(call["function"]["name"])
    assert called == {"good", "odd"}
    streamed = forced.post(CHAT, body | {"tool_choice": "required", "stream": True, "max_tokens": 1})
    assert (streamed.status_code, streamed.headers["X-JLLM-Ignored"]) == (200, left_out)
    # Free, it has no grammar, and nothing is left out.
    assert "X-JLLM-Ignored" not in forced.post(CHAT, body | {"max_tokens": 1}).headers


@pytest.mark.parametrize("number", range(len(ODD)), ids=names(ODD))
def test_a_call_of_an_odd_tool_is_made_to_its_end(number: int, forced) -> None:
    schema, keywords, *_ = ODD[number]
    tool = {"type": "function", "function": {"name": "odd", "parameters": schema | {"additionalProperties": False}}}
    choice = {"type": "function", "function": {"name": "odd"}}
    body = {"model": "tiny", "messages": QUESTION, "tools": [GOOD, tool], "tool_choice": choice, "max_tokens": 60}
    reply = forced.post(CHAT, body | OFF | {"logit_bias": {str(ord('"')): 9, str(ord("}")): 9, str(ord("]")): 9}})
    assert reply.is_success, reply.text
    left_out = [f"tools[1].function.parameters.{keyword}" for keyword in keywords]
    assert reply.headers["X-JLLM-Ignored"] == ", ".join(left_out)
    assert reply.json()["choices"][0]["message"]["tool_calls"]


def test_a_strict_tool_with_an_odd_schema_is_refused(forced) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1, **OFF}
    error = forced.post(CHAT, body | {"tools": [GOOD, odd(strict=True)]}).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "tools[1].function.parameters")
    assert "the tool 'odd' is strict" in error["message"]
    assert "properties.a.pattern (look-around" in error["message"]
    # One that is strict and right, beside an odd one that is not strict.
    strict = {"type": "function", "function": {**GOOD["function"], "strict": True}}
    reply = forced.post(CHAT, body | {"tools": [strict, odd()]})
    assert (reply.status_code, reply.headers["X-JLLM-Ignored"]) == (
        200,
        "tools[1].function.parameters.properties.a.pattern",
    )


def test_arguments_of_any_tool_are_an_object(forced) -> None:
    for parameters in ({}, {"properties": {}}, {"type": "object"}, {"description": "Anything."}):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body = {"model": "tiny", "messages": QUESTION, "tools": [tool], "tool_choice": "required", "max_tokens": 250}
        calls = 0
        for seed in range(3):
            bias = {str(ord("}")): 8}
            reply = forced.post(CHAT, body | OFF | {"seed": seed, "logit_bias": bias})
            [choice] = reply.json()["choices"]
            for call in choice["message"].get("tool_calls", []):
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
                calls += 1
        assert calls
