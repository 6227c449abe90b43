"""Do the sources fit the base? Every tensor of every checkpoint, matched by name.

Strict, since what is skipped or cut silently is found in a broken model much later: a tensor that
is missing, superfluous or of another shape is refused. Three irregularities are regular and known:
an output head that is tied to the embeddings and therefore not stored, a distribution vector, which
has no tensors that are not floating point, and a multimodal model whose text part is saved by
itself (`counterparts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from optimer_engine.adapter import adapter_tensors
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Checkpoint
from optimer_engine.counterparts import Counterparts, same_language_model
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.names import EMBEDDINGS, HEAD, is_vocabulary, plain
from optimer_engine.operands import Operand, Stored
from optimer_engine.quantized import as_input, merged_dtype
from optimer_engine.resized import Resized
from optimer_engine.runs import Row
from optimer_engine.types import DType, TensorInfo

if TYPE_CHECKING:
    from optimer_engine.by_token import ByToken

MAX_LISTED = 20

Given = TensorInfo | Operand | None

RowRule = Literal["strict", "common", "pad", "by_token"]
"""What is done with the embeddings and output heads of other vocabularies than the base's.

strict: other numbers of rows are refused. common: the output has the base's rows; what a source
lacks stays the base's, and what only a source has is dropped. pad: the output has the most rows of
all; those that the base lacks are of the source that has the most. Under these three, row i is the
same token in all. by_token: rows are matched by what the tokenizers say they stand for, see
`by_token`.
"""


class Alignment(NamedTuple):
    """What `align` found.

    Attributes:
        rows: one per base tensor, in the base's file order, not yet placed.
        warnings: what was noticed and not refused.
        files, omitted: of the tokenizer, see `by_token.ByToken`.
    """

    rows: list[Row]
    warnings: list[str]
    files: dict[str, bytes]
    omitted: tuple[str, ...]


def align(
    base: Checkpoint,
    sources: list[tuple[str, Checkpoint | None]],
    out_dtype: DType | None,
    rows: RowRule = "strict",
    vocabulary: Literal["union", "base"] = "union",
) -> Alignment:
    """Find every base tensor in every source, or say all that does not fit.

    Args:
        sources: the user's name and the checkpoint of each; None for one that is not read.
        out_dtype: of the merged tensors; None keeps the base's.
        rows: what to do where vocabularies differ, see `RowRule`.
        vocabulary: the output's tokens under "by_token".

    Raises:
        MismatchError: listing up to 20 problems.
        CheckpointError, RecipeError: vocabularies cannot be aligned by token.
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
        matched = Counterparts.of(base, given, label, source.kind != ADAPTER)
        problems += matched.problems
        warnings += matched.notes
        named = {mine: given[theirs] for mine, theirs in matched.names.items()}
        found.append(_fitting(base, source, named, matched.untouched, rows, label, problems))
        for extra in matched.extra:
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
    checkpoints = [base, *(source for _, source in sources)]
    by_token = _by_token(checkpoints, found, vocabulary) if rows == "by_token" else None
    made = []
    for info in base.tensors.values():
        own = merged_dtype(base, info)
        dtype = out_dtype if out_dtype is not None and info.dtype.mergeable else own
        inputs: tuple[Given, ...] = (
            as_input(base, info),
            *(aligned.get(info.name) for aligned in found),
        )
        shape = info.shape
        if by_token is not None and is_vocabulary(plain(info.name)):
            shape, inputs = _aligned_by_token(by_token, checkpoints, inputs)
        elif any(given is not None and given.shape != shape for given in inputs):
            shape, inputs = _resize(checkpoints, inputs, rows)
        size = math.prod(shape) * dtype.bits // 8
        made.append(Row(TensorInfo(info.name, dtype, shape, 0, 0, size), inputs, 0))
    if by_token is None:
        return Alignment(made, sorted(warnings), {}, ())
    warnings += by_token.warnings
    return Alignment(made, sorted(warnings), by_token.files, by_token.omitted)


def _by_token(
    checkpoints: list[Checkpoint | None],
    found: list[dict[str, TensorInfo | Operand]],
    vocabulary: Literal["union", "base"],
) -> ByToken:
    """The vocabularies of the base and of all that have whole rows of their own."""
    from optimer_engine.by_token import ByToken

    own: list[Checkpoint | None] = [checkpoints[0]]
    for checkpoint, tensors in zip(checkpoints[1:], found, strict=True):
        whole = any(
            is_vocabulary(plain(name)) and (isinstance(given, TensorInfo) or not given.is_delta)
            for name, given in tensors.items()
        )
        of_its_own = checkpoint is not None and checkpoint.kind != VECTOR and whole
        own.append(checkpoint if of_its_own else None)
    return ByToken(own, vocabulary)


def _operands(
    checkpoints: list[Checkpoint | None], inputs: tuple[Given, ...]
) -> list[Operand | None]:
    operands: list[Operand | None] = []
    for checkpoint, given in zip(checkpoints, inputs, strict=True):
        if isinstance(given, TensorInfo):
            assert checkpoint is not None
            operands.append(Stored(checkpoint, given, checkpoint.kind == VECTOR))
        else:
            operands.append(given)
    return operands


def _aligned_by_token(
    by_token: ByToken, checkpoints: list[Checkpoint | None], inputs: tuple[Given, ...]
) -> tuple[tuple[int, ...], tuple[Given, ...]]:
    """The output's shape, and the inputs with their rows in its order."""
    operands = _operands(checkpoints, inputs)
    shape, aligned = by_token.aligned(operands)
    kept = zip(inputs, operands, aligned, strict=True)
    return shape, tuple(given if new is old else new for given, old, new in kept)


def _resize(
    checkpoints: list[Checkpoint | None], inputs: tuple[Given, ...], rule: RowRule
) -> tuple[tuple[int, ...], tuple[Given, ...]]:
    """The output's shape, and the inputs (the base first) read as if all had it."""
    operands = _operands(checkpoints, inputs)
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
    untouched: frozenset[str],
    rows: RowRule,
    label: str,
    problems: list[str],
) -> dict[str, TensorInfo | Operand]:
    """The source's tensors that can be merged into the base's; what cannot joins `problems`."""
    fitting: dict[str, TensorInfo | Operand] = {}
    for info in base.tensors.values():
        other = _find(source, given, info.name)
        if other is None:
            if info.name in untouched:
                continue
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
    if same_language_model(base, source):
        return []
    return [
        f"{label}: config.json has {key} {source.config[key]!r}, the base has {base.config[key]!r}"
        for key in ("model_type", "architectures")
        if key in source.config and key in base.config and source.config[key] != base.config[key]
    ]


def _differ_in_rows(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the vocabulary has another number of rows, and nothing else differs."""
    return is_vocabulary(plain(info.name)) and info.shape[1:] == shape[1:] and shape != ()


def _find(
    checkpoint: Checkpoint, given: Mapping[str, TensorInfo | Operand], name: str
) -> TensorInfo | Operand | None:
    """Tensor `name`, or the embeddings where a tied output head is not stored."""
    found = given.get(name)
    if found is None and checkpoint.kind != ADAPTER and name.endswith(HEAD):
        tied = [t for t in given.values() if getattr(t, "name", "").endswith(EMBEDDINGS)]
        return tied[0] if len(tied) == 1 and checkpoint.ties_embeddings else None
    return found
