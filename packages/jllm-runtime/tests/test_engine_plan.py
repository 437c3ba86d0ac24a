"""Plans of the engine: its sizes, the descriptions of its programs' arguments, and bounds of what is compiled."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jllm_core import ModelConfig, MoEConfig, ShardingRules
from jllm_core.quantization.arrays import Quantization
from jllm_core.sharding import Placement
from jllm_runtime import Engine, EngineConfig, SamplingParams, make_mesh
from jllm_runtime.cache.paged import page_bytes as all_page_bytes
from jllm_runtime.engine.executor import MIN_EOS_IDS
from jllm_runtime.engine.grammar_masks import mask_words
from jllm_runtime.engine.pool_size import FITTED_SHARE, PAGES_BITS, USABLE
from jllm_runtime.mesh import abstract_mesh
from jllm_runtime.planner import command, engine_memory
from jllm_runtime.planner.bounds import program_bound
from jllm_runtime.planner.catalogue import PUBLISHED
from jllm_runtime.planner.compile_worker import compile_all, rules_from_json
from jllm_runtime.planner.engine_memory import engine_estimate, engine_sizes, largest_batch, live_bytes, page_bytes
from jllm_runtime.planner.memory import Workload
from jllm_runtime.planner.plan import make_placement, make_plan
from jllm_runtime.planner.report import as_json, memory_parts
from jllm_runtime.planner.roofline import decode_roofline
from jllm_runtime.planner.topologies import TOPOLOGIES, Device
from jllm_runtime.planner.tpu_compiler import Compilation, Program
from jllm_runtime.programs import paged_batch
from jllm_runtime.programs.paged_lowering import lowered_programs
from jllm_runtime.programs.paged_sizes import PagedSizes, reserved_bytes

SMALL = ModelConfig(
    model_type="small",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    context_length=4096,
)
ONE_DEVICE = Placement(abstract_mesh(None, 1))
SIZES = PagedSizes(
    rows=4, pages=24, page_size=16, table_width=16, chunk_pages=2, state_rows=4, snapshots=5, decode_steps=4, eos_ids=8
)


def test_the_plan_has_the_engines_own_sizes() -> None:
    assert EngineConfig().page_size == engine_memory.DEFAULT_PAGE_SIZE == command.DEFAULT_PAGE_SIZE
    assert EngineConfig().decode_steps == engine_memory.DECODE_STEPS
    assert (MIN_EOS_IDS, PAGES_BITS) == (engine_memory.EOS_IDS, engine_memory.PAGES_BITS)
    assert (FITTED_SHARE, USABLE) == (engine_memory.SHARE, engine_memory.USABLE)


def described(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_program_is_described_as_the_engine_calls_it(
    tiny: Any, kv_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is compiled ahead is what runs: else the engine would compile again when a request waits."""
    called: dict[str, list[Any]] = {}
    for name, function in (("decode", "decode_rows"), ("prefill", "prefill_pages")):
        real = getattr(paged_batch, function)

        def call(*arguments: Any, name: str = name, real: Any = real) -> Any:
            called[name] = described(arguments[:-1])
            # Not compiled: that would take seconds, and only the arguments matter.
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), real.eval_shape(*arguments))

        monkeypatch.setattr(paged_batch, function, call)
    model, config = (
        tiny.plain,
        EngineConfig(pages=24, page_size=16, max_batch=4, batch_sizes=(4,), kv_dtype=kv_dtype, chunk_tokens=32),
    )
    with Engine(model, config) as engine:
        engine.generate([list(range(40))], SamplingParams(max_tokens=4))
    monkeypatch.undo()
    lowered = lowered_programs(
        *(model.weights, model.config, dataclasses.replace(SIZES, table_width=4)),
        config.cache_dtype(model),
        model.backend,
    )
    for name, program in lowered.items():
        arguments = program().args_info[0]
        mine = jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), arguments)
        assert jax.tree.leaves(mine) == jax.tree.leaves(called[name]), name
    assert mask_words(model.config.vocab_size) == called["decode"][3].allowed[0][1]


