"""What an answer must be: a grammar, by one of its usual descriptions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jllm_runtime.errors import RequestError


@dataclass(frozen=True)
class Grammar:
    """A description of the answers that are allowed, made by one of the class methods.

    Attributes:
        kind: ``"json_schema"``, ``"regex"`` or ``"lark"``.
        text: the description.
    """

    kind: str
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool) -> Self:
        """Answers are JSON that this JSON schema accepts, on one line; ``{"type": "object"}`` is any object.

        ``"x-guidance": {"whitespace_flexible": true}`` in the schema lets the model choose its white space.
        """
        text = schema if isinstance(schema, str) else json.dumps(schema)
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise RequestError(f"the JSON schema is not JSON: {error}") from error
        if not isinstance(parsed, dict | bool):
            raise RequestError(f"a JSON schema must be an object, got {text!r:.80}")
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Answers match this regular expression from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Self:
        """The answer is one of these texts."""
        if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise RequestError(f"choices must be some texts that are not empty, got {choices!r:.80}")
        return cls("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Answers are texts of a context-free grammar in Lark's notation, as llguidance reads it."""
        return cls("lark", grammar)
