"""Ignored fields of a request: what changes nothing is taken out of its body, and named in a header of the response."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from fastapi import Request
from starlette.types import Scope

from jllm_runtime.sampling import SamplingParams
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.field_rules import INNER, REQUESTS, TOOL, FieldRules, Only

HEADER = "X-JLLM-Ignored"
MAX_HEADER = 2000
"""Most characters of the header. Proxies refuse responses whose headers are large."""

OFF = SamplingParams()
"""Sampling parameters that are all off."""


class IgnoredFields:
    """The parts of one request that changed nothing, for the header that names them.

    Attributes:
        sent: names as the client sent them, by the names that the fields have here.
    """

    def __init__(self) -> None:
        self.sent: dict[str, str] = {}
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """Add one, such as ``tools[0].function.parameters.not``."""
        self._names[self.as_sent(name)] = None

    def as_sent(self, text: str) -> str:
        """A field's path, or an error's message, with the names that the client sent."""
        for name, sent in self.sent.items():
            # Only where messages name fields of the request: elsewhere it may be a variable of a template, and "n" and
            # "stop" are words of a sentence.
            text = re.sub(rf"(\A|(?<= and )|(?<=at most )){name}(?!\w)", sent, text)
        return text

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


def as_sent(error: ApiError, scope: Scope) -> ApiError:
    """An error of a request, with the names that its client sent.

    Args:
        error: names the fields as they are called here.
        scope: ASGI's, of the request.
    """
    ignored: IgnoredFields | None = scope.get("state", {}).get("ignored")
    if ignored is None or not ignored.sent:
        return error
    param = error.param and ignored.as_sent(error.param)
    return ApiError(error.status_code, ignored.as_sent(error.message), error.code, param, error.headers)


def take_out(body: Any, path: str, ignored: IgnoredFields, defaults: SamplingParams = OFF) -> None:
    """Take the fields out of a body, in place, that change nothing, and give others the name that they have here.

    Args:
        body: of a request.
        path: the endpoint.
        ignored: is told of each field that asks for something. One that asks for what happens anyway is not told.
        defaults: sampling parameters where the body has none.

    Raises:
        ApiError: a field that would change the output, and that this server does not have.
    """
    for prefix, fields, rules in _objects(body, path):
        names = [name for name, value in fields.items() if value is not None]
        # Last those that depend on others, which may have been said by another name.
        for name in sorted(names, key=lambda name: name in rules.only and bool(rules.only[name].matters_with)):
            full = prefix + name
            if rules.is_ignored(name):
                del fields[name]
                ignored.add(full)
            elif name in rules.only:
                _take_only(full, rules.only[name], fields, name, ignored, defaults)
            elif name in rules.renamed:
                is_text = isinstance(fields[name], str)
                new = rules.renamed_texts.get(name, rules.renamed[name]) if is_text else rules.renamed[name]
                if fields.get(new) is not None:
                    message = f"{full} and {prefix}{new} are two names of one thing; give one of them"
                    raise ApiError(400, message, "invalid_value", full)
                fields[new] = fields.pop(name)
                ignored.sent[new] = name


def _take_only(
    full: str, rule: Only, fields: dict[str, Any], name: str, ignored: IgnoredFields, defaults: SamplingParams
) -> None:
    value = fields.pop(name)
    if any(_same(value, one) for one in rule.values):
        return
    for one, others in rule.stands_for:
        if _same(value, one):
            _set(full, value, others, fields)
            return
    if rule.matters_with and all(_is_off(other, fields, defaults) for other in rule.matters_with):
        ignored.add(full)
        return
    taken = [*rule.values, *(one for one, _ in rule.stands_for)]
    if not taken:
        raise ApiError(400, f"there is no parameter {full}: {rule.instead}", "unknown_parameter", full)
    expected = " or ".join(repr(one) for one in taken)
    raise ApiError(400, f"{full}: should be {expected}, got {value!r:.80}; {rule.instead}", "invalid_value", full)


def _set(full: str, value: Any, others: Mapping[str, Any], fields: dict[str, Any]) -> None:
    """Give the fields that a value stands for."""
    for other, wanted in others.items():
        given = fields.setdefault(other, wanted)
        if given is None:
            fields[other] = wanted
        elif not _same(given, wanted):
            message = f"{full}: {value!r} and {other}: {given!r:.80} contradict each other; leave one of them out"
            raise ApiError(400, message, "invalid_value", full)


def _is_off(name: str, fields: dict[str, Any], defaults: SamplingParams) -> bool:
    value = fields.get(name)
    return _same(getattr(defaults, name) if value is None else value, getattr(OFF, name))


def _same(value: Any, other: Any) -> bool:
    # True is not 1 here.
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


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