def test_what_is_described_lies_as_the_engine_makes_it(tiny: Any) -> None:
    from jllm_runtime.programs.paged_lowering import describe_pages, describe_state

    model = tiny.plain
    pages = describe_pages(model.config, SIZES, jnp.dtype(jnp.float32), model.backend)
    shape, dtype = pages.keys[0].shape, pages.keys[0].dtype
    made = paged_batch.empty_pages(shape, dtype, model.config, model.backend, SIZES.state_rows)
    state = describe_state(model.config, SIZES, model.backend)
    begun = paged_batch.empty_state(SIZES.state_rows, model.config.vocab_size, model.placement)
    for mine, theirs in ((pages, made), (state, begun)):
        assert described(mine) == described(theirs)
        for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, len(one.shape))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_engines_programs_are_compiled_and_the_estimate_agrees(kv_dtype: Any) -> None:
    workload = Workload(batch=4, context=256, dtype="float32", kv_dtype=kv_dtype)
    sizes = dataclasses.replace(SIZES, pages=512)
    compiled = compile_all(SMALL, workload, make_mesh(devices=jax.devices()[:1]), ShardingRules(), sizes)
    assert set(compiled.programs) == {"decode", "prefill"}
    told, memory = compiled.memory, engine_estimate(SMALL, workload, ONE_DEVICE, sizes)
    assert told is not None
    # The compiler's also has the TokenState.
    assert told.kv == memory.kv + 4 * 512 * 9
    assert told.weights == pytest.approx(memory.weights, rel=0.02)
    assert told.total == pytest.approx(memory.total, rel=0.1)
    decode = compiled.programs["decode"]
    assert decode.hbm_read > memory.weights
    assert decode.kernel_reads == 0


def test_the_pool_takes_what_is_free_and_no_more_than_anybody_needs() -> None:
    device = Device("tpu", "test", 6_000_000, 6_000_000, 1e9, 1e12, "nowhere")
    workload = Workload(batch=4, context=1024)
    sizes = engine_sizes(SMALL, workload, ONE_DEVICE, device)
    one = page_bytes(SMALL, workload, ONE_DEVICE, 64)
    small = page_bytes(SMALL, dataclasses.replace(workload, kv_dtype="int8"), ONE_DEVICE, 64)
    assert small == all_page_bytes(SMALL, 64, jnp.dtype("int8"), ONE_DEVICE) == 2 * 2 * 4 * 64 * (8 + 4)
    assert one == all_page_bytes(SMALL, 64, jnp.dtype("bfloat16"), ONE_DEVICE) == 2 * 2 * 4 * 64 * 8 * 2
    memory = engine_estimate(SMALL, workload, ONE_DEVICE, sizes)
    # Here what programs and requests take besides leaves less than nine tenths.
    reserved = reserved_bytes(SMALL, 4, jnp.dtype("bfloat16"), ONE_DEVICE)
    room = 0.97 * (6_000_000 - memory.weights) - memory.temp - reserved
    assert room < 0.9 * (6_000_000 - memory.weights)
    assert 8 / 9 * room - one < sizes.pages * one <= room
    assert (sizes.rows, sizes.state_rows, sizes.table_width) == (4, 4, 16)
    plenty = dataclasses.replace(device, usable_bytes=10**12)
    assert engine_sizes(SMALL, workload, ONE_DEVICE, plenty).pages == 4 * 64
    assert engine_sizes(SMALL, workload, ONE_DEVICE, plenty, page_size=128, pages=7).pages == 7
    nothing = dataclasses.replace(device, usable_bytes=1)
    assert engine_sizes(SMALL, workload, ONE_DEVICE, nothing).pages == 1


@pytest.mark.parametrize(
    ("windows", "rows", "slots"), [(None, None, 2 * 1000 * 4), ((None, 100), None, 1100 * 4), (None, 1, 2 * 1000)]
)
def test_attention_reads_each_rows_text_once_or_its_window(windows: Any, rows: int | None, slots: int) -> None:
    config = dataclasses.replace(SMALL, windows=windows)
    live = live_bytes(config, Workload(batch=4, context=1000), ONE_DEVICE, rows)
    assert live == slots * 4 * 8 * 2 * 2


def test_rules_come_through_json_as_they_were() -> None:
    rules = ShardingRules(ffw=None)
    read = rules_from_json(json.loads(json.dumps(dataclasses.asdict(rules))))
    assert (read, hash(read)) == (rules, hash(rules))


# ---- Bounds.


