"""Installs of built wheels, each with each of its extras, on each Python that the packages name."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from release.archives import run
from release.packages import NAMES, Package, ReleaseError
from release.rules import ALL, Finding

PYTHONS = ("3.11", "3.12", "3.13")

RESOLVED_ONLY = ("tpu", "cuda-plan")
"""Extras that bring gigabytes: it is only seen that there are versions of all that they ask for."""

UV = (sys.executable, "-m", "uv")
# A Python that is not there is told, and not fetched behind one's back.
OFFLINE_PYTHONS = {"UV_PYTHON_DOWNLOADS": "never"}

INSTALLED = """
import importlib.metadata
for each in importlib.metadata.distributions():
    print(each.name, each.version)
"""

IMPORT = """
import importlib, sys
package = importlib.import_module(sys.argv[1])
for name in package.__all__:
    getattr(package, name)
print(package.__version__)
"""


def pythons(wanted: list[str]) -> tuple[dict[str, str], list[Finding]]:
    """The interpreters to install for.

    Args:
        wanted: versions or paths that were asked for; empty for PYTHONS.

    Returns:
        Paths by what they were called, and a finding for each that is not there.
    """
    paths, missing = {}, []
    # Those that pyenv has built lie behind shims, which stand for one of them at a time.
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, sorted(pyenv.glob("*/bin")))])
    # Without the environment that this runs in, which would always be found.
    environment = {**OFFLINE_PYTHONS, "VIRTUAL_ENV": "", "PATH": places}
    for name in wanted or PYTHONS:
        try:
            paths[name] = run(*UV, "python", "find", "--system", name, cwd=Path.cwd(), environment=environment).strip()
        except ReleaseError:
            note = f"there is no Python {name} here; install it, or name those to check with --python"
            missing.append(Finding("python", ALL, False, note))
    return paths, missing


def check(package: Package, wheels: Path, python: str, path: str, scratch: Path) -> Iterator[Finding]:
    """Install a package alone and with each extra, import it and call its commands.

    Args:
        package: the package, whose wheel and those of its siblings are in ``wheels``.
        wheels: their folder.
        python: what the interpreter is called in the table.
        path: the interpreter.
        scratch: a folder for environments.
    """
    (wheel,) = wheels.glob(f"{package.module}-*.whl")
    for extra in (None, *package.extras):
        what = package.name if extra is None else f"{package.name}[{extra}]"
        requirement = str(wheel) if extra is None else f"{package.name}[{extra}] @ {wheel.as_uri()}"
        try:
            if extra in RESOLVED_ONLY:
                yield Finding(f"resolve {python}", what, True, _resolve(requirement, wheels, path, scratch))
            else:
                yield Finding(f"install {python}", what, True, _install(package, requirement, wheels, path, scratch))
        except ReleaseError as error:
            yield Finding(f"install {python}", what, False, str(error))


def _from(wheels: Path) -> list[str | Path]:
    """Options: the packages are these wheels, and neither an index' nor what uv has kept of an earlier build.

    A constraint leaves the bounds between the packages in force, and excludes a higher version that an index may have.
    """
    built = _wheels(wheels)
    constraints = wheels / "constraints.txt"
    constraints.write_text("".join(f"{name} @ {path.as_uri()}\n" for name, path in built.items()), encoding="utf-8")
    return ["--constraints", constraints, *(option for name in built for option in ("--refresh-package", name))]


def _wheels(folder: Path) -> dict[str, Path]:
    found = {path.name.split("-")[0].replace("_", "-"): path for path in sorted(folder.glob("*.whl"))}
    return {name: found[name] for name in NAMES if name in found}


def _resolve(requirement: str, wheels: Path, path: str, scratch: Path) -> str:
    wanted = scratch / "requirements.in"
    wanted.write_text(requirement, encoding="utf-8")
    command = (*UV, "pip", "compile", "--quiet", "--python", path, *_from(wheels), wanted)
    lines = run(*command, cwd=scratch, environment=OFFLINE_PYTHONS).splitlines()
    if others := [line for line in lines if re.match(rf"({'|'.join(NAMES)})(\[.*\])?==", line)]:
        raise ReleaseError(f"resolved is {others[0]} of an index, expected the wheel that was built")
    return f"{sum('==' in line for line in lines)} packages, not installed"


def _install(package: Package, requirement: str, wheels: Path, path: str, scratch: Path) -> str:
    environment = scratch / "environment"
    run(*UV, "venv", "--quiet", "--clear", "--python", path, environment, cwd=scratch, environment=OFFLINE_PYTHONS)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    run(*UV, "pip", "install", "--quiet", "--python", scripts / "python", *_from(wheels), requirement, cwd=scratch)
    run(*UV, "pip", "check", "--python", scripts / "python", cwd=scratch)
    there = dict(line.split() for line in run(scripts / "python", "-c", INSTALLED, cwd=scratch).splitlines())
    for name, wheel in _wheels(wheels).items():
        expected = wheel.name.split("-")[1]
        if there.get(name, expected) != expected:
            raise ReleaseError(f"installed is {name} {there[name]}, expected {expected}, the wheel that was built")
    version = run(scripts / "python", "-c", IMPORT, package.module, cwd=scratch).strip().splitlines()[-1]
    if version != package.version:
        raise ReleaseError(f"installed is {version}, expected {package.version}")
    for command in package.commands:
        run(scripts / command, "--help", cwd=scratch)
    return ""
