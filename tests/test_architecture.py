"""The rules that keep the packages apart and their modules small, read off the sources without importing them.

A rule takes a file's path, relative to the repository, and its syntax tree, and yields what it objects to.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"jllm-core": "jllm_core", "jllm-convert": "jllm_convert", "jllm-runtime": "jllm_runtime"}
ALLOWED_ARROWS = {("jllm_convert", "jllm_core"), ("jllm_runtime", "jllm_core")}
OTHER_FRAMEWORKS = {"torch", "transformers", "flax", "tensorflow"}
ORACLE_FOLDERS = ("tests/parity/", "benchmarks/")
# Where programs are compiled. Each is a decision about when XLA compiles anew, so a further one is added here by hand.
JIT_MODULES = {
    "jllm_runtime/programs/paged_batch.py",
    "jllm_runtime/programs/batch.py",
    "jllm_core/array_info.py",  # random weights, made in the shards where they will live
}
# Where the names of the mesh axes may be spelt; everywhere else they come from these modules.
AXIS_MODULES = {"jllm_core/sharding.py", "jllm_runtime/mesh.py"}
AXIS_NAMES = {"data", "tensor"}
# The calls of JAX whose strings can only be axis names, so that a key named "data" elsewhere raises no alarm.
AXIS_CALLS = {
    *("P", "PartitionSpec", "Mesh", "AbstractMesh", "make_mesh", "NamedSharding"),
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter"),
    *("axis_index", "axis_size"),
}
# What decides who runs and on which pages: plain Python, so that it can be read and tested without a device.
ARRAY_FREE = {"jllm_runtime/engine/scheduler.py", "jllm_runtime/cache/prefix.py"}
ARRAY_LIBRARIES = {"jax", "jaxlib", "numpy", "jaxtyping"}
MAX_LINES = 400

Rule = Callable[[PurePosixPath, ast.Module], Iterator[str]]


def in_src(path: PurePosixPath) -> bool:
    return path.parts[0] == "packages" and path.parts[2] == "src"


def module_path(path: PurePosixPath) -> str:
    """``packages/jllm-core/src/jllm_core/ops/norm.py`` -> ``jllm_core/ops/norm.py``."""
    return "/".join(path.parts[3:])


def last_name(node: ast.expr) -> str:
    """``c`` of the expression ``a.b.c`` or ``c``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the top-level name of each import, those that hide in a call with a literal string included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and last_name(node.func) in {"import_module", "__import__", "importorskip"}:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.split(".")[0]


