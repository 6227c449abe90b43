"""Do the sources fit the base? Every tensor of every checkpoint, matched by name.

Strict, since what is skipped or cut silently is found in a broken model much later: a tensor that
is missing, superfluous or of another shape is refused. Two irregularities are regular and known: an
output head that is tied to the embeddings and therefore not stored, and a distribution vector,
which has no tensors that are not floating point.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimer_engine.adapter import adapter_tensors
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Checkpoint
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.operands import Operand
from optimer_engine.runs import Row
from optimer_engine.types import DType, TensorInfo

MAX_LISTED = 20

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def align(
    base: Checkpoint, sources: list[tuple[str, Checkpoint | None]], out_dtype: DType | None
) -> tuple[list[Row], list[str]]:
    """Find every base tensor in every source, or say all that does not fit.

    Args:
        sources: the user's name and the checkpoint of each; None for one that is not read.
        out_dtype: of the merged tensors; None keeps the base's.

    Returns:
        One Row per base tensor, in the base's file order, not yet placed; and warnings.

    Raises:
        MismatchError: listing up to 20 problems.
    """
    problems: list[str] = []
    warnings: list[str] = []
    found: list[dict[str, TensorInfo | Operand]] = []
    for name, source in sources:
        if source is None:
            found.append({})
            continue
        label = quoted(name)
        problems += _identity_problems(base, source, label)
        given = _given(source)
        found.append(_fitting(base, source, given, label, problems))
        for extra in given.keys() - base.tensors.keys():
            if _find(base, base.tensors, extra) is not None and source.ties_embeddings:
                warnings.append(
                    f"{label}: {quoted(extra)} is tied to the embeddings and is not read"
                )
            else:
                problems.append(f"{label} has {quoted(extra)}, which the base lacks")
    if problems:
        more = len(problems) - MAX_LISTED
        listed = sorted(problems)[:MAX_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise MismatchError(
            "the sources do not fit the base:\n  - " + "\n  - ".join(listed),
            where=str(base.folder),
            todo="every source must come from this base, with the same tensors and shapes",
        )
    rows = []
    for info in base.tensors.values():
        dtype = out_dtype if out_dtype is not None and info.dtype.mergeable else info.dtype
        out = TensorInfo(info.name, dtype, info.shape, 0, 0, info.elems * dtype.itemsize)
        rows.append(Row(out, (info, *(aligned.get(info.name) for aligned in found)), 0))
    return rows, sorted(warnings)


def _given(source: Checkpoint) -> Mapping[str, TensorInfo | Operand]:
    """What a source offers, by the base's names."""
    if source.kind == ADAPTER:
        return adapter_tensors(source)
    return source.tensors


def _fitting(
    base: Checkpoint,
    source: Checkpoint,
    given: Mapping[str, TensorInfo | Operand],
    label: str,
    problems: list[str],
) -> dict[str, TensorInfo | Operand]:
    """The source's tensors that can be merged into the base's; what cannot joins `problems`."""
    fitting: dict[str, TensorInfo | Operand] = {}
    for info in base.tensors.values():
        other = _find(source, given, info.name)
        if other is None:
            if source.kind == MODEL or (source.kind == VECTOR and info.dtype.mergeable):
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
            fitting[info.name] = other
    return fitting


def _identity_problems(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    if source.kind == ADAPTER:
        return []
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


def _find(
    checkpoint: Checkpoint, given: Mapping[str, TensorInfo | Operand], name: str
) -> TensorInfo | Operand | None:
    """Tensor `name`, or the embeddings where a tied output head is not stored."""
    found = given.get(name)
    if found is None and checkpoint.kind != ADAPTER and name.endswith(_HEAD):
        tied = [t for t in given.values() if getattr(t, "name", "").endswith(_EMBEDDINGS)]
        return tied[0] if len(tied) == 1 and checkpoint.ties_embeddings else None
    return found
