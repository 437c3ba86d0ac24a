"""Models with delta nets in the engine: the tokens of a text move its states once, whatever else runs."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jllm_core import DeltaNetConfig, ModelConfig
from jllm_core.array_info import named_leaves
from jllm_core.recurrent_state import RecurrentState, StateCache
from jllm_runtime import Engine, EngineConfig, Model, SamplingParams, generate
from jllm_runtime.cache.paged import PagedCache, page_bytes
from jllm_runtime.cache.state_pool import state_pool_info
from jllm_runtime.chat.local import ChatSession
from jllm_runtime.engine import pool_size, warm_up
from jllm_runtime.engine.executor import Executor
from jllm_runtime.engine.pool_size import device_state_bytes
from jllm_runtime.engine.request import Request
from jllm_runtime.engine.runner import Runner
from jllm_runtime.engine.scheduler import PromptPage
from jllm_runtime.engine.sequence import Sequence
from jllm_runtime.errors import EngineError
from jllm_runtime.outputs import OutputStream
from jllm_runtime.programs import paged_batch

LENGTHS = (1, 2, 63, 64, 65, 66, 128, 129, 200)


@pytest.fixture(scope="module", params=["XLA", "kernels"])
def config(tiny, request) -> ModelConfig:
    """On a CPU with kernels they compute the layers whose heads are whole vectors."""
    return tiny.hybrid if request.param == "XLA" else tiny.hybrid_of_vectors


@pytest.fixture(scope="module")
def model(tiny, config: ModelConfig) -> Model:
    return tiny.random(config, tokenizer=tiny.tokenizer)


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, EngineConfig(pages=64)) as engine:
        yield engine
        engine.close(drain=True)
        assert_nothing_is_held(engine)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


def seeded(max_tokens: int, seed: int = 3) -> SamplingParams:
    return greedy(max_tokens, temperature=1.0, top_p=0.95, seed=seed)


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.states_in_use, stats.pages_in_use) == (0,) * 4
    assert len(engine._scheduler._free_state_rows) == engine.config.max_batch
    assert engine._cache.available == engine._cache.pages
    assert stats.snapshots_in_use <= min(stats.snapshots, stats.pages_idle)
    engine._cache.clear()
    assert engine.stats().snapshots_in_use == engine.stats().pages_idle == 0


# ---- The same tokens.


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_are_those_of_generate(length: int, engine: Engine, model: Model, prompt) -> None:
    expected = generate(model, [prompt(length)], greedy(20))[0].token_ids
    for reused in (0, (length - 1) // 64 * 64):
        [output] = engine.generate([prompt(length)], greedy(20))
        assert output.token_ids == expected
        assert output.reused_tokens == reused


def test_what_comes_behind_a_reused_prompt_has_the_same_bits(model: Model, prompt) -> None:
    """Prompts that begin alike: from where one ends, and from where two have parted."""
    common, ends = prompt(100), [prompt(50, seed=seed) for seed in range(3)]
    asked, own = (
        [common + ends[0], common + ends[0] + ends[1], common + ends[2], common + ends[1]],
        greedy(5, logprobs=3),
    )
    sizes = {"pages": 64, "page_size": 16}
    with Engine(model, EngineConfig(**sizes)) as warm, Engine(model, EngineConfig(snapshots=0, **sizes)) as cold:
        found = [warm.submit(ids, own).result() for ids in asked]
        expected = [cold.submit(ids, own).result() for ids in asked]
        # The third shares six pages, behind which the first has left no states, and leaves them itself.
        assert [output.reused_tokens for output in found] == [0, 144, 0, 96]
        assert [output.reused_tokens for output in expected] == [0] * 4
        assert cold.stats().snapshots == cold.stats().snapshots_in_use == 0
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == other.logprobs  # floats, equal to the bit
        assert_nothing_is_held(warm)


def test_prompts_that_come_together_are_computed_once_as_far_as_they_are_the_same(model: Model, prompt) -> None:
    asked = [prompt(100) + prompt(40, seed=number // 2) for number in range(6)]
    expected = [output.token_ids for output in generate(model, asked, greedy(8))]
    with Engine(model, EngineConfig(pages=128, page_size=16, step_tokens=64)) as engine:
        with engine._changed:
            requests = [engine.submit(ids, greedy(8)) for ids in asked]
        outputs = [request.result() for request in requests]
        assert [output.token_ids for output in outputs] == expected
        assert [output.reused_tokens for output in outputs] == [0, 128, 96, 128, 96, 128]
        assert_nothing_is_held(engine)


def test_an_evicted_snapshot_costs_time_and_changes_nothing(model: Model, prompt) -> None:
    asked = [prompt(100, seed=number % 5) for number in range(12)]
    expected = [output.token_ids for output in generate(model, asked[:5], greedy(8))]
    with Engine(model, EngineConfig(pages=64, page_size=16, snapshots=2, max_batch=2)) as engine:
        outputs = engine.generate(asked, greedy(8))
        assert [output.token_ids for output in outputs] == [expected[number % 5] for number in range(12)]
        assert engine.stats().snapshots_in_use == 2
        assert_nothing_is_held(engine)


def test_the_same_request_gets_the_same_tokens_whatever_happens(model: Model, engine: Engine, prompt) -> None:
    """Alone, a second time, among 15 others, some of which are cancelled, and after giving way."""
    asked = [(prompt(100), greedy(50)), (prompt(100), seeded(50))]
    expected = [output.token_ids for output in generate(model, [ids for ids, _ in asked], [own for _, own in asked])]
    assert expected[0] != expected[1]
    for (ids, own), right in zip(asked, expected, strict=True):
        for _ in range(2):
            assert engine.submit(ids, own).result().token_ids == right
        beside = [engine.submit(prompt(1 + 17 * number, seed=1), seeded(25, number)) for number in range(15)]
        among = engine.submit(ids, own)
        for request in beside[::3]:
            request.cancel()
        assert among.result().token_ids == right
        assert sorted({request.result().finish_reason for request in beside}) == ["cancelled", "length"]

    others = [prompt(50, seed=number) for number in range(6)]
    apart = [engine.submit(ids, greedy(40)).result().token_ids for ids in others]
    assert engine.stats().preemptions == 0
    # Few pages: the youngest give way, lose their states, and are computed anew.
    with Engine(model, EngineConfig(pages=24, page_size=16)) as few:
        with few._changed:  # all of them before the first step
            requests = [few.submit(ids, own) for ids, own in asked * 3]
            requests += [few.submit(ids, greedy(40)) for ids in others]
        assert [request.result().token_ids for request in requests] == expected * 3 + apart
        assert few.stats().preemptions > 2
        assert_nothing_is_held(few)


@pytest.mark.parametrize(
    ("mixers", "sizes"),
    [
        (("delta_net", "delta_net"), {"page_size": 8, "chunk_tokens": 32}),
        (("attention", "delta_net"), {"page_size": 128, "step_tokens": 300}),
    ],
)
def test_any_pattern_of_layers_and_any_pages(
    mixers: Any, sizes: dict[str, int], config: ModelConfig, tiny, prompt
) -> None:
    other = tiny.random(dataclasses.replace(config, mixers=mixers))
    prompts = [prompt(length) for length in (1, 40, 8, 33)]
    expected = [output.token_ids for output in generate(other, prompts, greedy(12))]
    with Engine(other, EngineConfig(pages=64, batch_sizes=(16,), **sizes)) as engine:
        assert [output.token_ids for output in engine.generate(prompts, greedy(12))] == expected


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_states_are_float32_whatever_the_pages_are(kv_dtype: Any, model: Model, prompt) -> None:
    with Engine(model, EngineConfig(pages=8, kv_dtype=kv_dtype)) as engine:
        engine.generate([prompt(20)], greedy(3))
        pages = engine._executor._runner._pages
        assert {array.dtype.name for array in jax.tree.leaves(pages.states)} == {"float32"}
        assert pages.keys[1].values.dtype == jnp.int8 if kv_dtype == "int8" else pages.keys[1].dtype == jnp.bfloat16


def test_a_failed_step_begins_its_neighbours_with_empty_states(
    model: Model, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, [prompt(70)], greedy(30))[0].token_ids
    decode, calls = paged_batch.decode_rows, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            # The pages are gone, as after an error on the device.
            decode(*arguments)
            raise RuntimeError("out of luck")
        return decode(*arguments)

    monkeypatch.setattr(paged_batch, "decode_rows", fail_once)
    with Engine(model, EngineConfig(pages=64, max_batch=2)) as engine:
        with engine._changed:
            first, second, third = (engine.submit(prompt(70), greedy(30)) for _ in range(3))
        for request in (first, second):
            with pytest.raises(Exception, match="out of luck"):
                request.result()
        assert third.result().token_ids == expected
        assert_nothing_is_held(engine)


def test_after_a_failed_step_nothing_goes_on_from_lost_states(
    model: Model, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, other = (generate(model, [prompt(length)], greedy(3))[0].token_ids for length in (70, 30))

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    with Engine(model, EngineConfig(pages=64, page_size=16)) as engine:
        assert engine.submit(prompt(70), greedy(3)).result().token_ids == expected
        with monkeypatch.context() as broken:
            broken.setattr(Runner, "restore", fail)
            with engine._changed:
                failing, beside = (engine.submit(prompt(length), greedy(3)) for length in (70, 30))
            with pytest.raises(Exception, match="out of luck"):
                failing.result()
            assert beside.result().token_ids == other
        for reused in (0, 64):
            output = engine.submit(prompt(70), greedy(3)).result()
            assert (output.token_ids, output.reused_tokens) == (expected, reused)
        assert_nothing_is_held(engine)


def test_many_short_requests_over_few_pages_and_few_states_leave_nothing_behind(model: Model, prompt) -> None:
    rng = random.Random(0)
    kinds = [
        (prompt(length, seed=length), seeded(answer, answer)) for length in (1, 5, 17, 40) for answer in (1, 6, 15)
    ]
    expected = [output.token_ids for output in generate(model, [ids for ids, _ in kinds], [own for _, own in kinds])]
    with Engine(model, EngineConfig(pages=12, page_size=8, max_batch=4, snapshots=3)) as engine:
        chosen = [rng.randrange(len(kinds)) for _ in range(500)]
        requests = [engine.submit(*kinds[kind]) for kind in chosen]
        dropped = set(range(7, 500, 11))
        for number in dropped:
            requests[number].cancel()
        for number, (kind, request) in enumerate(zip(chosen, requests, strict=True)):
            output = request.result()
            if number not in dropped:
                assert (output.finish_reason, output.token_ids) == ("length", expected[kind])
        stats = engine.stats()
        assert stats.preemptions > 0
        assert (stats.states, stats.failed, stats.finished + stats.cancelled) == (4, 0, 500)
        assert stats.reused_tokens > 0
        assert_nothing_is_held(engine)


def test_log_probabilities_of_prompt_and_answer(model: Model, engine: Engine, prompt) -> None:
    ids = prompt(70)
    wished = greedy(5, logprobs=1, prompt_logprobs=0)
    output = engine.submit(ids, wished).result()
    text = [*ids, *output.token_ids]
    scores = np.asarray(jax.nn.log_softmax(model.logits([text])[0]))
    found = [*output.prompt_logprobs[1:], *output.logprobs]
    assert [entry.token_id for entry in found] == text[1:]
    np.testing.assert_allclose(
        [entry.logprob for entry in found], [scores[at, token] for at, token in enumerate(text[1:])], atol=1e-4
    )


def test_a_chats_second_turn_goes_on_from_the_first(model: Model) -> None:
    session, reused = ChatSession(model, greedy(5)), []
    for text in ("hello " * 40, "more"):
        sent = [*session.messages, {"role": "user", "content": text}]
        shown, whole = "".join(session.send(text)), model.chat(sent, greedy(5))
        assert session._newest.token_ids == whole.token_ids
        # A session keeps back a character that the limit cuts: it may go on.
        assert whole.text.startswith(shown)
        assert shown.rstrip("\ufffd") == whole.text.rstrip("\ufffd")
        assert session.engine is not None
        reused.append(session.engine.stats().reused_tokens)
    assert reused[1] >= reused[0] + 128
    session.close()


def test_a_chat_goes_on_where_its_own_engine_has_taken_the_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(
        dataclasses.replace(model, config=dataclasses.replace(model.config, context_length=4096)), greedy(5)
    )
    "".join(session.send("hello"))
    monkeypatch.setattr(pool_size, "free_bytes", lambda _: 0)
    engine = session.engine
    # An answer that fits, and one that would want a larger engine.
    for most in (5, 3000):
        session.set("max_tokens", most)
        reply = session.send("more")
        next(reply)
        reply.close()
        assert session.engine is engine
    session.close()
    with pytest.raises(EngineError, match="leave no room for pages"):
        "".join(session.send("again"))


# ---- Whose states a step moves.


def sequence(model: Model, ids: list[int], pages: list[int], state_row: int) -> Sequence:
    params = greedy(50, seed=0)
    stream = OutputStream(model, ids, params)
    made = Sequence(Request(ids, 1, lambda _: None), 0, params, stream, None)
    made.pages, made.state_row = pages, state_row
    return made


def filled(executor: Executor, one: Sequence, size: int = 16) -> Sequence:
    for start in range(0, one.prefill_end, size):
        executor.prefill([PromptPage(one, start, min(start + size, one.prefill_end), one.pages[start // size])])
    one.computed = one.prefill_end
    return one


def states(executor: Executor) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in named_leaves(executor._runner._pages.states).items()}


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[int]:
    """The state rows that are not the same to the bit."""
    return {row for name in before for row in range(4) if before[name][row].tobytes() != after[name][row].tobytes()}


def spoiled(executor: Executor) -> None:
    """Leaves what is no number in every state row, as a sequence that has failed may."""
    runner = executor._runner
    runner._pages = dataclasses.replace(
        runner._pages, states=jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), runner._pages.states)
    )


@pytest.mark.parametrize("rows", [4, 8], ids=["each in its own row", "rows of states elsewhere"])
def test_a_step_moves_the_states_of_its_own_rows_alone(rows: int, model: Model, prompt) -> None:
    executor = Executor(model, EngineConfig(page_size=16, max_batch=4, batch_sizes=(rows,)), pages=20)

    def after(steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The states before and after steps of two texts, the second of which ends with the first step."""
        spoiled(executor)
        start = states(executor)
        one = filled(executor, sequence(model, prompt(40), [3, 1, 4, 5], 2))
        taken_in = states(executor)
        assert moved(start, taken_in) == {2}
        other = filled(executor, sequence(model, prompt(20), [7, 8, 9], 0))
        other.end = other.computed + 2
        before = states(executor)
        assert moved(taken_in, before) == {0}
        executor.decode([one, other], steps)
        return before, states(executor)

    before, first = after(1)
    again, second = after(2)
    assert moved(before, again) == set()
    assert moved(before, first) == {0, 2}
    assert moved(first, second) == {2}
    assert np.isfinite([array[[0, 2]].sum() for array in second.values()]).all()


