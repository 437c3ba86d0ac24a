"""Plans: against arrays that are made, against XLA's numbers for the compiled programs, and by hand."""

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jllm_core import ModelConfig, MoEConfig, ShardingRules
from jllm_core.config import DeltaNetConfig
from jllm_core.quantization.arrays import Quantization
from jllm_core.sharding import Placement
from jllm_runtime import make_mesh
from jllm_runtime.errors import MeshError, PlanError
from jllm_runtime.mesh import abstract_mesh, parse_mesh
from jllm_runtime.planner.assumptions import QUANTIZATIONS
from jllm_runtime.planner.catalogue import PUBLISHED, find_published
from jllm_runtime.planner.compile_worker import compile_all, find_collectives
from jllm_runtime.planner.engine_memory import engine_estimate, engine_sizes
from jllm_runtime.planner.memory import (
    CHUNK_CODE,
    SHORT_CHUNK_CODE,
    STEP_CODE,
    Workload,
    delta_net_code,
    estimate_memory,
    parameter_count,
)
from jllm_runtime.planner.plan import Plan, make_placement, make_plan
from jllm_runtime.planner.report import memory_parts
from jllm_runtime.planner.roofline import decode_roofline, touched_experts
from jllm_runtime.planner.topologies import TOPOLOGIES, CompilerTarget, Device, Topology, find_topology
from jllm_runtime.planner.tpu_compiler import Collective, compile_programs

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
SMALL_HYBRID = dataclasses.replace(
    SMALL,
    num_layers=3,
    mixers=("delta_net", "attention", "delta_net"),
    delta_net=DeltaNetConfig(num_key_heads=4, num_value_heads=8, key_head_dim=8, value_head_dim=4),
    output_gate=True,
)
ONE_DEVICE = Placement(abstract_mesh(None, 1))


def machine(usable_bytes: int, devices: int = 1) -> Topology:
    return Topology("test", Device("cpu", "test", usable_bytes, usable_bytes, 1e9, 1e12, "nowhere"), devices)


def plan_of(usable_bytes: int, workload: Workload | None = None) -> Plan:
    return make_plan("small", SMALL, machine(usable_bytes), workload or Workload())


# ---- The published models.


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name: str) -> None:
    model = PUBLISHED[name]
    assert parameter_count(model.config) == model.parameters


# As the model cards have them, in billions: parameters outside of the embeddings, and those that a token activates.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("0.6B", 0.44), ("1.7B", 1.4), ("4B", 3.6), ("8B", 6.95), ("14B", 13.2), ("32B", 31.2), ("30B-A3B", 29.9)],
)
def test_the_rest_is_what_the_card_calls_non_embedding(name: str, billions: float) -> None:
    config = PUBLISHED[f"Qwen/Qwen3-{name}"].config
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    digits = len(str(billions).partition(".")[2])
    assert round((parameter_count(config) - embeddings) / 1e9, digits) == billions


@pytest.mark.parametrize(
    ("name", "billions"),
    [("3-30B-A3B", 3.3), ("3-235B-A22B", 22.0), ("3.5-35B-A3B", 3.45), ("3.5-397B-A17B", 17.4), ("3.5-4B", 4.21)],
)
def test_a_token_activates_what_the_card_says(name: str, billions: float) -> None:
    config = PUBLISHED[f"Qwen/Qwen{name}"].config
    flops = decode_roofline(config, Workload(context=1), ONE_DEVICE, TOPOLOGIES["h200"].device).flops_per_step
    layers = len(config.layers_with("attention"))
    attention = 4 * layers * config.num_heads * 256 * config.head_dim  # over the smallest cache
    # All others are two a parameter, but for an untied embedding, whose rows are looked up.
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    active = (flops - attention) / 2 + looked_up
    assert active / 1e9 == pytest.approx(billions, rel=0.02)


