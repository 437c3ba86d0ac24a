"""The one place where activations meet a weight matrix."""

from jaxtyping import Array, Float

from jllm_core.quantization.arrays import QuantizedArray, matmul


def linear(
    equation: str, x: Float[Array, "..."], w: Float[Array, "..."] | QuantizedArray, bias: Array | None = None
) -> Array:
    """``einsum(equation, x, w) + bias`` in the type of ``x``.

    Args:
        equation: such as ``"BTD,DF->BTF"``.
        x: activations.
        w: weights, plain or quantised.
        bias: added to the trailing axes of the result; None adds nothing.
    """
    y = matmul(equation, x, w)
    return y if bias is None else y + bias
