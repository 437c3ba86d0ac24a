"""A mesh of eight devices that are not there: the CPU, seen as eight.

They share its cores, so nothing becomes faster; but the layout, the programs and the communication are those of eight
devices. On a machine with eight real ones, the same script runs on them (--real). An axis that does not divide a
dimension, such as 4 devices and the 9 heads of SmolLM2, leaves it whole.

    python examples/mesh8.py --mesh data=2,tensor=4
"""

import argparse

import jax
from jllm_runtime import SamplingParams, generate, load_model, make_mesh
from jllm_runtime.mesh import make_cpu_devices, parse_mesh
from script import command_line, run

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time", "Two and two make"]


def main(args: argparse.Namespace) -> None:
    """Show how the arrays lie on the mesh, and that the answers are those of one device."""
    if not args.real:
        make_cpu_devices(8)  # before JAX starts its devices
    shape = parse_mesh(args.mesh) if args.mesh else None
    # In float32, so that rounding, which the layout changes, does not choose another token.
    model = load_model(args.model, make_mesh(shape), dtype="float32")
    axes = ", ".join(f"{axis}={size}" for axis, size in model.mesh.shape.items())
    print(f"{model.mesh.size} devices ({model.mesh.devices.flat[0].device_kind}), mesh {axes}")

    print(f"{'array':28} {'shape':>16}   {'part of a device':>16}")
    shown = {"embedding": model.weights.embedding, "layers[0]": model.weights.layers[0]}
    # A quantised matrix is a tree of arrays: its numbers, scales and offsets.
    for path, leaf in jax.tree_util.tree_leaves_with_path(shown):
        if leaf.ndim > 1:
            name = jax.tree_util.keystr(path).replace("']", "").replace("['", "")
            print(f"{name:28} {leaf.shape!s:>16}   {leaf.sharding.shard_shape(leaf.shape)!s:>16}")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.weights))
    print(f"weights: {whole / 1e6:.1f} MB, of which a device holds {own / 1e6:.1f} MB")

    params = SamplingParams(max_tokens=args.max_tokens)
    alone = load_model(args.model, make_mesh(devices=jax.devices()[:1]), dtype="float32")
    outputs = zip(PROMPTS, generate(model, PROMPTS, params), generate(alone, PROMPTS, params), strict=True)
    for prompt, many, one in outputs:
        same = "as on one device" if many.token_ids == one.token_ids else f"one device: {one.text!r}"
        print(f"{prompt!r} -> {many.text!r} ({same})")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--mesh", help="devices along each axis, such as data=2,tensor=4 (default: tensor=8)")
    parser.add_argument("--real", action="store_true", help="the devices that JAX finds, in place of eight on the CPU")
    parser.add_argument("--max-tokens", type=int, default=12, help="most tokens of an answer (default: %(default)s)")
    run(main, parser)