# As the model cards and the pages of the hub have them, in billions, all parameters counted.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("Qwen2.5-0.5B", 0.49), ("Qwen2.5-1.5B", 1.54), ("Qwen2.5-3B", 3.09), ("Qwen2.5-7B", 7.61)),
        *(("Qwen2.5-14B", 14.7), ("Qwen2.5-32B", 32.5), ("Qwen2.5-72B", 72.7), ("Qwen2.5-Coder-32B-Instruct", 32.5)),
        *(("Qwen2-0.5B", 0.49), ("Qwen2-1.5B-Instruct", 1.54), ("Qwen2-7B", 7.62), ("Qwen2-72B", 72.7)),
        *(("Qwen2.5-Math-7B-Instruct", 7.62), ("Qwen3-30B-A3B-Instruct-2507", 30.5)),
        *(("Qwen3-4B-Thinking-2507", 4.02), ("Qwen3-235B-A22B-Thinking-2507", 235.0)),
        # Of these the text part, computed by others from config.json.
        *(("Qwen3.5-0.8B", 0.75), ("Qwen3.5-2B", 1.88), ("Qwen3.5-4B", 4.21), ("Qwen3.5-9B", 8.95)),
        *(("Qwen3.6-27B", 26.9), ("Qwen3.5-35B-A3B", 34.7), ("Qwen3.5-122B-A10B", 122.1), ("Qwen3.8-27B", 26.9)),
        *(("Qwen3.5-397B-A17B", 396.4), ("Qwen3.8-2.4T-A95B", 2420.0), ("Qwen3-Next-80B-A3B-Thinking", 79.7)),
        *(("Qwen3-Coder-30B-A3B-Instruct", 30.5), ("Qwen3-14B-Base", 14.8), ("Qwen3-0.6B-FP8", 0.6)),
        *(("llama-7b", 6.74), ("llama-13b", 13.0), ("llama-30b", 32.5), ("llama-65b", 65.2)),
        *(("Llama-2-7b-hf", 6.74), ("Llama-2-13b-chat-hf", 13.0), ("Llama-2-70b", 69.0)),
        *(("Meta-Llama-3-8B-Instruct", 8.03), ("Meta-Llama-3-70B", 70.6), ("Llama-3.1-8B-Instruct", 8.03)),
        *(("Meta-Llama-3.1-405B", 406.0), ("Llama-3.2-1B", 1.24), ("Llama-3.2-3B-Instruct", 3.21)),
        *(("Llama-3.3-70B-Instruct", 70.6), ("Mistral-7B-v0.1", 7.24), ("Mistral-7B-Instruct-v0.2", 7.24)),
        *(("Mistral-7B-Instruct-v0.3", 7.25), ("SmolLM2-135M", 0.135), ("SmolLM2-360M-Instruct", 0.362)),
        *(("SmolLM2-1.7B", 1.71), ("SmolLM3-3B", 3.08), ("TinyLlama-1.1B", 1.1)),
        *(("DeepSeek-R1-Distill-Qwen-1.5B", 1.78), ("DeepSeek-R1-Distill-Qwen-7B", 7.62)),
        *(("DeepSeek-R1-Distill-Qwen-14B", 14.8), ("DeepSeek-R1-Distill-Qwen-32B", 32.8)),
        *(("DeepSeek-R1-Distill-Llama-8B", 8.03), ("DeepSeek-R1-Distill-Llama-70B", 70.6)),
    ],
)
def test_the_number_of_parameters_is_that_of_the_card(name: str, billions: float) -> None:
    model = find_published(name)
    assert model is not None
    assert parameter_count(model.config) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", "qwen/QWEN3-30B-A3B", "unsloth/Qwen3-30B-A3B"])
def test_a_published_model_is_found_by_its_name_in_any_case(name: str) -> None:
    assert find_published(name) is PUBLISHED["Qwen/Qwen3-30B-A3B"]
    assert find_published(name + "x") is None


def test_every_name_of_the_catalogue_means_itself() -> None:
    for name, model in PUBLISHED.items():
        assert find_published(name) is model
        assert find_published(name.split("/")[1].upper()) is model


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
        ("qwen3-4b-2507", "Qwen/Qwen3-4B-Instruct-2507"),
        ("qwen3-coder-30b-a3b", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
    ],
)
def test_a_variant_of_the_same_architecture_is_found(name: str, published: str) -> None:
    assert find_published(name) is PUBLISHED[published]


