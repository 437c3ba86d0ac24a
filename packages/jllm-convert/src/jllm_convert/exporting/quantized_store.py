"""Quantised matrix of a checkpoint, dequantised box by box."""

from pathlib import Path

import numpy as np
from jllm_core.checkpoint import ArrayStore, Box
from jllm_core.quantization.arrays import QuantizedArray
from jllm_core.quantization.grids import restore


class QuantizedStore:
    """A quantised matrix that is read like an ArrayStore of float32.

    Attributes:
        name: the matrix's dotted name.
        shape: its shape.
        dtype: the element type that ``read`` returns, float32.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, name: str, parts: QuantizedArray) -> None:
        """Use ``open``. The fields of ``parts`` are ArrayStores here."""
        self.name = name
        self.shape = parts.shape
        self._parts = parts
        self._packed = 8 // parts.bits  # numbers in an element of the values

    @classmethod
    def open(cls, folder: Path, name: str, infos: QuantizedArray) -> "QuantizedStore":
        """Open the parts of a matrix.

        Args:
            folder: the checkpoint's folder of weights.
            name: the matrix's dotted name.
            infos: the descriptions of its parts.

        Raises:
            CheckpointError: a part is missing or damaged.
        """
        values, scales = (ArrayStore.open(folder, f"{name}.{part}") for part in ("values", "scales"))
        offsets = None if infos.offsets is None else ArrayStore.open(folder, f"{name}.offsets")
        return cls(name, QuantizedArray(values, scales, offsets, axis=infos.axis, bits=infos.bits))

    @property
    def stores(self) -> list[ArrayStore]:
        """The stored arrays of the matrix."""
        parts = (self._parts.values, self._parts.scales, self._parts.offsets)
        return [part for part in parts if part is not None]

    def blocks(self, limit: int) -> list[Box]:
        """Cut the matrix into boxes of about ``limit`` bytes of float32, near the values' chunks and between groups."""
        axis, size, boxes = self._parts.axis, self.shape[self._parts.axis], []
        unit = self._parts.group or 1
        for box in self._parts.values.blocks(limit // (self._packed * self.dtype.itemsize)):
            # Start and stop are rounded to groups in the same way, so that neighbouring boxes still meet.
            ends = [end * self._packed for end in (box[axis].start, box[axis].stop)]
            start, stop = (end if end == size else end - end % unit for end in ends)
            if start < stop:
                boxes.append((*box[:axis], slice(start, stop), *box[axis + 1 :]))
        return boxes

    def read(self, box: Box) -> np.ndarray:
        """Read a box that cuts no group.

        Raises:
            CheckpointError: a chunk is missing or damaged.
        """
        parts, axis = self._parts, self._parts.axis
        values = parts.values.read(self._along_axis(box, self._packed))
        if parts.group is None:
            # Along the axes that share a scale, the scales have one entry.
            of_scales = tuple(slice(0, 1) if size == 1 else b for b, size in zip(box, parts.scales.shape, strict=True))
        else:
            of_scales = self._along_axis(box, parts.group)
        scales = parts.scales.read(of_scales)
        offsets = None if parts.offsets is None else parts.offsets.read(of_scales)
        return restore(QuantizedArray(values, scales, offsets, axis=axis, bits=parts.bits))

    def _along_axis(self, box: Box, divisor: int) -> Box:
        """The box of an array with one entry for each ``divisor`` numbers along the quantised axis."""
        axis = self._parts.axis
        shared = slice(box[axis].start // divisor, box[axis].stop // divisor)
        return (*box[:axis], shared, *box[axis + 1 :])
