"""Which sequences work in the next step, and on which pages. It knows no array library and no text.

First come, first served: sequences are admitted in the order in which they came, none overtakes another; when pages
run out the youngest gives way, and is computed anew later. So the oldest always goes on, and every one becomes the
oldest in time.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.errors import RequestError


@dataclass(eq=False)
class Job:
    """One sequence on its way: a prompt, the tokens it has got so far, and where their keys and values are.

    All tokens of the prompt but the last are taken in by prefill; the last one is the first that decode is fed with.
    Decode after a preemption is fed with the tokens that are known already, by the same program as the first time, so
    the cache gets the same bits again.

    Attributes:
        prompt_ids: the prompt.
        end: most tokens that the text may have, prompt included.
        needs_host: every token must be seen by the host before the next one is made.
        computes_all: no page of another prompt is taken over, because something is wanted of every position.
        private: its pages serve nobody else: what is in them depends on more than the tokens.
        token_ids: what has been generated.
        number: the order of arrival.
        slot: the row of the device's state that it has while it runs; None while it waits.
        pages: its pages, in the order of its text.
        computed: tokens whose keys and values are in the pages.
        reused: prompt tokens that it did not need to compute, at its first admission.
        preemptions: how often it had to give way.
    """

    prompt_ids: Sequence[int]
    end: int
    needs_host: bool = False
    computes_all: bool = False
    private: bool = False
    token_ids: list[int] = field(default_factory=list)
    number: int = -1
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    preemptions: int = 0

    @property
    def prefill_end(self) -> int:
        """Tokens that prefill takes in."""
        return len(self.prompt_ids) - 1

    @property
    def decodes(self) -> bool:
        """Whether prefill is behind it."""
        return self.slot is not None and self.computed >= self.prefill_end

    def known(self, start: int, stop: int) -> list[int]:
        """The tokens from ``start`` on that are known already, up to ``stop``."""
        prompt = len(self.prompt_ids)
        if start < prompt:
            return [*self.prompt_ids[start:stop], *self.token_ids[: max(stop - prompt, 0)]]
        return self.token_ids[start - prompt : stop - prompt]


@dataclass(frozen=True)
class Chunk:
    """A page of a prompt to be computed: the tokens from ``start`` on, at most a page of them."""

    job: Job
    start: int
    stop: int
    page: int


@dataclass(frozen=True)
class Batch:
    """Sequences to be decoded together, and how many tokens each of them gets at most."""

    jobs: list[Job]
    steps: int


class Scheduler:
    """Continuous batching over the pages of a PrefixCache.

    Args:
        cache: the pages.
        slots: most sequences that run at a time.
        step_tokens: most tokens of prompts that are taken in between two steps of decode; at least a page is.
        decode_steps: most tokens of each sequence in a step of decode when nobody waits for it to end.
    """

    def __init__(self, cache: PrefixCache, slots: int, step_tokens: int, decode_steps: int) -> None:
        self.cache = cache
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._chunks_a_step = max(1, step_tokens // cache.page_size)
        self._decode_steps = decode_steps
        self._slots = list(range(slots - 1, -1, -1))
        self._arrivals = 0

    def check(self, job: Job) -> None:
        """Raise a RequestError for a sequence that no number of free pages would be enough for."""
        needed = self._pages_for(job.end - 1)
        if needed > self.cache.pages:
            raise RequestError(
                f"a prompt of {len(job.prompt_ids)} tokens and an answer of up to {job.end - len(job.prompt_ids)} need "
                f"{needed} pages of {self.cache.page_size} tokens, the cache has {self.cache.pages}; "
                "ask for a shorter answer (max_tokens), or give the engine more pages"
            )

    def add(self, job: Job) -> None:
        """Take a new sequence, at the end of the queue."""
        self.check(job)
        job.number = self._arrivals
        self._arrivals += 1
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Let go of a sequence that has ended or is no longer wanted, waiting or running."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.running:
            self._stop(job)

    def restart(self) -> None:
        """What the pages hold is lost: everybody who runs begins anew."""
        for job in list(self.running):
            self._preempt(job)
        self.cache.clear()

    def admit(self) -> list[Job]:
        """Start waiting sequences while there are slots and pages, oldest first; returns those that start."""
        admitted = []
        while self.waiting and self._slots and self._start(self.waiting[0]):
            admitted.append(self.waiting.pop(0))
        return admitted

    def chunks(self) -> list[Chunk]:
        """The pieces of prompts to compute before the next step of decode, oldest sequence first.

        Each must be reported by ``computed`` in this order. Pages that others have computed meanwhile are taken over.
        """
        chunks: list[Chunk] = []
        for job in self.running:
            self._take_over(job)
            start = job.computed
            while start < job.prefill_end and len(chunks) < self._chunks_a_step:
                stop = min(start + self.cache.page_size, job.prefill_end)
                chunks.append(Chunk(job, start, stop, job.pages[start // self.cache.page_size]))
                start = stop
        return chunks

    def chunk_done(self, chunk: Chunk) -> None:
        """A chunk has been computed; a full page of it may serve others from now on."""
        job, size = chunk.job, self.cache.page_size
        job.computed = chunk.stop
        if chunk.stop - chunk.start == size and not job.private:
            at = chunk.start // size
            job.pages[at] = self.cache.keep(job.pages[:at], job.pages[at], job.prompt_ids[chunk.start : chunk.stop])

    def batch(self) -> Batch:
        """The sequences to decode next, with pages for what they will add. Preempts the youngest where none are left.

        One token each where a sequence needs the host after each token, where somebody waits for a first one, or where
        a prompt is being taken in.
        """
        jobs = [job for job in self.running if job.decodes]
        one_by_one = len(jobs) < len(self.running) or any(job.needs_host or not job.token_ids for job in jobs)
        steps = 1 if one_by_one else self._decode_steps
        if sum(self._missing(job, steps) for job in jobs) > self.cache.available:
            steps = 1
        for job in jobs:
            while job.slot is not None and not self._grow(job, steps):
                self._preempt(self.running[-1])
        return Batch([job for job in jobs if job.slot is not None], steps)

    def _start(self, job: Job) -> bool:
        """Give a waiting sequence a slot and the pages of the text that it has, or change nothing."""
        full = 0 if job.computes_all or job.private else job.prefill_end
        pages = self.cache.match(job.prompt_ids[:full])
        # Each of those that run may need a page soon; to admit and preempt at once would help nobody.
        reserve = len(self.running)
        needed = self._pages_for(len(job.prompt_ids) + len(job.token_ids)) - len(pages)
        own = self.cache.allocate(needed) if needed + reserve <= self.cache.available else None
        if own is None:
            self.cache.release(pages)
            return False
        job.slot = self._slots.pop()
        job.computed = len(pages) * self.cache.page_size
        if not job.preemptions:
            job.reused = job.computed
        job.pages = pages + own
        bisect.insort(self.running, job, key=lambda running: running.number)
        return True

    def _take_over(self, job: Job) -> None:
        """Skip pages of the prompt that somebody has computed since this sequence was admitted."""
        size = self.cache.page_size
        alone = job.computes_all or job.private
        while not alone and job.computed % size == 0 and job.computed + size <= job.prefill_end:
            at = job.computed // size
            page = self.cache.next_page(job.pages[:at], job.prompt_ids[job.computed : job.computed + size])
            if page is None:
                return
            self.cache.release([job.pages[at]])
            job.pages[at] = page
            job.computed += size
            if not job.preemptions:
                job.reused += size

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def _missing(self, job: Job, steps: int) -> int:
        """Pages that the next ``steps`` tokens need. The last token of a text is never fed, and needs none."""
        return max(0, self._pages_for(min(job.computed + steps, job.end - 1)) - len(job.pages))

    def _grow(self, job: Job, steps: int) -> bool:
        pages = self.cache.allocate(self._missing(job, steps))
        job.pages += pages or []
        return pages is not None

    def _preempt(self, job: Job) -> None:
        """Take everything from a sequence but its tokens. It waits again, at its place in the order of arrival."""
        self._stop(job)
        job.preemptions += 1
        bisect.insort(self.waiting, job, key=lambda waiting: waiting.number)

    def _stop(self, job: Job) -> None:
        if job.slot is None:
            raise ValueError("a sequence that does not run cannot be stopped")
        self.running.remove(job)
        self.cache.release(job.pages)
        self._slots.append(job.slot)
        job.pages, job.slot, job.computed = [], None, 0