def test_a_variant_with_another_context_is_a_model_of_its_own() -> None:
    contexts = {
        "Qwen3-4B": 40960,
        "Qwen3-4B-Base": 32768,
        "Qwen3-4B-Instruct-2507": 262144,
        "Qwen2.5-7B": 131072,
        "Qwen2.5-7B-Instruct": 32768,
        "Qwen2.5-Math-7B": 4096,
        "Llama-3.1-8B": 131072,
        "Meta-Llama-3-8B": 8192,
    }
    assert {name: find_published(name).config.context_length for name in contexts} == contexts  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["somebody/Qwen3-8B", "unsloth/Qwen3-8B-GGUF", "Qwen3-8B-AWQ", "Qwen/Qwen3-480B", "/"])
def test_a_model_that_may_be_another_is_not_taken_for_a_published_one(name: str) -> None:
    assert find_published(name) is None


# ---- The machines.


def test_every_machine_states_possible_figures() -> None:
    tpus = {"v2-8", "v3-8", "v4-8", "v4-16", "v5e-1", "v5e-4", "v5e-8", "v5e-16", "v6e-1", "v6e-4", "v6e-8"}
    gpus = {"p100", "t4", "2xt4", "l4", "a10g", "rtx-3090", "rtx-4090", "rtx-5090", "a100-40", "a100", "h100", "h200"}
    assert set(TOPOLOGIES) == tpus | gpus | {"cpu"}
    for topology in TOPOLOGIES.values():
        device = topology.device
        assert 0.7 * device.memory_bytes < device.usable_bytes <= device.memory_bytes
        assert device.bytes_per_s < device.flops_per_s
        assert device.source
        assert (topology.target is None) == (topology.name not in tpus)
        assert (device.platform == "gpu") == (topology.name in gpus)


@pytest.mark.parametrize(
    ("name", "known", "devices"),
    [
        *(("T4", "t4", 1), ("2xT4", "2xt4", 2), ("t4x2", "2xt4", 2), ("t4-2", "2xt4", 2), ("2 x T4", "2xt4", 2)),
        *(("8xh100", "8xh100", 8), ("h100-8", "8xh100", 8), ("1xl4", "l4", 1), ("2x4090", "2xrtx-4090", 2)),
        *(("RTX 3090", "rtx-3090", 1), ("rtx5090", "rtx-5090", 1), ("A100-80GB", "a100", 1), ("a100-40", "a100-40", 1)),
    ],
)
def test_a_machine_is_found_by_the_ways_to_spell_it(name: str, known: str, devices: int) -> None:
    found = find_topology(name)
    assert (found.name, found.devices) == (known, devices)
    # The compiler's process and the suggestions of a plan name it again.
    assert find_topology(found.name) == found


@pytest.mark.parametrize("name", ["0xt4", "17xh100", "h100-80", "2xv2-8", "2xcpu", "v2-16", "2x2xt4"])
def test_a_number_of_devices_that_nobody_has_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="unknown topology"):
        find_topology(name)


@pytest.mark.parametrize(("name", "says_so"), [("t4", True), ("p100", True), ("l4", False)])
def test_a_plan_in_bfloat16_for_a_gpu_without_it_says_so(name: str, says_so: bool) -> None:
    notes = make_plan("small", SMALL, find_topology(name), Workload()).notes
    assert any("no arithmetic of bfloat16" in note for note in notes) == says_so


def test_a_plan_for_a_t4_suggests_float16_and_knows_its_peak() -> None:
    def planned(machine: str, dtype: str) -> Plan:
        return make_plan("small", SMALL, find_topology(machine), Workload(batch=8, dtype=dtype))

    rounded, half, single = (planned("t4", dtype) for dtype in ("bfloat16", "float16", "float32"))
    for words, expected in (("--dtype float16", [1, 0, 0]), ("no arithmetic of bfloat16", [1, 0, 0])):
        assert [any(words in note for note in plan.notes) for plan in (rounded, half, single)] == expected
    assert half.memory == rounded.memory
    t4, l4 = find_topology("t4").device, find_topology("l4").device
    assert (t4.peak("float16"), t4.peak("bfloat16"), t4.peak("float32")) == (65e12, 8.1e12, 8.1e12)
    assert l4.peak("float16") == l4.peak("bfloat16")
    assert planned("l4", "float16").notes == planned("l4", "bfloat16").notes == ()
    assert "plan with --dtype bfloat16" in planned("v5e-1", "float16").notes[-1]
    assert planned("v5e-1", "bfloat16").notes == ()


