"""What keeps JAX from starting its devices is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = """
from jllm_core.device_errors import DeviceError, device_errors
try:
    with device_errors():
        {first}
        import jax
        print(jax.devices()[0].platform, int(jax.numpy.ones(3).sum()))
except DeviceError as error:
    print("DeviceError:", error)
"""
# A plug-in that registers a platform, whose devices then fail.
FAILING_DEVICES = """
import jax._src.xla_bridge
def initialize():
    def fail():
        raise RuntimeError("UNKNOWN: the driver is too old\\nand more lines")
    jax._src.xla_bridge.register_backend_factory("broken", fail, priority=500, fail_quietly=False)
"""
PLUGINS = {
    "raises": "def initialize():\n    raise OSError('libbroken.so: cannot open shared object file.')",
    "has no initialize": "",
    "misses a module": "import not_there_at_all\ndef initialize():\n    pass",
    "cannot be imported": "raise ImportError('libcudart.so.12 is missing')",
    "has no devices": FAILING_DEVICES,
}


def start(folder: Path, first: str = "pass", **environment: str) -> tuple[str, str]:
    """What a fresh process prints to standard output and standard error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", START.format(first=first)],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("platform", ["nonsense", "gpu", "cuda", "cpu,nonsense"])
def test_a_platform_that_is_not_there_is_one_sentence(platform: str, tmp_path: Path) -> None:
    said, noise = start(tmp_path, JAX_PLATFORMS=platform)
    assert said.startswith("DeviceError: ")
    assert f"JAX_PLATFORMS={platform}" in said
    assert said.endswith("; unset the variable to run on what is there, or name another platform, such as cpu")
    assert len(said.splitlines()) == 1
    assert noise == ""


def test_an_option_may_name_the_platform(tmp_path: Path) -> None:
    first = "import jax; jax.config.update('jax_platforms', 'cpu')"
    assert start(tmp_path, first, JAX_PLATFORMS="nonsense") == ("cpu 3", "")


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_broken_plugin_is_one_sentence(kind: str, tmp_path: Path) -> None:
    (tmp_path / "jax_plugins" / "broken").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "broken" / "__init__.py").write_text(PLUGINS[kind], encoding="utf-8")
    said, noise = start(tmp_path)
    assert said.startswith("DeviceError: JAX")
    assert said.count("set JAX_PLATFORMS=cpu to do without it") == 1
    assert len(said.splitlines()) == 1
    assert noise == ""
    # Who names what to run on has said that the plug-in does not matter.
    assert start(tmp_path, JAX_PLATFORMS="cpu") == ("cpu 3", "")


@pytest.mark.parametrize("name", ["JAX_DEBUG_NANS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"])
def test_a_setting_that_is_none_is_one_sentence(name: str, tmp_path: Path) -> None:
    said, noise = start(tmp_path, JAX_PLATFORMS="cpu", **{name: "banana"})
    assert said.startswith("DeviceError: JAX refuses a setting in the environment: ")
    assert "banana" in said
    assert name.lower() in said.lower()
    assert noise == ""


def test_other_errors_stay_what_they_are() -> None:
    from jllm_core.device_errors import device_errors

    for kind in (RuntimeError, AssertionError, ValueError):
        with pytest.raises(kind, match="something else"), device_errors():
            raise kind("something else")
