"""Token usage of one request."""

from typing import TYPE_CHECKING

from jllm_runtime.server.requests.engine_requests import EngineRequests
from jllm_runtime.server.schemas.base import CompletionUsage

if TYPE_CHECKING:
    from jllm_runtime.outputs import Piece


class UsageCounter:
    """Counter of a request's tokens, over all prompts and outputs.

    Args:
        engine_requests: after ``submit``.
        with_outputs: count the tokens of the outputs. False where the client gets to see none of them.
    """

    def __init__(self, engine_requests: EngineRequests, with_outputs: bool = True) -> None:
        # Once for each prompt, however many outputs it has.
        self._prompt_tokens = sum(len(request.prompt_token_ids) for request in engine_requests.requests)
        self._with_outputs = with_outputs
        self._completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}

    def add(self, prompt: int, piece: "Piece") -> None:
        """Count a piece of an output to the prompt with this index."""
        self._completion_tokens += len(piece.token_ids) if self._with_outputs else 0
        if piece.output is not None:
            # Of the sequences of one prompt, the later ones reuse pages of the first. What the prompt found in the
            # cache is what the first one has reused: the least.
            reused = piece.output.reused_tokens
            self._cached_tokens[prompt] = min(self._cached_tokens.get(prompt, reused), reused)

    def total(self) -> CompletionUsage:
        """The usage so far."""
        return CompletionUsage.of(self._prompt_tokens, self._completion_tokens, sum(self._cached_tokens.values()))