def test_a_core_of_v2_is_a_device_and_a_chip_of_v4_is_one() -> None:
    v2, v4 = find_topology("V2-8"), find_topology("v4-8")
    assert (v2.devices, v2.device.memory_bytes) == (8, 8 * 2**30)
    assert (v4.devices, v4.device.memory_bytes) == (4, 32 * 2**30)


def test_an_unknown_machine_gets_suggestions() -> None:
    with pytest.raises(PlanError, match=r"unknown topology 'v5e-2'; did you mean v5e-.* `jllm plan --list`"):
        find_topology("v5e-2")
    with pytest.raises(PlanError, match=r"unknown topology 'abacus'; `jllm plan --list` lists all"):
        find_topology("abacus")


# ---- Memory.

MEASURE = """
import json, jax, jax.numpy as jnp, numpy as np
from jllm_core import ShardingRules, abstract_weights, init_weights
from jllm_core.quantization.arrays import Quantization
from jllm_core.backends.base import XLA
from jllm_core.sharding import Placement
from jllm_runtime import make_mesh
from jllm_runtime.planner.memory import Workload, estimate_memory, kv_info
from jllm_runtime.programs import contiguous_batch
from test_planner import SMALL, SMALL_HYBRID

def local(tree):
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))

report, rules = [], ShardingRules()
for config, shape, quantization, kv_dtype in (
    (SMALL, {"tensor": 8}, None, None),
    (SMALL, {"data": 2, "tensor": 4}, None, None),
    (SMALL, {"tensor": 8}, Quantization(8), None),
    (SMALL_HYBRID, {"data": 2, "tensor": 4}, None, None),
    (SMALL, {"data": 2, "tensor": 4}, None, "int8"),
    (SMALL, {"data": 2, "tensor": 4}, None, "float32"),
):
    mesh = make_mesh(shape)
    workload = Workload(batch=3, context=300, quantization=quantization, kv_dtype=kv_dtype)
    info = kv_info(config, workload, Placement(mesh, rules))
    cache = contiguous_batch.empty_cache(info.shape, info.dtype, config, XLA(Placement(mesh, rules)))
    weights = init_weights(config, jax.random.key(0), "bfloat16", mesh, rules, quantization)
    memory = estimate_memory(config, workload, Placement(mesh, rules))
    assert (memory.states > 0) == (config is SMALL_HYBRID)
    report.append([local(weights), memory.weights, local(cache), memory.kv + memory.states])
print(json.dumps(report))
"""


def test_weights_and_cache_are_as_large_as_the_arrays_that_are_made(
    run_python: Callable[..., str], request: Any
) -> None:
    code = f"import sys; sys.path.insert(0, {str(request.path.parent)!r})\n" + MEASURE
    for weights, planned_weights, cache, planned_cache in json.loads(run_python(code, devices=8)):
        assert weights == planned_weights > 0
        assert cache == planned_cache > 0


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_the_plan_agrees_with_the_compiler(kv_dtype: Any) -> None:
    # In float32, which XLA:CPU computes in without copies; attention dominates, as it does in models of full size.
    workload = Workload(batch=4, context=2048, dtype="float32", kv_dtype=kv_dtype)
    compiled = compile_all(SMALL, workload, make_mesh(devices=jax.devices()[:1]), ShardingRules())
    assert set(compiled.programs) == {"decode", "prefill", "growth"}
    told, memory = compiled.memory, estimate_memory(SMALL, workload, make_placement(TOPOLOGIES["cpu"]))
    assert told is not None
    assert told.kv == memory.kv
    assert told.weights == pytest.approx(memory.weights, rel=0.01)
    assert told.total == pytest.approx(memory.total, rel=0.1)


def test_a_plan_of_delta_nets_agrees_with_the_compiler_on_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(batch=4, context=2048, dtype="float32")
    compiled = compile_all(SMALL_HYBRID, workload, make_mesh(devices=jax.devices()[:1]), ShardingRules())
    monkeypatch.setattr("jllm_runtime.planner.plan.compile_programs", lambda *_: compiled)
    told = make_plan("small", SMALL_HYBRID, TOPOLOGIES["cpu"], workload, ask_compiler=True).memory
    memory = estimate_memory(SMALL_HYBRID, workload, make_placement(TOPOLOGIES["cpu"]))
    assert (told.kv, told.states) == (memory.kv, memory.states)
    # Two delta nets of float32: matrices of 8 heads, and three inputs of q, k and v before the convolution.
    assert memory.states == 2 * 4 * 4 * (8 * 8 * 4 + 3 * (2 * 4 * 8 + 8 * 4))
    assert told.weights == pytest.approx(memory.weights, rel=0.02)
    # States stay where they are while keys and values grow.
    assert told.temporaries["growth"] == pytest.approx(memory.temporaries["growth"], rel=0.001)


