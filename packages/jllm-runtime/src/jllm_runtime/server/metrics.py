"""Prometheus metrics: requests, latencies, engine statistics."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jllm_runtime.engine.stats import EngineStats

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATE_WINDOW = 5.0
"""Seconds over which tokens per second are averaged."""


class Metrics:
    """Metrics of one server, in a registry of its own: several servers may run in one process.

    Args:
        stats: the engine's statistics, read when metrics are collected.
        under_way: number of sequences that run or wait.
    """

    def __init__(self, stats: Callable[[], EngineStats], under_way: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.tokens_per_second = Rate()
        # Names and labels are an interface: dashboards use them.
        self.http_requests = Counter(
            "jllm_http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "jllm_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "jllm_inter_token_seconds",
            "Between a token and the next; of tokens that come together, each has its share.",
            buckets=NEXT_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.request = Histogram(
            "jllm_request_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        rate = Gauge("jllm_tokens_per_second", f"Tokens of answers, over {RATE_WINDOW:g} s.", registry=self.registry)
        # Functions are called when metrics are collected, so that nothing needs to be updated in between.
        rate.set_function(self.tokens_per_second.value)
        answers = Gauge("jllm_answers_under_way", "Answers that run or wait.", registry=self.registry)
        answers.set_function(under_way)
        self.registry.register(_EngineCollector(stats))


class Rate:
    """Average events per second over the last ``window`` seconds."""

    def __init__(self, window: float = RATE_WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        """Count events that happen now."""
        now = self._clock()
        self._events.append((now, count))
        self._sum += count
        self._forget(now)

    def value(self) -> float:
        """Events per second."""
        self._forget(self._clock())
        return self._sum / self._window

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] <= now - self._window:
            self._sum -= self._events.popleft()[1]


class LatencyTimer:
    """Latencies of one request: to the first token, between tokens, to the end.

    Args:
        metrics: takes the measurements.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}

    def add_tokens(self, sequence: tuple[int, int], count: int) -> None:
        """Count tokens of a sequence that come now.

        Args:
            sequence: index of the prompt, and of the output to it.
            count: may be 0, for a piece that only ends the sequence.
        """
        if not count:
            return
        now = time.perf_counter()
        # The first token of any of the request's sequences is what its client waits for.
        if not self._last:
            self._metrics.first_token.observe(now - self._began)
        if sequence in self._last:
            # One engine step may give several tokens at once: each has an equal share of its time.
            for _ in range(count):
                self._metrics.next_token.observe((now - self._last[sequence]) / count)
        self._last[sequence] = now
        self._metrics.tokens_per_second.add(count)

    def end(self) -> None:
        """Measure the whole request."""
        self._metrics.request.observe(time.perf_counter() - self._began)


class _EngineCollector(Collector):
    """Collector that reads the engine's statistics when Prometheus scrapes."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        # One call, so that all numbers belong to the same moment.
        stats = self._stats()
        for name, help_text, value in (
            ("jllm_answers_waiting", "Answers that wait for a row of the batch.", stats.waiting),
            ("jllm_answers_running", "Answers that run.", stats.running),
            ("jllm_max_batch", "Most answers that run at a time.", stats.max_batch),
            ("jllm_states", "States of delta nets, one for each answer that runs.", stats.states),
            ("jllm_states_in_use", "States held by running answers.", stats.states_in_use),
            ("jllm_snapshots", "Room for states of delta nets behind pages of earlier prompts.", stats.snapshots),
            ("jllm_snapshots_in_use", "Such states that are kept.", stats.snapshots_in_use),
            ("jllm_pages", "Pages of the cache.", stats.pages),
            ("jllm_pages_in_use", "Pages held by running answers.", stats.pages_in_use),
            ("jllm_pages_idle", "Pages of the prefix cache that no running answer holds.", stats.pages_idle),
        ):
            yield GaugeMetricFamily(name, help_text, value)
        for name, help_text, value in (
            ("jllm_prompt_tokens", "Tokens of prompts that were computed.", stats.prompt_tokens),
            ("jllm_reused_tokens", "Tokens of prompts found in the prefix cache.", stats.reused_tokens),
            ("jllm_generated_tokens", "Tokens of answers.", stats.generated_tokens),
            ("jllm_preemptions", "Answers that were put back because pages had run out.", stats.preemptions),
        ):
            yield CounterMetricFamily(name, help_text, value)
        ended = CounterMetricFamily("jllm_requests_ended", "The engine's requests by their end.", labels=["end"])
        for end in ("finished", "cancelled", "failed"):
            ended.add_metric([end], getattr(stats, end))
        yield ended
