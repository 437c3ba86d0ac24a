"""Grammars for structured output: JSON schema, regular expression, choice, Lark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jllm_runtime.errors import RequestError, check_text


@dataclass(frozen=True)
class Grammar:
    """A grammar that the output follows, made by one of the class methods. It is compiled when a request uses it.

    Attributes:
        kind: ``"json_schema"``, ``"regex"`` or ``"lark"``.
        text: the grammar, in the notation of its kind.

    Raises:
        RequestError: it is no Unicode.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "the grammar")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool) -> Self:
        """Output is JSON that follows this schema, on one line; ``{"type": "object"}`` is any object.

        ``"x-guidance": {"whitespace_flexible": true}`` in the schema lets the model choose its white space.

        Raises:
            RequestError: the schema is not JSON, or no object.
        """
        # A text stays as it is: the order of its fields is the order of the output.
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is not JSON: {error}") from error
        if not isinstance(parsed, dict | bool):
            raise RequestError(f"a JSON schema must be an object, got {text!r:.80}")
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Output matches this regular expression from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Self:
        """Output is one of these texts.

        Raises:
            RequestError: no texts, or an empty one.
        """
        if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise RequestError(f"choices must be some texts that are not empty, got {choices!r:.80}")
        # Quoted as JSON, whose escapes are those of Lark's strings.
        return cls("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Output is a text of a context-free grammar in llguidance's dialect of Lark."""
        return cls("lark", grammar)