HYBRIDS = [model.name for model in PUBLISHED.values() if model.config.delta_net is not None]


def test_states_and_keys_and_values_of_every_published_hybrid_are_counted_apart() -> None:
    assert len(HYBRIDS) == 18
    workload = Workload(batch=2, context=4096)
    for name in HYBRIDS:
        config = PUBLISHED[name].config
        plan: Any = SimpleNamespace(memory=estimate_memory(config, workload, ONE_DEVICE))
        parts, nets, net = memory_parts(plan), config.num_layers * 3 // 4, config.delta_net
        assert net is not None
        heads = net.num_value_heads
        assert parts["recurrent states"] == 2 * nets * 4 * (heads * 128 * 128 + 3 * 128 * (2 * 16 + heads)), name
        assert parts["KV cache"] == 2 * 2 * (config.num_layers // 4) * config.num_kv_heads * 4096 * 256 * 2, name


@pytest.mark.parametrize(("name", "chunk_code"), [("v5e-1", CHUNK_CODE), ("v2-8", SHORT_CHUNK_CODE["TPU v2"])])
def test_the_code_of_delta_nets_is_planned_on_tpus(name: str, chunk_code: int) -> None:
    config, workload, where = dataclasses.replace(SMALL_HYBRID, head_dim=128), Workload(8, 256), TOPOLOGIES[name]
    tpu, nets = make_placement(where), 2
    assert delta_net_code(SMALL, 64, tpu) == delta_net_code(config, 64, ONE_DEVICE) == 0
    of_generate = estimate_memory(config, workload, tpu).temporaries
    of_engine = engine_estimate(config, workload, tpu, engine_sizes(config, workload, tpu, where.device)).temporaries
    # Of a model as small as this the arrays are a few megabytes at most.
    for temporaries in (of_generate, of_engine):
        assert 0 < temporaries["prefill"] - nets * chunk_code < 8 * 2**20
        assert 0 < temporaries["decode"] - nets * STEP_CODE < 8 * 2**20


def test_a_tpu_copies_what_does_not_fill_its_lanes() -> None:
    # So many rows that a step of a prompt takes as many tokens of each on both.
    workload = Workload(batch=8)

    def temporaries(where: Placement, **fields: Any) -> dict[str, int]:
        return estimate_memory(dataclasses.replace(SMALL, **fields), workload, where).temporaries

    tpu, other = make_placement(TOPOLOGIES["v5e-1"]), ONE_DEVICE
    # Heads of 8 filled up to 128: layers, keys and values, rows, heads, slots, bytes.
    cache = 2 * 2 * 8 * 4 * 4096 * 128 * 2
    assert temporaries(tpu)["decode"] - temporaries(other)["decode"] == cache
    assert temporaries(tpu)["prefill"] == temporaries(other)["prefill"]
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=96)
    experts = 2 * 2 * 4 * 64 * 128 * 2  # layers, gate and up, experts, D, F filled up, bytes
    assert temporaries(tpu, moe=moe)["prefill"] - temporaries(other, moe=moe)["prefill"] == experts
    whole = dataclasses.replace(moe, intermediate_size=128)
    assert temporaries(tpu, moe=whole)["prefill"] == temporaries(other, moe=whole)["prefill"]


def test_only_a_cache_that_may_have_grown_counts_the_one_before() -> None:
    def growth(context: int) -> float:
        memory = estimate_memory(SMALL, Workload(context=context), ONE_DEVICE)
        return memory.temporaries["growth"] / memory.kv

    assert growth(256) == 0
    assert growth(257) == 0.5
    short = dataclasses.replace(SMALL, context_length=320)
    memory = estimate_memory(short, Workload(context=300), ONE_DEVICE)
    assert memory.temporaries["growth"] / memory.kv == 256 / 320  # the last cache ends with the context


