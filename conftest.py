"""Memory of a test run: what XLA has compiled is let go of between files, once it has become too much."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_BYTES = 3 * 2**30
"""Memory of a process with which the next file still begins. Programs stay for the files that follow, which share many
of them; thousands of them take gigabytes, and XLA's CPU compiler has crashed in a process that held so many."""
PAGE_BYTES = 4096
STATM = Path("/proc/self/statm")


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    yield
    # Where nothing tells the memory (macOS), all stay. Tests that load no JAX are not to load it here.
    if STATM.exists() and "jax" in sys.modules and int(STATM.read_text().split()[1]) * PAGE_BYTES > MOST_BYTES:
        sys.modules["jax"].clear_caches()
        gc.collect()
