"""What a lossless form of a trained tensor must take at least, and what `exact` takes.

    python -m benchmarks.entropy BASE TRAINED

Distances from the base are taken as `exact` takes them. Their entropy is estimated for each
exponent of the base apart, since a coder that has the base may use it: small weights move many
steps, large ones few. Low bits in which the distances are as good as evenly spread are counted
whole, so that the histograms of the others are well filled.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from optimer_engine import vectors
from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.kernels.reference import BF16, F16, F32, F64, STORAGE, upcast
from optimer_engine.kernels.reference_packed import BLOCK, distance, reference_bits, widths

MANTISSA_BITS = {BF16: 7, F16: 10, F32: 23, F64: 52}
SAMPLE_ELEMS = 1 << 15
"""Of a tensor."""
KEPT_BITS = 5
"""Of the median distance; a smooth distribution is even within a step of this size."""


def entropy_share(reference: np.ndarray, trained: np.ndarray, code: int) -> float:
    """Entropy of the distances, given the exponent of the reference, over the bits of an element.

    Args:
        reference, trained: elements of dtype `code`, stored bits.
    """
    unsigned = f"u{trained.itemsize}"
    start = reference.view(unsigned)
    z = distance(start, trained.view(unsigned)).astype(np.uint64)
    exponents = (start.astype(np.uint64) & np.uint64(2 ** (8 * trained.itemsize - 1) - 1)) >> (
        np.uint64(MANTISSA_BITS[code])
    )
    bits = 0.0
    for exponent in np.unique(exponents):
        own = z[exponents == exponent]
        low = max(0, int(np.median(own)).bit_length() - KEPT_BITS)
        counts = np.unique(own >> np.uint64(low), return_counts=True)[1]
        shares = counts / own.size
        bits += own.size * (low - float((shares * np.log2(shares)).sum()))
    return bits / z.size / (8 * trained.itemsize)


def exact_share(reference: np.ndarray, trained: np.ndarray) -> float:
    """What `exact` takes, headers of blocks included, over what the elements take."""
    unsigned = f"u{trained.itemsize}"
    z = distance(reference.view(unsigned), trained.view(unsigned))
    total = 0
    for start in range(0, z.size, BLOCK):
        block = z[start : start + BLOCK]
        w1, w2, w3 = widths(np.concatenate([block, np.zeros(BLOCK - block.size, z.dtype)]))
        n1 = int(np.count_nonzero(block.astype(np.uint64) >> np.uint64(w1))) if w2 else 0
        n2 = int(np.count_nonzero(block.astype(np.uint64) >> np.uint64(w1 + w2))) if w3 else 0
        total += 64 + BLOCK * w1 + (BLOCK + n1 * w2 if n1 else 0) + (n1 + n2 * w3 if n2 else 0)
    return total / 8 / trained.nbytes


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("trained", type=click.Path(path_type=Path))
def main(base: Path, trained: Path) -> None:
    """For a sample of each large tensor: |tau|/|theta|, and both shares, as stored and as bf16."""
    rows: dict[str, list[tuple[int, float, float, float]]] = {}
    with Checkpoint.open(base) as old, Checkpoint.open(trained) as new:
        for name, info in new.tensors.items():
            if info.elems < BLOCK or info.dtype not in vectors.format.CODES[:3]:
                continue
            assert new.kind != VECTOR
            code = vectors.format.CODES.index(info.dtype)
            start = old.view(name).reshape(-1)[:SAMPLE_ELEMS]
            bits = np.ascontiguousarray(new.view(name).reshape(-1)[:SAMPLE_ELEMS])
            own = vectors.format.CODES.index(old.tensors[name].dtype)
            forms = {info.dtype.code: (bits, code)}
            if code != BF16:
                forms["BF16"] = (reference_bits(bits, code, BF16), BF16)
            for label, (values, dtype) in forms.items():
                reference = reference_bits(np.ascontiguousarray(start), own, dtype)
                rows.setdefault(label, []).append(_row(reference, values, dtype, info.elems))
    for label, found in rows.items():
        total = sum(row[0] for row in found)
        moved, taken, least = (sum(r[0] * r[i] for r in found) / total for i in (1, 2, 3))
        click.echo(
            f"stored as {label}: |tau|/|theta| {moved:.4f}, exact {taken:.1%}, entropy {least:.1%}"
        )


def _row(
    reference: np.ndarray, trained: np.ndarray, code: int, elems: int
) -> tuple[int, float, float, float]:
    theta = upcast(reference.view(STORAGE[code]), code, np.float64)
    tau = upcast(trained.view(STORAGE[code]), code, np.float64) - theta
    moved = float(np.linalg.norm(tau) / max(np.linalg.norm(theta), 1e-300))
    return elems, moved, exact_share(reference, trained), entropy_share(reference, trained, code)


if __name__ == "__main__":
    main()
