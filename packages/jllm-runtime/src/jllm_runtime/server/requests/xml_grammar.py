"""Grammar of XML tool calls: a function's parameters in the order of its schema, each with the values that it takes.

Values are bare texts there, and not JSON. A parameter that takes only numbers, objects and the like has JSON of its
schema; a text is free up to its closing tag. Where both are taken, no text reads as JSON of the other types, so that
the parser finds in a value what the grammar has meant by it: a text then does not begin as an object, a list or a
number does.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jllm_runtime.grammar import Grammar
from jllm_runtime.server.parsing.argument_types import (
    ANNOTATIONS,
    READINGS,
    alternatives,
    kind_of,
    kinds_of,
    read_value,
)
from jllm_runtime.server.parsing.xml_call import (
    FUNCTION_END,
    FUNCTION_START,
    MAX_NAME,
    PARAMETER_END,
    PARAMETER_START,
    parameter_schema,
)
from jllm_runtime.server.requests.tool_schemas import grammar_error, moved

MAX_REPEATED = 2**20
"""Most characters of schemas that are written more than once, since several parameters refer to them."""

CANNOT_SAY = "this model writes calls as XML, of which a grammar cannot say it"
TOO_LARGE = "what the parameters refer to is too large to be written for each of them"

_OF_ALL = (
    *("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedProperties", "if", "then", "else", "not", "enum", "const"),
)
_OF_TEXTS = ("contentEncoding", "contentMediaType", "contentSchema", "not", "if", "then", "else")
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3})",
}
_SPACE = r"[ \t\r\n]*"
_ENDED = rf"(?s:.*)(\n<\/parameter>(\n(?s:.*))?|<\/parameter>{_SPACE}(<parameter=|<\/function>)(?s:.*))"
"""Texts with an end of a value in them."""

_FIXED = {"null": ["null"], "boolean": ["true", "false"]}
_FIRST = {"integer": "0-9-", "number": "0-9-", "object": "{", "array": r"\["}
"""Characters that values of these types begin with."""


class XMLFunctionWriter:
    """Writer of the rules of one function.

    Attributes:
        left_out: the reason for each keyword of the schema that the grammar does not hold, by its place.

    Args:
        schema: of the arguments; what of it JSON could not hold has been left out already.
        add_rule: adds a rule by its beginning ("value", "TEXT[...]") and its body; its name.
        add_json: adds a rule for JSON of a schema; its name.
    """

    def __init__(
        self, schema: dict[str, Any], add_rule: Callable[[str, str], str], add_json: Callable[[Any], str]
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._root = schema
        self._root_text = json.dumps(schema)
        self._repeated = 0
        self._add_rule = add_rule
        self._add_json = add_json

    def call(self, name: str) -> str:
        """The body of a rule for calls of the function."""
        bodies = [self._parameters(each) for each in alternatives(self._root, self._root, self._report(()))]
        opening, closing = _quoted(f"{FUNCTION_START}{name}>\n"), _quoted(FUNCTION_END)
        return " | ".join(f"{opening} {body} {closing}" for body in bodies)

    def _parameters(self, schema: dict[str, Any]) -> str:
        for key in schema.keys() & set(_OF_ALL):
            self.left_out[key] = CANNOT_SAY
        properties = schema["properties"] if isinstance(schema.get("properties"), dict) else {}
        required = [key for key in schema.get("required", []) if isinstance(key, str)]
        parts = []
        for key in dict.fromkeys([*properties, *required]):
            if not key or not key.isprintable() or re.search("[<>]", key) or len(key) > MAX_NAME:
                self.left_out[f"properties.{key:.80}"] = "the name cannot stand in a tag"
            elif (value := self._value(parameter_schema(schema, key), ("properties", key))) is not None:
                tag = _quoted(f"{PARAMETER_START}{key}>\n")
                parts.append(f"({tag} {value}){'' if key in required else '?'}")
        # A schema that names none has others for its arguments. Beside names it may do without.
        others = schema.get("additionalProperties", True)
        if not parts and (value := self._value(others, ("additionalProperties",))) is not None:
            parts.append(f"({_quoted(PARAMETER_START)} /[a-zA-Z_][a-zA-Z0-9_.-]*>\\n/ {value})*")
        return " ".join(parts)

    def _value(self, schema: Any, path: tuple[str, ...]) -> str | None:
        """The name of a rule for a value and its closing tag; None where there is no value."""
        kinds = kinds_of(schema, self._root)
        cases = [(each, kinds_of(each, self._root)) for each in alternatives(schema, self._root, self._report(path))]
        listed = [each for each, _ in cases if "const" in each or "enum" in each]
        texts = [each for each, own in cases if each not in listed and (not own or "string" in own)]
        # Where any text may come, it may read as a value of another type that may be anything, too.
        free = any(not _limits(each) for each in texts)
        found: list[str] = []
        without: set[str] = set()
        for each, own in cases:
            # Where one case does not say its type, every value is read as a text.
            own &= kinds
            # Nothing but a list of values says more of these.
            fixed = own & _FIXED.keys() if texts else frozenset()
            others = own - fixed - {"string"}
            if each in listed:
                found += self._literals(each, kinds, path)
                without |= {READINGS[kind] for kind in own - {"string"}}
            elif not free:
                found += [_ended(value) for kind in sorted(fixed) for value in _FIXED[kind]]
                without |= {READINGS[kind] for kind in fixed}
            if each not in listed and others and not (free and each.keys() <= {"type", *ANNOTATIONS}):
                found.append(f"{self._json({**each, 'type': sorted(others)}, path)} {_CLOSING}")
                without |= {f"[{_FIRST[kind]}](?s:.*)" for kind in others & _FIRST.keys()}
        found += [self._text(each, sorted(without), path) for each in texts]
        return self._add_rule("value", " | ".join(dict.fromkeys(found))) if found else None

    def _literals(self, schema: dict[str, Any], kinds: frozenset[str], path: tuple[str, ...]) -> list[str]:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        for key in schema.keys() - {"type", "enum", "const", *ANNOTATIONS}:
            self.left_out[".".join((*path, key))] = "it is beside a list of values"
        named = schema.get("type")
        types = {named} if isinstance(named, str) else set(named) if isinstance(named, list) else None
        found = []
        for value in values:
            kind = kind_of(value)
            if types is not None and kind not in types and not (kind == "integer" and "number" in types):
                continue
            text = value if kind == "string" else json.dumps(value, ensure_ascii=False)
            # What the parser would take for something else.
            if json.loads(read_value(text, kinds) or '""') != value or re.fullmatch(_ENDED, text):
                self.left_out[".".join((*path, "enum"))] = f"{text!r:.40} stands for another value in XML"
                continue
            found.append(_ended(text))
        return found

    def _json(self, schema: dict[str, Any], path: tuple[str, ...]) -> str:
        """The name of a rule for JSON of a schema, with what it refers to."""
        if '"$ref"' not in json.dumps(schema):
            return self._add_json(schema)
        self._repeated += len(self._root_text)
        if self._repeated > max(MAX_REPEATED, len(self._root_text)):
            self.left_out[".".join(path)] = TOO_LARGE
            return self._add_json({"type": schema["type"]})
        return self._add_json({"root": moved(self._root), **moved(schema)})

    def _text(self, schema: dict[str, Any], without: list[str], path: tuple[str, ...]) -> str:
        """The name of a rule for a bare text and its closing tag.

        Args:
            schema: of texts.
            without: texts that it is not, white space around them aside.
            path: the schema's place.
        """
        unknown = {"format"} if schema.get("format") not in _FORMATS else set()
        for key in schema.keys() & {*_OF_TEXTS, *unknown}:
            self.left_out[".".join((*path, key))] = CANNOT_SAY
        body = f"/(?s:.*)/ & ~/{_ENDED}/"
        body += f" & ~/{_SPACE}({'|'.join(without)}){_SPACE}/" if without else ""
        for keys, expression in _limits(schema):
            if (reason := grammar_error(Grammar.lark(f"start: A\nA: {body} & {expression}"))) is None:
                body += f" & {expression}"
            else:
                self.left_out |= {".".join((*path, key)): reason for key in keys}
        return self._add_rule(f"text[suffix={_CLOSING}]", self._add_rule("TEXT", body))

    def _report(self, path: tuple[str, ...]) -> Callable[[str, str], None]:
        """Takes a keyword of the schema at this place that does not hold, with the reason."""

        def report(key: str, reason: str) -> None:
            self.left_out[".".join((*path, key))] = reason

        return report


def _limits(schema: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Regular expressions of the limits of a text, each with its keywords."""
    found: list[tuple[tuple[str, ...], str]] = []
    lengths = tuple(key for key in ("minLength", "maxLength") if isinstance(schema.get(key), int | float))
    if lengths:
        most = int(schema["maxLength"]) if "maxLength" in lengths else ""
        found.append((lengths, f"/(?s:.{{{int(schema.get('minLength', 0))},{most}}})/"))
    if (expression := _FORMATS.get(str(schema.get("format")))) is not None:
        found.append((("format",), f"/{expression}/"))
    if isinstance(pattern := schema.get("pattern"), str):
        found.append((("pattern",), f"/{_searched(pattern)}/"))
    return found


def _searched(pattern: str) -> str:
    """A regular expression of the texts in which a pattern is found, as JSON Schema wants it, without anchors."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    while (inner := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = inner
    before, after = "(?s:.*)", "(?s:.*)"
    # Of a choice each part has anchors of its own; these stay, and the library refuses them.
    if "|" not in bare:
        if pattern.startswith("^"):
            pattern, before = pattern[1:], ""
        if bare.endswith("$"):
            pattern, after = pattern[:-1], ""
    inside = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return f"{before}({inside}){after}".replace("\n", "\\n")


def _ended(text: str) -> str:
    """A value with its closing tag, so that no other value is its beginning."""
    return _quoted(f"{text}\n{PARAMETER_END}\n")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_CLOSING = json.dumps(f"\n{PARAMETER_END}\n")
