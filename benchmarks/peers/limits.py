"""What the machine does at best: JSON on standard output."""

import json

import jax
from jllm_runtime.benchmarking.device_limits import measure_limits

if __name__ == "__main__":
    found = measure_limits(jax.devices("cpu")[0])
    print(json.dumps({"bytes_per_s": found.bytes_per_s, "flops_per_s": found.flops_per_s}))
