"""Low-rank adapters (LoRA): small matrices trained beside frozen weights, plain or quantised.

Reference: Hu et al., LoRA (arXiv:2106.09685); over quantised weights it is QLoRA (Dettmers et al., arXiv:2305.14314).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal as normal_initializer
from jax.nn.initializers import zeros as zeros_initializer
from jaxtyping import Array, Float, Int

from jllm_core.array_info import ArrayInfo, init_arrays, path_name
from jllm_core.config import ModelConfig
from jllm_core.errors import JLLMError
from jllm_core.ops.linear import Matrix, linear
from jllm_core.quantization.arrays import Quantization, QuantizedArray
from jllm_core.weight_specs import abstract_weights
from jllm_core.weights import Leaf, Weights

DEFAULT_TARGETS = ("q", "v")
"""The matrices that are adapted where nobody says which, as in the paper."""


class AdapterError(JLLMError):
    """An adapter that does not fit the model."""


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """What the product of two factors is multiplied by: ``alpha / rank``, by rsLoRA ``alpha / sqrt(rank)``."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """The two factors of one matrix's change: ``a [*inputs, r]`` and ``b [r, *outputs]``."""

    a: Leaf
    b: Leaf

    @property
    def rank(self) -> int:
        """How many products of a column and a row the change is the sum of."""
        return int(self.a.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The changes of some matrices of a model. Each is ``scale * a b``, added to the matrix.

    A pytree of its factors alone: ``jax.grad`` with respect to one trains nothing else.

    Attributes:
        factors: by the dotted name of the matrix, such as ``layers.0.attn.q``.
        alpha: the scale is ``alpha / r``.
        rslora: the scale is ``alpha / sqrt(r)`` instead (Kalajdzievski, arXiv:2312.03732).
    """

    factors: dict[str, LowRank]
    alpha: float = field(metadata={"static": True})
    rslora: bool = field(default=False, metadata={"static": True})

    def scale(self, name: str) -> float:
        """What the product of a matrix's factors is multiplied by."""
        return lora_scale(self.alpha, self.factors[name].rank, self.rslora)

    @property
    def size(self) -> int:
        """Numbers to train."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        ranks = sorted({each.rank for each in self.factors.values()})
        rank = ", ".join(map(str, ranks))
        return f"Adapter({len(self.factors)} matrices, rank {rank}, alpha {self.alpha:g}, {self.size:,} numbers)"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class AdaptedMatrix:
    """A weight matrix and a low-rank change of it, multiplied one after the other (``ops.linear.Matrix``).

    The change is never written out: ``x W + scale * (x a) b`` costs little more than ``x W``, and the matrix may be
    quantised.

    Attributes:
        base: the matrix, plain or quantised.
        a: ``[*inputs, r]``.
        b: ``[r, *outputs]``.
        scale: factor of the change.
    """

    base: Leaf
    a: Leaf
    b: Leaf
    scale: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return tuple(self.base.shape)

    def matmul(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``einsum(equation, x, base + scale * a b)`` in the type of ``x``."""
        changed: Array = linear(equation, x, self.base) + self.scale * _low_rank(equation, x, self.a, self.b)
        return changed

    def rows(self, numbers: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        """Not for embeddings.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("an embedding has no adapter here: only the matrices of layers have")

    def __repr__(self) -> str:
        return f"AdaptedMatrix({list(self.shape)}, rank {self.a.shape[-1]})"


def abstract_adapter(
    config: ModelConfig,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = DEFAULT_TARGETS,
    layers: Iterable[int] | None = None,
    dtype: Any = jnp.float32,
    rslora: bool = False,
) -> Adapter:
    """The description of an adapter: its factors are ArrayInfo. The arguments are those of ``init_adapter``.

    Raises:
        AdapterError: a rank that is no whole number from 1 up, an alpha that is no finite number, a layer that the
            model has not, a target that no layer has, or no matrix to adapt.
    """
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"the alpha of an adapter is a finite number, got {alpha!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"the rank of an adapter is a whole number from 1 up, got {rank!r}")
    # A text is a sequence too, of its letters.
    if isinstance(targets, str) or (targets is not None and not targets):
        raise AdapterError(
            f"the targets of an adapter are names of matrices, such as ('q', 'v'), or None for all, got {targets!r}"
        )
    numbers = set(range(config.num_layers) if layers is None else layers)
    if outside := sorted(number for number in numbers if not 0 <= number < config.num_layers):
        raise AdapterError(f"there is no layer {outside[0]} to adapt: the model's are 0 to {config.num_layers - 1}")
    matrices = _matrices_of_layers(config)
    known = {name.rpartition(".")[2] for name in matrices}
    targets = sorted(known) if targets is None else targets
    if unknown := [target for target in targets if target not in known]:
        raise AdapterError(f"no layer has a matrix {unknown[0]!r} to adapt; it has {', '.join(sorted(known))}")
    factors = {}
    for name, matrix in matrices.items():
        _, number, *_, own = name.split(".")
        if own not in targets or int(number) not in numbers:
            continue
        # The values of int8 have the matrix's own shape, and say which of its axes are inputs.
        values: ArrayInfo = matrix.values
        inputs = values.metadata["inputs"]
        ins, outs = values.shape[:inputs], values.shape[inputs:]
        # Of the size that leaves the change of a step independent of the width; b is zero, so that the model starts as
        # it was.
        spread = normal_initializer(1 / math.sqrt(math.prod(ins)))
        a = ArrayInfo((*ins, rank), dtype, (*values.logical_axes[:inputs], None), spread)
        b = ArrayInfo((rank, *outs), dtype, (None, *values.logical_axes[inputs:]), zeros_initializer)
        factors[name] = LowRank(a, b)
    if not factors:
        raise AdapterError(
            f"there is no matrix to adapt: none of the layers {sorted(numbers)} has one of {', '.join(targets)}"
        )
    return Adapter(factors, float(alpha), rslora)


def init_adapter(
    config: ModelConfig,
    key: jax.Array,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | None = DEFAULT_TARGETS,
    layers: Iterable[int] | None = None,
    dtype: Any = jnp.float32,
    rslora: bool = False,
) -> Adapter:
    """An adapter that changes nothing yet: ``a`` is random, ``b`` is zero.

    Args:
        config: the architecture.
        key: a JAX random key.
        rank: columns of ``a`` and rows of ``b``.
        alpha: how much the change counts; it is scaled by ``alpha / rank``.
        targets: the matrices of each layer to adapt, by their names in the Weights tree: ``q``, ``k``, ``v``, ``o``,
            ``w_gate``, ``w_up``, ``w_down``, and ``gate`` and ``z`` where layers have them. None is all of them. A
            layer that lacks one goes without. Experts have none.
        layers: the layers to adapt, from 0; None is all. Gradients are computed from the first of them on.
        dtype: element type of the factors; float32 trains well beside weights of any type.
        rslora: scale by ``alpha / sqrt(rank)``.

    Raises:
        AdapterError: a rank that is no whole number from 1 up, an alpha that is no finite number, a layer that the
            model has not, a target that no layer has, or no matrix to adapt.
    """
    made: Adapter = init_arrays(abstract_adapter(config, rank, alpha, targets, layers, dtype, rslora), key)
    return made


def with_adapter(weights: Weights, adapter: Adapter) -> Weights:
    """The weights with each adapted matrix as an AdaptedMatrix: ``forward`` runs on them unchanged.

    Raises:
        AdapterError: a matrix that the weights have not, or of another shape.
    """
    return _replaced(
        weights,
        adapter,
        lambda matrix, name, part: AdaptedMatrix(matrix, part.a, part.b, adapter.scale(name)),
    )


def merge_adapter(weights: Weights, adapter: Adapter) -> Weights:
    """The weights with the changes added, each in its own element type: as fast as before, and with no adapter.

    Raises:
        AdapterError: a matrix that the weights have not, of another shape, quantised, or with an adapter already.
    """

    def merged(matrix: Leaf, name: str, part: LowRank) -> Leaf:
        if isinstance(matrix, AdaptedMatrix):
            raise AdapterError(
                f"{name} is {matrix!r} already; merge the adapter into the weights without it, which with_adapter took"
            )
        if isinstance(matrix, Matrix):
            raise AdapterError(
                f"{name} is {matrix!r}, and a change would have to be rounded to its grid; merge the adapter into the "
                "weights that it was quantised from (jllm-convert convert SRC DST --adapter DIR --quantize ...), or "
                "run it beside them (with_adapter)"
            )
        return (matrix.astype(jnp.float32) + adapter.scale(name) * change(part.a, part.b)).astype(matrix.dtype)

    return _replaced(weights, adapter, merged)


def adapted_matrices(weights: Weights) -> list[str]:
    """The names of the matrices that have an adapter beside them."""
    parts, _ = jax.tree_util.tree_flatten_with_path(weights, is_leaf=lambda part: isinstance(part, AdaptedMatrix))
    return [path_name(path) for path, part in parts if isinstance(part, AdaptedMatrix)]


def change(a: Float[Array, "*inputs r"], b: Float[Array, "r *outputs"]) -> Float[Array, "..."]:
    """``a b`` in float32, ``[*inputs, *outputs]``."""
    product: Array = jnp.tensordot(
        a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST
    )
    return product


def _low_rank(
    equation: str, x: Float[Array, "..."], a: Float[Array, "*inputs r"], b: Float[Array, "r *outputs"]
) -> Float[Array, "..."]:
    """``einsum(equation, x, a b)``, by way of the few numbers between: ``BTD,DNH->BTNH`` is ``BTD,Dr->BTr`` and
    ``BTr,rNH->BTNH``."""
    operands, out = equation.split("->")
    of_x, of_w = operands.split(",")
    inputs, outputs = of_w[: a.ndim - 1], of_w[a.ndim - 1 :]
    rest = "".join(letter for letter in of_x if letter not in inputs)
    narrow = linear(f"{of_x},{inputs}r->{rest}r", x, a.astype(x.dtype))
    return linear(f"{rest}r,r{outputs}->{out}", narrow, b.astype(x.dtype))


def _matrices_of_layers(config: ModelConfig) -> dict[str, QuantizedArray]:
    """Descriptions of the matrices that may be adapted, by dotted name: those that quantising would take, but experts
    and the head."""
    # Any grid will do: which arrays are matrices does not depend on it.
    tree = abstract_weights(config, quantization=Quantization(8))
    leaves = jax.tree_util.tree_leaves_with_path(tree.layers, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
    return {
        f"layers.{path_name(path)}": leaf
        for path, leaf in leaves
        if isinstance(leaf, QuantizedArray) and not leaf.values.metadata["batch"]
    }


def _replaced(weights: Weights, adapter: Adapter, made: Any) -> Weights:
    """The weights with ``made(matrix, name, factors)`` in place of each adapted matrix."""
    found = set()

    def each(path: tuple[Any, ...], matrix: Leaf) -> Leaf:
        name = path_name(path)
        part = adapter.factors.get(name)
        if part is None:
            return matrix
        found.add(name)
        shape = (*part.a.shape[:-1], *part.b.shape[1:])
        if shape != tuple(matrix.shape):
            raise AdapterError(
                f"the adapter's change of {name} has shape {list(shape)}, the matrix {list(matrix.shape)}: it was made "
                "for another model"
            )
        return made(matrix, name, part)

    changed: Weights = jax.tree_util.tree_map_with_path(each, weights, is_leaf=lambda leaf: isinstance(leaf, Matrix))
    if missing := sorted(set(adapter.factors) - found):
        raise AdapterError(f"the weights have no matrix {missing[0]} ({len(missing)} of the adapter's are missing)")
    return changed
