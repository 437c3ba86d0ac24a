"""This project beside llama.cpp and transformers on a CPU: the same weights, the same threads, by turns.

    hatch run bench:peers --quick                     what the targets are about: some ten minutes
    hatch run bench:peers [--models qwen3-0.6b]       every case
    hatch run bench:peers --cases decode-512 --rounds 1 --prepared      a piece; its runs join those in the folder
    hatch run bench:peers --report                    what the runs in the folder come to

Every run is a process of its own: it loads, warms up, and times some repetitions. The machine's limits take their turn
in each round. Medians over the runs; ratios are the medians of the rounds' own. Every run's greedy tokens are compared
with what this project says in float32 without its kernels: what is float32 throughout must say the same.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.peers.cases import FULL, LIMITS, QUICK, Case, Contender, find_cases
from benchmarks.peers.models import MODELS, find_model
from benchmarks.peers.plots import draw
from benchmarks.peers.results import Results
from benchmarks.peers.runner import Runner
from benchmarks.peers.tables import case_table, limit_line, target_table
from benchmarks.peers.targets import targets

PACKAGES = ("jllm-core", "jllm-runtime", "jax", "llama-cpp-python", "torch", "transformers")
FEATURES = ("avx2", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What of a processor decides which of the peers' kernels run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the cases that the targets are about")
    parser.add_argument("--cases", nargs="+", help="of " + ", ".join(case.name for case in FULL))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--contenders", nargs="+", metavar="WORD", help="only those with such a word in their names")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that each run may use")
    default = Path(platformdirs.user_cache_dir("jllm", appauthor=False)) / "peers"
    parser.add_argument("--folder", type=Path, default=default, help="where weights and runs are kept: %(default)s")
    parser.add_argument("--only-prepare", action="store_true", help="make weights, references and compiled programs")
    parser.add_argument("--prepared", action="store_true", help="they are there already")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--anew", action="store_true", help="forget the runs in the folder first")
    options = parser.parse_args()
    cases = find_cases(options.cases, QUICK if options.quick else FULL)
    runs = options.folder / "runs.jsonl"
    if options.anew:
        runs.unlink(missing_ok=True)
    for name in [] if options.report else options.models:
        _run(Runner(find_model(name, options.folder), options.folder, options.threads), cases, options, runs)
    if not options.only_prepare:
        _report(runs, options.models, cases)


def _run(runner: Runner, cases: list[Case], options: argparse.Namespace, runs: Path) -> None:
    """All rounds of each case; each run is added to the file at once."""
    for case in cases:
        if case.kind == "start" and not runner.model.has_tokenizer:
            continue
        words = options.contenders
        chosen = [who for who in case.contenders if not words or any(word in who.name.split() for word in words)]
        if not options.prepared:
            runner.prepare(case, chosen)
        for number in [] if options.only_prepare else range(options.rounds):
            limits = [] if case.kind == "start" else [Contender(LIMITS)]
            for contender in [*chosen, *limits]:
                print(f"{runner.model.name} {case.name}, round {number + 1}: {contender.name}", file=sys.stderr)
                record = runner.run(case, contender)
                with runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record | {"threads": runner.threads}) + "\n")


def _report(runs: Path, models: list[str], cases: list[Case]) -> None:
    """Print the tables, and write them, the records and the plots beside the runs."""
    if not runs.exists():
        raise SystemExit(f"there are no runs in {runs.parent}")
    records = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    machine = _machine()
    parts = [f"{machine['processor']} ({machine['features']}), {machine['cores']} cores, {machine['versions']}"]
    for name in models:
        results = Results.of(records, name)
        there = [case for case in cases if results.contenders(case.name)]
        parts += [f"## {name}", limit_line(results, there), target_table(results, targets())]
        parts += [case_table(results, case) for case in there]
        if there:
            draw(
                results,
                there,
                f"{name}, {machine['cores']} cores of {machine['processor']}",
                runs.with_name(f"{name}.png"),
            )
    text = "\n\n".join(parts)
    print(text)
    (runs.parent / "tables.md").write_text(text + "\n", encoding="utf-8")
    (runs.parent / "results.json").write_text(json.dumps({"machine": machine, "runs": records}, indent=1) + "\n")


def _machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _is_there(name)}
    name, flags = _cpuinfo("model name") or platform.machine(), _cpuinfo("flags").split()
    features = ", ".join(flag for flag in FEATURES if flag in flags) or "features unknown"
    return {"processor": name, "features": features, "cores": os.cpu_count(), "versions": versions}


def _is_there(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


if __name__ == "__main__":
    main()