@pytest.mark.parametrize("rows", [4, 8], ids=["each in its own row", "rows of states elsewhere"])
def test_a_text_begins_with_zeros_whatever_was_there(rows: int, model: Model, prompt) -> None:
    executor = Executor(model, EngineConfig(page_size=16, max_batch=4, batch_sizes=(rows,)), pages=20)
    for length in (1, 20):
        spoiled(executor)
        one = filled(executor, sequence(model, prompt(length), [10, 11], 3))
        made, _ = executor.decode([one], 2)
        assert made[0, :2].tolist() == generate(model, [prompt(length)], greedy(2))[0].token_ids


def test_rows_without_a_sequence_move_nothing(model: Model, prompt) -> None:
    executor = Executor(model, EngineConfig(page_size=16, max_batch=4), pages=20)
    filled(executor, sequence(model, prompt(20), [10, 11], 3))
    before = states(executor)
    executor.warm_up()
    assert moved(before, states(executor)) == set()


def test_the_state_behind_a_prompt_has_the_same_bits_in_any_row_beside_anybody(model: Model, prompt) -> None:
    executor = Executor(model, EngineConfig(page_size=64, chunk_tokens=192, max_batch=4), pages=20)
    one, again = sequence(model, prompt(150), [0, 1, 2], 0), sequence(model, prompt(150), [3, 4, 5], 3)
    others = [sequence(model, prompt(150, seed=row), [6 + row, 9 + row, 12 + row], row) for row in (1, 2)]

    def page(of: Sequence, number: int) -> PromptPage:
        return PromptPage(of, 64 * number, min(64 * number + 64, of.prefill_end), of.pages[number])

    for number in range(3):
        executor.prefill([page(one, number)])
    for number in range(3):
        executor.prefill([page(others[0], number), page(others[1], number), page(again, number)])
    for name, array in states(executor).items():
        np.testing.assert_array_equal(array[0], array[3], err_msg=name)
        assert not np.array_equal(array[0], array[1]), name


