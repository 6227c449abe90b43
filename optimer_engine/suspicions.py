"""What is allowed in a merge and probably not meant: the warnings of a plan.

A few KiB per tensor tell whether a source was trained from this base: even long training keeps the
cosine between the weights above .99, another base has nearly 0. Nothing is refused for what samples
say; they are not calibrated for every kind of training.
"""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from optimer_engine.checkpoint import MODEL, Checkpoint
from optimer_engine.errors import quoted
from optimer_engine.operands import as_float
from optimer_engine.types import DType, TensorInfo

KIN_COSINE, OTHER_COSINE = 0.95, 0.5
TENSORS = 16
"""Matrices that are sampled of a checkpoint, evenly spaced."""
PIECES, PIECE_ELEMS = 8, 256
"""What is read of each, evenly spaced; a small one whole."""
MAX_TOKENIZER_BYTES, MAX_TOKENS = 64_000_000, 1_000_000

_MEANING = (
    "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "sliding_window", "tie_word_embeddings",
)  # fmt: skip
"""Keys of config.json that decide what the weights mean."""

_LEAST = {DType.F16: 2.0**-24, DType.F8_E4M3: 2.0**-9, DType.F8_E5M2: 2.0**-16}
"""The smallest positive number of each dtype; half of it, and what is below, rounds to 0."""


def suspicions(
    base: Checkpoint, sources: Sequence[tuple[str, Checkpoint | None]], out_dtype: DType | None
) -> list[str]:
    """One line for each thing that is probably not as meant.

    Args:
        sources: the user's name and the checkpoint of each; None for one that is not read.
        out_dtype: of the merged tensors, if another than the base's is asked for.
    """
    found = _odd_head(base, "the base")
    if out_dtype in _LEAST:
        found += _lost(base, out_dtype)
    seen: dict[Path, str] = {}
    for name, source in sources:
        if source is None:
            continue
        label, folder = quoted(name), source.folder.resolve()
        if folder in seen:
            found.append(f"{label} and {seen[folder]} are the same folder, which counts twice")
        seen.setdefault(folder, label)
        if source.kind == MODEL:
            found += _kinship(base, source, label)
            found += _dtypes(base, source, label)
            found += _configs(base, source, label)
            found += _tokenizers(base, source, label)
            found += _odd_head(source, label)
    return found


