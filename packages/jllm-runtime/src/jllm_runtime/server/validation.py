"""From pydantic's list of errors to the one sentence that helps, with the parameter's name."""

from collections.abc import Mapping, Sequence
from typing import Any


def first_error(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str, str | None]:
    """The error to tell: its message, its code, and the parameter as ``messages[0].content``.

    Where a value may be of several kinds, each kind has objected. An objection to more than the type belongs to the
    kind that was meant, and so does the one that lies deepest.
    """
    places = [_place(error, body) for error in errors]
    deepest = max(range(len(errors)), key=lambda at: (not errors[at]["type"].endswith("_type"), len(places[at]), -at))
    error, param = errors[deepest], _spelt(places[deepest]) or None
    if not places[deepest]:
        return "the body must be a JSON object", "invalid_type", None
    if error["type"] == "extra_forbidden":
        return f"there is no parameter {param}", "unknown_parameter", param
    if error["type"] == "missing":
        return f"{param} is missing", "missing_required_parameter", param
    same = [other for other, place in zip(errors, places, strict=True) if place == places[deepest]]
    expected = " or ".join(dict.fromkeys(_expected(other["msg"]) for other in same))
    given = "" if isinstance(error["input"], dict | list) else f", got {error['input']!r:.80}"
    return f"{param}: {expected}{given}", "invalid_value", param


def _expected(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body it is, without the names of kinds that pydantic puts in between."""
    place: list[str | int] = []
    value = body
    steps = error["loc"][1:]
    for number, step in enumerate(steps):
        if (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        ):
            value = value[step]
            place.append(step)
        elif error["type"] == "missing" and number == len(steps) - 1 and isinstance(value, dict):
            place.append(step)
    return place


def _spelt(place: list[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")
