"""Chat templates of a GGUF file: ``tokenizer.chat_template``, and named ones in ``tokenizer.chat_template.NAME``."""

from collections.abc import Mapping
from typing import Any

from jllm_convert.sources.gguf.vocabulary import ADVICE

KEY = "tokenizer.chat_template"


def is_template_key(key: str) -> bool:
    """Whether a key of the metadata holds a chat template."""
    return key == KEY or key.startswith(f"{KEY}.")


def read_chat_templates(metadata: Mapping[str, Any], problems: list[str]) -> str | list[dict[str, str]] | None:
    """Read the chat templates, as a tokenizer_config.json has them under ``chat_template``.

    Returns:
        A text where there is the default template alone, a list of named ones where there are more, None without any.
    """
    templates: dict[str, str] = {}
    # The key without a name comes last: it is that of the default one, whatever else has that name.
    for key in sorted(filter(is_template_key, metadata), key=lambda key: key == KEY):
        template = metadata[key]
        if isinstance(template, str):
            templates["default" if key == KEY else key.removeprefix(f"{KEY}.")] = template
        elif template is not None:
            problems.append(f"{key}: expected text, got {type(template).__name__}. {ADVICE}")
    if templates.keys() <= {"default"}:
        return templates.get("default")
    return [{"name": name, "template": template} for name, template in templates.items()]
