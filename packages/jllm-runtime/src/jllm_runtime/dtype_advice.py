"""Advice on a model's element type, by what a device computes with."""

from typing import Any

import numpy as np


def float16_advice(device: Any, dtype: Any) -> str | None:
    """A sentence for who runs a model of bfloat16 on a GPU that has none; None elsewhere.

    It is only said: float16 has other numbers, and less room for large ones, so nobody gets it unasked.

    Args:
        device: one of JAX's.
        dtype: the element type of the weights and activations.
    """
    if np.dtype(dtype).name != "bfloat16" or device.platform != "gpu":
        return None
    # CUDA's, such as "7.5" of a T4; bfloat16 came with 8.0 (Ampere). AMD's are no numbers ("gfx90a").
    major, _, _ = str(getattr(device, "compute_capability", "")).partition(".")
    if not major.isdecimal() or int(major) >= 8:
        return None
    return (
        f"{device.device_kind} has no arithmetic of bfloat16, and makes float32 of every number of this model in each "
        'step; --dtype float16 (dtype="float16") is faster'
    )
