"""Runs the tests of eight_devices.py: JAX takes the number of CPU devices once, at its start."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("eight_devices.py")


# Programs that run once are not worth XLA's optimisations.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def test_on_eight_devices() -> None:
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(command, env=environ, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
