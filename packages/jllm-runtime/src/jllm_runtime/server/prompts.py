"""Prompts as they come in, texts or token ids, one or several."""

from collections.abc import Sequence

from jllm_runtime.server.service import Service

Given = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


def prompt_list(given: Given) -> list[str | list[int]]:
    """Each prompt of what a request has for them: a text, some, a list of token ids, or some of those."""
    if isinstance(given, str):
        return [given]
    ids = [one for one in given if isinstance(one, int)]
    return [ids] if ids else [one if isinstance(one, str) else list(one) for one in given if not isinstance(one, int)]


def prompt_ids(service: Service, prompt: str | list[int], param: str, answered: bool = True) -> list[int]:
    """A prompt's token ids, checked.

    Args:
        service: knows the tokenizer and the limits.
        prompt: a text, encoded with the model's special tokens, or token ids.
        param: where it came in.
        answered: whether it needs room for an answer.

    Raises:
        ApiError: it is longer than a prompt may be.
        RequestError: it has ids that are none.
    """
    token_ids = service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return service.checked_prompt(token_ids, param, answered)
