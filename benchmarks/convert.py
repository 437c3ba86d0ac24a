"""Converting a random Qwen3 from safetensors: time beside `cp` and `sync` of the same files, memory, and the usual way.

The usual way is to load all weights, transpose them and save them with orbax's defaults. Every run is a process of its
own; the runs take turns. The folders are removed at the end.

    hatch run oracle:python benchmarks/convert.py
    hatch run oracle:python benchmarks/convert.py --sizes 4B --runs 1 --folder /mnt/scratch
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

# Qwen3's published sizes of these names; 1B is 1.7B.
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "heads": 16, "tied": True},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "heads": 32, "tied": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "heads": 32, "tied": False},
}
# ext4 is slow to make files just after it has removed many.
PAUSE = 5
KV_HEADS, HEAD_DIM, VOCABULARY, SHARD_BYTES = 8, 128, 151936, 4 << 30

OURS = """
import sys
from jllm_convert import convert
convert(sys.argv[1], sys.argv[2])
"""
USUAL = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np, orbax.checkpoint as ocp
from safetensors.numpy import load_file
weights = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    weights |= load_file(path)
weights = {k: np.ascontiguousarray(w.T) if k.endswith("proj.weight") else w for k, w in weights.items()}
tree = {name.replace(".", "/"): w for name, w in weights.items()}
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(Path(sys.argv[2]).absolute(), tree)
"""
COPY = 'cp -r "$1" "$2" && sync'
RESTORE = """
import os, sys
from pathlib import Path
import jax, numpy as np, orbax.checkpoint as ocp
from jllm_core import ShardingRules, abstract_weights
from jllm_core.array_info import named_leaves
from jllm_core.checkpoint import read_config
process, processes, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[1])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[4], processes, process)
mesh = jax.make_mesh((8,), ("tensor",))
infos = abstract_weights(read_config(folder), "bfloat16")
shardings = ShardingRules().tree_shardings(infos, mesh)
tree, share = {}, 0
for (name, info), sharding in zip(named_leaves(infos).items(), jax.tree.leaves(shardings), strict=True):
    node = tree
    *parents, last = name.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)
    indices = {str(i): i for i in sharding.addressable_devices_indices_map(info.shape).values()}
    sizes = [[len(range(*s.indices(n))) for s, n in zip(i, info.shape)] for i in indices.values()]
    share += sum(int(np.prod(size)) for size in sizes) * info.dtype.itemsize
before = int(open("/proc/self/io").read().split()[1])
with ocp.StandardCheckpointer() as stock:
    stock.restore((folder / "weights").absolute(), tree)
read = int(open("/proc/self/io").read().split()[1]) - before
print(f"process {process} of {processes} with {8 // processes} devices: read {read:,} bytes, its share is {share:,}: "
      f"{read / share:.3f}x")
"""


def tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3's tensors, as they are published."""
    d, f, q, kv = shape["hidden_size"], shape["intermediate_size"], shape["heads"] * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCABULARY, d)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.{n}_layernorm.weight", (d,)) for n in ("input", "post_attention"))
        yield from ((f"{prefix}.self_attn.{n}_norm.weight", (HEAD_DIM,)) for n in "qk")
        yield from ((f"{prefix}.self_attn.{n}_proj.weight", (s, d)) for n, s in (("q", q), ("k", kv), ("v", kv)))
        yield f"{prefix}.self_attn.o_proj.weight", (d, q)
        yield from ((f"{prefix}.mlp.{n}_proj.weight", (f, d)) for n in ("gate", "up"))
        yield f"{prefix}.mlp.down_proj.weight", (d, f)
    yield "model.norm.weight", (d,)
    if not shape["tied"]:
        yield "lm_head.weight", (VOCABULARY, d)


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A folder of shards of random bfloat16 numbers, every byte of them written."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        **{name: shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": bool(shape["tied"]),
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, size in tensors(shape):
        if sum(2 * math.prod(each) for _, each in shards[-1]) + 2 * math.prod(size) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, size))
    random = np.random.default_rng(0)
    # Random signs and mantissas around 2**-6; no two megabytes are the same.
    numbers = (random.integers(0, 1 << 16, 1 << 22, np.uint16) & 0x80FF) | 0x3C00
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, size in shard:
            start, end = end, end + 2 * math.prod(size)
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            while end:
                part = np.roll(numbers, int(random.integers(1 << 22))).tobytes()[:end]
                out.write(part)
                end -= len(part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:3]} failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1B,4B,8B", help="of " + ", ".join(SHAPES))
    parser.add_argument("--runs", type=int, default=3, help="of each way")
    parser.add_argument("--folder", type=Path, help="where to work; the system's temporary folder by default")
    parser.add_argument("--usual", default="4B", help="sizes to convert in the usual way as well")
    parser.add_argument("--restore", default="4B", help="sizes to restore on 8 devices, and in 2 processes of 4")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "orbax-checkpoint", "safetensors"))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}, {versions}"
    )
    print("| model | way | seconds | x of cp + sync | peak MiB |\n|---|---|---|---|---|")
    notes = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for size in options.sizes.split(","):
            source, target = Path(scratch) / size, Path(scratch) / "target"
            write_model(source, SHAPES[size])
            os.sync()
            ways = {"jllm-convert": [sys.executable, "-c", OURS], "cp + sync": ["sh", "-c", COPY, "sh"]}
            if size in options.usual.split(","):
                ways["load all, then save"] = [sys.executable, "-c", USUAL]
            results: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
            for _ in range(options.runs):
                for way, command in ways.items():
                    results[way].append(timed([*command, str(source), str(target)]))
                    if way == "jllm-convert" and size in options.restore.split(",") and len(results[way]) == 1:
                        notes += restores(size, target)
                    shutil.rmtree(target)
                    os.sync()
                    time.sleep(PAUSE)
            copied = statistics.median(seconds for seconds, _ in results["cp + sync"])
            for way, runs in results.items():
                seconds, peak = statistics.median(each[0] for each in runs), max(each[1] for each in runs)
                print(f"| {size} | {way} | {seconds:.1f} | {seconds / copied:.2f} | {peak >> 20:,} |", flush=True)
            shutil.rmtree(source)
    print("\n".join(notes))


def restores(size: str, checkpoint: Path) -> list[str]:
    """What stock orbax reads when it restores into 8 devices, in one process and in two."""
    lines = []
    for processes in (1, 2):
        flags = f"--xla_force_host_platform_device_count={8 // processes}"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", RESTORE, str(checkpoint)]
        started = [
            subprocess.Popen(
                [*command, str(process), str(processes), "localhost:34567"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for process in range(processes)
        ]
        lines += [
            f"{size}, orbax into a mesh: {process.communicate()[0].strip().splitlines()[-1]}" for process in started
        ]
    return lines


if __name__ == "__main__":
    main()
