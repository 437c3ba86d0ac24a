"""ArrayInfo: everything about an array but its numbers, and the trees that are made from it.

One tree of ArrayInfo describes a model once; shardings, random weights, the checkpoint's structure, the memory
plan and the converter's checklist are all read off it.
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

    It is a leaf on purpose: it is not registered as a pytree, so ``jax.tree.map`` over a tree of ArrayInfo
    hands over whole descriptions.

    Attributes:
        shape: the array's shape.
        dtype: its element type; anything that ``np.dtype`` takes, kept as an ``np.dtype``.
        logical_axes: a name for each axis (``"heads"``, ``"model"``); ShardingRules maps names to mesh axes.
        initializer: makes random values of that shape; None where there is no sensible one.
        metadata: anything else that is worth knowing of the array, by name.
    """

    shape: tuple[int, ...]
    dtype: Any
    logical_axes: tuple[str | None, ...]
    initializer: Initializer | None = None
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __post_init__(self) -> None:
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
        return self.size * int(self.dtype.itemsize)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as one dotted name: ``layers.0.attn.q``."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their dotted names, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract_arrays(tree: Any, shardings: Any = None) -> Any:
    """The tree with each ArrayInfo as a ``jax.ShapeDtypeStruct``, with its sharding where a tree of them is given."""
    if shardings is None:
        return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), tree)
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding), tree, shardings
    )


def init_arrays(tree: Any, key: jax.Array, shardings: Any = None) -> Any:
    """The tree with each ArrayInfo as a random array, made where it will live.

    Each array's key is ``key`` folded with a hash of the array's own name, so that its values do not depend on
    what else is in the tree or on how it is sharded.

    Raises:
        ValueError: an ArrayInfo without an initializer.
    """

    def init(path: tuple[Any, ...], info: ArrayInfo, sharding: Any) -> jax.Array:
        name = path_name(path)
        if info.initializer is None:
            raise ValueError(f"{name} has no initializer, so it cannot be given random values")
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        make = jax.jit(info.initializer, static_argnums=(1, 2), out_shardings=sharding)
        made: jax.Array = make(own_key, info.shape, info.dtype)
        return made

    if shardings is None:
        return jax.tree_util.tree_map_with_path(lambda path, info: init(path, info, None), tree)
    return jax.tree_util.tree_map_with_path(init, tree, shardings)
