"""The rules that keep the packages apart and their modules small, read off the sources without importing them.

A rule takes a file's path, relative to the repository, and its syntax tree, and yields what it objects to.
"""

import ast
import re
from collections import Counter
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
    "jllm_runtime/programs/contiguous_batch.py",
    "jllm_runtime/programs/scoring.py",
    "jllm_core/array_info.py",  # random weights, made in the shards where they will live
    # Inlined: inside a program they are none of their own.
    *("jllm_core/ops/attention.py", "jllm_core/ops/norm.py", "jllm_core/ops/rope.py"),
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
# The folders of core that are the maths, and all that they may know of backends.
MATHS = ("jllm_core/model.py", "jllm_core/ops/")
BACKEND_SEAM = {"jllm_core.backends.base", "jllm_core.backends.select"}
# Inside a package a folder may import from the folders on its right, besides itself; a folder without a line, from all.
FOLDERS = {
    "jllm_core": {
        "ops": {"backends", "quantization"},
        "quantization": {"ops"},
        "checkpoint": {"quantization"},
    },
    "jllm_convert": {
        "files": set(),
        "hub": {"files", "writing"},
        "sources": {"families", "files"},
        "families": set(),
        "matching": {"families", "sources"},
    },
    "jllm_runtime": {
        "cache": set(),
        "speculative": set(),
        "distributed": set(),
        "programs": {"cache", "speculative"},
        "engine": {"cache", "programs", "distributed"},
        "chat": {"engine", "cache"},
        "server": {"engine", "distributed"},
        "planner": {"cache", "programs"},
        "benchmarking": {"cache", "programs", "planner"},
        "evaluation": {"cache", "programs"},
    },
}
# Modules of a package that share a name because they play the same part.
SAME_PART = {
    *("__init__", "__about__"),
    "errors",  # of the library; of the HTTP API
    *("backend", "blocked_attention"),  # one a kind of device
    *("command", "report"),  # one a subcommand
    "config",  # one a source of published weights; the engine's and the server's
    *("chat", "completions", "embeddings", "tokens"),  # an endpoint and its schema
    "sampling",  # the maths in ops; the parameters of a request, and their schema
}
QUESTIONS = re.compile(r"(What|Who|Whose|How|Which|Where|When|Why|Whether|From what)\b")
LIMITS = re.compile(r"_?(MOST|LEAST|USUAL|FEWEST|SMALLEST|LARGEST|LONGEST|SHORTEST|WIDEST|HIGHEST|LOWEST)(_|$)")
# What decides who runs and on which pages: plain Python, so that it can be read and tested without a device.
ARRAY_FREE = {f"jllm_runtime/{name}.py" for name in ("engine/scheduler", "cache/prefix", "cache/snapshots")}
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


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of each module that is imported, at the top of a file or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def backend_seam(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """The maths knows the protocol alone, and nothing but its own folder and the choice knows a backend's insides."""
    if not in_src(path):
        return
    own = module_path(path)
    for line, name in imported_modules(tree):
        if not name.startswith("jllm_core.backends."):
            continue
        seam = ".".join(name.split(".")[:3])
        if own.startswith(MATHS) and seam != "jllm_core.backends.base":
            yield f"{path}:{line}: {name}: the maths knows no backend but the protocol in backends/base.py"
        elif seam not in BACKEND_SEAM and not own.startswith("jllm_core/backends/"):
            yield f"{path}:{line}: {name} is a backend's inside; ask the Backend, or choose one by backends/select.py"
        elif seam == "jllm_core.backends.cpu" and not own.startswith(
            ("jllm_core/backends/cpu/", "jllm_core/backends/select.py")
        ):
            yield f"{path}:{line}: nothing outside backends/cpu imports from it"


def folder_arrows(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not in_src(path) or len(path.parts) < 6:
        return
    package, folder = path.parts[3], path.parts[4]
    allowed = FOLDERS[package].get(folder)
    if allowed is None:
        return
    folders = {p.parent.name for p in (ROOT / Path(*path.parts[:4])).glob("*/__init__.py")} | set(FOLDERS[package])
    for line, name in imported_modules(tree):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] in folders - allowed - {folder}:
            yield f"{path}:{line}: {package}/{folder} may import from {sorted(allowed) or 'no folder'}, not {parts[1]}"


def first_lines(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    """A module's docstring, and that of a constant, begins with a noun phrase: a reader searches for that."""
    if not in_src(path):
        return
    if not ast.get_docstring(tree):
        yield f"{path}:1: a module says in its first line what it holds"
    for node in tree.body:
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and QUESTIONS.match(text.value):
            yield f"{path}:{node.lineno}: {text.value.splitlines()[0]!r} is a question, not a noun phrase"


def limits(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if not in_src(path):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and LIMITS.match(node.id):
            yield f"{path}:{node.lineno}: {node.id}: limits are called MAX_, MIN_ and DEFAULT_"


RULES: list[Rule] = [
    *(arrows, oracles, jit, axis_names, import_time_writes, asserts, array_free),
    *(backend_seam, folder_arrows, first_lines, limits),
]


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


def test_no_two_modules_of_a_package_share_a_name_unless_they_play_the_same_part() -> None:
    names = Counter((path.parts[1], path.stem) for path in sources() if in_src(path) and path.stem not in SAME_PART)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("module", "most_files", "most_lines"), [("jllm_core.model", 16, 1750), ("jllm_runtime.generation", 35, 4500)]
)
def test_few_files_have_to_be_opened_to_read_a_module(module: str, most_files: int, most_lines: int) -> None:
    """What it imports, and what that imports, of these packages, when it is imported."""
    seen: dict[Path, int] = {}
    queue = [module]
    while queue:
        parts = queue.pop().split(".")
        package = next((name for name, top in PACKAGES.items() if top == parts[0]), None)
        if package is None:
            continue
        base = (ROOT / "packages" / package / "src").joinpath(*parts)
        file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if file in seen or not file.exists():
            continue
        seen[file] = len(file.read_text(encoding="utf-8").splitlines())
        tree = ast.parse(file.read_bytes())
        # What stands in functions or under TYPE_CHECKING is not needed to read the module.
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        queue += [name for _, name in imported_modules(tree)]
    assert len(seen) <= most_files, sorted(str(file.relative_to(ROOT)) for file in seen)
    assert sum(seen.values()) <= most_lines


def test_the_softmax_of_attention_stands_once_in_the_maths_and_once_a_backend() -> None:
    """The forward pass is written once: whoever writes attention again writes its softmax again."""
    found = [
        module_path(path)
        for path in sources()
        if in_src(path) and path.parts[1] == "jllm-core"
        for node in ast.walk(ast.parse((ROOT / path).read_bytes()))
        if isinstance(node, ast.FunctionDef)
        and "attention" in path.stem
        and {"q", "k"} <= {a.arg for a in node.args.args}
    ]
    assert {*found} == {
        "jllm_core/ops/attention.py",
        "jllm_core/backends/blocked_attention.py",
        "jllm_core/backends/cpu/blocked_attention.py",
        "jllm_core/backends/gpu/flash_attention.py",
        "jllm_core/backends/tpu/paged_attention.py",
        "jllm_core/backends/tpu/pallas_attention.py",
    }
    elsewhere = [
        module_path(path)
        for path in sources()
        if in_src(path) and path.parts[1] != "jllm-core"
        for node in ast.walk(ast.parse((ROOT / path).read_bytes()))
        if isinstance(node, ast.Call) and last_name(node.func) == "softmax"
    ]
    assert elsewhere == []


# ---- The rules themselves, on snippets that they must object to, and on look-alikes that they must let pass.

CORE, CONVERT, RUNTIME = (f"packages/{name}/src/{module}/any.py" for name, module in PACKAGES.items())
MODEL, NORM = (f"packages/jllm-core/src/jllm_core/{name}.py" for name in ("model", "ops/norm"))
TPU_BACKEND = "packages/jllm-core/src/jllm_core/backends/tpu/any.py"
HUB = "packages/jllm-convert/src/jllm_convert/hub/any.py"
PROGRAM = "packages/jllm-runtime/src/jllm_runtime/programs/any.py"
SCHEDULER = "packages/jllm-runtime/src/jllm_runtime/engine/scheduler.py"


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (arrows, CONVERT, "import jllm_runtime"),
        (arrows, CONVERT, "def f():\n    from jllm_runtime.programs.contiguous_batch import decode"),
        (arrows, CONVERT, "import importlib\nimportlib.import_module('jllm_runtime.programs.contiguous_batch')"),
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
        (array_free, SCHEDULER, "from jllm_runtime.model import Model"),
        (backend_seam, MODEL, "from jllm_core.backends.cpu import ffi"),
        (backend_seam, MODEL, "def f():\n    from jllm_core.backends.select import select_backend"),
        (backend_seam, NORM, "import jllm_core.backends.tpu.pallas_attention"),
        (backend_seam, RUNTIME, "from jllm_core.backends.cpu.layer_calls import MAX_DECODE_TOKENS"),
        (backend_seam, RUNTIME, "from jllm_core.backends import cpu"),
        (backend_seam, TPU_BACKEND, "from jllm_core.backends.cpu.blocked_attention import attention"),
        (folder_arrows, HUB, "from jllm_convert.sources.opening import open_source"),
        (folder_arrows, PROGRAM, "def f():\n    from jllm_runtime.engine.engine import Engine"),
        (folder_arrows, PROGRAM, "from jllm_runtime import server"),
        (first_lines, CORE, '"""What a model is."""'),
        (first_lines, CORE, '"""Sizes."""\nA = 1\n"""How many there are."""'),
        (first_lines, CORE, "A = 1"),
        (limits, CORE, "MOST_ROWS = 3"),
        (limits, CORE, "def f():\n    _LEAST_ROWS: int = 3"),
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
        (jit, "packages/jllm-runtime/src/jllm_runtime/programs/contiguous_batch.py", "import jax\nf = jax.jit(g)"),
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
        (backend_seam, MODEL, "from jllm_core.backends.base import XLA, Backend"),
        (backend_seam, RUNTIME, "from jllm_core.backends.select import select_backend"),
        (backend_seam, "packages/jllm-core/tests/test_any.py", "from jllm_core.backends.cpu import ffi"),
        (
            backend_seam,
            "packages/jllm-core/src/jllm_core/backends/cpu/any.py",
            "from jllm_core.backends.cpu import ffi",
        ),
        (
            folder_arrows,
            HUB,
            "from jllm_convert.files.model_folder import ModelFolder\nfrom jllm_convert.hub import store",
        ),
        (
            folder_arrows,
            PROGRAM,
            "from jllm_runtime.cache.paged import Pages\nfrom jllm_runtime.sampling import sample",
        ),
        (folder_arrows, RUNTIME, "from jllm_runtime.server.app import create_app"),
        (first_lines, CORE, '"""Whatever it is: a noun."""\ndef f():\n    """What it gives."""'),
        (limits, CORE, "MAX_ROWS, MOSTLY = 3, 4\nmost_rows = 2\nx = MOST_ROWS"),
    ],
)
def test_rule_lets_pass(rule: Rule, path: str, code: str) -> None:
    assert not list(rule(PurePosixPath(path), ast.parse(code)))
