"""Schema of structured output: one grammar, in the spellings of JLLM, vLLM, SGLang and llama.cpp."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import Field

from jllm_runtime.errors import RequestError
from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.schemas.base import RequestModel

Schema = dict[str, Any] | str


def _lark_or_gbnf(text: str) -> Grammar:
    """The grammar of a text in Lark, or in the GBNF of llama.cpp, which vLLM's ``grammar`` is as well.

    Raises:
        RequestError: GBNF that cannot be read. A mistake in Lark shows when the grammar is compiled.
    """
    if "::=" not in text:
        return Grammar.lark(text)
    try:
        from llguidance.gbnf_to_lark import any_to_lark

        return Grammar.lark(any_to_lark(text))
    except ImportError:  # the engine says so, and what to install
        return Grammar.lark(text)
    except Exception as error:  # a parser by hand, which may also run out of stack
        raise RequestError(f"the GBNF grammar cannot be read: {error}") from error


KINDS: Mapping[str, Callable[[Any], Grammar]] = {
    "json": Grammar.json_schema,
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": _lark_or_gbnf,
}


class OwnGrammar(NamedTuple):
    """A grammar that a request has of its own.

    Attributes:
        field: gives it, such as ``structured_outputs.regex``.
        grammar: of kind ``json_schema``, it is JSON.
    """

    field: str
    grammar: Grammar

    @property
    def is_json(self) -> bool:
        """Whether it is JSON of a schema, before which a model that thinks may do so."""
        return self.grammar.kind == "json_schema"


class StructuredOutputs(RequestModel):
    """vLLM's ``structured_outputs``: one of these."""

    json_schema: Schema | None = Field(None, alias="json", description="JSON of this schema.")
    json_object: bool = Field(False, description="Any JSON object.")
    regex: str | None = Field(None, min_length=1)
    choice: list[str] | None = Field(None, min_length=1, fail_fast=True)
    grammar: str | None = Field(None, min_length=1, description="A grammar in Lark or GBNF.")


class StructuredOutputFields(RequestModel):
    """What the output must be: one of these fields, or none."""

    regex: str | None = Field(None, min_length=1, description="The output matches this regular expression.")
    choice: list[str] | None = Field(
        None, min_length=1, fail_fast=True, description="The output is one of these texts."
    )
    grammar: str | None = Field(
        None, min_length=1, description="The output is a text of this grammar, in Lark or GBNF."
    )
    guided_json: Schema | None = Field(None, description="The output is JSON of this schema.")
    guided_regex: str | None = Field(None, min_length=1, description="Another name of regex.")
    guided_choice: list[str] | None = Field(None, min_length=1, fail_fast=True, description="Another name of choice.")
    guided_grammar: str | None = Field(None, min_length=1, description="Another name of grammar.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The same, as an object.")

    def own_grammar(self) -> OwnGrammar | None:
        """The grammar that one of these fields gives, None without one.

        Raises:
            ApiError: more than one is given.
            RequestError: a choice without texts, or a schema that is none.
        """
        given = [(name, kind, value) for name, kind, value in self._spellings() if value is not None]
        if len(given) > 1:
            first, second = given[0][0], given[1][0]
            raise ApiError(400, f"{first} and {second} exclude each other", "invalid_value", second)
        for name, kind, value in given:
            try:
                return OwnGrammar(name, KINDS[kind](value))
            except RequestError as error:
                raise ApiError(400, f"{name}: {error}", "invalid_value", name) from error
        return None

    def whole_output_grammar(self) -> bool:
        """Whether a grammar covers the whole output, and not only what comes behind the thinking."""
        own = self.own_grammar()
        return own is not None and not own.is_json

    def _spellings(self) -> list[tuple[str, str, Any]]:
        """Name, kind and value of every field that may give a grammar."""
        found = [(kind, kind, getattr(self, kind)) for kind in ("regex", "choice", "grammar")]
        found += [(f"guided_{kind}", kind, getattr(self, f"guided_{kind}")) for kind in KINDS]
        if (inner := self.structured_outputs) is not None:
            values = {"json": inner.json_schema, "regex": inner.regex, "choice": inner.choice, "grammar": inner.grammar}
            found += [(f"structured_outputs.{kind}", kind, value) for kind, value in values.items()]
            found.append(("structured_outputs.json_object", "json", {"type": "object"} if inner.json_object else None))
        return found
