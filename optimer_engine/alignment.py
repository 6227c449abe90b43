"""Do the sources fit the base? Every tensor of every checkpoint, matched by name.

Strict, since what is skipped or cut silently is found in a broken model much later: a tensor that
is missing, superfluous or of another shape is refused. Two irregularities are regular and known: an
output head that is tied to the embeddings and therefore not stored, and a distribution vector,
which has no tensors that are not floating point.
"""

from __future__ import annotations

import msgspec

from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.types import DType, TensorInfo

MAX_LISTED = 20

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


class Match(msgspec.Struct, frozen=True, gc=False):
    """One output tensor and where it comes from; a source lacks only what is never merged."""

    out: TensorInfo
    base: TensorInfo
    sources: tuple[TensorInfo | None, ...]

    def operands(self, active: list[int]) -> list[tuple[int, TensorInfo]]:
        """Base (-1), output (-2) and the numbered sources among `active` that have the tensor."""
        found = [(-1, self.base), (-2, self.out)]
        for number in active:
            info = self.sources[number]
            if info is not None:
                found.append((number, info))
        return found


def align(
    base: Checkpoint, sources: list[tuple[str, Checkpoint]], out_dtype: DType | None
) -> tuple[list[Match], list[str]]:
    """Find every base tensor in every source, or say all that does not fit.

    Args:
        sources: the user's name and the checkpoint of each.
        out_dtype: of the merged tensors; None keeps the base's.

    Returns:
        One Match per base tensor, in the base's file order, not yet placed; and warnings.

    Raises:
        MismatchError: listing up to 20 problems.
    """
    problems: list[str] = []
    warnings: list[str] = []
    found: list[dict[str, TensorInfo]] = []
    for name, source in sources:
        label = quoted(name)
        problems += _identity_problems(base, source, label)
        aligned = {}
        for info in base.tensors.values():
            other = _find(source, info.name)
            if other is None:
                if source.kind == VECTOR and not info.dtype.mergeable:
                    continue
                problems.append(f"{label} lacks {quoted(info.name)} {list(info.shape)}")
            elif other.shape != info.shape:
                problems.append(
                    f"{label}: {quoted(info.name)} has shape {list(other.shape)}, the base has"
                    f" {list(info.shape)}"
                )
            elif other.dtype != info.dtype and not (other.dtype.mergeable and info.dtype.mergeable):
                problems.append(
                    f"{label}: {quoted(info.name)} is {other.dtype.code}, the base has"
                    f" {info.dtype.code}"
                )
            else:
                aligned[info.name] = other
        for extra in source.tensors.keys() - base.tensors.keys():
            if _find(base, extra) is not None and source.ties_embeddings:
                warnings.append(
                    f"{label}: {quoted(extra)} is tied to the embeddings and is not read"
                )
            else:
                problems.append(f"{label} has {quoted(extra)}, which the base lacks")
        found.append(aligned)
    if problems:
        more = len(problems) - MAX_LISTED
        listed = sorted(problems)[:MAX_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise MismatchError(
            "the sources do not fit the base:\n  - " + "\n  - ".join(listed),
            where=str(base.folder),
            todo="every source must come from this base, with the same tensors and shapes",
        )
    matches = []
    for info in base.tensors.values():
        dtype = out_dtype if out_dtype is not None and info.dtype.mergeable else info.dtype
        out = TensorInfo(info.name, dtype, info.shape, 0, 0, info.elems * dtype.itemsize)
        matches.append(Match(out, info, tuple(aligned.get(info.name) for aligned in found)))
    return matches, sorted(warnings)


def _identity_problems(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    if source.kind == VECTOR:
        if source.base_fingerprint == base.fingerprint:
            return []
        return [
            f"{label} is a vector of another base: it was taken from"
            f" {quoted(source.base_fingerprint)[:16]}, this base is {base.fingerprint[:16]}"
        ]
    return [
        f"{label}: config.json has {key} {source.config[key]!r}, the base has {base.config[key]!r}"
        for key in ("model_type", "architectures")
        if key in source.config and key in base.config and source.config[key] != base.config[key]
    ]


def _find(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """Tensor `name`, or the embeddings where a tied output head is not stored."""
    info = checkpoint.tensors.get(name)
    if info is None and name.endswith(_HEAD) and checkpoint.ties_embeddings:
        tied = [t for t in checkpoint.tensors.values() if t.name.endswith(_EMBEDDINGS)]
        return tied[0] if len(tied) == 1 else None
    return info
