"""The documents name what exists: files, folders, headings, and things that can be imported."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for top in ("docs", "packages") for path in (ROOT / top).rglob("*.md")),
]
# Changelogs name what was there before.
DOCUMENTS = [document for document in DOCUMENTS if not document.endswith("CHANGELOG.md")]
SOURCE_FOLDERS = ("packages", "docs", "tests", "benchmarks", "examples", "fuzz", "notebooks", "release", "website")
SOURCE_SUFFIXES = (".py", ".md", ".js", ".mjs", ".css", ".html", ".svg", ".png")
# Folders that documents speak of and that are not in the repository: what commands make, and what is in a checkpoint.
MADE = {"dist/", "dist/site/index.html", "my-model/", "weights/"}
# Files of other projects.
FOREIGN = {"convert_hf_to_gguf.py"}
TREE = ROOT / "docs" / "internals" / "tree.md"
# Pages that the site makes from the packages (website/pages.py).
REFERENCE = re.compile(r"docs/reference/jllm[\w.-]*\.md")


def repository() -> set[str]:
    """Every file and folder of the repository's sources, relative to its root; folders end with a slash."""
    found = [path for top in SOURCE_FOLDERS for path in [ROOT / top, *(ROOT / top).rglob("*")]]
    found += [path for path in ROOT.glob("*") if path.is_file()]
    return {
        path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        for path in found
        if "__pycache__" not in path.parts
    }


def is_there(name: str, paths: set[str]) -> bool:
    """Whether a file or folder of the repository has this path, from any folder on."""
    return any(f"/{path}".endswith(f"/{end}") for path in paths for end in {name, name.rstrip("/") + "/"})


def code_spans(text: str) -> list[str]:
    """What stands in backticks, outside of blocks of code. A span may go over the end of a line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```.*?\n(.*?)```", text, flags=re.S)


def named_paths(text: str) -> list[str]:
    """The paths of sources in spans and blocks of code; in blocks, those that begin with a folder of the repository."""
    words = [(word, True) for span in code_spans(text) for word in re.split(r"[\s=]+", span)]
    words += [(word, False) for block in code_blocks(text) for word in re.split(r"[\s=\"'()]+", block)]
    paths = []
    for word, in_span in words:
        path = word.partition("::")[0].removesuffix(",")
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*/?", path) or path in MADE | FOREIGN:
            continue
        in_sources = path.startswith(tuple(f"{folder}/" for folder in SOURCE_FOLDERS))
        if in_sources or (in_span and path.endswith((*SOURCE_SUFFIXES, "/"))):
            paths.append(path)
    return paths


def unknown_paths(text: str) -> list[str]:
    paths = repository()
    return [path for path in named_paths(text) if not is_there(path, paths)]


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        if REFERENCE.fullmatch(os.path.relpath(path, ROOT)):
            continue
        known = set() if not anchor or not path.exists() else anchors(path.read_text("utf-8") if name else text)
        if not path.exists() or (anchor and anchor not in known):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """The headings of a document as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dotted_names(text: str) -> list[str]:
    """Names such as ``jllm_core.sharding.PRESETS`` in spans of code."""
    return [
        match.group()
        for span in code_spans(text)
        for match in re.finditer(r"\bjllm_(core|convert|runtime)(\.\w+)+", span)
    ]


def can_be_imported(name: str) -> bool:
    """Whether it is a module, or an attribute of one, or of a class in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            found: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A library that the module needs and that is not there is no fault of the name.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def tree_entries(text: str) -> list[str]:
    """The paths of the tree, each put behind the folder that it is indented under."""
    block = code_blocks(text)[0]
    entries: list[str] = []
    folder = ""
    for line in block.splitlines():
        indent, names = re.fullmatch(r"( *)(\S+(?: \S+)*?)(?:  +.*)?", line).groups()  # type: ignore[union-attr]
        if not indent:
            folder = names
            entries.append(names)
        else:
            entries += [folder + name for name in names.split(" ")]
    return entries


def axis_letters(source: str) -> set[str]:
    """The letters of axes in the jaxtyping signatures and einsums of a module."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    shapes = [
        part
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in {"Float", "Int", "Int8", "Bool", "Key"}
        for part in str(ast.literal_eval(node.slice.elts[1])).split()  # type: ignore[attr-defined]
    ]
    equations = [s for s in strings if isinstance(s, str) and re.fullmatch(r"[.A-Z]+,[.A-Z]+->[.A-Z]+", s)]
    return {part for part in shapes if len(part) == 1 and part.isalpha()} | set("".join(equations)) - set(",.->")


