"""Text model of a config.json: the fields of ``text_config``, and those around it that are about the text.

Models that also read images have one config.json for all of their parts. The text model's own fields are in an object
of it, and some stand outside, or both.
"""

from collections.abc import Mapping
from typing import Any

from jllm_convert.families import family_of
from jllm_convert.sources.huggingface.config_fields import is_without_effect

_INNER = "text_config"
# Of the other parts, whose tensors are left out. That a server should not load them says language_model_only.
_OF_OTHER_PARTS = {"vision_config", "audio_config", "language_model_only"}


def text_fields(fields: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of the text model, as a config.json of it alone would have them.

    What stands outside of ``text_config`` and is about the text belongs to it. Where both places say the same thing in
    different ways, one of two readers would be wrong.

    Args:
        fields: the parsed config.json.
        where: the file's name, for messages.

    Returns:
        The fields, and the problems. Of a config.json that is of a text model alone, or of no known family, the fields
        are its own.
    """
    family, inner = family_of(fields.get("model_type")), fields.get(_INNER)
    if family is None or family.text_model_type is None or _INNER not in fields:
        return dict(fields), []
    if not isinstance(inner, Mapping):
        return dict(fields), [f"{where}: {_INNER} must be an object, got {inner!r}"]
    problems = []
    if fields["model_type"] != family.model_type or inner.get("model_type") not in (None, family.text_model_type):
        problems.append(
            f"{where}: model_type is {fields['model_type']!r} and that of {_INNER} {inner.get('model_type')!r}, "
            f"expected {family.model_type!r} and {family.text_model_type!r}"
        )
    text = {name: value for name, value in inner.items() if name not in family.outer_fields}
    for name, value in fields.items():
        if name in {_INNER, *_OF_OTHER_PARTS} or value is None:
            continue
        own = text.get(name)
        if own is not None and own != value and name != "model_type" and not is_without_effect(name, family):
            problems.append(
                f"{where}: {name} is {value!r} outside of {_INNER} and {own!r} in it; which of the two the weights are "
                "for, the file does not say: remove one of them"
            )
        elif own is None:
            text[name] = value
    return {**text, "model_type": fields["model_type"]}, problems
