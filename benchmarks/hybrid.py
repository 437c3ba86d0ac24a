"""A hybrid of delta nets and attention on a CPU: this project's kernels beside XLA and transformers, by turns.

    hatch run oracle:python -m benchmarks.hybrid [--types float32 int8-bfloat16] [--cases prefill-512] [--json FILE]

A random model of the shape of Qwen3.5-0.8B with a vocabulary of 32,768, made once. Every turn is a process of its own,
as in ``benchmarks/peers``; the first turn of each does not count. Medians over the turns; a ratio is the median of the
turns' own. transformers has no matrices of 8 or 4 bits on a CPU, so what all are compared with is the faster of its
types. In float32 all must choose the same tokens. On a machine that others use, ``--processor-time`` takes one core and
counts what each has of it.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.peers.cases import JLLM, TRANSFORMERS, TRANSFORMERS_PRECISIONS, Case, Contender
from benchmarks.peers.models import Model
from benchmarks.peers.processes import ask
from benchmarks.peers.prompts import prompts
from benchmarks.peers.runner import leading

VOCABULARY = 32768
TYPES = ("float32", "bfloat16", "int8-bfloat16", "int4-bfloat16")
"""Of this project's weights; after a hyphen, of what is not quantised, which in the published models is bfloat16."""
CASES = {
    case.name: case
    for case in (
        Case("prefill-512", "prefill", prompt=512),
        Case("decode-512", "decode", prompt=512, tokens=64),
    )
}
PACKAGES = ("jax", "torch", "transformers")
FOLDER = Path(platformdirs.user_cache_dir("jllm", appauthor=False)) / "hybrid"
"""Where the weights are kept, in each type."""


@dataclass
class Side:
    """One of those that take turns, and what it took.

    Attributes:
        name: for people.
        contender: whose weights, and whose script.
        environment: what is set for it.
        seconds: of each counted turn, the median repetition.
        tokens: what it chose.
    """

    name: str
    contender: Contender
    environment: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


def write_random(folder: Path) -> None:
    """The model as transformers makes it, in bfloat16, which every type holds or is made from."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def sides(types: list[str]) -> list[Side]:
    """The kernels and XLA with weights of each type, and transformers with each of its own."""
    xla = {"JLLM_KERNELS": "xla"}
    ours = [
        Side(f"{name} {precision}", Contender(JLLM, precision), environment)
        for precision in types
        for name, environment in (("kernels", {}), ("XLA", xla))
    ]
    peers = [Contender(TRANSFORMERS, precision) for precision in TRANSFORMERS_PRECISIONS]
    return [*ours, *(Side(peer.name, peer) for peer in peers)]


def take_turns(
    model: Model, case: Case, taking: list[Side], *, rounds: int, folder: Path, threads: int, processor_time: bool
) -> None:
    """Run a case by each side, again and again."""
    texts = prompts(model, folder, case.batch, case.prompt)
    for number in range(rounds + 1):
        for side in taking:
            task = {
                "kind": case.kind,
                "weights": str(model.weights(side.contender)),
                "precision": side.contender.precision,
                "threads": threads,
                "prompts": texts,
                "tokens": case.tokens,
                "repeats": case.repeats,
                "processor_time": processor_time,
            }
            told = ask(side.contender, task, threads, JLLM_CACHE=str(folder / "cache"), **side.environment)
            side.tokens = told["tokens"]
            if number:
                side.seconds.append(statistics.median(told["seconds"]))


def table(case: Case, taking: list[Side]) -> list[dict[str, Any]]:
    """Print a line for each side; the same as records."""
    peers = [side for side in taking if side.contender.peer == TRANSFORMERS]
    best = min(peers, key=lambda side: statistics.median(side.seconds))
    exact = peers[0].tokens
    print(f"{case.name:>22} {'tokens/s':>9} {'lowest':>8} {'highest':>8}  x of {best.name}; as transformers float32")
    records = []
    for side in taking:
        speeds = [case.work / seconds for seconds in side.seconds]
        ratio = statistics.median(b / a for a, b in zip(side.seconds, best.seconds, strict=True))
        same = sum(map(leading, side.tokens, exact)) / sum(map(len, exact))
        median, low, high = statistics.median(speeds), min(speeds), max(speeds)
        print(f"{side.name:>22} {median:9.1f} {low:8.1f} {high:8.1f}  {ratio:5.2f}x {same:4.0%}", flush=True)
        records.append(
            {"case": case.name, "side": side.name, "seconds": side.seconds, "tokens_per_s": median, "ratio": ratio}
            | {"against": best.name, "same": same}
        )
        if side.contender.is_exact and same < 1:
            raise SystemExit(f"{side.name} chooses {side.tokens}, transformers {exact}")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=(*TYPES, "int8", "int4"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sides", nargs="+", metavar="WORD", help="only those with such a word in their names")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that each may use")
    parser.add_argument("--processor-time", action="store_true", help="one core, and seconds of it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where weights are kept: %(default)s")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    busy = arguments.processor_time
    threads = 1 if busy else arguments.threads
    model = Model("qwen3.5-0.8b", arguments.folder, has_tokenizer=False, write=write_random, vocabulary=VOCABULARY)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(f"{threads} cores, {versions}; Qwen3.5-0.8B's shape, random; medians of {arguments.rounds} turns")
    records = []
    for case in (CASES[name] for name in arguments.cases):
        words = arguments.sides
        taking = [side for side in sides(arguments.types) if not words or set(words) & set(side.name.split())]
        for side in taking:
            model.prepare(side.contender, threads)
        settings = {"rounds": arguments.rounds, "folder": arguments.folder, "threads": threads}
        take_turns(model, case, taking, **settings, processor_time=busy)
        records += table(case, taking)
    if arguments.json:
        report = {"versions": versions, "threads": threads, "processor_time": busy, "results": records}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
