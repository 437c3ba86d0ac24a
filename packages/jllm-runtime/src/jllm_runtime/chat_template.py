"""Chat templates: rendering in Jinja's sandbox, as transformers' ``apply_chat_template`` does it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jllm_runtime.errors import RequestError

RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"}
)
"""Variables of templates that nobody sets by name: the conversation, the tools and the tokenizer do."""


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a conversation, up to where the assistant's message begins.

    The template comes with the model, from strangers, and so runs in a sandbox.

    Args:
        template: Jinja source.
        messages: ``{"role": "user", "content": "..."}`` and so on.
        variables: more variables of the template.

    Raises:
        RequestError: the template cannot be read, or refuses the messages.
    """
    from jllm_runtime.template_sandbox import render_template  # here, as it needs Jinja

    # The variables that transformers always passes, so that `tools is none` means the same here.
    always = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return render_template(template, {**always, **variables})
    except Exception as error:  # the template is a program: it can fail in every way
        raise RequestError(f"the model's chat template does not take this conversation: {error}") from error


@lru_cache(maxsize=16)
def find_variables(template: str) -> frozenset[str]:
    """Names of the variables that a template reads; none for one that cannot be parsed, which ``render`` reports."""
    from jinja2 import TemplateError

    from jllm_runtime.template_sandbox import names_read

    try:
        return frozenset(names_read(template))
    except (TemplateError, RecursionError, ValueError):  # the last, of a number with too many digits
        return frozenset()


def settable_variables(template: str) -> list[str]:
    """Names of the variables that a caller may set, such as ``enable_thinking``."""
    return sorted(find_variables(template) - RESERVED_VARIABLES)


def check_variables(template: str, names: Iterable[str]) -> None:
    """Refuse variables that a template does not read, which would have no effect.

    Raises:
        RequestError: there is one.
    """
    settable = settable_variables(template)
    for name in names:
        if name not in settable:
            # The one variable that has options of its own.
            advice = "; leave out --think and --no-think" if name == "enable_thinking" else ""
            known = ", ".join(settable) or "none that can be set"
            raise RequestError(f"the model's chat template has no variable {name!r:.80}; it has {known}{advice}")
