"""Ignored fields of a request: what changes nothing is taken out of its body, and named in a header of the response."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from fastapi import Request

from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.field_rules import INNER, REQUESTS, TOOL, FieldRules, Only

HEADER = "X-JLLM-Ignored"
MAX_HEADER = 2000
"""Most characters of the header. Proxies refuse responses whose headers are large."""


class IgnoredFields:
    """The parts of one request that changed nothing, for the header that names them."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """Add one, such as ``tools[0].function.parameters.not``."""
        self._names[name] = None

    def header(self) -> str | None:
        """The header's value, None where nothing was ignored."""
        # A schema's property may have any name, a header only ASCII.
        text = ", ".join(quote(name, safe="[].$/@:~!'()*+") for name in self._names)
        if len(text) <= MAX_HEADER:
            return text or None
        return text[:MAX_HEADER].rpartition(", ")[0] + ", ..."


def get_ignored(request: Request) -> IgnoredFields:
    """FastAPI dependency: the ignored parts of this request."""
    ignored: IgnoredFields = request.state.ignored
    return ignored


def take_out(body: Any, path: str, ignored: IgnoredFields) -> None:
    """Take the fields out of a body, in place, that change nothing, and give others the name that they have here.

    Args:
        body: of a request.
        path: the endpoint.
        ignored: is told of each field that asks for something. One that asks for what happens anyway is not told.

    Raises:
        ApiError: a field that would change the output, and that this server does not have.
    """
    for prefix, fields, rules in _objects(body, path):
        for name in [name for name, value in fields.items() if value is not None]:
            full = prefix + name
            if rules.is_ignored(name):
                del fields[name]
                ignored.add(full)
            elif name in rules.only:
                _check_only(full, fields[name], rules.only[name], fields)
                del fields[name]
            elif name in rules.renamed:
                new = rules.renamed[name]
                if fields.get(new) is not None:
                    message = f"{full} and {prefix}{new} are two names of one thing; give one of them"
                    raise ApiError(400, message, "invalid_value", full)
                fields[new] = fields.pop(name)


def _check_only(name: str, value: Any, rule: Only, fields: dict[str, Any]) -> None:
    # True is not 1 here.
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in rule.values):
        return
    if rule.matters_with and not any(fields.get(other) for other in rule.matters_with):
        return
    if not rule.values:
        raise ApiError(400, f"there is no parameter {name}: {rule.instead}", "unknown_parameter", name)
    expected = " or ".join(repr(one) for one in rule.values)
    message = f"{name}: should be {expected}, got {value!r:.80}; {rule.instead}"
    raise ApiError(400, message, "invalid_value", name)


def _objects(body: Any, path: str) -> Iterator[tuple[str, dict[str, Any], FieldRules]]:
    """The objects of a body that have rules, each with the beginning of its fields' names."""
    if not isinstance(body, dict) or path not in REQUESTS:
        return
    yield "", body, REQUESTS[path]
    for name, rules in INNER.items():
        if isinstance(inner := body.get(name), dict):
            yield f"{name}.", inner, rules
    for number, tool in enumerate(tools if isinstance(tools := body.get("tools"), list) else []):
        if isinstance(tool, dict):
            yield f"tools[{number}].", tool, TOOL
            if isinstance(function := tool.get("function"), dict):
                yield f"tools[{number}].function.", function, TOOL