def _kinship(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    cosines, equal = [], True
    for info in _matrices(base):
        other = source.tensors.get(info.name)
        if other is None or other.shape != info.shape or not _readable(source, other):
            continue
        one, two = _values(base, info), _values(source, other)
        equal &= np.array_equal(one, two)
        with np.errstate(all="ignore"):  # what is not finite is named by the merge
            scale = np.sqrt((one @ one) * (two @ two))
            cosine = (one @ two) / scale if scale else 1.0
        if np.isfinite(cosine):
            cosines.append(float(cosine))
    if not cosines:
        return []
    if equal:
        same = base.origin == source.origin and base.fingerprint == source.fingerprint
        return [f"{label} equals the base and contributes nothing"] if same else []
    middle = sorted(cosines)[len(cosines) // 2]
    if middle >= KIN_COSINE:
        return []
    what = "seems to be of another base" if middle < OTHER_COSINE else "is far from the base"
    return [
        f"{label} {what}: the cosine between their weights is {middle:.2f}, at least {KIN_COSINE}"
        " expected after any training"
    ]


def _dtypes(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    other = {
        (tensor.dtype.code, info.dtype.code)
        for info in base.tensors.values()
        if (tensor := source.tensors.get(info.name)) and tensor.dtype != info.dtype
    }
    return [
        f"{label} has tensors in {theirs} where the base has {ours}; they are converted exactly"
        for theirs, ours in sorted(other)
    ]


def _configs(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    ours, theirs = _inner(base.config), _inner(source.config)
    return [
        f"{label}: config.json has {key} {theirs[key]!r}, the base has {ours[key]!r}"
        for key in _MEANING
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _tokenizers(base: Checkpoint, source: Checkpoint, label: str) -> list[str]:
    """Equal rows of the embeddings that mean different tokens."""
    ours, theirs = (checkpoint.folder / "tokenizer.json" for checkpoint in (base, source))
    with contextlib.suppress(OSError):
        if filecmp.cmp(ours, theirs, shallow=False):
            return []
    one, two = _tokens(ours), _tokens(theirs)
    if one is None or two is None:
        return []
    differ = [number for number in sorted(one.keys() & two.keys()) if one[number] != two[number]]
    if not differ:
        return []
    number = differ[0]
    return [
        f"{label} has another tokenizer: token {number} is {quoted(two[number])!r}, the base has"
        f" {quoted(one[number])!r}, and {len(differ) - 1} more differ"
    ]


def _tokens(path: Path) -> dict[int, str] | None:
    """Token numbers to texts of a tokenizer.json; None where it is not of a kind with a list."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
            return None
        content = path.read_bytes()
        if content.count(b":") > MAX_TOKENS:
            return None
        model = msgspec.json.decode(content, type=_TokenizerFile).model
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return {number: text for text, number in model.vocab.items()}


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _TokenizerFile(msgspec.Struct):
    model: _Model


def _odd_head(checkpoint: Checkpoint, label: str) -> list[str]:
    """An output head that is stored, though tied, and is not what it is tied to."""
    head = checkpoint.tensors.get("lm_head.weight")
    embeddings = [t for n, t in checkpoint.tensors.items() if n.endswith("embed_tokens.weight")]
    if (
        head is None
        or len(embeddings) != 1
        or not _inner(checkpoint.config).get("tie_word_embeddings")
    ):
        return []
    tied = embeddings[0]
    if not (_readable(checkpoint, head) and _readable(checkpoint, tied)):
        return []
    alike = head.shape == tied.shape and head.dtype == tied.dtype
    if alike and np.array_equal(_values(checkpoint, head), _values(checkpoint, tied)):
        return []
    return [
        f"{label}: config.json ties lm_head to the embeddings, and it is stored with other values,"
        " which most loaders then ignore"
    ]


def _lost(base: Checkpoint, dtype: DType) -> list[str]:
    """Tensors of which more than one value in a hundred becomes 0."""
    found = []
    for info in _matrices(base):
        values = np.abs(_values(base, info))
        share = np.mean((values > 0) & (values <= _LEAST[dtype] / 2)) if values.size else 0.0
        if share > 0.01:
            found.append(
                f"{quoted(info.name)}: {share:.0%} of the base's values become 0 in"
                f" {dtype.torch_name}"
            )
    return found


def _matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    fitting = [
        info
        for info in checkpoint.tensors.values()
        if len(info.shape) >= 2 and _readable(checkpoint, info)
    ]
    return fitting[:: -(-len(fitting) // TENSORS) or 1]


def _readable(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether values can be had now, for nothing but a read."""
    plain = info.dtype.mergeable and info.name not in checkpoint.scales
    return plain and info.elems > 0 and checkpoint.here(info.file)


def _values(checkpoint: Checkpoint, info: TensorInfo) -> np.ndarray:
    """Some elements of a tensor as fp64, the same ones whatever its dtype."""
    if info.elems <= PIECES * PIECE_ELEMS:
        starts, elems = [0], info.elems
    else:
        step = (info.elems - PIECE_ELEMS) / (PIECES - 1)
        starts, elems = [int(step * number) for number in range(PIECES)], PIECE_ELEMS
    pieces = []
    for start in starts:
        raw = np.empty(elems * info.dtype.itemsize, np.uint8)
        checkpoint.read_into(info.file, info.offset + start * info.dtype.itemsize, raw.data)
        pieces.append(as_float(raw.view(info.dtype.storage), info.dtype).astype(np.float64))
    return np.concatenate(pieces)
