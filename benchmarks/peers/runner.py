"""Runs of a case: the contenders take turns, and what each says is checked against the reference."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import JLLM, LIMITS, Case, Contender
from benchmarks.peers.models import Model, make
from benchmarks.peers.processes import ask, ask_in_words
from benchmarks.peers.prompts import ANSWER, QUESTION, prompts

EXACT = Contender(JLLM, "float32")
ANSWER_TOKENS = 12
START = Case("start", "start")


@dataclass(frozen=True)
class Runner:
    """Runs cases of a model on so many threads; what can be kept is kept in the folder."""

    model: Model
    folder: Path
    threads: int

    def prepare(self, case: Case, contenders: Sequence[Contender]) -> None:
        """Make the weights and the reference, and have this project's programs compiled: nothing of it is timed."""
        self.model.prepare(EXACT, self.threads)
        for contender in contenders:
            self.model.prepare(contender, self.threads)
        self._reference(case)
        for contender in contenders:
            if contender.peer == JLLM:
                self.run(case, contender)
                if self.model.has_tokenizer:
                    self.run(START, contender)  # however coarse its weights are, it knows the answer

    def run(self, case: Case, contender: Contender) -> dict[str, Any]:
        """One run, as a record. ``same`` is the share of tokens that are the reference's; of a start, whether the right
        answer follows: of a peer, which may round more than we do, it is noted down and not asked for.

        Raises:
            SystemExit: it failed, or does not say what it must.
        """
        record = {"model": self.model.name, "case": case.name, "peer": contender.peer, "precision": contender.precision}
        cache = {"JLLM_CACHE": str(self.folder / "cache")}
        if contender.peer == LIMITS:
            return record | ask(contender, {}, self.threads)
        task = self._task(case, contender)
        if case.kind == "start":
            started = ask_in_words(contender, task, self.threads, **cache)
            knows = ANSWER in started.text
            if contender.peer == JLLM and not knows:
                raise SystemExit(f"{contender.name} does not know the answer: {started.text!r}")
            return record | {"median_s": started.first_s, "same": float(knows), "text": started.text}
        told = ask(contender, task, self.threads, **cache)
        same = self._same(case, contender, told.pop("tokens"))
        median = statistics.median(told["seconds"])
        return record | told | {"median_s": median, "tokens_per_s": case.work / median, "same": same}

    def _task(self, case: Case, contender: Contender) -> dict[str, Any]:
        task = {
            "kind": case.kind,
            "weights": str(self.model.weights(contender)),
            "precision": contender.precision,
            "threads": self.threads,
        }
        if case.kind == "start":
            return task | {"question": QUESTION, "tokens": ANSWER_TOKENS}
        tokenizer = self.model.weights(EXACT) / "tokenizer.json"
        texts = prompts(self.model, tokenizer, case.batch, case.prompt)
        return task | {"prompts": texts, "tokens": case.tokens, "repeats": case.repeats}

    def _same(self, case: Case, contender: Contender, tokens: list[list[int]]) -> float:
        """The share of tokens up to where each text leaves the reference."""
        expected = self._reference(case)
        agreed = sum(leading(own, theirs) for own, theirs in zip(tokens, expected, strict=True))
        share = agreed / sum(map(len, expected))
        if contender.is_exact and share < 1:
            raise SystemExit(f"{contender.name} leaves the reference in {case.name}: {tokens} is not {expected}")
        return share

    def _reference(self, case: Case) -> list[list[int]]:
        """What float32 says by XLA's own operations, without our kernels."""
        if case.kind == "start":
            return []

        def write(part: Path) -> None:
            task = self._task(case, EXACT) | {"repeats": 1}
            answer = ask(EXACT, task, self.threads, JLLM_KERNELS="xla", JLLM_CACHE=str(self.folder / "cache"))
            part.write_text(json.dumps(answer["tokens"]))

        made = make(self.folder / "references" / f"{self.model.name}-{case.name}.json", write)
        tokens: list[list[int]] = json.loads(made.read_text())
        return tokens


def leading(own: Sequence[int], other: Sequence[int]) -> int:
    """How many items are the same from the start."""
    pairs = enumerate(zip(own, other, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(own))
