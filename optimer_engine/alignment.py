"""Do the sources fit the base? Every tensor of every checkpoint, matched by name.

Strict, since what is skipped or cut silently is found in a broken model much later: a tensor that
is missing, superfluous or of another shape is refused. Two irregularities are regular and known: an
output head that is tied to the embeddings and therefore not stored, and a distribution vector,
which has no tensors that are not floating point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from optimer_engine.adapter import adapter_tensors
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Checkpoint
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.operands import Operand, Stored
from optimer_engine.quantized import as_input, merged_dtype
from optimer_engine.resized import Resized
from optimer_engine.runs import Row
from optimer_engine.types import DType, TensorInfo

MAX_LISTED = 20

Given = TensorInfo | Operand | None

RowRule = Literal["strict", "common", "pad"]
"""What is done with embeddings and output heads of other numbers of rows than the base's.

strict: refused. common: the output has the base's rows; what a source lacks stays the base's, and
what only a source has is dropped. pad: the output has the most rows of all; those that the base
lacks are of the source that has the most. Rows mean the same token in all: for vocabularies in
another order, use a mergekit file with `tokenizer_source`.
"""

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def align(
    base: Checkpoint,
    sources: list[tuple[str, Checkpoint | None]],
    out_dtype: DType | None,
    rows: RowRule = "strict",
) -> tuple[list[Row], list[str]]:
    """Find every base tensor in every source, or say all that does not fit.

    Args:
        sources: the user's name and the checkpoint of each; None for one that is not read.
        out_dtype: of the merged tensors; None keeps the base's.
        rows: what to do where vocabularies differ in size, see `RowRule`.

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
        given = _given(source, base)
        found.append(_fitting(base, source, given, rows, label, problems))
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
    made = []
    for info in base.tensors.values():
        own = merged_dtype(base, info)
        dtype = out_dtype if out_dtype is not None and info.dtype.mergeable else own
        inputs: tuple[Given, ...] = (
            as_input(base, info),
            *(aligned.get(info.name) for aligned in found),
        )
        shape = info.shape
        if any(given is not None and given.shape != shape for given in inputs):
            shape, inputs = _resize([base, *(source for _, source in sources)], inputs, rows)
        size = math.prod(shape) * dtype.bits // 8
        made.append(Row(TensorInfo(info.name, dtype, shape, 0, 0, size), inputs, 0))
    return made, sorted(warnings)


def _resize(
    checkpoints: list[Checkpoint | None], inputs: tuple[Given, ...], rule: RowRule
) -> tuple[tuple[int, ...], tuple[Given, ...]]:
    """The output's shape, and the inputs (the base first) read as if all had it."""
    operands: list[Operand | None] = []
    for checkpoint, given in zip(checkpoints, inputs, strict=True):
        if isinstance(given, TensorInfo):
            assert checkpoint is not None
            operands.append(Stored(checkpoint, given, checkpoint.kind == VECTOR))
        else:
            operands.append(given)
    present = [operand for operand in operands if operand is not None]
    base, largest = present[0], max(present, key=lambda operand: operand.shape[0])
    rows = largest.shape[0] if rule == "pad" else base.shape[0]
    if rows > base.shape[0]:
        base = Resized(base, rows, base.dtype, beyond=largest)
    resized = [base if base.shape != present[0].shape else inputs[0]]
    for given, operand in zip(inputs[1:], operands[1:], strict=True):
        if operand is not None and operand.shape[0] != rows:
            given = Resized(operand, rows, base.dtype)
        resized.append(given)
    return (rows, *base.shape[1:]), tuple(resized)


def _given(source: Checkpoint, base: Checkpoint) -> Mapping[str, TensorInfo | Operand]:
    """What a source offers, by the base's names."""
    if source.kind == ADAPTER:
        return adapter_tensors(source)
    if source.kind == VECTOR and source.metadata.get("vector_mode", "plain") != "plain":
        from optimer_engine import vectors

        packed = vectors.open(source)
        packed.check_base(base)
        return packed.tensors
    if source.scales:
        return {name: as_input(source, info) for name, info in source.tensors.items()}
    return source.tensors


def _fitting(
    base: Checkpoint,
    source: Checkpoint,
    given: Mapping[str, TensorInfo | Operand],
    rows: RowRule,
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
        elif other.shape != info.shape and not (
            rows != "strict" and _differ_in_rows(info, other.shape)
        ):
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


def _differ_in_rows(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the vocabulary has another number of rows, and nothing else differs."""
    return info.name.endswith((*_EMBEDDINGS, _HEAD)) and info.shape[1:] == shape[1:] != ()


def _find(
    checkpoint: Checkpoint, given: Mapping[str, TensorInfo | Operand], name: str
) -> TensorInfo | Operand | None:
    """Tensor `name`, or the embeddings where a tied output head is not stored."""
    found = given.get(name)
    if found is None and checkpoint.kind != ADAPTER and name.endswith(_HEAD):
        tied = [t for t in given.values() if getattr(t, "name", "").endswith(_EMBEDDINGS)]
        return tied[0] if len(tied) == 1 and checkpoint.ties_embeddings else None
    return found