@pytest.mark.parametrize(
    ("clock", "cycles", "seconds"), [(1e9, 5_000, 6e-6), (1e9, 7_000, 7e-6), (None, 7_000, 6e-6), (1e9, 0, 6e-6)]
)
def test_the_bound_is_the_largest_of_bytes_cycles_and_arithmetic(
    clock: float | None, cycles: int, seconds: float
) -> None:
    device = Device("tpu", "test", 1, 1, 1e9, 1e12, "nowhere", clock_hz=clock)
    program = Program(0, 0, 0, 0, 0, 0.0, 0.0, 0, (), 0.0, 1000, 2000, 3000, cycles)
    bound = program_bound(program, device)
    assert (bound.memory_s, bound.seconds) == pytest.approx((6e-6, seconds))
    assert bound.cycles_s == (None if clock is None or not cycles else pytest.approx(cycles / 1e9))
    busy = program_bound(dataclasses.replace(program, flops=8e6), device)
    assert (busy.arithmetic_s, busy.seconds) == pytest.approx((8e-6, 8e-6))


def test_a_core_of_v2_takes_in_matrices_more_slowly_than_its_memory_gives_them() -> None:
    config, v2 = PUBLISHED["Qwen/Qwen3-14B"].config, TOPOLOGIES["v2-8"]
    placement = make_placement(v2)
    plain, small = (
        decode_roofline(config, Workload(8, 4096, quantization=quantization), placement, v2.device)
        for quantization in (None, Quantization(8))
    )
    # 128 elements of 2 bytes at 0.7 GHz: 179 GB/s.
    head_and_layers = (14_768_307_200 - 151936 * 5120) / 8
    assert plain.feed_seconds == pytest.approx(head_and_layers / (128 * 0.7e9), rel=0.01)
    assert plain.bound == "matrix units"
    assert plain.seconds_per_step == plain.feed_seconds
    # Fewer bits bring memory there, not speed.
    assert small.seconds_per_step == plain.seconds_per_step
    assert small.bytes_per_step < plain.bytes_per_step


def test_matrix_units_take_in_the_experts_that_any_row_goes_to() -> None:
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=32)
    config = dataclasses.replace(SMALL, moe=moe)
    device = Device("tpu", "test", 1, 1, 1e30, 1e30, "nowhere", clock_hz=1.0, fed_per_cycle={16: 1})
    one, many = (decode_roofline(config, Workload(batch=batch), ONE_DEVICE, device) for batch in (1, 64))
    experts = 2 * 3 * 64 * 32 * 8
    share = (1 - 0.75**64) - 0.25
    assert many.feed_seconds - one.feed_seconds == pytest.approx(share * experts, rel=1e-3)
    assert decode_roofline(config, Workload(dtype="float32"), ONE_DEVICE, device).feed_seconds == 0


