"""What is measured: a prompt taken in, then tokens made one after another, for some texts side by side."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jllm_core.config import ModelConfig

from jllm_runtime.errors import RequestError


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        prompt_tokens: the length of each prompt whose taking in is timed.
        context: tokens that each text has when the first decode step is timed.
        decode_tokens: timed decode steps.
        batch: texts side by side.
    """

    prompt_tokens: int
    context: int
    decode_tokens: int
    batch: int

    @property
    def rows(self) -> int:
        """Rows that the compiled steps have: ``generate`` fills up to a power of two."""
        return 1 << (self.batch - 1).bit_length()

    @property
    def name(self) -> str:
        """For people."""
        return f"batch {self.batch}, prompt {self.prompt_tokens}, {self.decode_tokens} tokens from {self.context} on"


def make_cases(
    config: ModelConfig,
    prompt_tokens: Sequence[int],
    decode_tokens: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int] | None = None,
) -> list[Case]:
    """Every combination of the values, the batch changing fastest.

    Args:
        config: the model that they are for.
        prompt_tokens, decode_tokens, batches: the values, each at least 1.
        contexts: tokens before the first timed decode step; each prompt's length when None.

    Raises:
        RequestError: one that is longer than the model's context.
    """
    cases = [
        Case(prompt, context, decode, batch)
        for prompt, decode, context, batch in itertools.product(prompt_tokens, decode_tokens, contexts or [0], batches)
        for context in [context or prompt]
    ]
    for case in cases:
        longest = max(case.prompt_tokens, case.context + case.decode_tokens)
        if longest > config.context_length:
            raise RequestError(
                f"{case.name}: a text of {longest} tokens is longer than the model's context of "
                f"{config.context_length}; ask for fewer prompt, context or decode tokens"
            )
    return cases
