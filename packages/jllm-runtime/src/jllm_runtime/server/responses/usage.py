"""Tokens of one request, counted as its pieces come."""

from jllm_runtime.outputs import Piece
from jllm_runtime.server.requests.engine_requests import Generation
from jllm_runtime.server.schemas.base import Usage


class UsageCount:
    """Counts the tokens of a request with some prompts and some answers to each.

    Args:
        generation: after it has been submitted.
        answers: whether anybody gets to see the answers.
    """

    def __init__(self, generation: Generation, answers: bool = True) -> None:
        self._prompts = sum(len(request.prompt_token_ids) for request in generation.requests)
        self._with_answers = answers
        self._answers = 0
        self._cached: dict[int, int] = {}

    def add(self, prompt: int, piece: Piece) -> None:
        """A piece of an answer to this prompt."""
        self._answers += len(piece.token_ids) if self._with_answers else 0
        if piece.output is not None:
            # The answers to one prompt find each other's pages: what was there before them, the first has found.
            reused = piece.output.reused_tokens
            self._cached[prompt] = min(self._cached.get(prompt, reused), reused)

    def total(self) -> Usage:
        """All of them."""
        return Usage.of(self._prompts, self._answers, sum(self._cached.values()))
