"""Answer to a conversation, with its thinking and its content apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jllm_runtime.outputs import GenerationOutput
from jllm_runtime.reasoning import ReasoningParser, room_for_thinking

if TYPE_CHECKING:
    from jllm_runtime.model import Conversation, Model
    from jllm_runtime.sampling import SamplingParams

# Tokens of a prompt's end, which tells whether the thinking is open: a marker and line breaks.
_TAIL = 64


@dataclass(frozen=True)
class ChatAnswer(GenerationOutput):
    """The answer to a conversation.

    Attributes:
        reasoning: the thinking, without its markers; None without any. What a limit has cut off may be nothing else.
        content: the rest of the text.
    """

    reasoning: str | None = None
    content: str = ""


def answer_chat(
    model: "Model",
    messages: "Conversation",
    params: "SamplingParams | None",
    variables: Mapping[str, Any],
    generate: Callable[[list[int], "SamplingParams"], GenerationOutput],
) -> ChatAnswer:
    """Answer a conversation.

    Args:
        model: has the chat template, which tells whether the model thinks, and whether the prompt opens that.
        messages, params, variables: as for ``Model.chat``.
        generate: computes the answer to a prompt.
    """
    prompt = model.encode_chat(messages, **variables)
    output = generate(prompt, params or model.chat_params(**variables))
    thoughts, content = "", output.text
    if (tokenizer := model.tokenizer) is not None and tokenizer.thinks(**variables):
        continued = None
        if variables.get("continue_final_message") and not isinstance(messages, str):
            continued = messages[-1]["content"]
        end = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
        allowed, inside = room_for_thinking(end, continued)
        if allowed:
            parser = ReasoningParser(inside)
            parts = zip(parser.feed(output.text), parser.finish(), strict=True)
            thoughts, content = ("".join(texts) for texts in parts)
    return ChatAnswer(**vars(output), reasoning=thoughts or None, content=content)
