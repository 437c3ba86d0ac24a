"""References of a JSON schema without an end: no finite value follows them."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")

MAX_STEPS = 500_000
"""Most looks at schemas while references are followed: about a second."""

Path = tuple[str, ...]
Kind = Literal["object", "array", "other"]
KINDS: tuple[Kind, ...] = ("object", "array", "other")


class TooManyStepsError(Exception):
    """The schema is too large to follow its references."""


def cut_endless_references(schema: dict[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """A schema without the references that have no end, and where they were.

    Those that must be followed to come back to themselves are meant: ``{"properties": {"next": {"$ref": "#"}},
    "required": ["next"]}``. Of each such circle one reference is left out, the last that a reader meets.

    Raises:
        TooManyStepsError: it is too large for that.
    """
    found: list[Path] = []
    if '"$ref"' not in json.dumps(schema):
        return schema, found
    schema = copy.deepcopy(schema)  # the client's own stays as it is
    steps = 0
    while True:
        graph = _Graph(schema, steps)
        endless = graph.last_endless_reference()
        if endless is None:
            return schema, found
        del endless.schema["$ref"]
        found.append((*endless.path, "$ref"))
        steps = graph.steps


def parts(schema: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The schemas right inside of one, each with the keys that lead to it. Definitions come first: others need them."""
    for key, value in sorted(schema.items(), key=lambda item: item[0] not in ("$defs", "definitions")):
        if key in MAPS and isinstance(value, dict):
            yield from (((key, name), part) for name, part in value.items())
        elif key in LISTS and isinstance(value, list):
            yield from (((key, str(number)), part) for number, part in enumerate(value))
        elif key in ("items", "additionalProperties", "additionalItems"):
            yield (key,), value


@dataclass(eq=False)
class _Node:
    """A schema that is an object, and what is known of it.

    Attributes:
        schema: the object.
        path: the keys that lead to it.
        target: the schema that it refers to.
        parts: the schemas inside of it, without definitions, by their keys.
        ends: the kinds of which a finite value follows it.
    """

    schema: dict[str, Any]
    path: Path
    target: "_Node | None" = None
    parts: "dict[Path, _Node]" = field(default_factory=dict)
    ends: set[Kind] = field(default_factory=set)

    def among(self, key: str) -> "dict[str, _Node]":
        """The parts under this key."""
        return {path[1]: part for path, part in self.parts.items() if path[0] == key and len(path) == 2}


