"""The Python of the documents and the examples, as a type checker sees it: what is written there can be written."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(ROOT.glob("packages/*/README.md"))
EXAMPLES = ROOT / "examples"
SOURCES = [ROOT / "packages" / name / "src" for name in ("jllm-core", "jllm-convert", "jllm-runtime")]


def python_of(document: Path) -> str:
    """All blocks of a document as one module: a later one goes on where an earlier one ends."""
    return "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S))


def check(*files: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml"]
    return subprocess.run(
        [*command, "--cache-dir", cache, *files],
        # In a folder that has none of the packages, so that they are found as a user's are.
        cwd=cache,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, [*SOURCES, EXAMPLES]))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_type_checks(tmp_path: Path) -> None:
    # The model in one file has no types: its shapes are what there is to read.
    files = [path for path in EXAMPLES.glob("*.py") if path.name != "minimal_qwen3.py"]
    for document in DOCUMENTS:
        files.append(tmp_path / f"{document.parent.name.replace('-', '_')}_readme.py")
        files[-1].write_text(python_of(document), encoding="utf-8")
        assert files[-1].stat().st_size, document
    done = check(*files, cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # The check itself, on what it must object to: a type that there is not, and a tokenizer that may be missing.
    (tmp_path / "wrong.py").write_text(
        "from jllm_runtime import load_model\n"
        "model = load_model('smollm2', dtype='float64')\n"
        "model.tokenizer.encode('a')\n"
        "model.chat('a', temperature=1).text.no_such_method()\n"
    )
    wrong = check(tmp_path / "wrong.py", cache=tmp_path)
    assert re.findall(r"wrong\.py:(\d): error: .*\[([\w-]+)\]", wrong.stdout) == [
        ("2", "arg-type"),
        ("3", "union-attr"),
        ("4", "attr-defined"),
    ]
