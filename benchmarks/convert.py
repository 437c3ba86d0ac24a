"""Converting a random Qwen from safetensors: time beside `cp` and `sync` of the same files, memory, and the usual way.

The usual way is to load all weights, transpose them and save them with orbax's defaults. Every run is a process of its
own; the runs take turns. The folders are removed at the end.

    hatch run oracle:python benchmarks/convert.py
    hatch run oracle:python benchmarks/convert.py --sizes 4B --runs 1 --folder /mnt/scratch
    hatch run oracle:python benchmarks/convert.py --sizes 4B,hybrid-4B --layers 16
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Fields of config.json. All Qwen3 have these heads of keys and values, and this vocabulary; so have Qwen3.5.
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}


def sizes(hidden: int, ffw: int, layers: int, heads: int, tied: bool = True) -> dict[str, Any]:
    """The fields in which the sizes of a family differ."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    return dict(zip(names, (hidden, ffw, layers, heads, tied), strict=True))


# The published sizes of these names; 1B is Qwen3's 1.7B.
SHAPES: dict[str, dict[str, Any]] = {
    "1B": QWEN3 | sizes(2048, 6144, 28, 16),
    "4B": QWEN3 | sizes(2560, 9728, 36, 32),
    "8B": QWEN3 | sizes(4096, 12288, 36, 32, tied=False),
    "hybrid-4B": QWEN3_5 | sizes(2560, 9216, 32, 16) | {"num_key_value_heads": 4, "linear_num_value_heads": 32},
}
# ext4 is slow to make files just after it has removed many.
PAUSE = 5
SHARD_BYTES = 4 << 30
# Bytes of an element by safetensors' names.
ELEMENT = {"BF16": 2, "F32": 4}

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


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its name, shape, and element type as safetensors calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT[self.dtype]


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """A model's tensors, as they are published. A hybrid has delta nets, and attention in every few layers."""
    d, f, every = config["hidden_size"], config["intermediate_size"], config.get("full_attention_interval", 1)
    model = "model.language_model" if nested(config) else "model"
    yield Tensor(f"{model}.embed_tokens.weight", (config["vocab_size"], d))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{model}.layers.{layer}"
        yield from (Tensor(f"{prefix}.{name}_layernorm.weight", (d,)) for name in ("input", "post_attention"))
        yield from delta_net(f"{prefix}.linear_attn", config) if (layer + 1) % every else attention(prefix, config)
        yield from (Tensor(f"{prefix}.mlp.{name}_proj.weight", (f, d)) for name in ("gate", "up"))
        yield Tensor(f"{prefix}.mlp.down_proj.weight", (d, f))
    yield Tensor(f"{model}.norm.weight", (d,))
    if not config["tie_word_embeddings"]:
        yield Tensor("lm_head.weight", (config["vocab_size"], d))


def attention(prefix: str, config: dict[str, Any]) -> Iterator[Tensor]:
    d, width = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    # The output gate of hybrids lies between the queries.
    rows = {"q": 2 * q if nested(config) else q, "k": kv, "v": kv}
    yield from (Tensor(f"{prefix}.self_attn.{name}_norm.weight", (width,)) for name in "qk")
    yield from (Tensor(f"{prefix}.self_attn.{name}_proj.weight", (size, d)) for name, size in rows.items())
    yield Tensor(f"{prefix}.self_attn.o_proj.weight", (d, q))


def delta_net(prefix: str, config: dict[str, Any]) -> Iterator[Tensor]:
    d, heads, width = config["hidden_size"], config["linear_num_value_heads"], config["linear_value_head_dim"]
    values = heads * width
    channels = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + values
    yield Tensor(f"{prefix}.A_log", (heads,), "F32")
    yield Tensor(f"{prefix}.dt_bias", (heads,))
    yield Tensor(f"{prefix}.conv1d.weight", (channels, 1, config["linear_conv_kernel_dim"]))
    rows = {"qkv": channels, "z": values, "b": heads, "a": heads}
    yield from (Tensor(f"{prefix}.in_proj_{name}.weight", (size, d)) for name, size in rows.items())
    yield Tensor(f"{prefix}.norm.weight", (width,), "F32")
    yield Tensor(f"{prefix}.out_proj.weight", (d, values))


def nested(config: dict[str, Any]) -> bool:
    """Whether config.json has these fields as those of the text part of a model that reads images too."""
    return bool(config["model_type"].endswith("_text"))


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A folder of shards of random numbers, every byte of them written."""
    folder.mkdir(parents=True)
    outer = {"model_type": config["model_type"].removesuffix("_text"), "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(outer if nested(config) else config))
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(config):
        if sum(each.nbytes for each in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    random = np.random.default_rng(0)
    # Random signs and mantissas around 2**-6, also where two are read as one float32; no two megabytes are the same.
    numbers = (random.integers(0, 1 << 16, 1 << 22, np.uint16) & 0x80FF) | 0x3C00
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for tensor in shard:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
            weight_map[tensor.name] = file
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
    parser.add_argument("--sizes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--layers", type=int, help="keep the first layers only; two copies must fit on the disk")
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
            cut = {} if options.layers is None else {"num_hidden_layers": options.layers}
            write_model(source, SHAPES[size] | cut)
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
