"""Structured output: a random model's output follows the grammar."""

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jllm_runtime import Engine, EngineConfig, Grammar, RequestError, SamplingParams
from jllm_runtime.errors import EngineError

LENGTH = 250


@pytest.fixture(scope="module")
def engine(tiny) -> Iterator[Engine]:
    """A model that says anything, with the tokenizer of bytes."""
    model = dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer, eos_ids=(tiny.end,))
    with Engine(model, EngineConfig(pages=64)) as engine:
        yield engine


def constrained(grammar: Grammar, seed: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": LENGTH, "grammar": grammar, **fields})


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short, so that a random model comes to their end."""
    kinds = ["boolean", "null", "enum", "integer", "string"] + (["object", "array"] if depth < 2 else [])
    kind = rng.choice(kinds) if depth else rng.choice(["object", "array"])
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "ü", 'a"b'], 3)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    if kind == "string":
        return rng.choice([{"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^[a-c]{2,4}$"}])
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 1}
    if kind == "object":
        names = rng.sample(["a", "name", "größe", "x y", "id"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def holds(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value is what one of these schemas describes."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            pattern = schema.get("pattern", "")
            return isinstance(value, str) and len(value) <= 5 and bool(re.search(pattern, value))
        case "array":
            fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return fits and all(holds(one, schema["items"]) for one in value)
    known = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(known)
        and all(holds(one, known[name]) for name, one in value.items())
    )


def test_json_is_what_its_schema_says(engine: Engine) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(60)]
    params = [constrained(Grammar.json_schema(schema), seed) for seed, schema in enumerate(schemas)]
    outputs = engine.generate(["go:"] * len(schemas), params)
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason == "stop", (schema, output.text)
        assert holds(json.loads(output.text), schema), (schema, output.text)
        assert "\n" not in output.text
    assert len({output.text for output in outputs}) > 40


def test_a_regex_a_choice_and_a_grammar_in_one_batch(engine: Engine) -> None:
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=30)
    alone = engine.submit("go:", free).result()
    params = [
        constrained(Grammar.regex(r"[ab]{3}-\d{2}")),
        constrained(Grammar.choice(["yes", "no", 'may"be'])),
        constrained(Grammar.lark('start: "(" start ")" | "x"'), temperature=0.0, logit_bias={ord("x"): 50.0}),
        free,
    ]
    regex, choice, lark, beside = engine.generate(["go:"] * 4, params)
    assert re.fullmatch(r"[ab]{3}-\d{2}", regex.text)
    assert choice.text in {"yes", "no", 'may"be'}
    assert lark.text == "x"
    assert beside.token_ids == alone.token_ids
    assert {output.finish_reason for output in (regex, choice, lark)} == {"stop"}


def test_what_the_model_prefers_decides_within_the_grammar(engine: Engine) -> None:
    outputs = [
        engine.submit("go:", constrained(Grammar.choice(["ab", "cd"]), logit_bias={ord(letter): 100.0})).result()
        for letter in "ac"
    ]
    assert [output.text for output in outputs] == ["ab", "cd"]


def test_a_constrained_answer_is_the_same_after_it_gave_way(tiny) -> None:
    model = dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer, eos_ids=(tiny.end,))
    params = [constrained(Grammar.regex("[a-z]{60}"), seed) for seed in range(6)]
    with Engine(model, EngineConfig(pages=24, page_size=16)) as engine:
        alone = [engine.submit("go:", one).result().text for one in params]
        crowd = [engine.submit("abc" * 20, SamplingParams(max_tokens=60)) for _ in range(3)]
        with engine._changed:
            requests = [engine.submit("go:", one) for one in params]
        assert [request.result().text for request in requests] == alone
        assert all(request.result() for request in crowd)
        assert engine.stats().preemptions > 0
    assert all(re.fullmatch("[a-z]{60}", text) for text in alone)


def test_several_answers_follow_the_grammar_each(engine: Engine) -> None:
    outputs = engine.submit("go:", constrained(Grammar.regex("[0-9]{8}"), n=4)).results()
    assert all(re.fullmatch("[0-9]{8}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) == 4


@pytest.mark.parametrize(("schema", "message"), [("{", "is not JSON"), ("[1]", "a JSON schema must be an object")])
def test_what_is_no_schema_is_refused(schema: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Grammar.json_schema(schema)


@pytest.mark.parametrize("choices", [[], "yes", [""]], ids=repr)
def test_what_is_no_choice_is_refused(choices: Any) -> None:
    with pytest.raises(RequestError, match="choices must be some texts"):
        Grammar.choice(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.regex("(unclosed"),
        Grammar.lark("start: nothing"),
        Grammar.json_schema({"type": "nonsense"}),
        Grammar.json_schema({"type": "object", "unevaluatedProperties": False}),  # not known, so not passed over
    ],
    ids=lambda grammar: grammar.text,
)
def test_a_grammar_that_cannot_be_used_is_refused_at_once(grammar: Grammar, engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"the grammar .* cannot be used"):
        engine.submit("go:", constrained(grammar))


# Behind "aaaa" there are more possibilities than llguidance counts, or none at all.
WIDE = "\n".join(
    ['start: "aaaa" y', "y: " + " | ".join(f"w{i}" for i in range(3000))]
    + [f'w{i}: "a" w{i}z\nw{i}z: "b" w{i} | "{i}"' for i in range(3000)]
)
OUTGROWN = [(WIDE, "Current row has 9000 items; max is 2000"), ('start: "aaaa" x\nx: x x', "no text can follow here")]


@pytest.mark.parametrize(("grammar", "cause"), OUTGROWN, ids=["limit", "mask"])
def test_a_grammar_that_fails_in_use_ends_its_own_request_alone(grammar: str, cause: str, engine: Engine) -> None:
    free = SamplingParams(temperature=1.0, seed=9, max_tokens=30)
    alone, failed = engine.submit("go:", free).result(), engine.stats().failed
    with engine._changed:  # all of them in one batch
        beside = [engine.submit("go:", one) for one in (free, constrained(Grammar.regex("[ab]{30}")))]
        request = engine.submit("go:", constrained(Grammar.lark(grammar), n=2))
    with pytest.raises(EngineError, match=f"the grammar failed: .*{cause}") as caught:
        request.results()
    assert isinstance(caught.value.__cause__, RequestError)
    assert "<state>" not in str(caught.value)
    assert beside[0].result().token_ids == alone.token_ids
    assert re.fullmatch("[ab]{30}", beside[1].result().text)
    assert engine.generate(["go:"], free)[0].token_ids == alone.token_ids
    assert (engine.stats().failed, engine.stats().pages_in_use) == (failed + 1, 0)


def test_a_grammar_without_a_beginning_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(RequestError, match="the grammar failed: no text can follow here"):
        engine.submit("go:", constrained(Grammar.lark("start: x\nx: x x")))


def test_an_answer_that_is_complete_does_not_ask_its_grammar(engine: Engine) -> None:
    """At its last token the grammar would fail, but nobody needs to know what could follow."""
    output = engine.submit("go:", constrained(Grammar.lark('start: "aaaa" x\nx: x x'), max_tokens=4)).result()
    assert (output.text, output.finish_reason) == ("aaaa", "length")


def test_a_grammar_needs_a_tokenizer_and_an_end(tiny) -> None:
    for model, message in (
        (tiny.plain, "need a tokenizer"),
        (dataclasses.replace(tiny.plain, tokenizer=tiny.tokenizer), "need an end-of-text id"),
    ):
        with Engine(model, EngineConfig(pages=64)) as engine, pytest.raises(RequestError, match=message):
            engine.submit([1], constrained(Grammar.regex("a")))


def test_min_tokens_and_a_grammar_contradict_each_other(engine: Engine) -> None:
    with pytest.raises(RequestError, match="min_tokens cannot be combined with a grammar"):
        engine.submit("go:", constrained(Grammar.regex("a"), min_tokens=2))
