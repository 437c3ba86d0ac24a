"""What an engine tells of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it began.

    Attributes:
        waiting: answers that wait for a place.
        running: answers that are worked on.
        max_batch: most answers that are worked on at a time.
        pages: pages of the cache.
        pages_in_use: pages that running answers hold.
        pages_idle: pages that are kept for prompts that begin like earlier ones.
        requests: requests that were submitted.
        finished, cancelled, failed: how many ended in each way.
        prompt_tokens: tokens of prompts that were taken in, reused ones included.
        reused_tokens: those that a prefix left by an earlier prompt saved.
        generated_tokens: tokens of answers.
        preemptions: how often an answer gave way because pages had run out.
    """

    waiting: int = 0
    running: int = 0
    max_batch: int = 0
    pages: int = 0
    pages_in_use: int = 0
    pages_idle: int = 0
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
