"""Schemas of tool arguments and of answers: what of them a grammar can enforce, relaxed or refused."""

import json
from typing import Any

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.requests.schema_references import TooManyStepsError, cut_endless_references, parts
from jllm_runtime.server.schemas.chat_messages import FunctionDefinition
from jllm_runtime.server.schemas.structured_outputs import OwnGrammar

MAX_CHECKED = 2**24
"""Most characters of the schemas that are tried for one tool: a few seconds. Beyond, any object is taken."""

ENDLESS = "it leads back to itself without an end"
ANY_OBJECT: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "additionalProperties": False}


def arguments_schema(function: FunctionDefinition, place: str, ignored: IgnoredFields) -> dict[str, Any]:
    """The schema that a function's arguments follow in a grammar.

    A function that is not strict gets one without the keywords that cannot be enforced: its arguments follow the rest.

    Args:
        function: with ``parameters``.
        place: of the parameters in the request, such as ``tools[0].function.parameters``.
        ignored: is told of each keyword that is left out.

    Raises:
        ApiError: the function is strict, and its schema has such keywords.
    """
    relaxed, left_out = _relax_arguments(function.parameters or {})
    leave_out(function, left_out, place, ignored)
    return relaxed


def leave_out(function: FunctionDefinition, left_out: dict[str, str], place: str, ignored: IgnoredFields) -> None:
    """Leave out keywords of a function's schema, or refuse them where the function is strict.

    Args:
        function, place, ignored: as for ``arguments_schema``.
        left_out: the reason for each keyword, by its place in the schema.

    Raises:
        ApiError: there are such keywords, and the function is strict.
    """
    if function.strict and left_out:
        message = (
            f"{place}: the tool {function.name!r} is strict, and what its schema says in {_listed(left_out)} cannot "
            f"be enforced; leave it out, or leave strict out"
        )
        raise ApiError(400, message, "invalid_value", place)
    for path in left_out:
        ignored.add(f"{place}.{path}")


def check_own_grammar(own: OwnGrammar) -> None:
    """Check the grammar that a request has of its own.

    Raises:
        ApiError: it cannot be enforced.
    """
    schema = json.loads(own.grammar.text) if own.is_json else None
    if isinstance(schema, dict):
        check_schema(schema, own.field)
    elif (reason := grammar_error(own.grammar)) is not None:
        raise ApiError(400, f"{own.field}: the grammar cannot be used: {reason}", "invalid_value", own.field)


def check_schema(schema: dict[str, Any], place: str, instead: str = "leave it out") -> None:
    """Check a schema that the answer must follow in all it says.

    Args:
        schema: of the answer.
        place: of the schema in the request, such as ``response_format.schema``.
        instead: what a client can do about a keyword.

    Raises:
        ApiError: it has keywords that cannot be enforced.
    """
    _, left_out = relax(schema)
    if left_out:
        message = f"{place}: what the schema says in {_listed(left_out)} cannot be enforced; {instead}"
        raise ApiError(400, message, "invalid_value", place)


def _listed(left_out: dict[str, str]) -> str:
    """The keywords with the reasons, for a message."""
    return f"{', '.join(f'{path} ({reason})' for path, reason in left_out.items()):.500}"


def relax(schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A schema without what cannot be enforced, and the reason for each keyword that was left out."""
    try:
        # The grammar library takes references without an end, and stops in the middle of an answer that follows one.
        finite, endless = cut_endless_references(schema)
        relaxer = _Relaxer(finite)
        relaxed = relaxer.relax(finite, ())
        return relaxed, {**{".".join(path): ENDLESS for path in endless}, **relaxer.left_out}
    except (TooManyStepsError, _TooManyChecksError, RecursionError):
        kind = {"type": schema["type"]} if schema.get("type") == "object" else {}
        return kind, {"properties": "the schema is too large to find what cannot be enforced"}


def _relax_arguments(schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same for the schema of arguments, which are always an object."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        return ANY_OBJECT, {"type": f"arguments are an object, not {kind!r:.40}"}
    return relax({**ANY_OBJECT, **{key: value for key, value in schema.items() if key != "type"}})


class _TooManyChecksError(Exception):
    pass


class _Relaxer:
    """Finds the keywords of a schema that cannot be enforced, the deepest first, and leaves them out.

    Attributes:
        left_out: the reason for each of them, by its place.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self.left_out: dict[str, str] = {}
        self._root = root
        self._checked = 0

    def relax(self, schema: Any, path: tuple[str, ...]) -> Any:
        """The schema at this place, without what cannot be enforced."""
        if not isinstance(schema, dict) or self._error(schema, path) is None:
            return schema
        # With its parts put right it is either right itself, or has wrong keywords of its own.
        whole = dict(schema)
        # References see what has been put right already.
        self._root = self._root if path else whole
        for keys, part in list(parts(schema)):
            _put(whole, keys, self.relax(part, (*path, *keys)))
        if self._error(whole, path) is None:
            return whole
        kept: dict[str, Any] = {}
        for key, value in whole.items():
            reason = self._error({**kept, key: value}, path)
            # One of several that may overlap is at least any of them.
            if reason is None:
                kept[key] = value
                continue
            self.left_out[".".join((*path, key))] = reason
            # What fits exactly one of several fits at least one of them.
            if key == "oneOf" and "anyOf" not in whole and self._error({**kept, "anyOf": value}, path) is None:
                kept["anyOf"] = value
        return kept

    def _error(self, schema: dict[str, Any], path: tuple[str, ...]) -> str | None:
        # A part is checked beside the whole, which its references point into.
        text = json.dumps(schema if not path else {"root": moved(self._root), **moved(schema)})
        self._checked += len(text)
        # The first check of all is always made.
        if self._checked > max(MAX_CHECKED, len(text)):
            raise _TooManyChecksError
        return grammar_error(Grammar("json_schema", text))


def _put(schema: dict[str, Any], keys: tuple[str, ...], part: Any) -> None:
    if len(keys) == 1:
        schema[keys[0]] = part
        return
    # A copy of the container: the client's schema stays as it is.
    container = schema[keys[0]]
    if isinstance(container, list):
        at = int(keys[1])
        schema[keys[0]] = [*container[:at], part, *container[at + 1 :]]
    else:
        schema[keys[0]] = {**container, keys[1]: part}


def moved(value: Any) -> Any:
    """The same schema, with references for a document that has it under "root"."""
    if isinstance(value, list):
        return [moved(one) for one in value]
    if not isinstance(value, dict):
        return value
    new = {key: moved(one) for key, one in value.items()}
    if isinstance(reference := value.get("$ref"), str) and reference.startswith("#"):
        new["$ref"] = "#/root" + reference[1:]
    return new


def grammar_error(grammar: Grammar) -> str | None:
    """The reason why a grammar cannot be enforced, None where it can be."""
    try:
        from llguidance import LLMatcher
    except ImportError:  # the engine says so, and what to install
        return None
    make = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }[grammar.kind]
    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(make(grammar.text))
    except ValueError as error:
        return _first_line(str(error))
    return _first_line(messages[0]) if failed else None


def _first_line(text: str) -> str:
    # Errors in regular expressions are a drawing, whose last line says what is wrong.
    lines = [line for line in text.partition("\n<state>")[0].splitlines() if line.strip()] or [text]
    drawn = [line for line in lines if line.startswith("error: ")]
    return (drawn[0].removeprefix("error: ") if drawn and "regex parse error" in lines[0] else lines[0])[:200]
