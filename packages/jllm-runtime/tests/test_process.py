"""What depends on how a process starts: what an import brings with it, and where compiled programs are kept."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = "jax jaxlib numpy orbax tokenizers jinja2 tensorstore torch transformers flax tensorflow"
# Programs of two sizes, and how many of all were compiled and not read from disk.
COMPILE_TWO = """
hits, programs = [], []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: programs.append(event) if "backend_compile" in event else None
)
for size in (1, 2):
    jax.jit(lambda x: x + 1)(jax.numpy.ones(size))
print(len(programs) > 2, len(programs) - len(hits))
"""
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


# ---- A folder that takes no programs is said once, and done without.


@pytest.fixture
def run_and_listen(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Run code in a process where warnings are errors; what it prints, and the lines of its log."""

    def run(code: str, **environment: str) -> tuple[str, list[str]]:
        started = "import jax\nfrom jllm_runtime.compile_cache import keeps_programs, use_compile_cache\n"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", started + code],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JLLM_CACHE": str(tmp_path / "cache"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr.splitlines()

    return run


def is_sentence(line: str, folder: Path | str, why: str) -> bool:
    begin = f"compiled programs cannot be kept in {folder} ({why}"
    return line.startswith(begin) and line.endswith("set JLLM_CACHE to a folder that can be written")


def test_a_file_in_the_folder_s_place(run_and_listen, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    printed, said = run_and_listen("use_compile_cache()\nuse_compile_cache()\nprint(keeps_programs())" + COMPILE_TWO)
    assert printed.splitlines()[0] == "False"
    assert len(said) == 1
    assert is_sentence(said[0], tmp_path / "cache" / "xla", "Not a directory")


def test_a_folder_that_cannot_be_made(run_and_listen) -> None:
    _, said = run_and_listen("use_compile_cache()" + COMPILE_TWO, JLLM_CACHE="/proc/nobody")
    assert len(said) == 1
    assert is_sentence(said[0], "/proc/nobody/xla", "No such file or directory")


READ_ONLY = """
import errno, os, tempfile
def refuse(**_): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
tempfile.TemporaryFile = refuse
use_compile_cache()
"""


def test_a_folder_that_is_read_only(run_and_listen, tmp_path: Path) -> None:
    """Simulated: to the superuser, whom tests may run as, every folder is writable."""
    folder = tmp_path / "cache" / "xla"
    _, said = run_and_listen(READ_ONLY + COMPILE_TWO)
    assert len(said) == 1
    assert is_sentence(said[0], folder, "Read-only file system")
    assert not list(folder.iterdir())


def test_programs_of_a_folder_that_is_read_only_are_used(run_and_listen, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "xla"
    run_and_listen("use_compile_cache()" + COMPILE_TWO)
    kept = sorted(folder.iterdir())
    printed, said = run_and_listen(READ_ONLY + COMPILE_TWO + "jax.jit(lambda x: x * 3)(1)\nprint(keeps_programs())")
    assert printed.splitlines() == ["True 0", "False"]
    assert len(said) == 1
    assert is_sentence(said[0], folder, "Read-only file system")
    assert sorted(folder.iterdir()) == kept


def test_a_disk_that_becomes_full(run_and_listen, tmp_path: Path) -> None:
    code = (
        "use_compile_cache()\n"
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"  # no file may be larger
    )
    printed, said = run_and_listen(code + COMPILE_TWO + "print(keeps_programs())")
    assert printed.splitlines()[1] == "False"
    assert len(said) == 1
    assert is_sentence(said[0], tmp_path / "cache" / "xla", "OSError: [Errno 27] File too large")


def test_a_program_that_was_written_in_part_is_written_anew(run_and_listen, tmp_path: Path) -> None:
    run_and_listen("use_compile_cache()" + COMPILE_TWO)
    for entry in (tmp_path / "cache" / "xla").glob("jit__lambda*-cache"):
        entry.write_bytes(entry.read_bytes()[:50])
    outcomes = [run_and_listen("use_compile_cache()" + COMPILE_TWO) for _ in range(2)]
    assert outcomes == [("True 2", []), ("True 0", [])]


# ---- The library keeps programs by itself.


@pytest.mark.parametrize(
    ("option", "environment", "kept"),
    [
        ("", {}, True),
        (", compile_cache=False", {}, False),
        ("", {"JAX_ENABLE_COMPILATION_CACHE": "false"}, False),
    ],
)
def test_a_model_s_programs_are_kept_unless_told_otherwise(
    option: str, environment: dict[str, str], kept: bool, friendly_checkpoint: Path, run_python, tmp_path: Path
) -> None:
    code = (
        "from jllm_runtime import load_model, generate, SamplingParams\n"
        f"model = load_model({str(friendly_checkpoint)!r}{option})\n"
        "print(generate(model, 'x', SamplingParams(max_tokens=2))[0].finish_reason)"
    )
    assert run_python(code, JLLM_CACHE=str(tmp_path / "ours"), **environment).strip() == "length"
    assert (tmp_path / "ours" / "xla").exists() == kept
    assert bool(list(tmp_path.glob("ours/xla/jit_prefill-*-cache"))) == kept


def test_an_import_makes_no_folder_and_changes_no_setting(run_python, tmp_path: Path) -> None:
    code = "import jax, jllm_runtime.loading, jllm_runtime.generation; print(jax.config.jax_compilation_cache_dir)"
    assert run_python(code, JLLM_CACHE=str(tmp_path / "ours")).strip() == "None"
    assert not (tmp_path / "ours").exists()
