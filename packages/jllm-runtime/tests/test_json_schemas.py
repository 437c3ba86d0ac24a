"""Structured output with 200 random JSON schemas: a random model's output is valid, by an independent validator."""

import dataclasses
import json
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jllm_runtime import Engine, EngineConfig, Grammar, SamplingParams
from jsonschema import Draft202012Validator

COUNT = 200

words = st.text(string.ascii_letters + "_ äß漢", min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9).map(lambda x: round(x, 2)) | words


def integers() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-1000, 1000), st.integers(0, 500))
    return bounds.map(lambda bound: {"type": "integer", "minimum": bound[0], "maximum": sum(bound)})


def texts() -> st.SearchStrategy[dict[str, Any]]:
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 4))
    patterns = st.sampled_from(["^[a-f]{1,5}$", "^(yes|no|nö)$", r"^\d{3}-\d{2}$", "^(x|yz){0,3}$"])
    return (
        lengths.map(lambda each: {"type": "string", "minLength": each[0], "maxLength": sum(each)})
        | patterns.map(lambda pattern: {"type": "string", "pattern": pattern})
        | st.sampled_from(["uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name})
    )


def arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    lengths = st.tuples(st.integers(0, 2), st.integers(0, 2))
    plain = st.tuples(items, lengths).map(
        lambda each: {"type": "array", "items": each[0], "minItems": each[1][0], "maxItems": sum(each[1])}
    )
    tuples = st.lists(items, min_size=1, max_size=3).map(
        lambda each: {"type": "array", "prefixItems": each, "items": False, "minItems": len(each)}
    )
    return plain | tuples


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def of(properties: dict[str, Any], required: frozenset[int]) -> dict[str, Any]:
        names = [name for number, name in enumerate(properties) if number in required]
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    return st.builds(of, st.dictionaries(words, values, max_size=4), st.frozensets(st.integers(0, 3)))


leaves = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])
    | st.lists(scalars, min_size=1, max_size=4, unique_by=json.dumps).map(lambda values: {"enum": values})
    | scalars.map(lambda value: {"const": value})
    | integers()
    | texts()
)
schemas = st.recursive(
    leaves,
    lambda inner: arrays(inner) | objects(inner) | st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x}),
    max_leaves=6,
)
tops = (
    schemas
    | objects(schemas)
    | schemas.map(lambda one: {"$defs": {"one": one}, "type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2})
)


def some_schemas() -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    # More than are wanted, as some come twice; always the same.
    @settings(max_examples=3 * COUNT, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(tops)
    def collect(schema: dict[str, Any]) -> None:
        found[json.dumps(schema, sort_keys=True)] = schema

    collect()
    # Those that come first are the simplest.
    return list(found.values())[-COUNT:]


def test_two_hundred_random_schemas(tiny) -> None:
    config = dataclasses.replace(tiny.config, num_layers=1, context_length=1024)
    model = tiny.random(config, tokenizer=tiny.tokenizer, eos_ids=(tiny.end,))
    schemas = some_schemas()
    assert len(schemas) == COUNT
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=1000, grammar=Grammar.json_schema(schema))
        for seed, schema in enumerate(schemas)
    ]
    with Engine(model, EngineConfig(pages=256)) as engine:
        outputs = engine.generate(["go:"] * COUNT, params)
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason == "stop", (schema, output.text)
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        validator.validate(json.loads(output.text))
    assert len({output.text for output in outputs}) > COUNT / 2


def test_the_validator_would_object() -> None:
    schema = {"type": "array", "items": {"type": "integer", "maximum": 3}}
    assert not Draft202012Validator(schema).is_valid([4])
    with pytest.raises(ValueError, match="Expecting"):
        json.loads('{"a": }')
