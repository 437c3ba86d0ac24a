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
    for key, template in metadata.items():
        if not is_template_key(key) or template is None:
            continue
        if isinstance(template, str):
            templates[key.removeprefix(f"{KEY}.") if key != KEY else "default"] = template
        else:
            problems.append(f"{key}: expected text, got {type(template).__name__}. {ADVICE}")
    if templates.keys() <= {"default"}:
        return templates.get("default")
    return [{"name": name, "template": template} for name, template in templates.items()]
