"""Chat template variables of a request: ``chat_template_kwargs``, and how much the model thinks."""

from collections.abc import Callable, Collection
from typing import Any

from jllm_runtime.chat_template import RESERVED_VARIABLES
from jllm_runtime.server.errors import ApiError
from jllm_runtime.server.requests.ignored_fields import IgnoredFields
from jllm_runtime.server.schemas.chat import ChatCompletionRequest

SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn thinking on or off: Qwen's, GLM's and others'; DeepSeek's, Kimi's and Granite's."""

EFFORT = "reasoning_effort"
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
"""Degrees of thinking, the least first; ``none`` is no thinking."""


def known_variables(
    given: dict[str, Any], readable: Collection[str], strict: bool, ignored: IgnoredFields
) -> dict[str, Any]:
    """The variables of ``chat_template_kwargs`` without those that the template does not read.

    What nobody may set (``messages``, ``tools``) stays, for the renderer to refuse; with ``strict`` all do.
    """
    unread = {} if strict else {name: 0 for name in given if name not in {*readable, *RESERVED_VARIABLES}}
    for name in unread:
        ignored.add(f"chat_template_kwargs.{name}")
    return {name: value for name, value in given.items() if name not in unread}


def chat_variables(
    body: ChatCompletionRequest,
    thinking: bool,
    readable: Collection[str],
    strict: bool,
    ignored: IgnoredFields,
    takes: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> dict[str, Any]:
    """The template's variables for a chat.

    As in vLLM, the effort goes to a template that reads it, and any effort but ``none`` turns thinking on where the
    template has a switch. ``chat_template_kwargs`` comes before both. A template that refuses the effort gets the
    nearest one that it takes, as Qwen's own service does it for those of OpenAI.

    Args:
        body: the request.
        thinking: the model may think.
        readable: what the template reads.
        strict: refuse what the template does not read.
        ignored: is told of it otherwise, and of the degree of an effort that only turns thinking on, or became another.
        takes: whether the template renders a question with these variables.

    Raises:
        ApiError: an effort that the template cannot be told, or fields that contradict each other.
    """
    variables = known_variables(body.chat_template_kwargs, readable, strict, ignored)
    switches = [name for name in SWITCHES if name in readable]
    (effort_field, effort), (switch_field, thinks) = _effort(body), _switch(body)
    if effort is not None:
        if EFFORT in readable:
            told = variables.get(EFFORT) or _taken_effort(effort, switches, takes)
            if EFFORT not in variables and told not in (effort, None):
                ignored.add(effort_field)
            if told is not None:
                variables[EFFORT] = told
        elif switches:
            if effort not in ("none", "medium"):
                ignored.add(effort_field)
        # A model that never thinks makes no effort as it is.
        elif thinking or effort != "none":
            message = (
                f"{effort_field}: the model's chat template reads neither {EFFORT} nor {SWITCHES[0]}, so that the "
                f"effort cannot be set; leave it out"
            )
            raise ApiError(400, message, "unsupported", effort_field)
        thinks = effort != "none" if thinks is None else thinks
    if thinks is not None:
        for name in switches:
            variables.setdefault(name, thinks)
        if not switches and switch_field:
            if strict:
                message = f"{switch_field}: the model's chat template has no {SWITCHES[0]}"
                raise ApiError(400, message, "unsupported", switch_field)
            ignored.add(switch_field)
    return variables


def _taken_effort(effort: str, switches: Collection[str], takes: Callable[[dict[str, Any]], bool]) -> str | None:
    """The effort to tell a template: the one asked for, or the nearest that it takes. None where a switch says it."""

    def is_taken(each: str) -> bool:
        return takes({EFFORT: each, **dict.fromkeys(switches, each != "none")})

    if is_taken(effort):
        return effort
    if effort == "none":
        return None if switches else effort
    at = EFFORTS.index(effort)
    # Of two that are as near the higher one.
    nearest = sorted(EFFORTS, key=lambda each: (abs(EFFORTS.index(each) - at), -EFFORTS.index(each)))
    return next((each for each in nearest if is_taken(each)), effort)


def _effort(body: ChatCompletionRequest) -> tuple[str, str | None]:
    """The effort, and the field that has it."""
    inner = body.reasoning.effort if body.reasoning else None
    return _one("reasoning_effort", body.reasoning_effort, "reasoning.effort", inner)


def _switch(body: ChatCompletionRequest) -> tuple[str, bool | None]:
    """Whether the model thinks, and the field that says so."""
    inner = body.reasoning.enabled if body.reasoning else None
    first, value = _one("enable_thinking", body.enable_thinking, "reasoning.enabled", inner)
    kind = None if body.thinking is None else body.thinking.type == "enabled"
    return _one(first, value, "thinking", kind)


def _one(name: str, value: Any, other_name: str, other: Any) -> tuple[str, Any]:
    """One value that two fields may have, with the name of its field; none where neither has."""
    if value is None:
        return (other_name, other) if other is not None else ("", None)
    if other is not None and other != value:
        message = f"{name} and {other_name} are two names of one thing; give one of them"
        raise ApiError(400, message, "invalid_value", other_name)
    return name, value
