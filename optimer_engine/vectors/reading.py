"""Opening a vector: all that its headers say is checked before anything is read by them.

That each packed tensor has exactly its parts, of the dtypes and sizes that its shape demands, and
that the index of an exact one is a rising line of offsets inside its stream. So a damaged or
hostile file gives an error that names file and tensor, and never a read outside of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optimer_engine.adapter import Factor, LowRank, RecentFactors, matrix
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import CheckpointError, quoted
from optimer_engine.kernels.reference_packed import BLOCK, CHUNK, GROUP, HEADER_BYTES
from optimer_engine.operands import Stored
from optimer_engine.safetensors_format import read_header
from optimer_engine.types import DType, TensorInfo
from optimer_engine.vectors.format import (
    PARTS,
    TENSOR,
    VERSION,
    Description,
    parse,
    part_name,
)
from optimer_engine.vectors.tensors import (
    ExactTensor,
    Packed,
    QuantisedTensor,
    ZeroTensor,
    group_count,
    refuse,
)


def open(checkpoint: Checkpoint) -> Packed:
    """The tensors of a vector, in whatever mode each is stored.

    Args:
        checkpoint: an opened folder of kind "vector"; it must stay open while tensors are read.

    Raises:
        CheckpointError: at the first departure from the format, naming file and tensor.
    """
    packed = Packed(checkpoint)
    version = checkpoint.metadata.get("vector_format", VERSION)
    if version != VERSION:
        raise CheckpointError(
            f"vector format {quoted(version)!r}, this version reads {VERSION}",
            where=str(checkpoint.folder),
            todo="install a newer optimer-engine",
        )
    parts = dict(checkpoint.tensors)
    described: list[tuple[str, Description, list[TensorInfo]]] = []
    for file in range(len(checkpoint.files)):
        for key, text in _metadata(checkpoint, file).items():
            if key.startswith(TENSOR):
                name = key.removeprefix(TENSOR)
                said = _description(checkpoint, file, name, text)
                described.append((name, said, _take_parts(checkpoint, file, name, said, parts)))
    indexes = _read_indexes(
        checkpoint, [found[1] for _, said, found in described if said.mode == "exact"]
    )
    kept = RecentFactors()
    for name, said, found in described:
        if name in packed.tensors or name in parts:
            raise CheckpointError(
                f"{quoted(name)} is stored twice",
                where=str(checkpoint.folder),
                todo="pack the vector again",
            )
        if said.mode == "exact":
            index = indexes[found[1].name]
            _check_index(checkpoint, name, said, found, index)
            packed.tensors[name] = ExactTensor(packed, name, said, found[0], index)
        elif said.mode == "zero":
            packed.tensors[name] = ZeroTensor(said.shape)
        elif said.mode == "lowrank":
            packed.tensors[name] = _low_rank(checkpoint, said, found, kept)
        else:
            packed.tensors[name] = QuantisedTensor(packed, name, said, *found)
    packed.tensors |= {name: Stored(checkpoint, info, True) for name, info in parts.items()}
    return packed


def _metadata(checkpoint: Checkpoint, file: int) -> Mapping[str, str]:
    if file == 0:
        return checkpoint.metadata
    opened = checkpoint.files[file]
    return read_header(opened.fd, opened.path, file)[1]


def _description(checkpoint: Checkpoint, file: int, name: str, text: str) -> Description:
    said = parse(text)
    if isinstance(said, str):
        raise CheckpointError(
            f"{quoted(name)}: {quoted(said)}",
            where=str(checkpoint.files[file].path),
            todo="pack the vector again",
        )
    return said


def _take_parts(
    checkpoint: Checkpoint, file: int, name: str, said: Description, parts: dict[str, TensorInfo]
) -> list[TensorInfo]:
    """The entries of a packed tensor, taken out of `parts`, each of the size it must have."""
    found = []
    for part in PARTS[said.mode]:
        info = parts.pop(part_name(name, part), None)
        if info is None or info.file != file:
            raise CheckpointError(
                f"{quoted(name)}: the entry {quoted(part_name(name, part))} is missing",
                where=str(checkpoint.files[file].path),
                todo="pack the vector again",
            )
        found.append(info)
    if not found:
        return found
    groups = group_count(said.elems)
    wanted: list[tuple[DType, tuple[int, ...]]]
    if said.mode == "exact":
        wanted = [
            (DType.U8, (found[0].nbytes,)),
            (DType.U64, (-(-said.elems // CHUNK) + 1,)),
        ]
    elif said.mode == "lowrank":
        rank = found[0].shape[0] if found[0].shape else 0
        if len(said.shape) != 2 or not rank:
            refuse(checkpoint, found[0], name, "a low-rank tensor has two dimensions and a rank")
        floats = (DType.BF16, DType.F16, DType.F32)
        dtypes = [i.dtype if i.dtype in floats else DType.F32 for i in found]
        wanted = [(dtypes[0], (rank, said.shape[1])), (dtypes[1], (said.shape[0], rank))]
    else:
        bits = 8 if said.mode == "int8" else 4
        wanted = [(DType.U8, (groups * GROUP * bits // 8,)), (DType.BF16, (groups,))]
    for info, (dtype, shape) in zip(found, wanted, strict=True):
        if info.dtype is not dtype or info.shape != shape:
            refuse(
                checkpoint,
                info,
                name,
                f"{quoted(info.name)} is {info.dtype.code} {list(info.shape)}, {dtype.code}"
                f" {list(shape)} expected",
            )
    return found


def _read_indexes(checkpoint: Checkpoint, infos: list[TensorInfo]) -> dict[str, np.ndarray]:
    """Every index, by entry; those that adjoin in a file come with one read."""
    found: dict[str, np.ndarray] = {}
    infos = sorted(infos, key=lambda info: (info.file, info.offset))
    while infos:
        first, end, count = infos[0], infos[0].offset, 0
        for info in infos:
            if info.file != first.file or info.offset != end:
                break
            end, count = end + info.nbytes, count + 1
        raw = np.empty(end - first.offset, np.uint8)
        checkpoint.read_into(first.file, first.offset, raw.data)
        for info in infos[:count]:
            begin = info.offset - first.offset
            found[info.name] = raw[begin : begin + info.nbytes].view("<i8")
        infos = infos[count:]
    return found


def _check_index(
    checkpoint: Checkpoint,
    name: str,
    said: Description,
    found: list[TensorInfo],
    index: np.ndarray,
) -> None:
    stream = found[0]
    sizes = np.diff(index)
    whole = CHUNK // BLOCK
    blocks = np.full(sizes.size, whole)
    if sizes.size:
        blocks[-1] = -(-said.elems // BLOCK) - whole * (sizes.size - 1)
    most = HEADER_BYTES + BLOCK * said.dtype.itemsize
    right = (
        index[0] == 0
        and index[-1] == stream.nbytes
        and bool(((index >= 0) & (index <= stream.nbytes)).all())
        and bool((sizes >= blocks * HEADER_BYTES).all())
        and bool((sizes <= blocks * most).all())
        and not (sizes % 8).any()
    )
    if not right:
        refuse(checkpoint, found[1], name, "the index does not fit the stream")


def _low_rank(
    checkpoint: Checkpoint, said: Description, found: list[TensorInfo], kept: RecentFactors
) -> LowRank:
    a, b = found
    factor = Factor(matrix(checkpoint, a), a.dtype, kept)
    return LowRank(matrix(checkpoint, b), b.dtype, factor, said.scale)
