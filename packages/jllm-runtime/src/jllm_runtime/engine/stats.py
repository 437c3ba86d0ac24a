"""Engine statistics: queue, pages and counts."""

from dataclasses import dataclass, replace

from jllm_runtime.engine.config import EngineConfig
from jllm_runtime.engine.scheduler import S, Scheduler


@dataclass(frozen=True)
class EngineStats:
    """Statistics of an engine: its state now, and counts since its start.

    Attributes:
        waiting: sequences (answers) in the queue.
        running: sequences that are computed.
        max_batch: most sequences that are computed at a time.
        states: states of delta nets, one for each sequence that is computed at a time; 0 in models without.
        states_in_use: states that running sequences hold.
        snapshots: room for copies of states behind pages of earlier prompts.
        snapshots_in_use: such copies, from which prompts that begin alike go on.
        pages: pages of the cache.
        pages_in_use: pages that running sequences hold.
        pages_idle: pages kept for prompts that begin like earlier ones.
        requests: submitted requests.
        finished, cancelled, failed: requests that ended in each way.
        prompt_tokens: prompt tokens that were computed or reused.
        reused_tokens: prompt tokens whose keys and values came from the prefix cache.
        generated_tokens: tokens of answers.
        preemptions: number of times that a sequence was preempted because pages had run out.
    """

    waiting: int = 0
    running: int = 0
    max_batch: int = 0
    states: int = 0
    states_in_use: int = 0
    snapshots: int = 0
    snapshots_in_use: int = 0
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


def statistics(counts: EngineStats, arrived: int, scheduler: Scheduler[S], config: EngineConfig) -> EngineStats:
    """Statistics of this moment.

    Args:
        counts: since the start.
        arrived: sequences that the scheduler does not know yet.
        scheduler: the others.
        config: sizes, fitted to the model.
    """
    cache, running = scheduler.cache, len(scheduler.running)
    snapshots = cache.snapshots
    return replace(
        counts,
        waiting=arrived + len(scheduler.waiting),
        running=running,
        max_batch=config.max_batch,
        # Only a model with states has snapshots of them, be it none at a time.
        states=0 if snapshots is None else config.max_batch,
        states_in_use=0 if snapshots is None else running,
        snapshots=config.snapshots or 0,
        snapshots_in_use=0 if snapshots is None else len(snapshots),
        pages=cache.pages,
        pages_in_use=cache.in_use,
        pages_idle=cache.idle,
    )
