"""Benchmark cases: prompt length, context, decode steps, batch size."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jllm_core.config import ModelConfig

from jllm_runtime.errors import RequestError


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        prompt_tokens: tokens of each prompt whose prefill is timed.
        context: tokens of each sequence before the first timed decode step.
        decode_tokens: timed decode steps.
        batch: sequences side by side.
    """

    prompt_tokens: int
    context: int
    decode_tokens: int
    batch: int

    @property
    def rows(self) -> int:
        """Rows of the compiled programs: ``generate`` fills a batch up to a power of two."""
        # The next power of two, so that few programs serve all batch sizes.
        return 1 << (self.batch - 1).bit_length()

    @property
    def name(self) -> str:
        """The case in words."""
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
        contexts: tokens before the first timed decode step; None for each prompt's length.

    Raises:
        RequestError: a case that is longer than the model's context.
    """
    cases = [
        Case(prompt, context, decode, batch)
        # 0 stands for the length of the prompt, which differs from case to case.
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
