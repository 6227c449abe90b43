"""Output files: which tensor goes into which shard, at which byte."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from optimer_engine.safetensors_format import place
from optimer_engine.types import TensorInfo


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: name, first bytes (the header), total size, tensors in file order."""

    name: str
    header: bytes
    size: int
    tensors: tuple[TensorInfo, ...]


def lay_out(
    outs: Iterable[TensorInfo], max_bytes: int, kind: str, metadata: dict[str, str]
) -> tuple[Shard, ...]:
    """Fill shards in the order given, named as `save_pretrained` names them.

    Args:
        outs: name, dtype and shape of every output tensor; file and offset are decided here.
        max_bytes: of tensor data in a shard; a larger tensor gets a shard of its own.
        kind: stem of the file names.
        metadata: of every shard's header.
    """
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in outs:
        if groups[-1] and filled + info.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    shards = []
    for number, group in enumerate(groups):
        header, tensors = place(group, metadata, number)
        name = f"{kind}-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        size = len(header) + sum(info.nbytes for info in tensors)
        shards.append(
            Shard(name if len(groups) > 1 else f"{kind}.safetensors", header, size, tuple(tensors))
        )
    return tuple(shards)