def test_it_is_a_cache_as_the_model_wants_it(model: Model) -> None:
    executor = Executor(model, EngineConfig(max_batch=2), pages=2)
    rows = jnp.array([1, 2])  # the second has none
    cache = PagedCache(executor._runner._pages, jnp.zeros((2, 1), jnp.int32), rows, begins=jnp.array([False, True]))
    assert isinstance(cache, StateCache)
    ones = jax.tree.map(lambda array: jnp.ones((2, *array.shape[1:])), cache.pages.states[0])
    after = cache.set_state(0, ones)
    for array in jax.tree.leaves(after.pages.states):
        np.testing.assert_array_equal(array[1], 1)
        assert not np.array(array[0] == 1).all()
    for array in jax.tree.leaves(after.state(0)):
        np.testing.assert_array_equal(array, jnp.stack([jnp.ones_like(array[0]), jnp.zeros_like(array[0])]))
    # Each row's own, none of which begins.
    for array, pool in zip(
        *map(jax.tree.leaves, (PagedCache(after.pages, cache.tables).state(0), after.pages.states[0])), strict=True
    ):
        np.testing.assert_array_equal(array, pool)
    for array in jax.tree.leaves(PagedCache(after.pages, cache.tables).set_state(0, ones).pages.states):
        np.testing.assert_array_equal(array, 1)


