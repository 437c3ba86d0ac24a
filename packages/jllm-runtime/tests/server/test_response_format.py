"""Output grammars of chat requests: the texts that they accept and refuse."""

from typing import Any

import llguidance
import pytest
from jllm_runtime import Grammar, Tokenizer
from jllm_runtime.server.parsing.tool_calls import ToolCallFormat
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.response_format import Thinking, available_tools, output_grammar
from jllm_runtime.server.schemas.chat import ChatCompletionRequest

SHARED = {"$defs": {"n": {"type": "integer"}}, "type": "object", "additionalProperties": False}
PARAMETERS = SHARED | {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "one", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "two"}},
]
STRICT = [{"type": "function", "function": {"name": "one", "parameters": PARAMETERS, "strict": True}}]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
ONE, TWO = '{"name": "one", "arguments": {"a": 5}}', '{"name": "two", "arguments": {}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.fixture(params=["marks that are tokens", "marks that are text"])
def tokenizer(request: pytest.FixtureRequest, marked_tokenizer: Tokenizer, tiny) -> Tokenizer:
    return marked_tokenizer if request.param == "marks that are tokens" else tiny.tokenizer


def accepts(grammar: Grammar | None, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the whole text is one of the grammar's."""
    assert grammar is not None
    eos = list(tokenizer.eos_ids)
    library = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=eos)
    matcher = llguidance.LLMatcher(library, llguidance.LLMatcher.grammar_from_lark(grammar.text))
    assert not matcher.is_error(), matcher.get_error()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.try_consume_tokens([token]):
            return False
    return bool(matcher.is_accepting())


def grammar_of(
    tokenizer: Tokenizer,
    tool_format: ToolCallFormat = "hermes",
    thinking: Thinking | None = None,
    ignored: IgnoredFields | None = None,
    **fields: Any,
) -> Any:
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    )
    thinking = thinking or Thinking()
    return output_grammar(body, available_tools(body), tool_format, tokenizer, thinking, ignored or IgnoredFields())


def test_what_is_free_has_no_grammar(tokenizer: Tokenizer) -> None:
    off = {"tools": STRICT, "tool_choice": "none"}
    for fields in ({}, {"tools": TOOLS}, off, {"response_format": {"type": "text"}}):
        assert grammar_of(tokenizer, **fields) is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (hermes(ONE), True),
        (hermes(TWO), True),
        (hermes(ONE, TWO, ONE), True),
        ("", False),
        ("Hello", False),
        (hermes(ONE) + "!", False),
        ("Well " + hermes(ONE), False),
        (hermes('{"name": "one", "arguments": {"a": "x"}}'), False),
        (hermes('{"name": "one", "arguments": {}}'), False),
        (hermes('{"name": "two", "arguments": {"a": 1}}'), False),
        (hermes('{"name": "six", "arguments": {}}'), False),
    ],
)
def test_a_call_that_is_demanded(text: str, right: bool, tokenizer: Tokenizer) -> None:
    assert accepts(grammar_of(tokenizer, tools=TOOLS, tool_choice="required"), tokenizer, text) == right


def test_one_call_alone(tokenizer: Tokenizer) -> None:
    named = {"type": "function", "function": {"name": "two"}}
    grammar = grammar_of(tokenizer, tools=TOOLS, tool_choice=named, parallel_tool_calls=False)
    assert accepts(grammar, tokenizer, hermes(TWO))
    assert not accepts(grammar, tokenizer, hermes(ONE))
    assert not accepts(grammar, tokenizer, hermes(TWO, TWO))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Hello, you! {} <tool> \n", True),
        (hermes(ONE), True),
        ("Let me see.\n" + hermes(ONE, ONE), True),
        (hermes('{"name": "one", "arguments": {"a": "x"}}'), False),
        ("Hm. " + hermes('{"name": "one", "arguments": {"a": "x"}}'), False),
        ("<tool_call>", False),
    ],
)
def test_calls_of_a_strict_function(text: str, right: bool, tokenizer: Tokenizer) -> None:
    assert accepts(grammar_of(tokenizer, tools=STRICT), tokenizer, text) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "one", "parameters": {"a": 5}}', True),
        ('{"name": "one", "parameters": {"a": 5}}; {"name": "one", "parameters": {"a": 6}}', True),
        ("Hello {}", True),
        ('{"name": "one", "parameters": {"a": "x"}}', False),
        ("{}", False),
    ],
)
def test_the_format_of_llama_3(text: str, right: bool, tokenizer: Tokenizer) -> None:
    assert accepts(grammar_of(tokenizer, "llama3", tools=STRICT), tokenizer, text) == right
    demanded = grammar_of(tokenizer, "llama3", tools=STRICT, tool_choice="required")
    assert accepts(demanded, tokenizer, text) == (right and text != "Hello {}")


def test_json_or_a_call(tokenizer: Tokenizer) -> None:
    grammar = grammar_of(tokenizer, tools=TOOLS, response_format=JSON_SCHEMA)
    assert accepts(grammar, tokenizer, hermes(ONE))
    assert accepts(grammar, tokenizer, '{"a": 5}')
    assert not accepts(grammar, tokenizer, "Hello")


@pytest.mark.parametrize("fields", [{"response_format": JSON_SCHEMA}, {"tools": TOOLS, "tool_choice": "required"}])
def test_thoughts_may_come_first(fields: dict[str, Any], tokenizer: Tokenizer) -> None:
    answer = '{"a": 5}' if "response_format" in fields else hermes(ONE)
    none = grammar_of(tokenizer, **fields)
    if "response_format" in fields:
        assert none == Grammar.json_schema(PARAMETERS)
        none = Grammar.lark(f"start: %json {none.text}")
    allowed = grammar_of(tokenizer, thinking=Thinking(allowed=True), **fields)
    opened = grammar_of(tokenizer, thinking=Thinking(allowed=True, opened=True), **fields)
    thought, rest = f"<think>\nHm, {{}} </b>?\n</think>\n\n{answer}", f"\nHm?\n</think>\n\n{answer}"
    assert [accepts(one, tokenizer, answer) for one in (none, allowed, opened)] == [True, True, False]
    assert [accepts(one, tokenizer, thought) for one in (none, allowed)] == [False, True]
    assert [accepts(one, tokenizer, rest) for one in (none, allowed, opened)] == [False, False, True]
    assert accepts(allowed, tokenizer, f"<think></think>{answer}")
    assert not accepts(allowed, tokenizer, "<think>\nHm?")


def test_the_client_s_own_grammar_is_the_whole_answer(tokenizer: Tokenizer) -> None:
    assert grammar_of(tokenizer, regex="a+", thinking=Thinking(allowed=True)) == Grammar.regex("a+")
