"""Scheduler for continuous batching over pages of the KV cache. Plain Python: no array library, no text.

The policy is first come, first served. Sequences are admitted in the order of their arrival, and none overtakes
another. When pages run out, the youngest running sequence is preempted and computed again later. So the oldest sequence
always goes on, and every sequence becomes the oldest in time: nobody starves.
"""

import bisect
from collections import abc
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.errors import RequestError

PROMPT_TAIL = 8
"""Tokens at the end of a prompt that a chat's next turn may write otherwise, such as the opening of a thought."""

MIN_INTERVAL = 8
"""Least number of pages between the snapshots that a prompt leaves on its way."""


@dataclass(eq=False)
class PagedSequence:
    """The scheduler's part of a sequence: its tokens, and the pages that hold their keys and values.

    Prefill computes all tokens of the prompt but the last. The last one is the first input of decode, so that every
    token that is drawn comes from the one decode program. After a preemption, decode is fed the tokens that are known
    already, by the same program as the first time: the cache gets the same bits again.

    Attributes:
        prompt_ids: the prompt.
        end: most tokens of prompt and answer together.
        needs_host: the host must see every token before the next one is drawn.
        computes_all: takes no page over from other prompts, because something is wanted of every position.
        private: shares no page with others, because its keys and values depend on more than the tokens.
        token_ids: the tokens generated so far.
        number: order of arrival.
        state_row: index of its states on the device (the TokenState, and those of delta nets), held while it runs; None
            while it waits.
        pages: its pages, in the order of the text.
        computed: tokens whose keys and values are in the pages.
        reused: prompt tokens taken over from the prefix cache, before any preemption.
        preemptions: number of times it was preempted.
    """

    prompt_ids: abc.Sequence[int]
    end: int
    needs_host: bool = False
    computes_all: bool = False
    private: bool = False
    token_ids: list[int] = field(default_factory=list)
    number: int = -1
    state_row: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    reused: int = 0
    preemptions: int = 0

    @property
    def prefill_end(self) -> int:
        """Number of tokens that prefill computes."""
        return len(self.prompt_ids) - 1

    @property
    def decodes(self) -> bool:
        """Whether the sequence runs and its prefill is complete."""
        return self.state_row is not None and self.computed >= self.prefill_end

    @property
    def shareable(self) -> int:
        """Number of tokens, from the first on, that may be taken over from other prompts in whole pages."""
        return 0 if self.computes_all or self.private else self.prefill_end

    def known(self, start: int, stop: int) -> list[int]:
        """Known tokens of the text, prompt or answer, from position ``start`` up to ``stop``."""
        prompt = len(self.prompt_ids)
        if start < prompt:
            return [*self.prompt_ids[start:stop], *self.token_ids[: max(stop - prompt, 0)]]
        return self.token_ids[start - prompt : stop - prompt]


S = TypeVar("S", bound=PagedSequence)


@dataclass(frozen=True)
class PromptPage(Generic[S]):
    """A page of a prompt to be computed: the tokens from ``start`` up to ``stop``, at most a page of them."""

    sequence: S
    start: int
    stop: int
    page: int


@dataclass(frozen=True)
class Batch(Generic[S]):
    """Sequences to decode together, and the most tokens that each of them gets."""

    sequences: list[S]
    decode_steps: int


def in_chunks(pages: abc.Sequence[PromptPage[S]], size: int, in_turn: bool) -> list[list[PromptPage[S]]]:
    """Cut pages of prompts into chunks of at most ``size``, which are computed one after another.

    Args:
        pages: those of each prompt in the order of its text.
        size: most pages of a chunk.
        in_turn: each page of a prompt needs what the one before it leaves, so that no two are in the same chunk.
    """
    chunks: list[list[PromptPage[S]]] = []
    earliest: dict[S, int] = {}
    for page in pages:
        number = earliest.get(page.sequence, 0)
        while number < len(chunks) and len(chunks[number]) == size:
            number += 1
        if number == len(chunks):
            chunks.append([])
        chunks[number].append(page)
        if in_turn:
            earliest[page.sequence] = number + 1
    return chunks


