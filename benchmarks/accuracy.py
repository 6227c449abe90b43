"""The gate before every timing: is the output the right one?

The oracle is the definition in fp64: s = sum_i w_i (theta_i - base), then base + s, rounded once to
the dtype of the output. (The order counts even in fp64: decimal weights make exact ties common, and
adding each term to the base breaks them otherwise.) A sum in fp32 falls on the other side of a tie
now and then; so ours must equal the numpy reference of its kernel to the bit, may differ from the
oracle in at most one element in a thousand, and nowhere by more than half a rounding step and a
trifle. For rivals the same is reported and nothing is demanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.checkpoints import BLOCK_ELEMS, Inputs, weight_files
from optimer_engine.kernels import reference
from optimer_engine.kernels.reference import BF16, F32

MAX_MISROUNDED_SHARE = 1e-3
MAX_ERROR_STEPS = 0.51
EDGE_ELEMS = 1 << 16
WHOLE = ("model.layers.0.", "model.norm.")
"""Tensors of these names are compared whole; of the others, the first and last elements."""


class Accuracy(msgspec.Struct):
    """How an output compares with the fp64 oracle.

    Attributes:
        checked_elems: how many elements were compared.
        misrounded_elems: how many are not the oracle's rounding.
        worst_error_steps: largest distance from the oracle before it is rounded, in rounding steps
            at the size of base or result, whichever is larger; 0.5 is perfect.
        unlike_reference_elems: how many differ from the numpy reference of our kernel.
    """

    checked_elems: int = 0
    misrounded_elems: int = 0
    worst_error_steps: float = 0.0
    unlike_reference_elems: int = 0

    @property
    def misrounded_share(self) -> float:
        """Misrounded elements over checked ones."""
        return self.misrounded_elems / max(1, self.checked_elems)

    @property
    def passes(self) -> bool:
        """Whether this may be ours."""
        return (
            self.checked_elems > 0
            and self.unlike_reference_elems == 0
            and self.worst_error_steps <= MAX_ERROR_STEPS
            and self.misrounded_share <= MAX_MISROUNDED_SHARE
        )

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(
            self.checked_elems + other.checked_elems,
            self.misrounded_elems + other.misrounded_elems,
            max(self.worst_error_steps, other.worst_error_steps),
            self.unlike_reference_elems + other.unlike_reference_elems,
        )


def compare(
    out: np.ndarray,
    base: np.ndarray,
    sources: Sequence[np.ndarray],
    weights: Sequence[float],
    code: int,
) -> Accuracy:
    """Compare 1-D `out` with the merge of `base` and `sources`, all in the storage of `code`."""
    values = [reference.upcast(array, code, np.float64) for array in (out, base, *sources)]
    result, start = values[:2]
    delta = np.zeros_like(start)
    for value, weight in zip(values[2:], weights, strict=True):
        delta += weight * (value - start)
    exact = start + delta
    rounded = reference.upcast(reference.round_to(exact, code), code, np.float64)
    size = np.maximum(np.abs(exact), np.abs(start)).astype(np.float32)
    step = np.spacing(size) * np.float64(1 if code == F32 else 2**16)
    codes, full = [code] * len(sources), [False] * len(sources)
    expected = reference.linear(base, code, list(sources), codes, full, list(weights), code)
    return Accuracy(
        out.size,
        int(np.count_nonzero(result != rounded)),
        float((np.abs(result - exact) / step).max(initial=0.0)),
        int(np.count_nonzero(out != expected)),
    )


def of_folder(out: Path, inputs: Inputs) -> Accuracy:
    """Compare the bf16 checkpoint in `out`, read by safetensors, with the oracle."""
    return _of_tensors(_tensors(out), inputs, out.name)


def of_model(model: Any, inputs: Inputs) -> Accuracy:
    """Compare the bf16 parameters of a loaded model with the oracle."""
    return _of_tensors({k: _bits(p.detach()) for k, p in model.named_parameters()}, inputs, "model")


def _of_tensors(merged: dict[str, np.ndarray], inputs: Inputs, what: str) -> Accuracy:
    tensors = [merged, *(_tensors(folder) for folder in (inputs.base, *inputs.sources))]
    base = tensors[1]
    if set(merged) != set(base):
        raise RuntimeError(f"{what}: tensors lack or abound: {set(merged) ^ set(base)}")
    total = Accuracy()
    for name in base:
        for start, stop in _spans(name, base[name].size):
            pieces = [found[name][start:stop] for found in tensors]
            total += compare(pieces[0], pieces[1], pieces[2:], inputs.weights, BF16)
    return total


def _spans(name: str, size: int) -> Iterator[tuple[int, int]]:
    if name.startswith(WHOLE) or size <= 2 * EDGE_ELEMS:
        for start in range(0, size, BLOCK_ELEMS):
            yield start, min(size, start + BLOCK_ELEMS)
    else:
        yield from ((0, EDGE_ELEMS), (size - EDGE_ELEMS, size))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, flat, as bits on a lazy memory mapping."""
    from safetensors.torch import load_file

    loaded = {k: v for file in weight_files(folder) for k, v in load_file(file).items()}
    wrong = {str(v.dtype) for v in loaded.values()} - {"torch.bfloat16"}
    if wrong:
        raise RuntimeError(f"{folder.name}: {', '.join(wrong)} found, bfloat16 expected")
    return {k: _bits(v) for k, v in loaded.items()}


def _bits(tensor: Any) -> np.ndarray:
    import torch

    return np.asarray(tensor.flatten().view(torch.int16).numpy().view(np.uint16))