# ---- Whether it fits.


def test_it_fits_to_the_byte() -> None:
    total = plan_of(2**40).memory.total
    assert plan_of(total).fits
    short = plan_of(total - 1)
    assert (short.fits, short.short_bytes) == (False, 1)


def test_the_largest_batch_and_context_are_the_last_that_fit() -> None:
    room = plan_of(2**40, Workload(batch=8, context=1024)).memory.total
    plan = plan_of(room, Workload(batch=8, context=1024))
    assert (plan.largest_batch, plan.largest_context) == (8, 1024)
    smaller = plan_of(room - 1, Workload(batch=8, context=1024))
    assert (smaller.largest_batch, smaller.largest_context) == (4, 512)
    assert plan_of(2**40).largest_context == SMALL.context_length
    assert (plan_of(1).largest_batch, plan_of(1).largest_context) == (0, 0)


def test_every_alternative_would_fit() -> None:
    config, workload = PUBLISHED["Qwen/Qwen3-4B"].config, Workload(batch=8, context=2048, dtype="float32")
    topology = TOPOLOGIES["v5e-1"]
    plan = make_plan("4B", config, topology, workload)
    assert not plan.fits
    kinds = {option.split()[0] for option in plan.alternatives}
    assert {"--dtype", "--quantize", "--topology"} <= kinds
    assert len({option.partition("x")[2] for option in plan.alternatives if "l4" in option}) == 1
    for option in plan.alternatives:
        name, value = option.split()
        changed, where = workload, topology
        if name == "--topology":
            where = find_topology(value)
        elif name == "--kv-dtype":
            changed = dataclasses.replace(workload, kv_dtype="int8")
        elif name == "--quantize":
            changed = dataclasses.replace(workload, quantization=QUANTIZATIONS[value])
        else:
            field = name.removeprefix("--")
            changed = dataclasses.replace(workload, **{field: value if field == "dtype" else int(value)})
        placement = make_placement(where)
        assert estimate_memory(config, changed, placement).total <= where.device.usable_bytes, option


def test_several_gpus_are_suggested_the_fewest_of_each_kind() -> None:
    config = PUBLISHED["Qwen/Qwen3-32B"].config
    plan = make_plan("32B", config, TOPOLOGIES["h100"], Workload())
    machines = [option.split()[1] for option in plan.alternatives if "--topology" in option]
    assert {"2xh100", "2xa100", "h200", "4xl4"} <= set(machines)
    assert not {"h100", "a100", "2xh200", "4xh100", "2xl4", "8xl4"} & set(machines)
    memory = [find_topology(name).devices * find_topology(name).device.usable_bytes for name in machines]
    assert memory == sorted(memory)


def test_activations_of_int8_are_planned_where_the_model_does_not_fit() -> None:
    config, workload = PUBLISHED["Qwen/Qwen3-32B"].config, Workload(quantization=Quantization(8), activations="int8")
    plan = make_plan("32B", config, TOPOLOGIES["v5e-1"], workload)
    assert not plan.fits
    assert plan.alternatives
    # int4 takes no such activations, and no other machine multiplies them.
    assert all(option.startswith(("--topology v5e-", "--topology v6e-")) for option in plan.alternatives)


def test_where_one_change_will_not_do_a_machine_and_fewer_bits_are_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = dataclasses.replace(SMALL, hidden_size=256, head_dim=32)
    room = estimate_memory(wide, Workload(quantization=Quantization(8)), ONE_DEVICE).total
    other = dataclasses.replace(machine(room), name="other")
    monkeypatch.setattr("jllm_runtime.planner.plan.TOPOLOGIES", {"other": other})
    assert make_plan("wide", wide, machine(1), Workload()).alternatives == ("--topology other --quantize int8",)