# ---- The command.


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from jllm_runtime.cli import main

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["jllm", "plan", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def test_the_plan_of_an_engine_has_its_pool_and_bounds(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PagedSizes] = []

    def compiled(config: Any, workload: Any, topology: Any, placement: Any, engine: PagedSizes) -> Compilation:
        asked.append(engine)
        step = Program(1400, 400, 400, 50, 0, 1.0, 1.0, 2, (), 0.5, 819 * 10**6, 0, 819 * 10**6, 1_500_000)
        return Compilation({"decode": step, "prefill": step})

    monkeypatch.setattr("jllm_runtime.planner.plan.compile_programs", compiled)
    arguments = ("qwen3-0.6b", "--topology", "v5e-1", "--batch", "16", "--context", "1024", "--engine")
    code, out, _ = plan(*arguments, "--page-size", "128", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["engine"] == dataclasses.asdict(asked[0])
    assert (asked[0].page_size, asked[0].rows) == (128, 16)
    assert told["per_device"]["kv_bytes"] == 400
    assert told["bounds"]["decode"] == {
        "memory_s": 0.002,
        "cycles_s": 0.001,
        "arithmetic_s": 1 / 197e12,
        "seconds": 0.002,
    }
    tokens = asked[0].pages * 128
    assert (told["largest_batch"], told["largest_context"]) == (tokens // 1024, min(tokens // 16, 40960))
    assert told["compiled"]["programs"]["decode"]["hbm_read"] == 819 * 10**6

    code, out, _ = plan(*arguments)
    words = " ".join(out.split())
    assert "decode at best: 8,000 tokens/s, 2.0 ms a step (2.0 ms of memory, 1.0 ms of cycles)" in words
    chunk = asked[1].chunk_pages * asked[1].page_size
    assert f"prefill at best: {chunk / 0.002:,.0f} tokens/s" in words
    assert f"The engine's pool: {asked[1].pages:,} pages of 64" in words


def test_without_the_engine_there_are_no_pages(plan: Callable[..., Any]) -> None:
    code, _, err = plan("qwen3-0.6b", "--topology", "v5e-1", "--page-size", "64")
    assert (code, "add --engine" in err) == (2, True)
    code, _, err = plan("qwen3-0.6b", "--topology", "v5e-1", "--page-size", "48", "--engine")
    assert (code, "power of two" in err) == (2, True)


def test_a_plan_without_a_compiler_has_no_bounds_and_no_engine(plan: Callable[..., Any]) -> None:
    _, out, _ = plan("qwen3-0.6b", "--topology", "v5e-1", "--json")
    assert (json.loads(out)["bounds"], json.loads(out)["engine"]) == ({}, None)


def test_states_are_counted_beside_the_pages_of_the_layers_of_attention(tiny: Any) -> None:
    config = dataclasses.replace(tiny.hybrid, num_layers=4, mixers=("delta_net",) * 3 + ("attention",))
    workload = Workload(batch=4, context=256, dtype="float32")
    sizes = dataclasses.replace(SIZES, pages=512)
    compiled = compile_all(config, workload, make_mesh(devices=jax.devices()[:1]), ShardingRules(), sizes)
    told, memory = compiled.memory, engine_estimate(config, workload, ONE_DEVICE, sizes)
    assert memory.states == SIZES.state_rows * 3 * 4 * (4 * 8 * 12 + 3 * (2 * 8 + 2 * 8 + 4 * 12))
    assert memory.snapshots == memory.states * 5 // 4
    assert memory.total == memory.weights + memory.kv + memory.states + memory.snapshots + memory.temp
    page = page_bytes(config, workload, ONE_DEVICE, SIZES.page_size)
    assert page == 2 * 2 * SIZES.page_size * 8 * 4
    assert memory.kv == 512 * page
    assert told is not None
    assert told.kv == memory.kv + memory.states + SIZES.state_rows * config.vocab_size * 9
    # What they take, pages do not get.
    plain = dataclasses.replace(config, mixers=None, delta_net=None)
    room = 400 * page_bytes(config, workload, ONE_DEVICE, 64)
    device = Device("tpu", "test", room, room, 1e9, 1e12, "nowhere")
    few, many = (dataclasses.replace(workload, batch=batch) for batch in (1, 64))
    assert live_bytes(config, workload, ONE_DEVICE) * 4 == live_bytes(plain, workload, ONE_DEVICE)
    larger, smaller = (engine_sizes(config, each, ONE_DEVICE, device) for each in (few, many))
    assert smaller.pages < larger.pages
    assert (larger.snapshots, engine_sizes(plain, few, ONE_DEVICE, device).snapshots) == (4, 0)
    # Another text takes pages, states and a snapshot.
    assert 2 < largest_batch(config, workload, ONE_DEVICE, sizes) < 512 * SIZES.page_size // 256
    texts = 512 * page + 9 * (memory.states // 4)
    assert largest_batch(config, workload, ONE_DEVICE, sizes) == texts // (256 // 16 * page + memory.states // 2)
    assert largest_batch(plain, workload, ONE_DEVICE, sizes) == 512 * SIZES.page_size // 256
    # A quarter of what is left beside weights and states.
    one = memory.states // SIZES.state_rows
    room = memory.weights + int((64 + 4 * 20.5) * one / 0.9)
    tight = Device("tpu", "test", room, room, 1e9, 1e12, "nowhere")
    assert engine_sizes(config, many, ONE_DEVICE, tight).snapshots == 20
    # Pages of a given number go before snapshots.
    pages = 70 * one // page_bytes(config, workload, ONE_DEVICE, 64)
    rest = int((room - memory.weights) * 0.9) - 64 * one - pages * page_bytes(config, workload, ONE_DEVICE, 64)
    assert engine_sizes(config, many, ONE_DEVICE, tight, pages=pages).snapshots == rest // one < 20


def test_snapshots_are_in_the_report_of_an_engine_with_states(tiny: Any) -> None:
    workload, topology = Workload(batch=4, context=64, dtype="float32"), TOPOLOGIES["v5e-1"]
    sizes = engine_sizes(tiny.hybrid, workload, ONE_DEVICE, topology.device)
    made = make_plan("tiny", tiny.hybrid, topology, workload, ONE_DEVICE, engine=sizes)
    told = as_json(made)
    assert told["engine"]["snapshots"] == 4
    assert told["per_device"]["snapshots_bytes"] == told["per_device"]["states_bytes"] > 0
    assert memory_parts(made)["prefix snapshots"] == told["per_device"]["snapshots_bytes"]
    without = make_plan("tiny", tiny.hybrid, topology, workload, ONE_DEVICE)
    assert "prefix snapshots" not in memory_parts(without)
