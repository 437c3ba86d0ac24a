"""What the server counts and measures, for Prometheus."""

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
"""Seconds that tokens per second are taken over."""


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        stats: what the engine is doing, asked when somebody looks.
        under_way: answers that the server is working on or has waiting.
    """

    def __init__(self, stats: Callable[[], EngineStats], under_way: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.tokens_per_second = Rate()
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
        rate.set_function(self.tokens_per_second.value)
        answers = Gauge("jllm_answers_under_way", "Answers worked on or waiting.", registry=self.registry)
        answers.set_function(under_way)
        self.registry.register(_EngineCollector(stats))


class Rate:
    """Tokens per second, over the last seconds."""

    def __init__(self, window: float = RATE_WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        """So many have come now."""
        now = self._clock()
        self._events.append((now, count))
        self._sum += count
        self._forget(now)

    def value(self) -> float:
        """How many came in a second."""
        self._forget(self._clock())
        return self._sum / self._window

    def _forget(self, now: float) -> None:
        while self._events and self._events[0][0] <= now - self._window:
            self._sum -= self._events.popleft()[1]


class TokenClock:
    """Measures when the tokens of one request come.

    Args:
        metrics: where it is noted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}

    def tokens(self, answer: tuple[int, int], count: int) -> None:
        """So many tokens of this answer have come."""
        if not count:
            return
        now = time.perf_counter()
        if not self._last:
            self._metrics.first_token.observe(now - self._began)
        if answer in self._last:
            for _ in range(count):
                self._metrics.next_token.observe((now - self._last[answer]) / count)
        self._last[answer] = now
        self._metrics.tokens_per_second.add(count)

    def end(self) -> None:
        """The request has ended."""
        self._metrics.request.observe(time.perf_counter() - self._began)


class _EngineCollector(Collector):
    """Asks the engine, when it is asked."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, help_text, value in (
            ("jllm_answers_waiting", "Answers that wait for a place.", stats.waiting),
            ("jllm_answers_running", "Answers that are worked on.", stats.running),
            ("jllm_max_batch", "Most answers that are worked on at a time.", stats.max_batch),
            ("jllm_pages", "Pages of the cache.", stats.pages),
            ("jllm_pages_in_use", "Pages that running answers hold.", stats.pages_in_use),
            ("jllm_pages_idle", "Pages kept for prompts that begin like earlier ones.", stats.pages_idle),
        ):
            yield GaugeMetricFamily(name, help_text, value)
        for name, help_text, value in (
            ("jllm_prompt_tokens", "Tokens of prompts that were computed.", stats.prompt_tokens),
            ("jllm_reused_tokens", "Tokens of prompts that an earlier prompt had left.", stats.reused_tokens),
            ("jllm_generated_tokens", "Tokens of answers.", stats.generated_tokens),
            ("jllm_preemptions", "How often an answer gave way because pages had run out.", stats.preemptions),
        ):
            yield CounterMetricFamily(name, help_text, value)
        ended = CounterMetricFamily("jllm_requests_ended", "The engine's requests by their end.", labels=["end"])
        for end in ("finished", "cancelled", "failed"):
            ended.add_metric([end], getattr(stats, end))
        yield ended