# ---- Memory.


@pytest.mark.parametrize(
    ("sizes", "most"),
    # Of all states XLA's CPU compiler makes what each operation of the rule gives; a TPU's writes over what it reads.
    [({"max_batch": 200, "batch_sizes": (4, 200)}, 0.2), ({"max_batch": 64, "batch_sizes": (64,)}, 2.2)],
    ids=["a few of the states", "all of them"],
)
def test_no_step_copies_pages_or_states(
    sizes: dict[str, Any], most: float, config: ModelConfig, tiny, prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So wide that a layer's states weigh more than all activations.
    net = DeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=64, value_head_dim=64)
    model = tiny.random(dataclasses.replace(config, delta_net=net))
    programs: dict[str, Any] = {}

    def measure(name: str) -> None:
        step = getattr(paged_batch, name)

        def measured(*arguments: Any) -> Any:
            programs[name] = step.lower(*arguments).compile()
            return step(*arguments)

        monkeypatch.setattr(paged_batch, name, measured)

    measure("prefill_pages")
    measure("decode_rows")
    executor = Executor(model, EngineConfig(decode_steps=2, page_size=8, **sizes), pages=2000)
    executor.decode([filled(executor, sequence(model, prompt(20), [5, 6, 7], 0), 8)], 2)
    pages = executor._runner._pages
    states, memory = jax.tree.leaves(pages.states), pages.states[0].memory
    for name, program in programs.items():
        needs = program.memory_analysis()
        assert needs.alias_size_in_bytes >= pages.nbytes() + sum(array.nbytes for array in states), name
        assert needs.temp_size_in_bytes < most * memory.nbytes, name
        made = [line for line in program.as_text().splitlines() if f"= f32[{','.join(map(str, memory.shape))}]" in line]
        assert made, name
        assert not [line for line in made if " copy(" in line], name


