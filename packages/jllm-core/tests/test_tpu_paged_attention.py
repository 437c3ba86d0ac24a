"""The kernel of paged attention for TPUs against the attention of ``ops``, interpreted on the CPU, and where it is
chosen."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, Mesh
from jllm_core.backends import blocked_attention
from jllm_core.backends.tpu import paged_attention
from jllm_core.backends.tpu.backend import TPU
from jllm_core.kv_cache import PagedSlots
from jllm_core.ops.attention import attention
from jllm_core.quantization.keys_values import QuantizedSlots, quantize_slots
from jllm_core.sharding import Placement, ShardingRules


class Case(NamedTuple):
    """Shapes that a kernel is compiled for."""

    queries: int = 1
    kv_heads: int = 2
    group: int = 2
    head: int = 16
    page: int = 8
    window: int | None = None
    quantized: bool = False
    dtype: Any = jnp.float32
    rows: int = 3
    width: int = 6


CASES = {
    "decode": Case(),
    "decode, a window": Case(page=4, window=13, width=12),
    "decode, int8": Case(quantized=True, width=7),
    "decode, an odd group, bfloat16": Case(kv_heads=1, group=5, dtype=jnp.bfloat16),
    "decode, whole lanes": Case(head=128, group=1),
    "decode, many heads": Case(kv_heads=32, group=1, rows=2),
    "prefill": Case(queries=8),
    "prefill, a window": Case(queries=8, window=5),
    "prefill, a window over blocks": Case(queries=8, window=30, width=12),
    "prefill, in parts": Case(queries=32, page=32, group=3, width=3),
    "prefill, int8": Case(queries=16, page=16, quantized=True, kv_heads=3),
    "prefill, small pages": Case(queries=4, page=4, width=12),
    "prefill, whole lanes, bfloat16": Case(queries=16, page=16, head=128, dtype=jnp.bfloat16, width=4),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few pages and queries, so that rows have several."""
    monkeypatch.setattr(paged_attention, "DECODE_SLOTS", 16)
    monkeypatch.setattr(paged_attention, "PREFILL_SLOTS", 32)
    monkeypatch.setattr(paged_attention, "MAX_QUERIES", 96)


class Rows(NamedTuple):
    """Queries, and pages with their tables, of rows that end at these lengths."""

    q: jax.Array
    keys: PagedSlots
    values: PagedSlots
    positions: jax.Array