def known_letters(notation: str) -> tuple[set[str], set[str]]:
    """The letters of the two tables in docs/notation.md: everywhere, and in a few places."""
    rows = [line.split("|")[1] for line in notation.splitlines() if re.match(r"\| [A-Za-z](, [A-Za-z])* \|", line)]
    letters = [set(row.replace(",", " ").split()) for row in rows]
    local = notation.index("local meaning")
    count = sum(1 for line in notation[:local].splitlines() if re.match(r"\| [A-Za-z] \|", line))
    return set().union(*letters[:count]), set().union(*letters[count:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    assert unknown_paths((ROOT / document).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert broken_links((ROOT / document).read_text(encoding="utf-8"), (ROOT / document).parent) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_dotted_names_can_be_imported(document: str) -> None:
    names = dotted_names((ROOT / document).read_text(encoding="utf-8"))
    assert [name for name in names if not can_be_imported(name)] == []


def test_the_tree_has_every_module_and_folder_of_the_packages_and_nothing_else() -> None:
    entries = tree_entries(TREE.read_text(encoding="utf-8"))
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    sources = [path for path in ROOT.glob("packages/*/src/*/*") if not path.name.startswith(("__", "py.typed"))]
    wanted = {path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "") for path in sources}
    # A folder whose files are listed is not listed itself.
    listed = set(entries) | {f"{entry.rpartition('/')[0]}/" for entry in entries}
    assert sorted(wanted - listed) == []


def test_the_letters_of_axes_are_in_the_notation() -> None:
    everywhere, local = known_letters((ROOT / "docs/notation.md").read_text(encoding="utf-8"))
    used = {path: axis_letters(path.read_text(encoding="utf-8")) for path in ROOT.glob("packages/*/src/**/*.py")}
    unknown = {path.name: letters - everywhere - local for path, letters in used.items()}
    assert {name: letters for name, letters in unknown.items() if letters} == {}
    assert everywhere | local == set().union(*used.values())


# ---- The checks themselves, on texts that they must object to.


@pytest.mark.parametrize(
    "text",
    [
        "see `kernels/attention.py`",
        "see `jllm_core/kernels/`",
        "see `steps.py`, `decode`",
        "run `hatch run oracle:python benchmarks/none.py`",
        "```sh\npython benchmarks/none.py\n```",
        "`packages/jllm-core/src/jllm_core/none`",
        "a span over\ntwo `jllm_core/ops/\nnone.py` lines, `none.py`",
    ],
)
def test_a_path_that_is_not_there_is_found(text: str) -> None:
    assert unknown_paths(text)


def test_paths_that_are_there_pass() -> None:
    text = "`jllm_core/ops/attention.py`, `ops/`, `packages/jllm-core`, `tests/test_docs.py::test_x`, `my-model/`"
    assert len(named_paths(text)) == 4
    assert unknown_paths(text) == []


def test_letters_are_read_off_signatures_and_einsums() -> None:
    source = 'def f(x: Float[Array, "B *rows D"] | Int[Array, " Q"]): return jnp.einsum("...D,VD->...V", x, w)'
    assert axis_letters(source) == {*"BDQV"}
    assert known_letters("| Z | a | b |\n\nSome have a local meaning:\n\n| E, t | x | y |") == ({"Z"}, {"E", "t"})


@pytest.mark.parametrize("text", ["[a](none.md)", "[a](README.md#none)", "# A\n[a](#b)"])
def test_a_link_that_leads_nowhere_is_found(text: str) -> None:
    assert broken_links(text, ROOT)


@pytest.mark.parametrize(
    "name", ["jllm_core.none", "jllm_core.sharding.NONE", "jllm_core.config.ModelConfig.none", "jllm_runtime.steps"]
)
def test_a_name_that_cannot_be_imported_is_found(name: str) -> None:
    assert dotted_names(f"`{name}(x)`") == [name]
    assert not can_be_imported(name)


def test_names_that_can_be_imported_pass() -> None:
    assert can_be_imported("jllm_core.config.ModelConfig.window")
    assert can_be_imported("jllm_runtime.Engine")