class Scheduler(Generic[S]):
    """Continuous batching over the pages of a PrefixCache. One thread at a time may call it.

    Args:
        cache: the pages.
        max_sequences: most sequences that run at a time.
        step_tokens: most prompt tokens that are computed in one step of the engine, before its decode; at least a page
            is computed.
        decode_steps: most tokens of each sequence in one step of the engine, where nobody waits for the step to end.
        prompt_tokens: most tokens of one prompt that are computed in a step, where programs take one page of each
            prompt; None for ``step_tokens``.
    """

    def __init__(
        self,
        cache: PrefixCache,
        max_sequences: int,
        step_tokens: int,
        decode_steps: int,
        prompt_tokens: int | None = None,
    ) -> None:
        self.cache = cache
        # Both lists are in the order of arrival, and everyone in `running` came before everyone in `waiting`.
        self.waiting: list[S] = []
        self.running: list[S] = []
        self._pages_per_step = max(1, step_tokens // cache.page_size)
        self._prompt_pages = max(1, (prompt_tokens or step_tokens) // cache.page_size)
        self._decode_steps = decode_steps
        # In reverse, so that the lowest is popped first.
        self._free_state_rows = list(range(max_sequences - 1, -1, -1))
        self._arrivals = 0
        self._restores: dict[S, int] = {}

    def check(self, sequence: PagedSequence) -> None:
        """Refuse a sequence that the cache could not hold even if it were empty.

        Raises:
            RequestError: it needs more pages than there are.
        """
        # The last token of a text is never an input, so it needs no position in the cache.
        needed = self._pages_for(sequence.end - 1)
        if needed > self.cache.pages:
            prompt = len(sequence.prompt_ids)
            raise RequestError(
                f"a prompt of {prompt} tokens and an answer of up to {sequence.end - prompt} need "
                f"{needed} pages of {self.cache.page_size} tokens, the cache has {self.cache.pages}; "
                "ask for a shorter answer (max_tokens), or give the engine more pages"
            )

    def add(self, sequence: S) -> None:
        """Put a new sequence at the end of the queue.

        Raises:
            RequestError: as ``check``.
        """
        self.check(sequence)
        sequence.number = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a sequence, waiting or running, and release its pages."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._stop(sequence)

    def restart(self) -> None:
        """Preempt every running sequence and empty the prefix cache, after the contents of the pages were lost."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.cache.clear()

    def admit(self) -> list[S]:
        """Start waiting sequences while there are state rows and pages, oldest first.

        Returns:
            The sequences that start now.
        """
        admitted = []
        # The first that does not fit ends the loop: a smaller one behind it must not overtake, or big ones starve.
        while self.waiting and self._free_state_rows and self._start(self.waiting[0]):
            admitted.append(self.waiting.pop(0))
        return admitted

    def prompt_pages(self) -> list[PromptPage[S]]:
        """Choose the pages of prompts to compute in this step, oldest sequence first.

        The caller computes them in this order, several at a time or not, and reports each by ``page_done``. Pages that
        others have computed since the admission are taken over here.
        """
        chosen: list[PromptPage[S]] = []
        in_prefill: list[S] = []
        for sequence in self.running:
            if len(chosen) == self._pages_per_step:
                break
            if sequence.decodes:
                continue
            self._take_over(sequence)
            waits = any(self._is_coming(sequence, older) for older in in_prefill)
            in_prefill.append(sequence)
            if waits:
                continue  # to be taken over in a later step
            start, most = sequence.computed, min(self._pages_per_step, len(chosen) + self._prompt_pages)
            # Each page is computed whole, at its own place: its bits follow from the text up to its end. Only the last
            # one of a prompt may be shorter.
            while start < sequence.prefill_end and len(chosen) < most:
                stop = min(start + self.cache.page_size, sequence.prefill_end)
                chosen.append(PromptPage(sequence, start, stop, sequence.pages[start // self.cache.page_size]))
                start = stop
        return chosen

    def take_restores(self) -> list[tuple[S, int]]:
        """The sequences whose states are behind the text that they begin with, and the snapshots of these states.

        The caller copies them before anything is computed: the snapshots may be given to others afterwards.
        """
        restores, self._restores = list(self._restores.items()), {}
        return restores

    def page_done(self, page: PromptPage[S]) -> int | None:
        """Note that a page of a prompt has been computed. A full one may serve others from now on.

        Returns:
            The snapshot into which the caller copies the states of the sequence before it goes on; None for none.
        """
        sequence, size = page.sequence, self.cache.page_size
        sequence.computed = page.stop
        if page.stop - page.start < size or sequence.private:
            return None
        index = page.start // size
        # The tree may have got the same page from another sequence meanwhile. Then it gives us that one, and ours is
        # free again.
        sequence.pages[index] = self.cache.insert(
            sequence.pages[:index], sequence.pages[index], sequence.prompt_ids[page.start : page.stop]
        )
        return self.cache.take_snapshot(sequence.pages[index]) if self._wants_snapshot(sequence) else None

    def batch(self) -> Batch[S]:
        """Choose the sequences to decode in this step, and give them pages for their new tokens.

        Each gets a single token where one of them needs the host after each token, where somebody waits for a first
        token, or where a prompt is still in prefill. The youngest are preempted where pages run out.
        """
        sequences = [sequence for sequence in self.running if sequence.decodes]
        in_prefill = len(sequences) < len(self.running)
        one_by_one = in_prefill or any(sequence.needs_host or not sequence.token_ids for sequence in sequences)
        decode_steps = 1 if one_by_one else self._decode_steps
        # Fewer tokens in this step are better than a preemption, which computes all of a text again.
        if sum(self._missing(sequence, decode_steps) for sequence in sequences) > self.cache.available:
            decode_steps = 1
        for sequence in sequences:
            # The youngest may be this one; its state row is None then, and the loop ends.
            while sequence.state_row is not None and not self._grow(sequence, decode_steps):
                self._preempt(self.running[-1])
        return Batch([sequence for sequence in sequences if sequence.state_row is not None], decode_steps)

    def _start(self, sequence: S) -> bool:
        """Give a waiting sequence a state row and pages for the text that it has, or change nothing."""
        pages = self.cache.match(sequence.prompt_ids, sequence.shareable)
        # Each running sequence may need a page soon. To admit one and preempt it at once would help nobody.
        reserve = len(self.running)
        needed = self._pages_for(len(sequence.prompt_ids) + len(sequence.token_ids)) - len(pages)
        own = self.cache.allocate(needed) if needed + reserve <= self.cache.available else None
        if own is None:
            self.cache.release(pages)
            return False
        sequence.state_row = self._free_state_rows.pop()
        sequence.pages = pages + own
        self._reuse(sequence, pages)
        # A sequence that was preempted is older than some of those that run.
        bisect.insort(self.running, sequence, key=lambda running: running.number)
        return True

    def _is_coming(self, sequence: S, older: S) -> bool:
        """Whether the next page that an older sequence computes belongs to this one's text as well."""
        stop = older.computed + self.cache.page_size
        if older.private or older.computed < sequence.computed or stop > min(older.prefill_end, sequence.shareable):
            return False
        return self.cache.shares and self._begin_alike(older, sequence, stop)

    def _begin_alike(self, one: S, other: S, stop: int) -> bool:
        """Whether the texts of two sequences are the same up to a page's end."""
        # The last page first: most texts differ there, and are long.
        start = stop - self.cache.page_size
        page = one.prompt_ids[start:stop] == other.prompt_ids[start:stop]
        return page and one.prompt_ids[:start] == other.prompt_ids[:start]

    def _take_over(self, sequence: S) -> None:
        """Skip pages of the prompt that others have computed since this sequence was admitted."""
        index, rest = divmod(sequence.computed, self.cache.page_size)
        if rest:
            return
        pages = self.cache.match(sequence.prompt_ids, sequence.shareable, behind=sequence.pages[:index])
        # Our own pages have been allocated, but nothing is in them yet.
        own = slice(index, index + len(pages))
        self.cache.release(sequence.pages[own])
        sequence.pages[own] = pages
        self._reuse(sequence, pages)

    def _reuse(self, sequence: S, pages: list[int]) -> None:
        """Count pages from the prefix cache as computed, with the states behind them."""
        tokens = len(pages) * self.cache.page_size
        sequence.computed += tokens
        # What a preempted sequence finds again it has computed itself; that saved the caller nothing.
        if not sequence.preemptions:
            sequence.reused += tokens
        if pages and self.cache.snapshots is not None:
            self._restores[sequence] = self.cache.snapshots.use(pages[-1])

    def _wants_snapshot(self, sequence: S) -> bool:
        """Whether the states behind the page that a sequence has just computed are worth a snapshot: where a later
        prompt may go on, or has gone on, otherwise than this one."""
        if self.cache.snapshots is None:
            return False
        size, stop = self.cache.page_size, sequence.computed
        full, rest = divmod(sequence.prefill_end, size)
        # The last page. What stands at a prompt's very end a chat's next turn writes otherwise: then the one before it.
        if stop // size >= full - (rest < PROMPT_TAIL):
            return True
        # Every so many pages: few enough that one long prompt leaves most snapshots to others.
        if stop // size % max(MIN_INTERVAL, full // max(3, self.cache.snapshots.count // 4)) == 0:
            return True
        following = sequence.prompt_ids[stop : stop + size]
        return self.cache.branches(sequence.pages[stop // size - 1], following) or any(
            stop <= other.shareable
            and (other.prompt_ids[stop : stop + size] != following or stop + size > other.shareable)
            and self._begin_alike(sequence, other, stop)
            for other in self.running
            if other is not sequence
        )

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def _missing(self, sequence: S, decode_steps: int) -> int:
        """Pages that the next ``decode_steps`` tokens need. The last token of a text is never an input."""
        reach = min(sequence.computed + decode_steps, sequence.end - 1)
        return max(0, self._pages_for(reach) - len(sequence.pages))

    def _grow(self, sequence: S, decode_steps: int) -> bool:
        pages = self.cache.allocate(self._missing(sequence, decode_steps))
        sequence.pages += pages or []
        return pages is not None

    def _preempt(self, sequence: S) -> None:
        """Take everything from a sequence but its tokens. It waits again, at its place in the order of arrival."""
        self._stop(sequence)
        sequence.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.number)

    def _stop(self, sequence: S) -> None:
        if sequence.state_row is None:
            raise ValueError("a sequence that does not run cannot be stopped")
        self.running.remove(sequence)
        self.cache.release(sequence.pages)
        self._restores.pop(sequence, None)
        self._free_state_rows.append(sequence.state_row)
        sequence.pages, sequence.state_row, sequence.computed = [], None, 0