def rows_of(case: Case, lengths: list[int], seed: int = 0, width: int | None = None) -> Rows:
    """Rows with so many tokens each; one of 0 is blank. What no row has in it is not a number."""
    rng = np.random.default_rng(seed)
    rows, width = len(lengths), width or case.width
    pool = rows * case.width + 2
    own = rng.permutation(pool)[: rows * case.width].reshape(rows, -1)
    tables = np.full((rows, width), pool, np.int32)
    filled = np.zeros((pool, case.page), bool)
    for row, length in enumerate(lengths):
        pages = own[row, : -(-length // case.page)]
        tables[row, : len(pages)] = pages
        filled[pages] = (np.arange(len(pages) * case.page) < length).reshape(-1, case.page)

    def slots() -> PagedSlots:
        numbers = rng.standard_normal((pool, case.kv_heads, case.page, case.head))
        numbers = np.where(filled[:, None, :, None], numbers, np.nan)
        if not case.quantized:
            return PagedSlots(jnp.asarray(numbers, case.dtype), jnp.asarray(tables))
        values, scales = quantize_slots(jnp.asarray(np.nan_to_num(numbers), jnp.float32))
        return PagedSlots(QuantizedSlots(values, jnp.where(filled[:, None], scales, jnp.nan)), jnp.asarray(tables))

    keys, values = slots(), slots()
    q = jnp.asarray(rng.standard_normal((rows, case.queries, case.kv_heads * case.group, case.head)), case.dtype)
    starts = np.maximum(np.array(lengths) - case.queries, 0)
    return Rows(q, keys, values, jnp.asarray(starts[:, None] + np.arange(case.queries), jnp.int32))


@cache
def kernel(window: int | None, interpret: Any = True) -> Any:
    """The kernel, compiled once for each of its shapes."""

    def attend(q: jax.Array, keys: PagedSlots, values: PagedSlots, positions: jax.Array) -> jax.Array:
        return paged_attention.paged_attention(q, keys.pages, values.pages, keys.tables, positions, window, interpret)

    return jax.jit(attend)


def lengths_of(case: Case) -> Any:
    """Lengths of rows: of whole pages where a row is one, and blank ones."""
    step = case.queries
    return st.lists(
        st.integers(0, case.width * case.page // step).map(lambda steps: steps * step),
        min_size=case.rows,
        max_size=case.rows,
    )


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_xla_gives(name: str) -> None:
    case = CASES[name]
    reference = jax.jit(partial(attention, window=case.window))

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(lengths_of(case), st.integers(0, 9))
    def check(lengths: list[int], seed: int) -> None:
        rows = rows_of(case, lengths, seed)
        ours = np.asarray(kernel(case.window)(*rows), np.float32)
        theirs = np.asarray(reference(*rows[:4]), np.float32)
        there = np.array(lengths) > 0
        assert np.isfinite(ours).all()  # of blank rows, too
        np.testing.assert_allclose(ours[there], theirs[there], atol=2e-6 if case.dtype == jnp.float32 else 0.03)

    check()


@pytest.mark.parametrize("case", [CASES["decode, a window"], CASES["prefill, int8"]])
def test_no_copy_races_with_another(case: Case) -> None:
    interpret = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    rows = rows_of(case, [case.width * case.page, 0, 3 * case.page])
    np.testing.assert_allclose(kernel(case.window, interpret)(*rows), kernel(case.window)(*rows), atol=2e-6)
    # Read after the kernel ran, for each run has races of its own.
    try:
        from jax._src.pallas.mosaic.interpret.interpret_pallas_call import races
    except ImportError:  # its place in older JAX
        from jax._src.pallas.mosaic.interpret import races

    assert not races.races_found


@pytest.mark.parametrize("name", ["prefill, in parts", "decode, a window"])
def test_neighbours_and_the_width_of_the_table_change_no_bit(name: str) -> None:
    case = CASES[name]
    length = 2 * case.page
    rows = rows_of(case, [length, case.width * case.page, 0])
    first = np.asarray(kernel(case.window)(*rows))[0]
    alone = jax.tree.map(lambda array: array[:1], (rows.q, rows.keys.tables, rows.positions))
    wider = jnp.pad(alone[1], ((0, 0), (0, 5)), constant_values=len(rows.keys.pages))
    keys, values = (PagedSlots(slots.pages, wider) for slots in (rows.keys, rows.values))
    np.testing.assert_array_equal(kernel(case.window)(alone[0], keys, values, alone[2])[0], first)
    others = rows._replace(positions=rows.positions.at[1:].set(rows.positions[1:] // 2))
    np.testing.assert_array_equal(kernel(case.window)(*others)[0], first)


def test_a_row_that_ended_may_stand_behind_its_pages() -> None:
    rows = rows_of(CASES["decode"], [48, 16, 9])
    behind = rows._replace(positions=rows.positions.at[1].set(10_000))
    ours = kernel(None)(*behind)
    assert jnp.isfinite(ours).all()
    np.testing.assert_array_equal(ours[::2], kernel(None)(*rows)[::2])


# ---- The choice.


class Absent(NamedTuple):
    """A device that is not there."""

    device_kind: str


def on(kind: str = "TPU v5 lite", rules: ShardingRules | None = None, **axes: int) -> Placement:
    mesh = AbstractMesh(tuple(axes.values()) or (1,), tuple(axes) or ("tensor",), abstract_device=Absent(kind))
    return Placement(mesh, rules or ShardingRules())


def chosen(
    placement: Placement, page: int = 64, head: int = 128, rows: int = 16, width: int = 128, **fields: Any
) -> bool:
    queries, kv_heads, dtype = fields.get("queries", 1), fields.get("kv_heads", 8), fields.get("dtype", jnp.bfloat16)
    pool: Any = jax.ShapeDtypeStruct((100, kv_heads, page, head), fields.get("kv", dtype))
    if pool.dtype == jnp.int8:
        pool = QuantizedSlots(pool, jax.ShapeDtypeStruct(pool.shape[:3], jnp.float32))
    answers = []

    def ask(pool: Any, tables: jax.Array) -> None:
        slots = PagedSlots(pool, tables)
        answers.append(paged_attention.supports((rows, queries, 32, head), dtype, slots, placement))

    jax.eval_shape(ask, pool, jax.ShapeDtypeStruct((rows, width), jnp.int32))
    return answers[0]


@pytest.mark.parametrize(
    ("placement", "fields", "expected"),
    [
        (on("TPU v5 lite"), {}, True),
        (on("TPU v6 lite", tensor=8), {}, True),
        (on("TPU v4"), {"queries": 64}, True),
        (on("TPU v5"), {"kv": jnp.int8, "page": 128}, True),
        (on("TPU v5 lite", data=2, tensor=4), {}, True),
        (on(), {"dtype": jnp.float32}, True),
        (on(), {"head": 64, "page": 128}, True),
        (on(), {"head": 80, "page": 128}, True),
        (on("TPU v2"), {}, False),
        (on("TPU v3"), {}, False),
        (on("NVIDIA H200"), {}, False),
        (on("cpu"), {}, False),
        (on(), {"dtype": jnp.float16}, False),
        (on(), {"kv": jnp.float32}, False),
        (on(), {"kv": jnp.int8}, False),  # scales of 64 tokens lie otherwise
        (on(), {"head": 64}, False),
        (on(), {"head": 72, "page": 128}, False),
        (on(), {"page": 8}, False),
        (on(tensor=16), {}, False),  # 8 kv heads do not divide
        (on(), {"rows": 256, "width": 2048}, False),  # tables beyond the scalar memory
        (on(), {"page": 1024}, False),  # a page beyond a block
    ],
)
def test_where_the_kernel_is_chosen(placement: Placement, fields: dict[str, Any], expected: bool) -> None:
    assert chosen(placement, **fields) == expected


def test_the_backend_runs_the_kernel_where_it_can_and_xla_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    rows = rows_of(CASES["decode"], [20, 48, 5])
    expected = attention(*rows)
    calls: list[int] = []
    attend = paged_attention.attention
    monkeypatch.setattr(paged_attention, "attention", lambda *args: calls.append(1) or attend(*args))
    interpreted, plain = TPU(placement, interpret=True), TPU(placement)
    np.testing.assert_allclose(jax.jit(interpreted.attention)(*rows), expected, atol=2e-6)
    assert calls == [1]
    np.testing.assert_array_equal(plain.attention(*rows), expected)
    assert calls == [1]
    assert interpreted.one_table_width
    assert not plain.one_table_width


@pytest.mark.parametrize(("kind", "blocked"), [("TPU v5 lite", True), ("TPU v3", False)])
def test_pages_that_the_kernel_does_not_take_are_never_gathered_to_a_wide_table(
    kind: str, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = Placement(Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    monkeypatch.setattr(Placement, "device_kind", kind)
    rows = rows_of(CASES["decode"], [20, 48, 5], width=100)
    expected = attention(*rows)
    gathered = []
    take = PagedSlots.gathered
    monkeypatch.setattr(PagedSlots, "gathered", lambda self, *last: gathered.append(self.shape) or take(self, *last))
    backend = TPU(placement)
    np.testing.assert_allclose(backend.attention(*rows), expected, atol=2e-6)
    assert backend.one_table_width == blocked
    assert {shape[2] for shape in gathered} == {blocked_attention.BLOCK if blocked else 800}


@pytest.mark.parametrize(
    ("kind", "tokens", "one_width"),
    [("TPU v2", 256, False), ("TPU v5 lite", 512, True), ("TPU v6 lite", 1024, True)],
)
def test_how_a_tpu_wants_its_prompts(kind: str, tokens: int, one_width: bool) -> None:
    backend = TPU(on(kind))
    assert (backend.prefill_tokens, backend.min_step_tokens) == (tokens, tokens // 2)
    assert backend.one_table_width == one_width