def arrows(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if path.parts[0] != "packages":
        return
    owner = PACKAGES[path.parts[1]]
    for line, name in imported(tree):
        if name in PACKAGES.values() and name != owner and (owner, name) not in ALLOWED_ARROWS:
            yield f"{path}:{line}: {owner} must not import {name}"


def oracles(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not str(path).startswith(ORACLE_FOLDERS):
        for line, name in imported(tree):
            if name in OTHER_FRAMEWORKS:
                yield f"{path}:{line}: {name} may be imported only under {' and '.join(ORACLE_FOLDERS)}"


def jit(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not in_src(path) or module_path(path) in JIT_MODULES:
        return
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and last_name(node.func) == "getattr":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        if {"jit", "pjit"} & set(names):
            yield f"{path}:{node.lineno}: jax.jit belongs in {', '.join(sorted(JIT_MODULES))}"


def axis_names(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not in_src(path) or module_path(path) in AXIS_MODULES:
        return
    for node in ast.walk(tree):
        places: list[ast.expr] = []
        if isinstance(node, ast.Call):
            if last_name(node.func) in AXIS_CALLS:
                places += node.args
            places += [keyword.value for keyword in node.keywords if keyword.arg in {"axis_name", "axis_names"}]
        elif isinstance(node, ast.Subscript) and last_name(node.value) == "shape":  # mesh.shape["tensor"]
            places.append(node.slice)
        for place in places:
            for part in place.elts if isinstance(place, ast.Tuple | ast.List) else [place]:
                if isinstance(part, ast.Constant) and part.value in AXIS_NAMES:
                    yield f"{path}:{part.lineno}: the axis name {part.value!r} is spelt out; import it"


def import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions and of the main guard."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue += [*node.decorator_list, node.args]
        elif isinstance(node, ast.Lambda):
            queue.append(node.args)
        elif isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            queue += node.orelse
        else:
            queue += ast.iter_child_nodes(node)


def import_time_writes(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not in_src(path):
        return
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def is_global(node: ast.expr) -> bool:
        head, _, rest = ast.unparse(node).partition(".")
        name = aliases.get(head, head) + (f".{rest}" if rest else "")
        return name in {"os.environ", "jax.config"}

    for node in import_time(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            written = is_global(node.value)
        elif isinstance(node, ast.AugAssign):  # os.environ |= {...}
            written = is_global(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            changes = {"update", "setdefault", "pop", "popitem", "clear"}
            written = (method in changes and is_global(node.func.value)) or method in {"putenv", "unsetenv"}
        else:
            written = False
        if written:
            yield f"{path}:{getattr(node, 'lineno', 0)}: an import must not change os.environ or jax.config"


def asserts(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if in_src(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield f"{path}:{node.lineno}: `python -O` drops an assert; raise an error that helps"


def array_free(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if in_src(path) and module_path(path) in ARRAY_FREE:
        allowed = {"jllm_runtime.errors", *(file[:-3].replace("/", ".") for file in ARRAY_FREE)}
        for node in ast.walk(tree):
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if name.startswith("jllm_") and name not in allowed:
                yield f"{path}:{node.lineno}: {name} may bring an array library; import only {sorted(allowed)}"
        for line, name in imported(tree):
            if name in ARRAY_LIBRARIES:
                yield f"{path}:{line}: {name} is an array library, which this module does without"


RULES: list[Rule] = [arrows, oracles, jit, axis_names, import_time_writes, asserts, array_free]


def sources() -> list[PurePosixPath]:
    files = [file for top in ("packages", "tests", "examples", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    return sorted(PurePosixPath(file.relative_to(ROOT).as_posix()) for file in files)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    objections = [o for path in sources() for o in rule(path, ast.parse((ROOT / path).read_bytes()))]
    assert not objections, "\n".join(objections)


def test_files_are_small_and_named_for_what_they_hold() -> None:
    files = [path for path in sources() if in_src(path)]
    assert {path.parts[1] for path in files} == set(PACKAGES), "a package has no sources: the rules checked nothing"
    lengths = {str(path): len((ROOT / path).read_bytes().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert [str(path) for path in files if path.stem in {"util", "utils"}] == []


# ---- The rules themselves, on snippets that they must object to, and on look-alikes that they must let pass.

CORE, CONVERT, RUNTIME = (f"packages/{name}/src/{module}/any.py" for name, module in PACKAGES.items())
SCHEDULER = "packages/jllm-runtime/src/jllm_runtime/engine/scheduler.py"


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (arrows, CONVERT, "import jllm_runtime"),
        (arrows, CONVERT, "def f():\n    from jllm_runtime.programs.batch import decode"),
        (arrows, CONVERT, "import importlib\nimportlib.import_module('jllm_runtime.programs.batch')"),
        (arrows, RUNTIME, "from jllm_convert import convert"),
        (arrows, CORE, "from jllm_convert import convert"),
        (arrows, CORE, "import jllm_runtime.mesh as mesh"),
        (arrows, "packages/jllm-core/tests/test_any.py", "import jllm_runtime"),
        (oracles, CORE, "import torch"),
        (oracles, "tests/test_any.py", "from transformers import AutoModel"),
        (oracles, "examples/any.py", "import torch.nn as nn"),
        (oracles, "tests/e2e/test_any.py", "import pytest\npytest.importorskip('torch')"),
        (jit, CORE, "import jax\nf = jax.jit(g)"),
        (jit, CORE, "import jax\n@jax.jit\ndef f(): ..."),
        (jit, CONVERT, "import functools, jax as j\n@functools.partial(j.jit, static_argnums=0)\ndef f(x): ..."),
        (jit, RUNTIME, "from jax import jit as compiled"),
        (jit, RUNTIME, "from jax.experimental.pjit import pjit"),
        (jit, RUNTIME, "import jax\nf = getattr(jax, 'jit')(g)"),
        (axis_names, CORE, "spec = P(None, 'tensor')"),
        (axis_names, CORE, "spec = jax.sharding.PartitionSpec(('data', 'tensor'))"),
        (axis_names, RUNTIME, "mesh = jax.make_mesh((1, 2), ('data', 'tensor'))"),
        (axis_names, RUNTIME, "x = jax.lax.psum(x, axis_name='tensor')"),
        (axis_names, RUNTIME, "n = mesh.shape['tensor']"),
        (import_time_writes, CORE, "import os\nos.environ['XLA_FLAGS'] = ''"),
        (import_time_writes, CORE, "from os import environ as e\nclass A:\n    e.setdefault('A', 'b')"),
        (import_time_writes, CORE, "import os\nif True:\n    del os.environ['A']"),
        (import_time_writes, CORE, "import os\nos.environ |= {}"),
        (import_time_writes, CORE, "import os\ndef f(a=os.environ.pop('A')): ..."),
        (import_time_writes, RUNTIME, "import jax\njax.config.update('jax_enable_x64', True)"),
        (import_time_writes, RUNTIME, "from jax import config\nconfig.jax_enable_x64 = True"),
        (asserts, RUNTIME, "def f(x):\n    assert x"),
        (array_free, SCHEDULER, "import numpy as np"),
        (array_free, SCHEDULER, "def f():\n    from jax import numpy"),
        (array_free, SCHEDULER, "from jllm_runtime.loading import Model"),
    ],
)
def test_rule_objects(rule: Rule, path: str, code: str) -> None:
    assert list(rule(PurePosixPath(path), ast.parse(code)))


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (arrows, CONVERT, "import jllm_core.config\nfrom jllm_convert import layout\nfrom . import rules"),
        (arrows, RUNTIME, "from jllm_core import Model\nfrom .steps import decode"),
        (arrows, "tests/test_any.py", "import jllm_convert, jllm_runtime"),
        (oracles, CORE, "name = 'torch'\nfrom .torch import names\nimport torchless"),
        (oracles, "tests/parity/test_any.py", "import torch, transformers"),
        (oracles, "benchmarks/any.py", "import torch"),
        (jit, "packages/jllm-runtime/src/jllm_runtime/programs/batch.py", "import jax\nf = jax.jit(g)"),
        (jit, CORE, "'jax.jit is elsewhere'\njit = 1"),
        (axis_names, "packages/jllm-core/src/jllm_core/sharding.py", "spec = P('tensor')"),
        (axis_names, CONVERT, "x = fields['data']\ny = {'tensor': 1}\nz = read(file, 'data')\nw = x.shape[0]"),
        (import_time_writes, CORE, "import os\nhome = os.environ['HOME']\nx = os.environ.get('X')"),
        (import_time_writes, RUNTIME, "import jax\ndef main():\n    jax.config.update('jax_enable_x64', True)"),
        (import_time_writes, RUNTIME, "import os\nif __name__ == '__main__':\n    os.environ['A'] = 'b'"),
        (import_time_writes, CORE, "config = {}\nconfig.update(a=1)\nconfig['a'] = 2"),
        (asserts, "packages/jllm-core/tests/test_any.py", "assert True"),
        (array_free, SCHEDULER, "import bisect\nfrom jllm_runtime.cache.prefix import PrefixCache"),
        (array_free, RUNTIME, "import numpy"),
    ],
)
def test_rule_lets_pass(rule: Rule, path: str, code: str) -> None:
    assert not list(rule(PurePosixPath(path), ast.parse(code)))
