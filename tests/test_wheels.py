"""Each package as its user gets it: built, and installed alone in a clean environment."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COMMANDS = {"jllm-core": None, "jllm-convert": "jllm-convert", "jllm-runtime": "jllm"}
# No JLLM package, nor what it imports, may bring a second framework.
FOREIGN = {"torch", "transformers", "flax", "tensorflow"}

# Run by the clean environment's own Python: imports the package and its every module, then names what was loaded. A
# module may miss what an extra brings.
IMPORT_ALL = """
import importlib, importlib.metadata, pkgutil, re, sys
package = importlib.import_module(sys.argv[1])
requirements = importlib.metadata.requires(package.__name__)
extras = {re.match(r"[\\w-]+", line)[0].replace("-", "_") for line in requirements if "extra ==" in line}
def fail(name): raise
for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=fail):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in extras:
                raise
print(package.__file__)
print(*{name.partition(".")[0] for name in sys.modules})
"""


def run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH would let the child see more than its environment holds.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def module_name(package: str) -> str:
    return package.replace("-", "_")


def about_version(package: str) -> str:
    about = ROOT / "packages" / package / "src" / module_name(package) / "__about__.py"
    match = re.search(r'^__version__ = "(.+)"$', about.read_text(), re.MULTILINE)
    assert match, about
    return match[1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three wheels in one folder, each built from its source distribution, which so is shown to be complete."""
    folder = tmp_path_factory.mktemp("wheels")
    built = {}
    for package in COMMANDS:
        unpacked = tmp_path_factory.mktemp("sdist")
        build = (sys.executable, "-m", "hatchling", "build", "--target")
        run(*build, "sdist", "--directory", unpacked, cwd=ROOT / "packages" / package)
        (sdist,) = unpacked.glob("*.tar.gz")
        with tarfile.open(sdist) as tar:
            tar.extractall(unpacked, filter="data")
        run(*build, "wheel", "--directory", folder, cwd=unpacked / sdist.name.removesuffix(".tar.gz"))
        (built[package],) = folder.glob(f"{module_name(package)}-*.whl")
    return built


def test_the_documented_way_to_wheels_makes_these(tmp_path: Path, wheels: dict[str, Path]) -> None:
    (command,) = re.findall(r"^pip (wheel .*)$", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE)
    arguments = [str(ROOT / part) if part.startswith("./") else part for part in command.split()]
    # With the hatchling of this environment, which comes from the same place.
    run(sys.executable, "-m", "pip", *arguments, "--no-build-isolation", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "wheels").iterdir()} == {path.name for path in wheels.values()}


@pytest.mark.parametrize("package", COMMANDS)
def test_wheel_holds_what_it_should(package: str, wheels: dict[str, Path]) -> None:
    version, module = about_version(package), module_name(package)
    with zipfile.ZipFile(wheels[package]) as wheel:
        files = set(wheel.namelist())
        info = f"{module}-{version}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{module}/py.typed" in files
    source = ROOT / "packages" / package / "src"
    assert {path.relative_to(source).as_posix() for path in source.rglob("*.py")} <= files
    assert {file.partition("/")[0] for file in files} == {module, info}


@pytest.mark.parametrize(
    ("machine", "system", "by_itself"),
    [
        ("x86_64", "linux", True),
        ("x86_64", "darwin", True),
        ("AMD64", "win32", True),
        ("aarch64", "linux", True),
        ("arm64", "darwin", False),
        ("riscv64", "linux", False),
    ],
)
def test_the_compiler_of_the_kernels_comes_with_core(
    machine: str, system: str, by_itself: bool, wheels: dict[str, Path]
) -> None:
    with zipfile.ZipFile(wheels["jllm-core"]) as wheel:
        (info,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(wheel.read(info)).get_all("Requires-Dist", [])

    def brings_compiler(extra: str) -> bool:
        there = {"platform_machine": machine, "sys_platform": system, "extra": extra}
        wanted = [Requirement(line) for line in lines]
        names = {one.name for one in wanted if one.marker is None or one.marker.evaluate(there)}
        return {"llvmlite", "platformdirs"} <= names

    assert brings_compiler("") is by_itself
    assert brings_compiler("cpu")  # the name under which it was asked for before stays


@pytest.mark.parametrize("package", COMMANDS)
def test_wheel_works_alone(package: str, wheels: dict[str, Path], tmp_path: Path) -> None:
    uv, bin_folder = (sys.executable, "-m", "uv"), tmp_path / "venv" / "bin"
    python = bin_folder / "python"
    run(*uv, "venv", "--quiet", "--python", sys.executable, "venv", cwd=tmp_path)
    # The sibling that it depends on comes from the folder of the wheels, everything else from the package index.
    siblings = ("--find-links", wheels[package].parent)
    # uv caches a wheel from there under its path and version, so that one built anew would go unseen.
    refresh = [option for name in COMMANDS for option in ("--refresh-package", name)]
    install = (*uv, "pip", "install", "--quiet", "--python", python)
    run(*install, *siblings, *refresh, wheels[package], cwd=tmp_path)

    origin, loaded = run(python, "-c", IMPORT_ALL, module_name(package), cwd=tmp_path).splitlines()
    assert Path(origin).is_relative_to(tmp_path)
    assert FOREIGN & set(loaded.split()) == set()
    # Besides what it depends on, it is alone: jllm-convert and jllm-runtime do not bring each other.
    assert {name for name in loaded.split() if name.startswith("jllm")} <= {"jllm_core", module_name(package)}

    # What reads GGUF files brings much that nobody needs to run a model.
    installed = run(*uv, "pip", "freeze", "--python", python, cwd=tmp_path)
    assert ("gguf==" in installed) == (package == "jllm-convert")

    if command := COMMANDS[package]:
        assert "Usage:" in run(bin_folder / command, "--help", cwd=tmp_path)


def test_the_extras_that_documents_and_messages_name_are_there() -> None:
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("packages/*/*.md"),
        *ROOT.glob("packages/*/src/**/*.py"),
    ]
    named = {
        (package, extra.strip())
        for path in texts
        for package, extras in re.findall(r"\b(jllm-\w+)\[([\w, -]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    there = {
        (package, extra)
        for package in COMMANDS
        for extra in tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"].get(
            "optional-dependencies", {}
        )
    }
    assert named - there == set()
    assert ("jllm-runtime", "serve") in named
