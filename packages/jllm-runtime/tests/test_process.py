"""What depends on how a process starts: what an import brings with it, and where compiled programs are kept."""

from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = "jax jaxlib numpy orbax tokenizers jinja2 tensorstore torch transformers flax tensorflow"
CACHE = """
import os, jax
from jllm_runtime.compile_cache import cache_folder, use_compile_cache
{before}
use_compile_cache({folder})
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: x + 1)(1)
"""


@pytest.mark.parametrize("module", ["jllm_runtime", "jllm_runtime.cli", "jllm_runtime.errors"])
def test_an_import_brings_nothing_heavy(module: str, run_python: Callable[..., str]) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & set('{HEAVY}'.split())))"
    assert run_python(code).strip() == "[]"


def test_the_whole_package_brings_no_other_framework(run_python: Callable[..., str]) -> None:
    code = (
        "import sys, pkgutil, importlib, jllm_runtime\n"
        "names = [module.name for module in pkgutil.iter_modules(jllm_runtime.__path__)]\n"
        "for name in names: importlib.import_module('jllm_runtime.' + name)\n"
        "print(len(names) > 10, sorted(set(sys.modules) & {'torch', 'transformers', 'flax', 'tensorflow'}))"
    )
    assert run_python(code).strip() == "True []"


def test_every_public_name_is_there(run_python: Callable[..., str]) -> None:
    code = (
        "import jllm_runtime\n"
        "assert dir(jllm_runtime) == jllm_runtime.__all__\n"
        "assert all(getattr(jllm_runtime, name) is not None for name in jllm_runtime.__all__)\n"
        "try: jllm_runtime.no_such_name\n"
        "except AttributeError as error: print(error)"
    )
    assert run_python(code).strip() == "module 'jllm_runtime' has no attribute 'no_such_name'"


def test_compiled_programs_are_kept_under_jllm_cache(run_python: Callable[..., str], tmp_path: Path) -> None:
    printed = run_python(CACHE.format(before="", folder=""), JLLM_CACHE=str(tmp_path))
    assert printed.strip() == str(tmp_path / "xla")
    assert list((tmp_path / "xla").iterdir())


def test_compiled_programs_are_kept_in_the_users_cache_folder(run_python: Callable[..., str], tmp_path: Path) -> None:
    printed = run_python(CACHE.format(before="", folder=""), JLLM_CACHE="", XDG_CACHE_HOME=str(tmp_path))
    assert Path(printed.strip()).parts[-2:] == ("jllm", "xla")


def test_a_given_folder_is_used(run_python: Callable[..., str], tmp_path: Path) -> None:
    printed = run_python(CACHE.format(before="", folder=repr(str(tmp_path))), JLLM_CACHE="/nowhere")
    assert printed.strip() == str(tmp_path)


def test_a_folder_that_the_program_has_chosen_stays(run_python: Callable[..., str], tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    before = f"jax.config.update('jax_compilation_cache_dir', {str(chosen)!r})"
    for code, environment in (
        (CACHE.format(before=before, folder=""), {}),
        (CACHE.format(before="", folder=""), {"JAX_COMPILATION_CACHE_DIR": str(chosen)}),
    ):
        assert run_python(code, JLLM_CACHE=str(tmp_path / "ours"), **environment).strip() == str(chosen)
    assert not (tmp_path / "ours").exists()


def test_a_second_process_compiles_nothing_anew(run_python: Callable[..., str], tmp_path: Path) -> None:
    code = CACHE.format(before="", folder=repr(str(tmp_path)))
    run_python(code)
    kept = {path.name: path.stat().st_size for path in tmp_path.glob("*-cache")}
    assert kept
    run_python(code)
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*-cache")} == kept