def test_a_snapshot_is_copied_by_itself(config: ModelConfig, model: Model) -> None:
    executor = Executor(model, EngineConfig(max_batch=64, snapshots=64), pages=2)
    pages, snapshots = executor._runner._pages, executor._runner._snapshots
    number = np.int32(0)
    program = paged_batch.copy_states.lower(snapshots, number, pages.states, number, model.placement).compile()
    needs, all_states = program.memory_analysis(), sum(array.nbytes for array in jax.tree.leaves(snapshots))
    assert needs.alias_size_in_bytes >= all_states
    assert needs.temp_size_in_bytes < all_states / 16


def test_only_attention_takes_pages_and_states_are_counted_apart(config: ModelConfig, model: Model) -> None:
    executor = Executor(model, EngineConfig(page_size=8, max_batch=4), pages=5)
    pages = executor._runner._pages
    assert pages.nbytes() == 5 * page_bytes(config, 8, jnp.dtype("float32")) == 5 * 2 * 2 * 8 * config.head_dim * 4
    assert [keys.nbytes for keys in pages.keys] == [0, 5 * 2 * 8 * config.head_dim * 4]
    keys, values = config.delta_net.key_head_dim, config.delta_net.value_head_dim
    one = 4 * (4 * keys * values + 3 * (2 * keys + 2 * keys + 4 * values))
    assert sum(array.nbytes for array in jax.tree.leaves(pages.states)) == 4 * one == device_state_bytes(model, 4)
    assert (
        device_state_bytes(
            dataclasses.replace(model, config=dataclasses.replace(config, mixers=None, delta_net=None)), 4
        )
        == 0
    )
    assert isinstance(state_pool_info(config, 4)[0], RecurrentState)


