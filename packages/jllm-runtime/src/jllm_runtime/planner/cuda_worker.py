"""Worker process of the CUDA compiler: as ``compile_worker``, for GPUs that are not there."""

from collections.abc import Callable
from typing import Any

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

from jllm_runtime.planner import compile_worker
from jllm_runtime.planner.cuda_compiler import target_config
from jllm_runtime.planner.topologies import Topology

NAMES = ("gpu", "cuda")


def main() -> None:
    """Read a job, compile its programs, and print the result."""
    know_cuda()
    compile_worker.run(cuda_devices)


def know_cuda() -> None:
    """Have JAX lower for CUDA in this process, although there is no such device.

    JAX asks the devices that are there what a platform's name stands for, and fails where there are none
    (https://github.com/jax-ml/jax/issues/23971). It has no setting for that, so two of its functions are replaced. That
    is why no other process than this one calls this.
    """

    def answering(answer: Any, otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda platform: answer if platform in NAMES else otherwise(platform)

    for name, answer in {"canonicalize_platform": "cuda", "expand_platform_alias": ["cuda"]}.items():
        setattr(xla_bridge, name, answering(answer, getattr(xla_bridge, name)))


def cuda_devices(topology: Topology) -> list[jax.Device]:
    """The compiler's descriptions of a host's GPUs."""
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(topology.device),
        # Hosts that share fast links, hosts, and GPUs of each.
        topology=f"1x1x{topology.devices}",
    )
    return list(described.devices)


if __name__ == "__main__":
    main()
