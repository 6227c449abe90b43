"""LoRA adapters as sources: the low-rank product is formed tile by tile and never as a whole.

A PEFT folder holds adapter_config.json and adapter_model.safetensors. For a linear layer of weight
W [out, in] the delta is scale * B A with A [r, in] and B [out, r] (LoRA, arXiv 2106.09685); scale
is alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). Tensors that were trained
whole (`modules_to_save`, biases) are models' tensors.
"""

from __future__ import annotations

import math
import re
import threading
from typing import Any, NoReturn

import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import CheckpointError, quoted
from optimer_engine.operands import Operand, as_float
from optimer_engine.types import DType, TensorInfo

BLOCK_ROWS = 16
"""Products are formed in blocks of this many rows counted from the first one, so that an element's
bits do not depend on how the tensor was cut into tiles."""

_PREFIX = "base_model.model."
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_REFUSED = {
    "use_dora": "DoRA scales columns of the merged weight, which no sum of deltas can express",
    "use_qalora": "QALoRA adapts quantised groups",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "lora_bias": "its bias is not part of a low-rank product",
    "megatron_config": "its factors are split over Megatron's ranks",
    "trainable_token_indices": "its token rows are stored apart",
}


class Matrix:
    """A factor in a checkpoint's file, read where it is indexed: never as a whole, never mapped.

    A mapped file that is cut meanwhile ends the process; one that is read is an error.

    Args:
        info: the stored matrix; `transposed` says that it is used the other way round.
    """

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo, transposed: bool = False) -> None:
        self._checkpoint, self._info, self._transposed = checkpoint, info, transposed
        self.itemsize = info.dtype.storage.itemsize
        rows, columns = info.shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        checkpoint.bring(info.file)

    @property
    def T(self) -> Matrix:
        """The same, the other way round."""
        return Matrix(self._checkpoint, self._info, not self._transposed)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of it, in the storage dtype."""
        low, high, _ = rows.indices(self.shape[0])
        if not self._transposed:
            return self._read(low * self.shape[1], (high - low) * self.shape[1]).reshape(
                high - low, self.shape[1]
            )
        if (low, high) == (0, self.shape[0]):
            return self._read(0, self.shape[0] * self.shape[1]).reshape(self._info.shape).T
        pieces = [self._read(row * self.shape[0] + low, high - low) for row in range(self.shape[1])]
        return np.stack(pieces, axis=1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return np.asarray(self[:], dtype)

    def _read(self, start: int, elems: int) -> np.ndarray:
        info, buffer = self._info, np.empty(elems * self.itemsize, np.uint8)
        self._checkpoint.read_into(info.file, info.offset + start * self.itemsize, buffer.data)
        return buffer.view(info.dtype.storage)


def matrix(checkpoint: Checkpoint, info: TensorInfo) -> Matrix | np.ndarray:
    """A stored matrix, by the checkpoint's backend."""
    return checkpoint.view(info.name) if checkpoint.backend == "mmap" else Matrix(checkpoint, info)


