"""GPUs as the CUDA compiler is told of them; `hatch run cuda-plan:test` asks the compiler itself."""

import re
import subprocess
import sys

import pytest
from jllm_core.backends import blocked_attention
from jllm_core.backends.gpu.backend import MIN_CAPABILITY, gpu_backend
from jllm_runtime.errors import PlanError
from jllm_runtime.planner import compile_worker
from jllm_runtime.planner.cuda_compiler import TARGETS, check_compiler, target_config
from jllm_runtime.planner.plan import make_placement
from jllm_runtime.planner.topologies import TOPOLOGIES


@pytest.mark.parametrize(
    "name", ["h100", "h200", "a100", "a100-40", "l4", "a10g", "rtx-3090", "rtx-4090", "t4", "2xt4"]
)
def test_a_gpu_is_described_by_its_own_figures(name: str) -> None:
    topology = TOPOLOGIES[name]
    text = target_config(topology.device)
    assert f'name: "{topology.device.kind}"' in text
    assert f"memory_bandwidth: {int(topology.device.bytes_per_s)}\n" in text
    assert f"device_memory_size: {topology.device.memory_bytes}\n" in text
    # A message in protobuf's text: braces in pairs, and each field a name and a value.
    assert text.count("{") == text.count("}") == 4
    assert not re.search(r"[{}]:|None|\(", text)
    if topology.devices == 1:
        # The backend of a plan goes by the name, that of a real mesh by the capability: they must agree.
        backend = gpu_backend(make_placement(topology))
        assert backend is not None
        assert backend.triton == (TARGETS[topology.device.kind].capability >= MIN_CAPABILITY)


def test_the_account_counts_the_blocks_of_the_backends() -> None:
    assert compile_worker.ATTENTION_BLOCK == blocked_attention.BLOCK


def test_a_machine_without_a_description_is_told_which_have_one() -> None:
    with pytest.raises(PlanError, match=r"RTX 5090 for the CUDA compiler; known: .*NVIDIA L4.*plans are estimates"):
        check_compiler(TOPOLOGIES["rtx-5090"])


def test_only_the_process_of_the_compiler_changes_jax() -> None:
    code = """
import jax
from jax._src import xla_bridge
from jllm_runtime.planner import cuda_worker
assert xla_bridge.canonicalize_platform.__module__ == "jax._src.xla_bridge"
cuda_worker.know_cuda()
assert jax._src.xla_bridge.canonicalize_platform("gpu") == "cuda"
assert xla_bridge.expand_platform_alias("cuda") == ["cuda"]
assert xla_bridge.canonicalize_platform("cpu") == "cpu"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
