"""JSON objects without two values for one name, which readers of JSON understand in different ways."""

from typing import Any


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for the ``object_pairs_hook`` of ``json``.

    Raises:
        ValueError: a name stands in it twice. Python's json would take the last value, others the first.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:100]!r} stands twice in one object")
            seen.add(name)
    return fields
