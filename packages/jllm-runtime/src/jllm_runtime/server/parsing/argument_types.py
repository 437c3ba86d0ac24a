"""Types of tool arguments by their JSON schemas, for calls whose values are bare texts and not JSON."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jllm_runtime.special_markers import WHITESPACE

Schema = Mapping[str, Any]

READINGS = {
    "null": r"null|None",
    "boolean": r"[tT]rue|[fF]alse",
    "integer": r"-?(0|[1-9][0-9]*)(\.0+)?",
    "number": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?",
    "object": r"\{(?s:.*)\}",
    "array": r"\[(?s:.*)\]",
}
"""Texts that are read as a value of a type, white space around them aside.

Templates write Python's ``True`` and ``None`` into the history, so that models write them, too."""

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id"}
)
"""Keywords that say nothing of which values are valid."""

BESIDE = "a part of the same schema says it, too"

UNIONS = ("anyOf", "oneOf")
MAX_LOOKS = 1000
"""Most looks at the alternatives of one schema: references and unions may multiply, or have no end."""

_PATTERNS = {kind: re.compile(pattern) for kind, pattern in READINGS.items()}
_KINDS = {"properties": "object", "additionalProperties": "object", "items": "array", "prefixItems": "array"}


Report = Callable[[str, str], None]
"""Takes a keyword that does not hold, and the reason."""


def alternatives(schema: Any, root: Schema, report: Report = lambda *_: None) -> list[dict[str, Any]]:
    """The schemas of which a value follows one, without a reference, a union or an ``allOf`` at their top.

    Args:
        schema: of the value.
        root: the document that references point into.
        report: is told of a keyword beside a union, or a reference, that says it in another way. The latter counts.

    Returns:
        Those; one that takes anything where there are too many, or a reference leads back to itself.
    """
    found: list[dict[str, Any]] = []
    waiting: list[Any] = [schema]
    for _ in range(MAX_LOOKS):
        if not waiting:
            return found
        each = waiting.pop()
        # True takes anything, as an empty schema does. Of false there is no value.
        if each is False:
            continue
        rest, groups = _parted(each if isinstance(each, dict) else {}, root)
        if not groups:
            found.append(rest)
            continue
        # One group is opened at a time. What is said beside it holds for each of its schemas, and so do the others.
        first, *others = groups
        for part in reversed(first):
            if part is not False:
                merged = _merged(rest, part if isinstance(part, dict) else {}, report)
                parts = [*merged.get("allOf", []), *({"anyOf": group} for group in others)]
                waiting.append({**merged, **({"allOf": parts} if parts else {})})
    if waiting:
        report("$ref", "it leads to too many schemas")
    return [{}] if waiting else found


def _merged(schema: dict[str, Any], part: dict[str, Any], report: Report) -> dict[str, Any]:
    """A schema with what a part says that holds as well."""
    merged = {**schema, **part}
    for key in schema.keys() & part.keys():
        mine, other = schema[key], part[key]
        if key == "properties" and isinstance(mine, dict) and isinstance(other, dict):
            merged[key] = {**mine, **other}
            if any(mine[name] != other[name] for name in mine.keys() & other.keys()):
                report(key, BESIDE)
        elif key == "required" and isinstance(mine, list) and isinstance(other, list):
            merged[key] = [*mine, *(name for name in other if name not in mine)]
        elif key not in ANNOTATIONS and mine != other:
            report(key, BESIDE)
    if not isinstance(merged.get("allOf", []), list):
        del merged["allOf"]
    return merged


def _parted(schema: dict[str, Any], root: Schema) -> tuple[dict[str, Any], list[list[Any]]]:
    """A schema without its references, unions and ``allOf``; and of these the groups, of each of which one must fit."""
    groups = [schema[key] for key in UNIONS if isinstance(schema.get(key), list)]
    groups += [[part] for part in (schema["allOf"] if isinstance(schema.get("allOf"), list) else [])]
    if isinstance(reference := schema.get("$ref"), str):
        groups.append([_pointed(reference, root)])
    return {key: value for key, value in schema.items() if key not in (*UNIONS, "allOf", "$ref")}, groups


def kinds_of(schema: Any, root: Schema) -> frozenset[str]:
    """The types of the values that a schema takes; none where it does not say."""
    found = [_kinds(each) for each in alternatives(schema, root)]
    # One that takes anything says as much as no schema.
    return frozenset().union(*found) if all(found) else frozenset()


def _kinds(schema: Schema) -> set[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        return {kind_of(value) for value in values}
    named = schema.get("type")
    if named is None:
        return {kind for key, kind in _KINDS.items() if key in schema}
    names = [each for each in (named if isinstance(named, list) else [named]) if isinstance(each, str)]
    return {each for each in names if each == "string" or each in READINGS}


def kind_of(value: Any) -> str:
    """The type of a JSON value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number" if isinstance(value, float) else "integer"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def read_value(text: str, kinds: frozenset[str]) -> str | None:
    """The JSON of an argument that a model has written as a bare text; None for no argument.

    A text is what it is where the schema takes nothing else. Otherwise what reads as another type that the schema takes
    is of that type. Where no text is taken, any JSON is read as it is, for the client to judge, and an empty text is no
    argument: models write it for those that they leave out (https://github.com/sgl-project/sglang/pull/36835).

    Args:
        text: the argument.
        kinds: of ``kinds_of``.
    """
    bare = text.strip(WHITESPACE)
    for kind, pattern in _PATTERNS.items():
        if kind in kinds and pattern.fullmatch(bare):
            if kind in ("null", "boolean"):
                return "null" if kind == "null" else bare.lower()
            if (value := _json(bare)) is not None:
                return value
    if kinds and "string" not in kinds:
        if not bare:
            return "null" if "null" in kinds else None
        if _PATTERNS["null"].fullmatch(bare):
            return "null"
        if (value := _json(bare)) is not None:
            return value
    return json.dumps(text, ensure_ascii=False)


def begun_value(text: str, kinds: frozenset[str]) -> str | None:
    """The beginning of the JSON of an argument that is cut off; None where it is not known what it becomes.

    Args:
        text: the argument so far.
        kinds: as for ``read_value``.
    """
    if kinds <= {"string"}:
        return json.dumps(text, ensure_ascii=False)[:-1]
    return None if "string" in kinds else text.lstrip(WHITESPACE)


def _json(text: str) -> str | None:
    """The text of a JSON value, as it is where that is valid; None where it is none."""
    try:
        value = _DECODER.decode(text)
        try:
            json.loads(text)
        except ValueError:  # line breaks in strings, which strict=False forgives
            return json.dumps(value, ensure_ascii=False)
        return text
    except (ValueError, RecursionError):
        return None


def _pointed(reference: str, root: Schema) -> Any:
    """The schema that a reference into the same document names; one that takes anything where it names none."""
    value: Any = root
    for key in reference.removeprefix("#").split("/")[1:]:
        value = value.get(key.replace("~1", "/").replace("~0", "~"), True) if isinstance(value, dict) else True
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)