class LowRank:
    """An operand: scale * (left @ right), rows of `left` against columns of `right`.

    Args:
        left: stored factor [rows, r] of `left_dtype`; transposed where PEFT has it so.
        right: the other factor, [r, columns].
    """

    dtype, is_delta, note = DType.F32, True, "low-rank"
    reads = ()  # factors are here when they are opened

    def __init__(
        self, left: Matrix | np.ndarray, left_dtype: DType, right: Factor, scale: float
    ) -> None:
        self.left, self.left_dtype, self.right, self.scale = left, left_dtype, right, scale
        self.shape = (left.shape[0], right.stored.shape[1])
        self.elems = self.shape[0] * self.shape[1]
        rank = left.shape[1]
        self.read_bytes_per_elem = left.itemsize * rank * sum(self.shape) / max(1, self.elems)

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """fp32 deltas start..stop; see `operands.Operand`."""
        rows, columns = self.shape
        out = buffer[: (stop - start) * 4].view(np.float32)
        right = self.right.values()
        first = start // columns // BLOCK_ROWS * BLOCK_ROWS
        for top in range(first, -(-stop // columns), BLOCK_ROWS):
            bottom = min(top + BLOCK_ROWS, rows)
            left = as_float(self.left[top:bottom], self.left_dtype)
            block = (np.float32(self.scale) * (left @ right)).reshape(-1)
            low, high = max(start, top * columns), min(stop, bottom * columns)
            out[low - start : high - start] = block[low - top * columns : high - top * columns]
        return out

    def scratch_bytes(self, elems: int) -> int:
        """The right factor, stored and in fp32, and two blocks of the product."""
        rank = self.left.shape[1]
        return self.shape[1] * ((4 + self.right.stored.itemsize) * rank + 8 * BLOCK_ROWS)


class Adapted:
    """An operand: a model's tensor with a low-rank delta added, theta + tau, in fp32."""

    dtype, is_delta, note = DType.F32, False, "low-rank"

    def __init__(self, model: Operand, delta: LowRank) -> None:
        self.model, self.delta, self.shape = model, delta, model.shape
        self.read_bytes_per_elem = model.read_bytes_per_elem + delta.read_bytes_per_elem
        self.reads = model.reads

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """fp32 elements start..stop; see `operands.Operand`."""
        scratch = np.empty((stop - start) * self.model.dtype.itemsize, np.uint8)
        stored = self.model.read(start, stop, scratch, base)
        out = self.delta.read(start, stop, buffer, base)
        out += as_float(stored, self.model.dtype)
        return out

    def scratch_bytes(self, elems: int) -> int:
        """The tile as stored and as numbers, and the delta's own."""
        return elems * (self.model.dtype.itemsize + 4) + self.delta.scratch_bytes(elems)


class Factor:
    """A factor upcast to fp32 once, while the tiles of its tensor come; one per adapter is kept."""

    def __init__(self, stored: Matrix | np.ndarray, dtype: DType, kept: RecentFactors) -> None:
        self.stored, self.dtype, self.kept = stored, dtype, kept

    def values(self) -> np.ndarray:
        """fp32, contiguous."""
        return self.kept.get(self)


class RecentFactors:
    """The two factors used last: neighbouring tensors may be under way at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.recent: list[tuple[Factor, np.ndarray]] = []

    def get(self, factor: Factor) -> np.ndarray:
        """The values of a factor, upcast unless they are held."""
        with self.lock:
            for known, values in self.recent:
                if known is factor:
                    return values
            values = np.ascontiguousarray(as_float(np.asarray(factor.stored), factor.dtype))
            self.recent = [*self.recent[-1:], (factor, values)]
            return values


def adapter_tensors(adapter: Checkpoint) -> dict[str, TensorInfo | LowRank]:
    """What an adapter gives for each tensor of its base, by the base's names.

    Args:
        adapter: an opened folder of kind "adapter_model".

    Raises:
        CheckpointError: for a kind of adapter that is not a sum of low-rank deltas, or factors that
            do not fit each other.
    """
    config = adapter.config
    where = str(adapter.folder)
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"peft_type is {config['peft_type']!r}; LORA expected", where=where, todo=_MERGE_FIRST
        )
    for key, why in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"has {key}: {why}", where=where, todo=_MERGE_FIRST)
    found: dict[str, TensorInfo | LowRank] = {}
    factors: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    for name, info in adapter.tensors.items():
        plain = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(plain)
        if match:
            factors.setdefault((match[1], bool(match[2])), {})[match[3]] = info
        else:
            # With a resized vocabulary PEFT adds a copy of the wrapper: trained, and as it was.
            if ".original_module." not in plain:
                found[_WRAPPER.sub("", plain)] = info
    kept = RecentFactors()
    for (module, is_embedding), pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(
                f"{quoted(module)} has factor {', '.join(pair)} alone", where=where
            )
        found[f"{module}.weight"] = _low_rank(adapter, module, pair, is_embedding, kept)
    return found


_MERGE_FIRST = "merge it into its base first with PEFT's merge_and_unload"


def _low_rank(
    adapter: Checkpoint,
    module: str,
    pair: dict[str, TensorInfo],
    is_embedding: bool,
    kept: RecentFactors,
) -> LowRank:
    config, (a, b) = adapter.config, (pair["A"], pair["B"])
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{quoted(module)}: factors A {list(a.shape)} and B {list(b.shape)} are not [r, in] and"
            " [out, r]",
            where=str(adapter.folder),
            todo=_MERGE_FIRST,
        )
    rank = a.shape[0]
    alpha = _number(adapter, "alpha_pattern", module, "lora_alpha", 8)
    expected = _number(adapter, "rank_pattern", module, "r", rank)
    if rank != expected or not rank:
        raise CheckpointError(
            f"{quoted(module)} has rank {rank}, adapter_config.json says {expected:g}",
            where=str(adapter.folder),
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    view_a, view_b = matrix(adapter, a), matrix(adapter, b)
    if is_embedding or config.get("fan_in_fan_out"):  # the weight is stored as [in, out]
        return LowRank(view_a.T, a.dtype, Factor(view_b.T, b.dtype, kept), scale)
    return LowRank(view_b, b.dtype, Factor(view_a, a.dtype, kept), scale)


_ENDLESS = re.compile(r"\)[*+{]|([*+{].*){4}", re.DOTALL)
"""In a pattern: a group that is repeated, or so many repeats that matching may take for ever."""


def _number(adapter: Checkpoint, patterns: str, module: str, key: str, default: int) -> float:
    """PEFT's rule: of the first pattern that is the module's name or a dotted end of it, or `key`.

    Raises:
        CheckpointError: it is no finite number, or a pattern is none.
    """

    def refuse(name: str, what: str) -> NoReturn:
        where = f"{adapter.folder}/adapter_config.json: {name}"
        raise CheckpointError(what, where=where, todo=_MERGE_FIRST)

    found = adapter.config.get(key, default)
    known = adapter.config.get(patterns) or {}
    if not isinstance(known, dict):
        refuse(patterns, "is not a map from names to numbers")
    for pattern, value in known.items():
        if _ENDLESS.search(pattern):
            refuse(patterns, f"{quoted(pattern)[:80]!r} is too involved to be matched")
        try:
            fits = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except (re.error, RecursionError, OverflowError) as error:
            refuse(patterns, f"{quoted(pattern)[:80]!r} is no pattern: {error}")
        if fits:
            found = value
            break
    if type(found) not in (int, float) or not math.isfinite(found):
        refuse(key, f"is {quoted(found)[:80]!r}, a number expected")
    return float(found)
