"""What the runs of one model on one machine came to."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.cases import JLLM, LIMITS, Contender


@dataclass(frozen=True)
class Results:
    """Records by case and contender, in the order of their rounds: the n-th of one is compared with the n-th of
    another, so that a machine that slows down for a while slows both."""

    records: dict[tuple[str, Contender], list[dict[str, Any]]]

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]], model: str) -> "Results":
        """Those of this model."""
        sorted_out = defaultdict(list)
        for record in records:
            if record["model"] == model:
                sorted_out[record["case"], Contender(record["peer"], record["precision"])].append(record)
        return cls(dict(sorted_out))

    def runs(self, case: str, contender: Contender) -> list[dict[str, Any]]:
        """In order; empty where there are none."""
        return self.records.get((case, contender), [])

    def contenders(self, case: str) -> list[Contender]:
        """Who has run a case, the machine's limits left out."""
        return [who for name, who in self.records if name == case and who.peer != LIMITS]

    def seconds(self, case: str, contender: Contender) -> list[float]:
        """Of each run, its median repetition."""
        return [run["median_s"] for run in self.runs(case, contender)]

    def speedup(self, case: str, ours: Contender, theirs: Contender) -> float | None:
        """How many times faster ours is: the median of the rounds. None where one of them has not run."""
        pairs = list(zip(self.seconds(case, ours), self.seconds(case, theirs), strict=False))
        return statistics.median(b / a for a, b in pairs) if pairs else None

    def fastest(self, case: str, among: Sequence[Contender] | None = None) -> Contender | None:
        """The fastest peer by the median, among these."""
        peers = [who for who in self.contenders(case) if who.peer != JLLM and (among is None or who in among)]
        return min(peers, key=lambda who: statistics.median(self.seconds(case, who)), default=None)

    def share_of_limit(self, case: str, contender: Contender, limit: str) -> float | None:
        """What of the machine's ``bytes_per_s`` or ``flops_per_s``, measured in the same rounds, a contender used."""
        pairs = zip(self.runs(case, contender), self.runs(case, Contender(LIMITS)), strict=False)
        shares = [run["needs"] / run["median_s"] / machine[limit] for run, machine in pairs if "needs" in run]
        return statistics.median(shares) if shares else None

    def peak(self, case: str, contender: Contender) -> int | None:
        """The most resident memory of any run."""
        return max((run["peak_rss_bytes"] for run in self.runs(case, contender)), default=None)
