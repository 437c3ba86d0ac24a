"""What must be reached, and whether it is."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.cases import JLLM, LLAMA, LLAMA_PRECISIONS, TRANSFORMERS, Contender
from benchmarks.peers.results import Results

MB = 10**6


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        case, against: in words.
        bound: the ratio that must be reached, or not be passed if ``at_most``.
        measure: the ratio, None where a run is missing.
    """

    case: str
    against: str
    bound: float
    measure: Callable[[Results], float | None]
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        """Whether a ratio is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


def _faster(case: str, ours: str, peer: str, theirs: str) -> Callable[[Results], float | None]:
    return lambda results: results.speedup(case, Contender(JLLM, ours), Contender(peer, theirs))


def _faster_than_best(case: str, ours: str, *peers: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        among = [who for who in results.contenders(case) if who.peer in peers]
        best = results.fastest(case, among)
        return None if best is None else results.speedup(case, Contender(JLLM, ours), best)

    return measure


def _slowest_of_ours(results: Results) -> float | None:
    ours = [who.precision for who in results.contenders("decode-512") if who.peer == JLLM]
    ratios = [_faster("decode-512", precision, TRANSFORMERS, "float32")(results) for precision in ours]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _slower(ours: str, peer: str, theirs: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        ratio = _faster("start", ours, peer, theirs)(results)
        return None if ratio is None else 1 / ratio

    return measure


def _share(ours: str) -> Callable[[Results], float | None]:
    return lambda results: results.share_of_limit("decode-512", Contender(JLLM, ours), "bytes_per_s")


def _more_memory(ours: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        own, other = (results.peak("decode-512", who) for who in (Contender(JLLM, ours), Contender(LLAMA, "Q8_0")))
        return None if own is None or other is None else (own - other) / MB

    return measure


def targets() -> list[Target]:
    """All of them."""
    lines = [
        Target("decode b1, ctx 512, float32", "llama.cpp F32", 1.0, _faster("decode-512", "float32", LLAMA, "F32")),
        Target("decode b1, ctx 512, bfloat16", "llama.cpp F16", 1.1, _faster("decode-512", "bfloat16", LLAMA, "F16")),
    ]
    for ours, theirs, bound in (("int8", "Q8_0", 1.3), ("int4", "Q4_0", 1.2)):
        measure = _faster("decode-512", ours, LLAMA, theirs)
        lines.append(Target(f"decode b1, ctx 512, {ours}", f"llama.cpp {theirs}", bound, measure))
    lines.append(Target("decode b1, ctx 512, the slowest of ours", "transformers float32", 4.0, _slowest_of_ours))
    best = f"the best of llama.cpp {', '.join(LLAMA_PRECISIONS)}"
    for precision in ("int8", "float32"):
        measure = _faster_than_best("decode-128-b16", precision, LLAMA)
        lines.append(Target(f"decode b16, ctx 128, {precision}", best, 2.0, measure))
    for precision in ("float32", "int8"):
        measure = _faster_than_best("prefill-512", precision, LLAMA, TRANSFORMERS)
        lines.append(Target(f"prefill 512, {precision}", "the best peer at any precision", 1.0, measure))
    return [
        *lines,
        Target("decode b1 int8, share of reading", "measured read bandwidth", 0.65, _share("int8")),
        Target("decode b1 int8, peak RSS, MB more", "llama.cpp Q8_0", 250, _more_memory("int8"), at_most=True),
        Target("start to first word, int8, times", "llama.cpp Q8_0", 1.5, _slower("int8", LLAMA, "Q8_0"), True),
        Target("start to first word, float32, times", "llama.cpp F32", 1.5, _slower("float32", LLAMA, "F32"), True),
        Target(
            "start to first word, float32, times",
            "transformers float32",
            0.5,
            _slower("float32", TRANSFORMERS, "float32"),
            at_most=True,
        ),
    ]
