"""Unpack: the trained checkpoint again, to the bit, from its base and an exact vector.

It is a plan like any other, whose every tensor is copied from an operand that decodes it; so it
streams, resumes and reports as a merge does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optimer_engine import engine, vectors
from optimer_engine.checkpoint import MODEL, VECTOR, Checkpoint
from optimer_engine.errors import RecipeError, quoted
from optimer_engine.events import Callback
from optimer_engine.folder_sink import FolderSink
from optimer_engine.hub import locate
from optimer_engine.layout import lay_out
from optimer_engine.operands import Operand, Place, Stored
from optimer_engine.plans import TILE_BYTES, Plan, available_cores
from optimer_engine.recipe import Recipe, Source
from optimer_engine.report import Report
from optimer_engine.runs import UNPACK, Row, Treatment
from optimer_engine.tensor_recipe import Settings
from optimer_engine.types import TensorInfo, parse_bytes
from optimer_engine.vectors import ExactTensor
from optimer_engine.vectors.format import CODES


class Restored:
    """An operand: a trained tensor, decoded with base elements that it reads itself."""

    is_delta = False

    def __init__(self, base: Stored, exact: ExactTensor) -> None:
        self.base, self.exact = base, exact
        self.dtype, self.shape = exact.dtype, exact.shape
        self.read_bytes_per_elem = base.read_bytes_per_elem + exact.read_bytes_per_elem
        self.reads = (*base.reads, *exact.reads)

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """See `operands.Operand`."""
        size = (stop - start) * self.base.dtype.itemsize
        held = self.exact.packed.scratch(size, "base")
        return self.exact.read(start, stop, buffer, self.base.read(start, stop, held, None))

    def places(self, start: int) -> list[Place]:
        """See `operands.Placed`."""
        return [*self.base.places(start), *self.exact.places(start)]

    def scratch_bytes(self, elems: int) -> int:
        """The packed bytes and the base's."""
        size = elems * self.base.dtype.itemsize
        return self.exact.scratch_bytes(elems) + size + size // 4


def unpack(
    base: str | Path,
    vector: str | Path,
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    discard: bool = False,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Write the checkpoint that `vector` was packed from, every tensor to the bit, into `out`.

    Args:
        base: what the vector was packed from.
        vector: packed in mode exact.
        out, discard: as in `merge`; an interrupted call continues.

    Raises:
        MismatchError: for a vector of another base.
        RecipeError: for a vector that does not keep every bit.
        CheckpointError, OutputError: as `merge` raises them.
    """
    made = plan_unpack(base, vector, max_shard_size=max_shard_size, threads=threads)
    try:
        return engine.run(made, FolderSink(out, discard=discard), callbacks=callbacks)
    finally:
        made.close()


def plan_unpack(
    base: str | Path,
    vector: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
) -> Plan:
    """What `unpack` runs.

    Raises:
        MismatchError, RecipeError, CheckpointError: as `unpack`.
    """
    opened: list[Checkpoint] = []
    try:
        opened += (Checkpoint.open(locate(str(name))) for name in (base, vector))
        return _plan(str(base), str(vector), opened, parse_bytes(max_shard_size), threads)
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise


def _plan(
    base_name: str,
    vector_name: str,
    opened: list[Checkpoint],
    max_shard_size: int,
    threads: int | None,
) -> Plan:
    base, vector = opened
    if base.kind != MODEL or vector.kind != VECTOR:
        raise RecipeError(
            f"{base_name} is a {base.kind} and {vector_name} a {vector.kind}; a model and a vector"
            " expected",
            where="unpack",
        )
    packed = vectors.open(vector)
    packed.check_base(base)
    inputs: dict[str, Operand | TensorInfo] = {}
    outs = []
    for info in base.tensors.values():
        exact = packed.tensors.get(info.name)
        if exact is None or info.dtype not in CODES:
            inputs[info.name] = info
            outs.append(info)
            continue
        if not isinstance(exact, ExactTensor):
            raise RecipeError(
                f"{quoted(info.name)} is stored as a delta, which does not keep every bit",
                where=vector_name,
                todo="unpack a vector of mode exact, or merge this one with weight 1",
            )
        inputs[info.name] = Restored(Stored(base, info, False), exact)
        nbytes = info.elems * exact.dtype.itemsize
        outs.append(TensorInfo(info.name, exact.dtype, info.shape, 0, 0, nbytes))
    shards = lay_out(outs, max_shard_size, MODEL, {"format": "pt"})
    rows = tuple(
        Row(info, (inputs[info.name], None), 0) for shard in shards for info in shard.tensors
    )
    # Where the trained dtype is one and not the base's, config.json has to say so.
    dtypes = {out.dtype for out in outs if out.dtype in CODES}
    same = {info.dtype for info in base.tensors.values() if info.dtype in CODES} == dtypes
    files = {}
    if len(dtypes) == 1 and not same:
        key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
        config = {**base.config, key: dtypes.pop().torch_name}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        files["config.json"] = text.encode()
    recipe = Recipe(base_name, [Source("vector", vector_name)])
    settings = Settings.of({}, [{"weight": 1.0}])
    return Plan(
        recipe,
        (base, vector),
        ("base", "vector"),
        (Treatment(UNPACK, settings, (0, 1)),),
        rows,
        shards,
        threads or available_cores(),
        TILE_BYTES,
        files=files,
        options={"max_shard_size": max_shard_size},
    )
