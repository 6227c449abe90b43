"""Rows, which say what each output tensor is made of, and runs, which the engine walks.

Neighbouring rows are joined into *runs*: stretches that are contiguous, in the same order, of one
dtype and of one treatment in every operand and in the output. A run is one flat array to the
engine, so a thousand small norms cost what one tensor of their size costs, and tiles are cut from
runs. Only methods that treat each element by itself can be joined; others get a run per tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from optimer_engine import methods
from optimer_engine.adapter import LowRank
from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.methods.protocol import GRANULE, Method
from optimer_engine.operands import Operand, Stored
from optimer_engine.tensor_recipe import Ref, Settings, TensorRecipe
from optimer_engine.types import DType, TensorInfo

DIFFERENCE = "difference"
"""The treatment of `optimer extract`: source - base, the base not added."""
UNPACK = "unpack"
"""The treatment of `optimer unpack`: every tensor is copied from what decodes it."""
JOINED = ("task_arithmetic", DIFFERENCE, UNPACK)
"""Treatments that the fused linear kernel runs over joined tensors."""
GPU_SOURCES = 64
"""Sources that the GPU's kernels take in one launch."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to tensors: shared by all rows that are treated alike.

    Attributes:
        method: a name in `optimer_engine.methods`, or DIFFERENCE.
        settings: its parameters.
        checkpoints: number of the checkpoint of each input: the base (-1 for none), the sources.
        skips_zero: whether a source of weight 0 has no part in the result, and is not read.
    """

    method: str
    settings: Settings
    checkpoints: tuple[int, ...]
    skips_zero: bool = True

    @property
    def weights(self) -> list[float]:
        """The weight of each source."""
        return self.settings.column("weight")


class Row(msgspec.Struct, frozen=True, gc=False):
    """One output tensor and where it comes from.

    Attributes:
        out: what is written, and where once the row is placed.
        inputs: the base's tensor (None without one), then each source's; None for a source that
            does not touch this tensor.
        treatment: number of its Treatment.
    """

    out: TensorInfo
    inputs: tuple[TensorInfo | Operand | None, ...]
    treatment: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Where an output's bytes of a run begin: file is the number of the shard."""

    file: int
    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class Run:
    """A flat stretch of `elems` elements.

    Attributes:
        tensors: the output tensors it consists of, and `starts`, the first element of each.
        treatment: what is done to them.
        base: the base's operand, None for a method without one.
        sources: (number of the source in the treatment, operand) of those that are read.
        out: where the output's bytes go.
        copied: the base's bytes are the output (no arithmetic); any source must equal them.
        computed: dtype of the result before stochastic rounding; else the output's.
    """

    tensors: tuple[TensorInfo, ...]
    starts: tuple[int, ...]
    elems: int
    treatment: Treatment
    base: Operand | None
    sources: tuple[tuple[int, Operand], ...]
    out: Piece
    copied: bool
    computed: DType

    @property
    def operands(self) -> list[Operand]:
        """All that is read, the base first."""
        first = [] if self.base is None else [self.base]
        return [*first, *(operand for _, operand in self.sources)]

    @property
    def reads(self) -> list[tuple[Checkpoint, int]]:
        """The files that are read."""
        return [file for operand in self.operands for file in operand.reads]

    @property
    def read_bytes_per_elem(self) -> float:
        """Bytes of the inputs' files behind one element."""
        return sum(operand.read_bytes_per_elem for operand in self.operands)

    @property
    def widest(self) -> int:
        """Bytes of an element in the widest operand or the output."""
        return max(self.computed.itemsize, *(o.dtype.itemsize for o in self.operands), 1)

    @property
    def method(self) -> Method | None:
        """What merges it; None for a copy, and for what the fused linear kernel does."""
        if self.copied or self.treatment.method in JOINED:
            return None
        return methods.get(self.treatment.method)

    @property
    def recipe(self) -> TensorRecipe:
        """The run of one tensor as a row of a recipe, for methods."""
        (info,) = self.tensors
        numbers = self.treatment.checkpoints
        base = None if self.base is None else Ref(numbers[0], info.name)
        refs = tuple(Ref(numbers[number + 1], info.name) for number, _ in self.sources)
        kept = tuple(self.treatment.settings.per_source[number] for number, _ in self.sources)
        settings = Settings(self.treatment.settings.shared, kept)
        return TensorRecipe(
            info.name, info.shape, self.computed, self.treatment.method, settings, base, refs
        )

    @property
    def on_gpu(self) -> bool:
        """Whether what is done to it has a GPU form; a copy has none, and needs none."""
        method = self.method
        fits = not self.copied and len(self.sources) <= GPU_SOURCES
        return fits and (method is None or method.on_gpu)

    def tile_elems(self, tile_bytes: int, on_gpu: bool = False) -> int:
        """Elements of a tile whose widest operand takes `tile_bytes`, or the method's least.

        On a GPU a weighted sum's tiles do not cut what packed vectors are made of.
        """
        elems = max(1, tile_bytes // self.widest)
        if self.method is not None:
            unit = self.method.unit(self.recipe)
            return max(unit, elems // unit * unit)
        if not on_gpu:
            return elems
        rows = [o.shape[1] for o in self.operands if isinstance(o, LowRank)]
        unit = max(rows, default=GRANULE)
        return elems // unit * unit or elems

    def parts(self, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int, int]]:
        """Tensors met by elements start..stop: (tensor, first element in it, from, to in run)."""
        for info, begin in zip(self.tensors, self.starts, strict=True):
            low, high = max(start, begin), min(stop, begin + info.elems)
            if low < high:
                yield info, low - begin, low, high


def join(
    rows: Sequence[Row],
    treatments: Sequence[Treatment],
    checkpoints: Sequence[Checkpoint | None],
    stochastic: bool = False,
) -> list[Run]:
    """All rows as runs, in their order; sources of weight 0 are not read.

    Args:
        stochastic: bf16 outputs are computed in fp32, to be rounded by chance.
    """
    active = [_active(treatment) for treatment in treatments]
    joined = [treatment.method in JOINED for treatment in treatments]
    runs: list[Run] = []
    group: list[Row] = []
    layout: list[Any] = []
    ends: list[int] = []
    for row in rows:
        infos = [row.out, *(row.inputs[i] for i in active[row.treatment])]
        stored = [info for info in infos if type(info) is TensorInfo]
        here = [row.treatment, *((i.file, i.dtype) if type(i) is TensorInfo else i for i in infos)]
        if group and (here != layout or [info.offset for info in stored] != ends):
            runs.append(_run(group, treatments, checkpoints, active, stochastic))
            group = []
        group.append(row)
        layout = here
        # An operand that computes its elements has no neighbours: it equals itself alone.
        ends = [info.offset + info.nbytes for info in stored] if joined[row.treatment] else []
    return [*runs, _run(group, treatments, checkpoints, active, stochastic)] if group else runs


def _active(treatment: Treatment) -> list[int]:
    """Positions among a row's inputs of those that are read: the base and weights other than 0."""
    read = [0] if treatment.checkpoints[0] >= 0 else []
    for number, pairs in enumerate(treatment.settings.per_source, start=1):
        if not treatment.skips_zero or dict(pairs).get("weight") != 0:
            read.append(number)
    return read


def _run(
    group: list[Row],
    treatments: Sequence[Treatment],
    checkpoints: Sequence[Checkpoint | None],
    active: list[list[int]],
    stochastic: bool,
) -> Run:
    starts, elems = [], 0
    for row in group:
        starts.append(elems)
        elems += row.out.elems
    first = group[0]
    treatment = treatments[first.treatment]
    base: Operand | None = None
    sources = []
    for position in active[first.treatment]:
        info = first.inputs[position]
        if info is None:
            continue
        if isinstance(info, TensorInfo):
            checkpoint = checkpoints[treatment.checkpoints[position]]
            assert checkpoint is not None
            operand: Operand = Stored(checkpoint, info, checkpoint.kind == VECTOR)
        else:
            operand = info
        if position == 0:
            base = operand
        else:
            sources.append((position - 1, operand))
    out = Piece(first.out.file, first.out.offset, first.out.dtype)
    copied = base is not None and (
        not base.dtype.mergeable or (not sources and out.dtype == base.dtype)
    )
    if base is not None and not sources and treatment.method not in JOINED:
        treatment = Treatment("task_arithmetic", Settings(), treatment.checkpoints[:1])
    tensors = tuple(row.out for row in group)
    computed = DType.F32 if stochastic and out.dtype is DType.BF16 and not copied else out.dtype
    return Run(
        tensors, tuple(starts), elems, treatment, base, tuple(sources), out, copied, computed
    )


def fold(treatment: Treatment) -> Treatment:
    """The same as a weighted sum for the fused linear kernel, where the method is one.

    Where the method sums models without a base, the first source becomes the anchor that the
    deltas are taken from: checkpoints[0] is then that source's.
    """
    method = methods.get(treatment.method)
    first, *others = treatment.checkpoints
    base = Ref(first, "") if first >= 0 else None
    refs = tuple(Ref(number, "") for number in others)
    row = TensorRecipe("", (), DType.F32, treatment.method, treatment.settings, base, refs)
    method.check(row)
    folded = method.fold(row)
    if folded is None or folded.scale != 1.0:
        return treatment
    settings = Settings.of({}, [{"weight": weight} for weight in folded.weights])
    anchor = first if folded.anchor_is_base else others[0]
    return Treatment("task_arithmetic", settings, (anchor, *others))


def anchored(row: Row, treatment: Treatment, unfolded: Treatment) -> Row:
    """The row with the anchor that `fold` chose in the base's place."""
    if treatment.checkpoints[0] == unfolded.checkpoints[0]:
        return row
    return msgspec.structs.replace(row, inputs=(row.inputs[1], *row.inputs[1:]))