class _Graph:
    """The schemas that a root leads to, and which of them have a finite value.

    Anything but an object has one here: what is wrong with ``false``, the grammar library says itself.
    """

    def __init__(self, root: dict[str, Any], steps: int) -> None:
        self.steps = steps
        self._nodes: dict[int, _Node] = {}
        # No recursion: references may lead through thousands of schemas.
        self._node(root, ())
        for node in (waiting := list(self._nodes.values())):
            for keys, part in parts(node.schema):
                if isinstance(part, dict) and keys[0] not in ("$defs", "definitions"):
                    known = id(part) in self._nodes
                    node.parts[keys] = self._node(part, (*node.path, *keys))
                    waiting += [] if known else [node.parts[keys]]
            path = _pointed(node.schema.get("$ref"))
            if path is not None and isinstance(target := _at(root, path), dict):
                known = id(target) in self._nodes
                node.target = self._node(target, path)
                waiting += [] if known else [node.target]
        self._find_ends()

    def last_endless_reference(self) -> _Node | None:
        """The last schema with a reference that leads back to it through schemas without a finite value."""
        for node in reversed(self._nodes.values()):
            if node.target is not None and not node.ends and self._leads_to(node.target, node):
                return node
        return None

    def _node(self, schema: dict[str, Any], path: Path) -> _Node:
        self._step()
        return self._nodes.setdefault(id(schema), _Node(schema, path))

    def _step(self, node: _Node | None = None) -> None:
        self.steps += 1 if node is None else 1 + len(node.parts)
        if self.steps > MAX_STEPS:
            raise TooManyStepsError

    def _leads_to(self, start: _Node, end: _Node) -> bool:
        seen, waiting = {start}, [start]
        while waiting:
            node = waiting.pop()
            self._step(node)
            if node is end:
                return True
            inside = [*node.parts.values(), *([node.target] if node.target else [])]
            new = {part for part in inside if not part.ends} - seen
            seen |= new
            waiting += new
        return False

    def _find_ends(self) -> None:
        """The least fixed point: what ends by itself, then what ends with the help of that, and so on."""
        # From the inside out, so that one round is enough where there is no circle.
        inside_out, changed = list(reversed(self._nodes.values())), True
        while changed:
            changed = False
            for node in inside_out:
                if len(node.ends) == len(KINDS):
                    continue
                self._step(node)
                new = {kind for kind in KINDS if kind not in node.ends and self._ends(node, kind)}
                node.ends |= new
                changed = changed or bool(new)

    def _ends(self, node: _Node, kind: Kind) -> bool:
        """Whether a finite value of this kind follows the schema, by what is known so far."""
        schema = node.schema
        if (kinds := _kinds(schema)) is not None and kind not in kinds:
            return False
        if node.target is not None and kind not in node.target.ends:
            return False
        if any(kind not in part.ends for part in node.among("allOf").values()):
            return False
        for key in ("anyOf", "oneOf"):
            choices = node.among(key)
            # One that is no object is true, or the library's matter.
            if choices and len(choices) == len(schema[key]) and all(kind not in each.ends for each in choices.values()):
                return False
        if "enum" in schema or "const" in schema or kind == "other":
            return True
        return self._object_ends(node) if kind == "object" else self._array_ends(node)

    def _object_ends(self, node: _Node) -> bool:
        together = self._together(node)
        required = {name for each in together for name in _texts(each.schema.get("required"))}
        for each in together:
            properties, others = each.among("properties"), self._others(each)
            named = each.schema.get("properties")
            names = set(named) if isinstance(named, dict) else set()
            if any(not properties[name].ends for name in required & set(properties)):
                return False
            if others is not None and required - names and not any(other.ends for other in others):
                return False
            if _least(each.schema, "minProperties") and others is not None:
                inside = [*properties.values(), *others]
                if len(properties) == len(names) and inside and not any(part.ends for part in inside):
                    return False
        return True

    def _others(self, node: _Node) -> list[_Node] | None:
        """The schemas of properties that are not named, None where one of those may be anything."""
        patterns = list(node.among("patternProperties").values())
        rest = node.schema.get("additionalProperties", True)
        if rest is False:
            return patterns or None
        return [*patterns, node.parts[("additionalProperties",)]] if isinstance(rest, dict) else None

    def _array_ends(self, node: _Node) -> bool:
        least, first = _least(node.schema, "minItems"), node.among("prefixItems")
        if any(not part.ends for number, part in first.items() if int(number) < least):
            return False
        items, prefix = node.parts.get(("items",)), node.schema.get("prefixItems")
        return items is None or bool(items.ends) or least <= (len(prefix) if isinstance(prefix, list) else 0)

    def _together(self, node: _Node) -> list[_Node]:
        """The schemas that a value of this one must follow as well, with this one."""
        together = {node: None}
        for one in (waiting := [node]):
            self._step(one)
            inside = [*one.among("allOf").values(), *([one.target] if one.target else [])]
            new = dict.fromkeys(part for part in inside if part not in together)
            together |= new
            waiting += new
        return list(together)


def _kinds(schema: dict[str, Any]) -> set[Kind] | None:
    """The kinds of the values that a schema names; None for all."""
    if isinstance(values := [schema["const"]] if "const" in schema else schema.get("enum"), list) and values:
        return {"object" if isinstance(one, dict) else "array" if isinstance(one, list) else "other" for one in values}
    names = schema.get("type")
    names = [names] if isinstance(names, str) else _texts(names)
    return {"object" if name == "object" else "array" if name == "array" else "other" for name in names} or None


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _least(schema: dict[str, Any], key: str) -> float:
    value = schema.get(key)
    return value if isinstance(value, int | float) and value > 0 else 0


def _pointed(reference: Any) -> Path | None:
    """The keys that a reference into the same document names, None for another."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    return tuple(unquote(key).replace("~1", "/").replace("~0", "~") for key in reference.split("/")[1:])


def _at(root: dict[str, Any], path: Path) -> Any:
    value: Any = root
    for key in path:
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return None
    return value
