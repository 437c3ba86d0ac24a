"""Installs of built wheels, each with each of its extras, on each Python that the packages name."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from release.archives import run
from release.packages import Package, ReleaseError
from release.rules import ALL, Finding

PYTHONS = ("3.11", "3.12", "3.13")

RESOLVED_ONLY = ("tpu", "cuda-plan")
"""Extras that bring gigabytes: it is only seen that there are versions of all that they ask for."""

UV = (sys.executable, "-m", "uv")
# A Python that is not there is told, and not fetched behind one's back.
OFFLINE_PYTHONS = {"UV_PYTHON_DOWNLOADS": "never"}

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
    """Options: siblings come from this folder, and not from what uv has kept of an earlier build."""
    refresh = [option for wheel in wheels.glob("*.whl") for option in ("--refresh-package", wheel.name.split("-")[0])]
    return ["--find-links", wheels, *refresh]


def _resolve(requirement: str, wheels: Path, path: str, scratch: Path) -> str:
    wanted = scratch / "requirements.in"
    wanted.write_text(requirement, encoding="utf-8")
    command = (*UV, "pip", "compile", "--quiet", "--python", path, *_from(wheels), wanted)
    lines = run(*command, cwd=scratch, environment=OFFLINE_PYTHONS).splitlines()
    return f"{sum('==' in line for line in lines)} packages, not installed"


def _install(package: Package, requirement: str, wheels: Path, path: str, scratch: Path) -> str:
    environment = scratch / "environment"
    run(*UV, "venv", "--quiet", "--clear", "--python", path, environment, cwd=scratch, environment=OFFLINE_PYTHONS)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    run(*UV, "pip", "install", "--quiet", "--python", scripts / "python", *_from(wheels), requirement, cwd=scratch)
    run(*UV, "pip", "check", "--python", scripts / "python", cwd=scratch)
    version = run(scripts / "python", "-c", IMPORT, package.module, cwd=scratch).strip().splitlines()[-1]
    if version != package.version:
        raise ReleaseError(f"installed is {version}, expected {package.version}")
    for command in package.commands:
        run(scripts / command, "--help", cwd=scratch)
    return ""
