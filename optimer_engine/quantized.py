"""fp8 checkpoints with scales: a weight is its fp8 numbers times the scale of their block.

The scale has one element for the whole tensor, one for each row ([rows] or [rows, 1]), or one for
each block of a grid, such as DeepSeek's 128 x 128, whose last blocks may be cut off by the edge.
"""

from __future__ import annotations

import numpy as np

from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.errors import CheckpointError, MismatchError, quoted
from optimer_engine.operands import Operand, Stored, as_float
from optimer_engine.types import DType, TensorInfo


class Dequantized:
    """An operand: fp8 numbers times their scale, in fp32.

    Args:
        stored: the fp8 weight, [rows, columns].
        scale: fp32, [grid rows, grid columns]; element (r, c) belongs to
            scale[r // height, c // width].
    """

    dtype, note = DType.F32, "fp8 times scale"

    def __init__(self, stored: Stored, scale: np.ndarray, block: tuple[int, int]) -> None:
        self.stored, self.scale, self.block = stored, scale, block
        self.shape, self.is_delta = stored.shape, stored.is_delta
        self.read_bytes_per_elem: float = stored.dtype.itemsize
        self.reads = stored.reads

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """fp32 elements start..stop; see `operands.Operand`."""
        scratch = np.empty(stop - start, np.uint8)
        out = buffer[: (stop - start) * 4].view(np.float32)
        out[:] = as_float(self.stored.read(start, stop, scratch, base), self.stored.dtype)
        columns, (height, width) = self.shape[-1], self.block
        for row in range(start // columns, -(-stop // columns)):
            low, high = max(start, row * columns), min(stop, (row + 1) * columns)
            first, last = low - row * columns, high - row * columns
            scales = self.scale[row // height, first // width : -(-last // width)]
            of_each = np.repeat(scales, width)[first % width :][: last - first]
            out[low - start : high - start] *= of_each
        return out

    def scratch_bytes(self, elems: int) -> int:
        """The fp8 tile, its numbers, and a row of scales."""
        return 5 * elems + 8 * (self.shape[-1] + 2 * self.block[1]) + self.scale.nbytes


def as_input(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo | Operand:
    """What to read for a tensor: itself, or its numbers where it is stored with a scale.

    Raises:
        CheckpointError: for a scale whose shape fits no known form.
    """
    scale = checkpoint.scales.get(info.name)
    if scale is None:
        return info
    rows, columns = (1, *info.shape)[-2:] if len(info.shape) < 3 else (0, 0)
    grid = (*scale.shape, 1, 1)[:2] if scale.shape else (1, 1)
    block = _block(rows, grid[0], checkpoint), _block(columns, grid[1], checkpoint)
    if 0 in block or len(scale.shape) > 2:
        raise CheckpointError(
            f"{quoted(info.name)} {list(info.shape)} has a scale of shape {list(scale.shape)};"
            " one number, one for each row, or a grid of equal blocks expected",
            where=str(checkpoint.folder),
            todo="convert the checkpoint to bfloat16 first",
        )
    raw = np.empty(scale.nbytes, np.uint8)
    checkpoint.read_into(scale.file, scale.offset, raw.data)
    values = as_float(raw.view(scale.dtype.storage), scale.dtype).reshape(grid)
    stored = Stored(checkpoint, info, checkpoint.kind == VECTOR)
    return Dequantized(stored, values, block)


_PACKED = (
    ".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_packed", ".weight_scale_2",
    "_blocks",
)  # fmt: skip
"""Ends of names under which GPTQ, AWQ, bitsandbytes, compressed-tensors, NVFP4 and MXFP4 store."""


def refuse_packed(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a model whose weights are stored as codes of several numbers at once.

    Args:
        name: what the user calls it.

    Raises:
        MismatchError: naming such a tensor and the method of its config.json.
    """
    packed = [
        tensor
        for tensor, info in checkpoint.tensors.items()
        if tensor.endswith(_PACKED) and not (tensor.endswith("_blocks") and info.dtype.mergeable)
    ]
    if packed:
        config = checkpoint.config.get("quantization_config")
        how = config.get("quant_method") if isinstance(config, dict) else None
        raise MismatchError(
            f"is quantised ({quoted(how or 'by a method it does not name')}): {quoted(packed[0])}"
            f" and {len(packed) - 1} more tensors are codes, not numbers to add",
            where=name,
            todo="dequantise it first: load it and save it in bfloat16",
        )


def merged_dtype(checkpoint: Checkpoint, info: TensorInfo) -> DType:
    """The dtype in which a tensor is written by default: bf16 where its scale is left behind."""
    return DType.BF16 if info.name in checkpoint.scales else info.dtype


def _block(size: int, count: int, checkpoint: Checkpoint) -> int:
    """Elements per block along one dimension; 0 where `count` blocks cannot cover it."""
    if count == 1:
        return max(size, 1)
    quantization = checkpoint.config.get("quantization_config")
    said = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    sizes = {n for n in said if type(n) is int and n > 0} if isinstance(said, list) else set()
    for block in sorted(sizes | {1, -(-size // max(count, 1))}, reverse=True):
        if block and -(-size // block) == count:
            return block
    return 0
