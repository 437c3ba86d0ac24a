"""Concurrency limit: how many sequences may run and wait at a time."""

from jllm_runtime.server.errors import RETRY_AFTER, ApiError


class ConcurrencyLimit:
    """A counter of the sequences that run or wait, which refuses more than the limit.

    A request counts as many sequences as it asks for answers: prompts times ``n``.

    Args:
        max_running: sequences that the engine runs at a time.
        max_queue: sequences that may wait beside them.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self.limit = max_running + max_queue
        self.in_use = 0

    def acquire(self, sequences: int) -> None:
        """Count a request in; ``release`` must follow.

        Raises:
            ApiError: 429 where other requests are in the way, 400 where the request alone is over the limit.
        """
        # No lock: only the event loop's thread counts.
        if sequences > self.limit:
            raise ApiError(
                400, f"{sequences} answers are asked for, the server takes {self.limit} at a time", "too_many_answers"
            )
        if self.in_use + sequences > self.limit:
            message = (
                f"{self.in_use} answers are under way and {sequences} more are asked for, the limit is {self.limit}"
            )
            raise ApiError(429, f"{message}; try again later", "queue_full", headers=RETRY_AFTER)
        self.in_use += sequences

    def release(self, sequences: int) -> None:
        """Count a request out."""
        self.in_use -= sequences
