"""How much may be under way at a time."""

from jllm_runtime.server.errors import RETRY_AFTER, ApiError


class Admission:
    """Counts the answers that are under way, and refuses what would be too many.

    Args:
        places: answers that are worked on at a time.
        queue: answers that may wait beside them.
    """

    def __init__(self, places: int, queue: int) -> None:
        self.limit = places + queue
        self.taken = 0

    def take(self, answers: int) -> None:
        """Let this many answers begin; ``give_back`` must follow.

        Raises:
            ApiError: 429 where others are in the way, 400 where it is more than would ever be let in.
        """
        if answers > self.limit:
            raise ApiError(
                400, f"{answers} answers are asked for, the server takes {self.limit} at a time", "too_many_answers"
            )
        if self.taken + answers > self.limit:
            message = f"{self.taken} answers are under way and {answers} more are asked for, the limit is {self.limit}"
            raise ApiError(429, f"{message}; try again later", "queue_full", headers=RETRY_AFTER)
        self.taken += answers

    def give_back(self, answers: int) -> None:
        """These answers have ended."""
        self.taken -= answers
