"""The scheduler: rules one by one, then any order of events against what must always hold."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jllm_runtime import RequestError
from jllm_runtime.cache.prefix import PrefixCache
from jllm_runtime.cache.snapshots import StateSnapshots
from jllm_runtime.engine.scheduler import Batch, PagedSequence, PromptPage, Scheduler, in_chunks

SIZE = 4


def scheduler(
    pages: int = 32,
    state_rows: int = 4,
    step_tokens: int = SIZE,
    decode_steps: int = 3,
    snapshots: int | None = None,
) -> Scheduler:
    """Of a model with states, where a number of snapshots is given."""
    kept = None if snapshots is None else StateSnapshots(snapshots)
    return Scheduler(PrefixCache(pages, SIZE, kept), state_rows, step_tokens, decode_steps)


def sequence(length: int = 6, answer: int = 5, first: int = 0, branch: int = 100, **fields: bool) -> PagedSequence:
    """Its tokens count up from ``first``, and otherwise from position ``branch`` on."""
    tokens = [first + at + 1000 * (branch + 1) * (at >= branch) for at in range(length)]
    return PagedSequence(tokens, length + answer, **fields)


class States:
    """The texts that the states of the state rows and of the snapshots have taken in."""

    def __init__(self) -> None:
        self.of_rows: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}

    def restore(self, plan: Scheduler) -> None:
        for one, snapshot in plan.take_restores():
            self.of_rows[one.state_row] = self.kept[snapshot]

    def move(self, one: PagedSequence, stop: int) -> None:
        """A program takes in the tokens of a sequence that come next, up to ``stop``."""
        if one.computed == 0:
            self.of_rows[one.state_row] = []
        assert self.of_rows[one.state_row] == one.known(0, one.computed)
        self.of_rows[one.state_row] = one.known(0, stop)

    def done(self, plan: Scheduler, page: PromptPage) -> int | None:
        snapshot = plan.page_done(page)
        if snapshot is not None:
            self.kept[snapshot] = self.of_rows[page.sequence.state_row]
        return snapshot


def prefill(plan: Scheduler, states: States | None = None) -> list[PromptPage]:
    """Admit, and compute everything that is to be computed."""
    plan.admit()
    done: list[PromptPage] = []
    states = states or States()
    while pages := plan.prompt_pages():
        states.restore(plan)
        for page in pages:
            states.move(page.sequence, page.stop)
            states.done(plan, page)
        done += pages
    states.restore(plan)
    return done


def decode(plan: Scheduler, batch: Batch, states: States | None = None) -> list[PagedSequence]:
    """What the engine does with the results of a batch; returns the sequences that have ended."""
    ended = []
    for one in batch.sequences:
        for _ in range(batch.decode_steps):
            if states is not None:
                states.move(one, one.computed + 1)
            one.computed += 1
            if one.computed == len(one.prompt_ids) + len(one.token_ids):
                one.token_ids.append(len(one.token_ids))
            if len(one.prompt_ids) + len(one.token_ids) == one.end:
                ended.append(one)
                plan.remove(one)
                break
    return ended


def test_a_prompt_is_taken_in_page_by_page_up_to_its_last_token() -> None:
    plan = scheduler()
    plan.add(sequence(10))
    assert [(page.start, page.stop) for page in prefill(plan)] == [(0, 4), (4, 8), (8, 9)]
    assert plan.running[0].decodes


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    plan = scheduler()
    plan.add(sequence(1))
    assert prefill(plan) == []
    assert [one.computed for one in plan.batch().sequences] == [0]


def test_a_long_prompt_is_taken_in_between_steps_of_the_others() -> None:
    plan = scheduler(step_tokens=2 * SIZE)
    plan.add(sequence(5))
    prefill(plan)
    plan.add(sequence(40, first=100))
    plan.admit()
    assert [page.start for page in plan.prompt_pages()] == [0, 4]
    batch = plan.batch()
    assert [one.number for one in batch.sequences] == [0]
    assert batch.decode_steps == 1  # the prompt goes on soon


def test_a_page_that_another_prompt_is_getting_in_the_same_step_is_waited_for() -> None:
    plan = scheduler(step_tokens=8 * SIZE)
    for length in (10, 10, 7):
        plan.add(sequence(length))
    plan.add(sequence(9, computes_all=True))
    plan.admit()
    pages = plan.prompt_pages()
    # The last page of a prompt is its own, and who wants something of every position computes all.
    assert [(page.sequence.number, page.start) for page in pages] == [(0, 0), (0, 4), (0, 8), (3, 0), (3, 4)]
    for page in pages:
        plan.page_done(page)
    assert [(page.sequence.number, page.start) for page in plan.prompt_pages()] == [(1, 8), (2, 4)]
    assert [one.reused for one in plan.running] == [0, 8, 4, 0]


@pytest.mark.parametrize(
    ("size", "in_turn", "expected"),
    [
        (1, False, ["a0", "a4", "a8", "b0", "b4", "c0"]),
        (4, False, ["a0 a4 a8 b0", "b4 c0"]),
        (1, True, ["a0", "a4", "a8", "b0", "b4", "c0"]),
        (2, True, ["a0 b0", "a4 b4", "a8 c0"]),
        (4, True, ["a0 b0 c0", "a4 b4", "a8"]),
    ],
)
def test_pages_of_a_prompt_that_go_in_turn_are_in_chunks_of_their_own(
    size: int, in_turn: bool, expected: list[str]
) -> None:
    plan = scheduler(step_tokens=8 * SIZE)
    for number, length in enumerate((11, 6, 3)):
        plan.add(sequence(length, first=100 * number))
    plan.admit()
    chunks = in_chunks(plan.prompt_pages(), size, in_turn)
    assert [" ".join(f"{'abc'[page.sequence.number]}{page.start}" for page in chunk) for chunk in chunks] == expected


def test_the_first_token_is_not_waited_for_and_further_ones_come_several_a_step() -> None:
    plan = scheduler()
    plan.add(sequence())
    prefill(plan)
    first = plan.batch()
    assert first.decode_steps == 1
    decode(plan, first)
    assert plan.batch().decode_steps == 3


def test_a_sequence_that_needs_the_host_gets_one_token_a_step() -> None:
    plan = scheduler()
    plan.add(sequence())
    plan.add(sequence(first=50, needs_host=True))
    prefill(plan)
    assert plan.batch().decode_steps == 1


def test_more_sequences_than_slots_wait_in_order() -> None:
    plan = scheduler(state_rows=2)
    sequences = [sequence(first=100 * number) for number in range(4)]
    for one in sequences:
        plan.add(one)
    assert plan.admit() == sequences[:2]
    assert plan.admit() == []
    plan.remove(sequences[0])
    assert plan.admit() == [sequences[2]]


def test_a_small_request_does_not_overtake_one_that_waits_for_pages() -> None:
    plan = scheduler(pages=8)
    plan.add(sequence(20, first=0))
    plan.add(sequence(20, first=100))
    plan.add(sequence(1, first=200))
    assert [one.number for one in plan.admit()] == [0]
    assert [one.number for one in plan.waiting] == [1, 2]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    plan = scheduler(pages=3)
    plan.add(sequence(8, answer=5))  # the twelfth token is the last that needs a place
    with pytest.raises(RequestError, match=r"answer of up to 6 need 4 pages of 4 tokens.* has 3;"):
        plan.add(sequence(8, answer=6))


def test_a_prefix_is_reused_in_whole_pages_and_never_the_last_token() -> None:
    plan = scheduler()
    plan.add(sequence(9))
    prefill(plan)
    for length, reused in ((9, 8), (8, 4), (5, 4), (4, 0), (30, 8)):
        plan.add(sequence(length))
        [one] = plan.admit()
        assert one.reused == reused
        plan.remove(one)


def test_a_sequence_that_computes_all_reuses_nothing_but_is_reused() -> None:
    plan = scheduler()
    plan.add(sequence(9))
    prefill(plan)
    plan.add(sequence(9, computes_all=True))
    assert len(prefill(plan)) == 2
    assert plan.running[1].reused == 0
    assert plan.running[0].pages[:2] == plan.running[1].pages[:2]


def test_a_private_sequence_neither_takes_nor_leaves_pages() -> None:
    plan = scheduler()
    for private in (True, False, True):
        plan.add(sequence(9, private=private))
    assert [page.sequence.number for page in prefill(plan)] == [0, 0, 1, 1, 2, 2]
    assert len({page for one in plan.running for page in one.pages}) == 9


def test_a_prompt_that_another_is_taking_in_is_computed_once() -> None:
    plan = scheduler()
    for _ in range(3):
        plan.add(sequence(9))
    assert [(page.sequence.number, page.start) for page in prefill(plan)] == [(0, 0), (0, 4)]
    assert [one.reused for one in plan.running] == [0, 8, 8]


def snapshots_of(plan: Scheduler, states: States, **fields: int) -> list[int]:
    """Take a prompt in alone; the numbers of its pages behind which a snapshot was made."""
    plan.add(sequence(answer=1, **fields))
    plan.admit()
    made = []
    while pages := plan.prompt_pages():
        states.restore(plan)
        for page in pages:
            states.move(page.sequence, page.stop)
            if states.done(plan, page) is not None:
                made.append(page.start // SIZE)
    states.restore(plan)
    plan.remove(plan.running[0])
    return made


@pytest.mark.parametrize(
    ("length", "made"),
    # The last full page, the one before where a chat's next turn may write the end of it otherwise, and some between.
    [(1, []), (4, []), (5, [0]), (20, [2, 3]), (21, [3, 4]), (4 * 40 + 1, [9, 19, 29, 38, 39])],
)
def test_states_are_kept_where_a_later_prompt_may_go_on(length: int, made: list[int]) -> None:
    plan, states = scheduler(pages=64, snapshots=16), States()
    assert snapshots_of(plan, states, length=length) == made


def test_a_prompt_goes_on_from_the_last_snapshot_and_leaves_one_where_it_branches_off() -> None:
    plan, states = scheduler(pages=64, snapshots=16), States()
    assert snapshots_of(plan, states, length=41) == [7, 8, 9]
    plan.add(sequence(41))
    [one] = plan.admit()
    assert (one.reused, plan.prompt_pages()) == (40, [])
    states.restore(plan)
    assert states.of_rows[one.state_row] == one.prompt_ids[:40]
    plan.remove(one)
    # Five pages are the same, but no states are kept there: computed once more, and kept.
    assert snapshots_of(plan, states, length=41, branch=22) == [4, 7, 8, 9]
    plan.add(sequence(41, branch=21))
    assert len(prefill(plan, states)) == 5
    assert plan.running[0].reused == 20


def test_prompts_that_begin_alike_wait_for_the_states_behind_what_they_share() -> None:
    plan, states = scheduler(pages=64, snapshots=16), States()
    for branch in (13, 13, 17, 100):
        plan.add(sequence(25, branch=branch))
    computed = [(page.sequence.number, page.start // SIZE) for page in prefill(plan, states)]
    assert computed == [*((0, page) for page in range(6)), *((2, page) for page in (3, 4, 5)), (3, 4), (3, 5)]
    assert [one.reused for one in plan.running] == [0, 24, 12, 16]


def test_a_prompt_that_is_computed_in_full_holds_nobody_up() -> None:
    plan = scheduler(step_tokens=64)
    plan.add(sequence(17))
    prefill(plan)
    plan.add(sequence(33, computes_all=True))
    plan.add(sequence(33))
    plan.admit()
    assert {page.sequence.number for page in plan.prompt_pages()} == {1, 2}


def test_a_sequence_that_is_stopped_is_given_no_states() -> None:
    plan, states = scheduler(pages=64, snapshots=4), States()
    assert snapshots_of(plan, states, length=41) == [7, 8, 9]
    plan.add(sequence(41))
    assert len(plan.admit()) == 1
    plan.restart()
    assert plan.take_restores() == []


def test_without_room_for_snapshots_nobody_waits_in_vain() -> None:
    plan, states = scheduler(pages=64, step_tokens=64, snapshots=0), States()
    for _ in range(3):
        plan.add(sequence(9))
    assert [page.sequence.number for page in prefill(plan, states)] == [0, 0, 1, 1, 2, 2]


def test_a_chunk_of_pages_that_go_in_turn_is_filled_with_those_of_others() -> None:
    plan = Scheduler(
        PrefixCache(64, SIZE, StateSnapshots(4)), 4, step_tokens=4 * SIZE, decode_steps=1, prompt_tokens=SIZE
    )
    for number in range(5):
        plan.add(sequence(17, first=100 * number))
    plan.admit()
    pages = plan.prompt_pages()
    assert [(page.sequence.number, page.start) for page in pages] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert len(in_chunks(pages, 4, in_turn=True)) == 1


def test_who_waits_goes_on_alone_where_the_other_is_cancelled() -> None:
    plan, states = scheduler(pages=64, snapshots=4), States()
    for _ in range(2):
        plan.add(sequence(41))
    plan.admit()
    for _ in range(3):
        states.restore(plan)
        for page in plan.prompt_pages():
            states.move(page.sequence, page.stop)
            states.done(plan, page)
    plan.remove(plan.running[0])
    assert [page.start // SIZE for page in prefill(plan, states)] == list(range(10))
    assert plan.running[0].decodes


def test_the_youngest_gives_way_and_comes_back_at_its_place() -> None:
    plan = scheduler(pages=6, decode_steps=1)
    old, young, third = sequence(7, answer=13), sequence(7, answer=9, first=50), sequence(1, first=90)
    plan.add(old)
    plan.add(young)
    prefill(plan)
    while not young.preemptions:
        decode(plan, plan.batch())
        if not plan.waiting:
            assert len(plan.running) == 2
    plan.add(third)
    assert plan.running == [old]
    assert plan.waiting == [young, third]
    assert (young.pages, young.computed, young.state_row) == ([], 0, None)
    assert young.token_ids  # what it has said stays said
    known = young.known(5, 9)
    assert known == [55, 56, *young.token_ids[:2]]


def test_steps_get_shorter_before_anybody_gives_way() -> None:
    plan = scheduler(pages=4, decode_steps=8)
    plan.add(sequence(4, answer=5))
    plan.add(sequence(4, answer=5, first=50))
    prefill(plan)
    decode(plan, plan.batch())
    batch = plan.batch()
    assert (batch.decode_steps, len(batch.sequences)) == (8, 2)
    plan = scheduler(pages=3, decode_steps=8)
    plan.add(sequence(3, answer=7))
    plan.add(sequence(3, answer=7, first=50))
    prefill(plan)
    decode(plan, plan.batch())
    batch = plan.batch()
    assert (batch.decode_steps, len(batch.sequences)) == (1, 2)


class Engine(RuleBasedStateMachine):
    """Requests come, go on, end and are cancelled in any order, over few pages."""

    @initialize(
        pages=st.integers(4, 24),
        state_rows=st.integers(1, 4),
        chunks=st.integers(1, 3),
        decode_steps=st.integers(1, 6),
        snapshots=st.none() | st.integers(0, 4),
    )
    def start(self, pages: int, state_rows: int, chunks: int, decode_steps: int, snapshots: int | None) -> None:
        self.state_rows = state_rows
        self.plan = scheduler(pages, state_rows, chunks * SIZE, decode_steps, snapshots)
        self.states = None if snapshots is None else States()
        self.ended: set[int] = set()
        self.cancelled: set[int] = set()
        self.sequences: list[PagedSequence] = []

    @rule(
        length=st.integers(1, 20),
        answer=st.integers(1, 20),
        begins=st.integers(0, 1),
        branch=st.sampled_from([4, 9, 13, 100]),
        flags=st.booleans(),
    )
    def add(self, length: int, answer: int, begins: int, branch: int, flags: bool) -> None:
        new = sequence(
            length,
            answer,
            100 * begins,
            branch,
            needs_host=flags,
            computes_all=flags and length % 2 == 0,
            private=length % 5 == 0,
        )
        try:
            self.plan.add(new)
            self.sequences.append(new)
        except RequestError:
            assert -(-(length + answer - 1) // SIZE) > self.plan.cache.pages

    @precondition(lambda self: self.plan.running or self.plan.waiting)
    @rule(choice=st.integers(0, 100))
    def cancel(self, choice: int) -> None:
        alive = self.plan.running + self.plan.waiting
        gone = alive[choice % len(alive)]
        self.cancelled.add(gone.number)
        self.plan.remove(gone)

    @rule()
    def step(self) -> None:
        oldest = min(self.plan.running + self.plan.waiting, key=lambda one: one.number, default=None)
        before = oldest and (oldest.computed, len(oldest.token_ids), oldest.preemptions)
        self.plan.admit()
        pages = self.plan.prompt_pages()
        if self.states is not None:
            self.states.restore(self.plan)
        for page in pages:
            assert page.start % SIZE == 0
            assert page.sequence.pages[page.start // SIZE] == page.page
            if self.states is None:
                assert self.plan.page_done(page) is None
            else:
                self.states.move(page.sequence, page.stop)
                self.states.done(self.plan, page)
        batch = self.plan.batch()
        for one in batch.sequences:
            assert len(one.pages) * SIZE >= min(one.computed + batch.decode_steps, one.end - 1)
        self.ended |= {one.number for one in decode(self.plan, batch, self.states)}
        if oldest:  # nobody starves: the oldest goes on in every step
            assert oldest.preemptions == before[2]
            assert oldest.number in self.ended or oldest.computed > before[0]

    @invariant()
    def pages_are_counted_right(self) -> None:
        cache = self.plan.cache
        users: dict[int, int] = {}
        for one in self.plan.running:
            assert len(set(one.pages)) == len(one.pages)
            for page in one.pages:
                users[page] = users.get(page, 0) + 1
        assert cache._ref_counts == users
        free = cache._free
        assert len(set(free)) == len(free)
        assert not set(free) & set(users)
        assert not set(free) & set(cache._nodes)
        assert len(free) + cache.in_use + cache.idle == cache.pages
        assert cache.idle == len(set(cache._nodes) - set(users))
        for node in cache._nodes.values():  # who holds a page holds its parents
            if node.parent is not cache._root:
                assert users.get(node.parent.page, 0) >= users.get(node.page, 0)

    @invariant()
    def snapshots_are_counted_right(self) -> None:
        snapshots = self.plan.cache.snapshots
        if snapshots is not None:
            assert set(snapshots._taken) <= set(self.plan.cache._nodes)
            assert sorted([*snapshots._free, *snapshots._taken.values()]) == list(range(snapshots.count))

    @invariant()
    def a_page_that_is_not_in_the_tree_has_one_user(self) -> None:
        cache = self.plan.cache
        assert all(count == 1 for page, count in cache._ref_counts.items() if page not in cache._nodes)

    @invariant()
    def those_that_run_came_before_those_that_wait(self) -> None:
        order = [one.number for one in self.plan.running + self.plan.waiting]
        assert order == sorted(order)
        state_rows = [one.state_row for one in self.plan.running]
        assert len(set(state_rows)) == len(state_rows) <= self.state_rows
        assert all(one.state_row is None and not one.pages for one in self.plan.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "plan"):
            return
        for _ in range(2000):
            if not (self.plan.running or self.plan.waiting):
                break
            self.step()
        assert {one.number for one in self.sequences} == self.ended | self.cancelled
        assert self.plan.cache.in_use == 0
        self.plan.cache.clear()
        assert self.plan.cache.available == self.plan.cache.pages


TestAnyOrderOfEvents = Engine.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