def test_the_states_memory_is_not_given_to_pages(
    model: Model, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_bytes(config, 64, jnp.dtype("float32"))
    states = device_state_bytes(model, 16)
    monkeypatch.setattr(pool_size, "free_bytes", lambda _: 2 * (48 * page + states))
    assert EngineConfig(max_batch=16).page_count(model) == 48
    # A quarter of what is left is for snapshots, and those go before pages of a given number.
    monkeypatch.setattr(pool_size, "free_bytes", lambda _: 2 * (states + 10 * states // 4))
    assert EngineConfig(max_batch=16).fitted(model).snapshots == 10
    pages = 2 * states // page
    assert EngineConfig(max_batch=16, pages=pages).fitted(model).snapshots == (10 * states // 4 - pages * page) // (
        states // 16
    )
    monkeypatch.setattr(pool_size, "free_bytes", lambda _: 2 * states)
    with pytest.raises(EngineError, match=r"the states of 16 texts, .* leave no room for pages; give .* max_batch"):
        EngineConfig(max_batch=16).page_count(model)


def test_states_that_do_not_fit_are_refused_before_anything_is_compiled(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "free_bytes", lambda _: device_state_bytes(model, 19))
    monkeypatch.setattr(warm_up, "compile_together", lambda *_: pytest.fail("compiled"))
    with pytest.raises(EngineError, match="the states of 20 texts"):
        Engine(model, EngineConfig(max_batch=16, snapshots=4, pages=2, warm_up=True))
