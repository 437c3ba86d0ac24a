"""Linear projection: activations times a weight matrix, plus a bias."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@runtime_checkable
class Matrix(Protocol):
    """A weight matrix that is more than one plain array, and therefore multiplies itself.

    ``QuantizedArray`` is one. Whoever reads weights from a file piece by piece passes in another, and runs the same
    forward pass.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers that it stands for."""
        ...

    def matmul(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``einsum(equation, x, self)`` in the type of ``x``, summed in float32."""
        ...

    def rows(self, numbers: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        """These rows of an embedding ``[V, D]``, in this type."""
        ...


def linear(equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | Matrix, bias: Array | None = None) -> Array:
    """``einsum(equation, x, w) + bias`` in the type of ``x``.

    Args:
        equation: such as ``"BTD,DF->BTF"``, or ``"...D,VD->...V"`` for a tied embedding; the outputs of ``w`` are the
            last axes of the result. The letters are those of docs/notation.md.
        x: activations.
        w: weights, a plain array or a ``Matrix``.
        bias: added to the trailing axes of the result; None adds nothing.
    """
    # The matrix is asked, not its type: quantised weights and weights on a disk need no code here.
    if isinstance(w, Matrix):
        y = w.matmul(equation, x)
    else:
        y = jnp.einsum(equation, x, w, precision=matmul_precision(x.dtype))
    # A bias has the output axes of w, which are the last of y: [N, H] is added to [B, T, N, H].
    return y if bias is None else y + bias


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """The precision that a product of activations of this type asks XLA for.

    For float32 it is the highest: the defaults of TPUs (passes of bfloat16) and of recent GPUs (TF32) would be off by
    more than the 1e-4 that float32 users are promised.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
