"""ArrayInfo: shape, dtype, logical axes and initialiser of an array, and the trees that are made from it.

One tree of ArrayInfo describes a model. Shardings, random weights, the checkpoint's structure, the memory plan and the
converter's checklist are all read off it.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

Initializer = Callable[..., jax.Array]
"""``initializer(key, shape, dtype)``, as in ``jax.nn.initializers``."""


@dataclass(frozen=True)
class ArrayInfo:
    """The description of one array.

    It is not registered as a pytree, so it is a leaf: ``jax.tree.map`` over a tree of ArrayInfo hands over whole
    descriptions.

    Attributes:
        shape: the array's shape.
        dtype: its element type: anything that ``np.dtype`` takes; stored as an ``np.dtype``.
        logical_axes: a name for each axis (``"heads"``, ``"model"``); ShardingRules maps names to mesh axes.
        initializer: makes random values of that shape; None where no random values make sense.
        metadata: further facts about the array, by name. They take no part in its hash.

    Raises:
        ValueError: another number of logical axes than of sizes, or a negative size.
    """

    shape: tuple[int, ...]
    dtype: Any
    logical_axes: tuple[str | None, ...]
    initializer: Initializer | None = None
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __post_init__(self) -> None:
        # Lists and names of types become tuples and dtypes, so that equal descriptions compare equal.
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "logical_axes", tuple(self.logical_axes))
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(
                f"an array of shape {self.shape} has {len(self.shape)} axes, "
                f"but {len(self.logical_axes)} logical axes were named: {self.logical_axes}"
            )
        if any(size < 0 for size in self.shape):
            raise ValueError(f"a shape has no negative sizes, got {self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return array_bytes(self.shape, self.dtype)


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in a device's memory: int4 takes half a byte there, and in numpy's a whole one."""
    bits = 4 if np.dtype(dtype).name in ("int4", "uint4") else 8 * np.dtype(dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * bits // 8


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree key path as a dotted name: ``layers.0.attn.q``."""
    # A key of a dataclass has a name, of a list an index, of a dict a key.
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted names, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract_arrays(tree: Any, shardings: Any = None) -> Any:
    """Turn a tree of ArrayInfo into a tree of ``jax.ShapeDtypeStruct``, for tracing and for restoring.

    Args:
        tree: of ArrayInfo.
        shardings: the same tree of shardings; None leaves them out.
    """
    if shardings is None:
        return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), tree)
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding), tree, shardings
    )


def init_arrays(tree: Any, key: jax.Array, shardings: Any = None) -> Any:
    """Turn a tree of ArrayInfo into a tree of random arrays, each made in the shards where it will live.

    Each array's key is ``key`` folded with a hash of the array's name, so its values depend neither on what else is in
    the tree nor on how it is sharded.

    Args:
        tree: of ArrayInfo.
        key: a PRNG key.
        shardings: the same tree of shardings; None is the default device.

    Raises:
        ValueError: an ArrayInfo without an initializer.
    """

    def init(path: tuple[Any, ...], info: ArrayInfo, sharding: Any) -> jax.Array:
        name = path_name(path)
        if info.initializer is None:
            raise ValueError(f"{name} has no initializer, so it cannot be given random values")
        # crc32, not Python's hash, which is another one in each process.
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        make = jax.jit(info.initializer, static_argnums=(1, 2), out_shardings=sharding)
        made: jax.Array = make(own_key, info.shape, info.dtype)
        return made

    if shardings is None:
        return jax.tree_util.tree_map_with_path(lambda path, info: init(path, info, None), tree)
    return jax.tree_util.tree_map_with_path(init, tree, shardings)