def test_keys_and_values_of_int8_are_suggested_where_they_fit_and_once() -> None:
    config, workload = PUBLISHED["Qwen/Qwen3-0.6B"].config, Workload(batch=8, context=2048)
    smaller = dataclasses.replace(workload, kv_dtype="int8")
    room = estimate_memory(config, smaller, ONE_DEVICE).total

    def suggested(usable_bytes: int, workload: Workload) -> bool:
        return "--kv-dtype int8" in make_plan("0.6B", config, machine(usable_bytes), workload).alternatives

    assert [suggested(room, workload), suggested(room - 1, workload), suggested(room - 1, smaller)] == [1, 0, 0]
    # A feature takes one byte in place of two, and each head of a token four more.
    kept, less = (estimate_memory(config, each, ONE_DEVICE).kv for each in (workload, smaller))
    assert less * 2 * config.head_dim == kept * (config.head_dim + 4)
    rooflines = [decode_roofline(config, each, ONE_DEVICE, machine(1).device) for each in (workload, smaller)]
    assert rooflines[0].bytes_per_step - rooflines[1].bytes_per_step == kept - less


def test_an_estimate_that_leaves_little_says_so() -> None:
    total = plan_of(2**40).memory.total
    assert any("an estimate can be off by more" in note for note in plan_of(total * 100 // 96).notes)
    assert not any("estimate" in note for note in plan_of(total * 100 // 94).notes)
    assert not any("estimate" in note for note in plan_of(total - 1).notes)


def test_of_int8_weights_the_plan_may_suggest_int4_and_of_int4_nothing() -> None:
    wide = dataclasses.replace(SMALL, hidden_size=256, head_dim=32)
    int8, int4 = Workload(quantization=Quantization(8)), Workload(quantization=Quantization(4, 32))
    room = estimate_memory(wide, int4, ONE_DEVICE).total

    def suggested(usable_bytes: int, workload: Workload) -> list[str]:
        plan = make_plan("wide", wide, machine(usable_bytes), workload)
        assert not plan.fits
        return [option for option in plan.alternatives if "quantize" in option]

    assert suggested(room, int8) == ["--quantize int4"]
    assert suggested(room - 1, int4) == []


def test_a_context_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"context of 4097 is more than the 4096 of small"):
        plan_of(2**40, Workload(context=4097))


# ---- The roofline.


def test_the_roofline_of_a_small_model_by_hand() -> None:
    # q and o, k and v, three matrices of the feed-forward layer, two gammas; final gamma, output head.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    matrices = 2 * layer + 64 * 512
    cache = 2 * 2 * 2 * (4 * 256 * 8)  # layers, keys and values, rows, [K, S, H]
    device = machine(2**40).device
    roofline = decode_roofline(SMALL, Workload(batch=2, context=256), ONE_DEVICE, device)
    assert roofline.bytes_per_step == 2 * (matrices + 5 * 64 + cache)
    assert roofline.flops_per_step == 2 * 2 * matrices + 4 * 2 * 2 * 8 * 256 * 8
    assert roofline.bound == "memory"
    assert roofline.decode_tokens_per_s == pytest.approx(2 / (roofline.bytes_per_step / 1e9))
    slow = dataclasses.replace(device, flops_per_s=1e6)
    assert decode_roofline(SMALL, Workload(), ONE_DEVICE, slow).bound == "compute"


def test_a_tied_embedding_is_read_whole_and_an_untied_one_is_not() -> None:
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    rooflines = [decode_roofline(config, Workload(), ONE_DEVICE, machine(1).device) for config in (SMALL, tied)]
    assert rooflines[0].bytes_per_step == rooflines[1].bytes_per_step
    assert rooflines[0].flops_per_step == rooflines[1].flops_per_step


def test_a_mixture_reads_the_experts_that_its_rows_touch() -> None:
    moe = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=128)
    assert touched_experts(moe, 1) == 0.25
    assert touched_experts(moe, 2) == pytest.approx(1 - 0.75**2)
    config = dataclasses.replace(SMALL, moe=moe)

    def moved(rows: int) -> int:
        workload = Workload(batch=rows, context=256)
        kv = estimate_memory(config, workload, ONE_DEVICE).kv
        return decode_roofline(config, workload, ONE_DEVICE, machine(1).device).bytes_per_step - kv

    experts = 2 * 8 * 3 * 64 * 128 * 2  # layers, experts, matrices, [D, F], bytes
    assert moved(2) - moved(1) == pytest.approx((touched_experts(moe, 2) - 0.25) * experts, abs=2)


def test_devices_share_the_work() -> None:
    one, eight = (
        decode_roofline(SMALL, Workload(batch=8), make_placement(machine(1, count)), machine(1).device)
        for count in (1, 8)
    )
    # Four kv heads do not divide over eight devices, so each holds all of them.
    assert one.bytes_per_step / 8 < eight.bytes_per_step < one.bytes_per_step
    split = Placement(abstract_mesh({"data": 8}, 8))
    copies = decode_roofline(SMALL, Workload(batch=8), split, machine(1).device)
    assert copies.flops_per_step == pytest.approx(one.flops_per_step / 8, rel=0.01)


# ---- Meshes and the compiler.


def test_a_mixture_is_planned_on_the_mesh_that_it_would_be_loaded_on() -> None:
    config, workload = PUBLISHED["Qwen/Qwen3-30B-A3B"].config, Workload(batch=16, context=1024)
    made = make_plan("30B", config, TOPOLOGIES["v5e-8"], workload)
    assert dict(made.placement.mesh.shape) == {"data": 1, "expert": 8, "tensor": 1}
    assert made.fits
    assert made.notes == ()
    cut = make_plan("30B", config, TOPOLOGIES["v5e-8"], workload, make_placement(TOPOLOGIES["v5e-8"], {"tensor": 8}))
    # Gate and up of 128 experts in 48 layers are there a second time, filled up to 128 columns.
    assert cut.memory.temp - made.memory.temp == pytest.approx(48 * 2 * 128 * 2048 * 128 * 2, rel=0.05)
    assert "96 of the 768 columns" in cut.notes[0]
    dense = make_plan("14B", PUBLISHED["Qwen/Qwen3-14B"].config, TOPOLOGIES["v5e-8"], workload)
    assert dict(dense.placement.mesh.shape) == {"data": 1, "expert": 1, "tensor": 8}


def test_a_mesh_is_read_from_text() -> None:
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "tensor": 4}
    for wrong in ("", "tensor", "tensor=", "tensor=x", "tensor=-1", "tensor=2,tensor=4", "tensor=2,"):
        with pytest.raises(MeshError, match="such as data=2,tensor=4"):
            parse_mesh(wrong)


@pytest.mark.parametrize("shape", [{"tensor": 3}, {"rows": 8}, {"data": 0, "tensor": 8}])
def test_an_impossible_abstract_mesh_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(MeshError):
        abstract_mesh(shape, 8)


def test_collectives_are_counted_by_kind_and_size() -> None:
    hlo = """
      %all-reduce.1 = bf16[8,1024]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1
      %all-reduce.2 = bf16[8,1024]{1,0} all-reduce(%all-reduce.1), channel_id=2
      %both = (f32[4]{0}, s32[2,2]{1,0}) all-reduce(%a, %b), channel_id=3
      %g = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%c), dimensions={0}
      %d = bf16[64,16]{1,0} all-gather-done(%g)
      %n = pred[] fusion(%all-reduce.2), kind=kLoop
    """
    assert find_collectives(hlo) == (
        Collective("all-reduce", 16384, 2),
        Collective("all-gather", 2048, 1),
        Collective("all-reduce", 32, 1),
    )


def test_the_compiler_is_asked_only_where_it_knows_the_machine() -> None:
    with pytest.raises(PlanError, match="do not know cpu"):
        compile_programs(SMALL, Workload(), TOPOLOGIES["cpu"], ONE_DEVICE)
    with pytest.raises(
        PlanError, match="no description of Tesla P100-PCIE-16GB for the CUDA compiler; known: NVIDIA H1"
    ):
        compile_programs(SMALL, Workload(), TOPOLOGIES["p100"], ONE_DEVICE)


@pytest.mark.parametrize(("topology", "extra"), [("v5e-1", "tpu"), ("h100", "cuda-plan"), ("2xt4", "cuda-plan")])
def test_a_compiler_that_is_not_there_is_named(topology: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=rf"pip install 'jllm-runtime\[{extra}\]'"):
        compile_programs(SMALL, Workload(), TOPOLOGIES[topology], ONE_DEVICE)


def test_what_the_compiler_process_says_of_its_failure_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    nowhere = Topology("v9-1", TOPOLOGIES["v2-8"].device, 1, CompilerTarget("v9:1x1", (1, 1, 1)))
    with pytest.raises(PlanError, match=r"the compiler failed for v9-1:\n(.*\n)*.*unknown topology"):
        compile_programs(SMALL, Workload(quantization=Quantization(8)), nowhere, ONE_DEVICE)
