"""Every GPU kernel as a case: operands, launch, bytes moved, and the check that comes first.

One registry serves two reports. Without a GPU, `kernels_aot` makes the cases small and compiles
what they launch. With one, `gpu_kernels` makes them large, compares their output with the CPU's
specification, and times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_operands import (
    CHECKED_ELEMS,
    DTYPES,
    SPREAD,
    STEP,
    Prepared,
    as_stored,
    differing,
    expected,
    moved,
    operands,
    stored,
    weights,
)
from optimer_engine.kernels import gpu, gpu_sparse, reference, reference_packed, sparse
from optimer_engine.kernels import reference_methods as methods
from optimer_engine.kernels.reference import BF16, F32
from optimer_engine.kernels.triton_elements import ITEM_BYTES
from optimer_engine.kernels.triton_launch import flag_on
from optimer_engine.kernels.triton_lowrank import Factors, low_rank
from optimer_engine.kernels.triton_moments import moments
from optimer_engine.kernels.triton_packed import unpack_exact
from optimer_engine.kernels.triton_rank import keep_by_rank, row_norms

COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of sources; the kernel for one of them serves all down to the next smaller."""

PLAIN = ("bf16", "fp16", "fp32")
"""Dtypes that are looked at with all COUNTS."""


@dataclass(frozen=True)
class Case:
    """One kernel at one mixture of dtypes and number of sources.

    Attributes:
        make: (device, elements) to a Prepared.
        tail_bytes: element sizes of what the path for a ragged end loads and, last, stores once
            each; empty where that path is not one element per thread.
    """

    kernel: str
    dtypes: str
    sources: int
    make: Callable[[str, int], Prepared]
    tail_bytes: tuple[int, ...] = ()


def _linear(dtypes: str, count: int, device: str, elems: int) -> Prepared:
    code, source, out_code = DTYPES[dtypes]
    base, sources = operands(device, elems, code, source, count)
    out = torch.empty(elems, dtype=gpu.TORCH_DTYPES[out_code], device=device)
    deltas, w = [source != code] * count, weights(count)
    return Prepared(
        lambda: gpu.linear(base, code, sources, [source] * count, deltas, w, out, out_code),
        moved(elems, code, source, out_code, count),
        lambda: differing(
            as_stored(out[:CHECKED_ELEMS], out_code),
            expected(base, code, sources, source, out_code),
        ),
        (base, sources, w) if dtypes == "bf16" else None,
    )


SMALL_ELEMS = 5120
"""Of each tensor of the case `batch`: a norm of a 27B model."""


def _batch(dtypes: str, count: int, device: str, elems: int) -> Prepared:
    code, source, out_code = DTYPES[dtypes]
    base, sources = operands(device, elems, code, source, count)
    out = torch.empty(elems, dtype=gpu.TORCH_DTYPES[out_code], device=device)
    cut = [tensor.split(SMALL_ELEMS) for tensor in (base, *sources, out)]
    made = gpu.Batch(cut[0], list(zip(*cut[1:-1], strict=True)), [source != code] * count, cut[-1])
    return Prepared(
        lambda: made.merge(weights(count)),
        moved(elems, code, source, out_code, count),
        lambda: differing(
            as_stored(out[:CHECKED_ELEMS], out_code),
            expected(base, code, sources, source, out_code),
        ),
    )


_FORMS = {
    "ties": (methods.CUT, methods.SUM, True),
    "dare": (methods.CHANCE, methods.NO_CONSENSUS, False),
    "dare ties": (methods.CHANCE, methods.SUM, False),
    "breadcrumbs": (methods.CUT, methods.NO_CONSENSUS, False),
    "sce": (methods.KEEP, methods.SUM, True),
}
"""Kind of mask, what elects signs, whether terms are averaged."""

_KEY = int(np.float32(0.7 * STEP).view(np.uint32))
_BEYOND = int(np.float32(2.5 * STEP).view(np.uint32))


def _masks(form: str, count: int) -> sparse.Masks:
    """Thresholds at fixed magnitudes, and half of the elements by chance."""
    rows = np.zeros((count + 1, 8), np.int64)
    rows[:, 0] = methods.KEEP
    rows[:count, 0], nothing = _FORMS[form][0], (0xFFFFFFFE, -1, 0)
    rows[:count, 1:7] = [_KEY, 1 << 40, 0, *(nothing if form == "ties" else (_BEYOND, 0, 0))]
    rows[:count, 7] = 1 << 31
    streams = np.random.default_rng(0).integers(0, 2**32, (count, 4))
    measure = methods.MAGNITUDE
    if form == "sce":
        least = int(np.float32(STEP**2 / 2).view(np.uint32))
        rows[count, :7] = [methods.CUT, least, 1 << 40, 0, *nothing]
        measure = methods.VARIANCE
    return sparse.Masks(rows, np.zeros((count, 2)), streams, measure)


def _inputs(dtypes: str, count: int, device: str, elems: int) -> tuple[Any, int]:
    code, source, out_code = DTYPES[dtypes]
    base, sources = operands(device, elems, code, source, count)
    return sparse.Inputs.of(
        base, code, sources, [source] * count, [source != code] * count, 0, out_code
    ), out_code


def _on_cpu(inputs: Any) -> Any:
    """The first elements of inputs, for the CPU's kernels."""
    stop = min(inputs.base.numel(), CHECKED_ELEMS)
    return sparse.Inputs(
        as_stored(inputs.base[:stop], inputs.base_code), inputs.base_code,
        [as_stored(s[:stop], c) for s, c in zip(inputs.sources, inputs.codes, strict=True)],
        inputs.codes, inputs.is_delta, 0, inputs.wide,
    )  # fmt: skip


def _sparse(form: str, dtypes: str, count: int, device: str, elems: int) -> Prepared:
    inputs, out_code = _inputs(dtypes, count, device, elems)
    out = torch.empty(elems, dtype=gpu.TORCH_DTYPES[out_code], device=device)
    masks, (_, consensus, divides) = _masks(form, count), _FORMS[form]
    w = weights(count)
    terms = (masks, w, w, w if divides else None, consensus, 1.0, False)

    def wrong() -> int:
        cpu = _on_cpu(inputs)
        want = np.empty(cpu.base.size, reference.STORAGE[out_code])
        sparse.merge(cpu, *terms, want, out_code)
        return differing(as_stored(out[:CHECKED_ELEMS], out_code), want)

    return Prepared(
        lambda: gpu_sparse.merge(inputs, *terms, out, out_code),
        moved(elems, *DTYPES[dtypes][:2], out_code, count),
        wrong,
    )


def _count(stage: int, dtypes: str, device: str, elems: int) -> Prepared:
    inputs, _ = _inputs(dtypes, 1, device, elems)
    masks, width = _masks("ties", 1), (methods.HIGH, methods.LOW, 0)[stage]
    wanted = np.array([[0, (0, _KEY >> 16, _KEY)[stage]]])

    def wrong() -> int:
        cpu, n = _on_cpu(inputs), min(elems, CHECKED_ELEMS)
        part = sparse.Inputs(
            inputs.base[:n], inputs.base_code, [s[:n] for s in inputs.sources], inputs.codes,
            inputs.is_delta, 0, inputs.wide,
        )  # fmt: skip
        results = []
        for kernel, given in ((sparse.count, cpu), (gpu_sparse.count, part)):
            granules = -(-n // methods.GRANULE)
            bins, equal = np.zeros((1, width), np.int64), np.zeros((1, granules), np.int64)
            kernel(given, masks, stage, wanted, bins, equal)  # type: ignore[operator]
            results.append(np.concatenate([bins, equal], 1))
        return differing(*results)

    return Prepared(
        lambda: gpu_sparse._count(inputs, masks, 0, stage, int(wanted[0, 1])),
        moved(elems, *DTYPES[dtypes][:2], BF16, 1) - 2 * elems,
        wrong,
    )


ROW = 1280
"""Elements of a row that DELLA ranks."""


def _by_rank(dtypes: str, device: str, elems: int) -> Prepared:
    """Mask by rank, without the sort, which is torch's."""
    elems = -(-elems // ROW) * ROW
    inputs, _ = _inputs(dtypes, 1, device, elems)
    ranks = torch.arange(elems, dtype=torch.int32, device=device) % ROW
    flag, stream = flag_on(device), [1, 2, 3, 4]
    kept: list[torch.Tensor] = []

    def launch() -> None:
        base, source, codes, model = gpu_sparse._bits_of(inputs, 0)
        kept[:] = [
            keep_by_rank(
                base, source, codes, model, inputs.wide, ranks, ROW, 0.3, 0.4, True, stream, 0, flag
            )
        ]

    def wrong() -> int:
        cpu = _on_cpu(inputs)
        n, delta = cpu.base.size, _delta(cpu)
        probability = 0.3 + 0.4 / (ROW - 1) * (np.arange(n) % ROW)
        words = methods.uniform_words(np.array(stream), 0, n)
        want = np.where(words < probability * 2**32, (delta / probability).astype(cpu.dtype), 0)
        return differing(kept[0][:n].cpu().numpy(), want.astype(cpu.dtype))

    width = 8 if inputs.wide else 4
    return Prepared(launch, moved(elems, *DTYPES[dtypes][:2], BF16, 1) + (2 + width) * elems, wrong)


def _delta(cpu: Any) -> np.ndarray:
    """Of the only source."""
    theta, base = (
        reference.upcast(operand, code, cpu.dtype)
        for operand, code in ((cpu.sources[0], cpu.codes[0]), (cpu.base, cpu.base_code))
    )
    return theta if cpu.is_delta[0] else theta - base


def _row_norms(dtypes: str, device: str, elems: int) -> Prepared:
    """What a row had and what its mask left of it; the mask here keeps every other element."""
    elems = -(-elems // ROW) * ROW
    inputs, _ = _inputs(dtypes, 1, device, elems)
    base, source, codes, model = gpu_sparse._bits_of(inputs, 0)
    real = torch.float64 if inputs.wide else torch.float32
    masked = (torch.arange(elems, device=device) % 2).to(real)
    found: list[torch.Tensor] = []

    def launch() -> None:
        found[:] = [row_norms(base, source, codes, model, inputs.wide, masked, ROW)]

    def wrong() -> int:
        cpu = _on_cpu(inputs)
        rows = cpu.base.size // ROW
        before = np.abs(_delta(cpu)[: rows * ROW]).astype(np.float64).reshape(rows, ROW).sum(1)
        want = np.stack([before, np.full(rows, ROW / 2), np.full(rows, ROW / 2)], 1)
        return int(np.count_nonzero(~np.isclose(found[0][:rows].cpu().numpy(), want, rtol=1e-12)))

    read = elems * (ITEM_BYTES[inputs.base_code] + ITEM_BYTES[inputs.codes[0]])
    return Prepared(launch, read + elems * masked.itemsize, wrong)


def _norms(form: str, dtypes: str, count: int, device: str, elems: int) -> Prepared:
    inputs, _ = _inputs(dtypes, count, device, elems)
    masks, blocks = _masks(form, count), -(-elems // methods.GRANULE)
    sums = np.zeros((blocks, count, 3))

    def wrong() -> int:
        cpu = _on_cpu(inputs)
        want = np.zeros((-(-cpu.base.size // methods.GRANULE), count, 3))
        sparse.norms(cpu, masks, methods.GRANULE, want)
        whole = cpu.base.size // methods.GRANULE  # the CPU's last block may be cut short
        return int(np.count_nonzero(~np.isclose(sums[:whole], want[:whole], rtol=1e-12)))

    return Prepared(
        lambda: gpu_sparse.norms(inputs, masks, methods.GRANULE, sums),
        count * elems * (ITEM_BYTES[inputs.base_code] + ITEM_BYTES[inputs.codes[0]]),
        wrong,
    )


def _moments(dtypes: str, count: int, device: str, elems: int) -> Prepared:
    code, source, _ = DTYPES[dtypes]
    base, sources = operands(device, elems, code, source, count)
    deltas = [source != code] * count
    found: list[Any] = []

    def launch() -> None:
        found[:] = moments(base, code, sources, [source] * count, deltas, True)

    def wrong() -> int:
        stop = min(elems, methods.GRANULE)
        theta = (
            0.0 if deltas[0] else reference.upcast(as_stored(base[:stop], code), code, np.float32)
        )
        values = np.array(
            [reference.upcast(as_stored(s[:stop], source), source, np.float32) - theta
             for s in sources], np.float64,
        )  # fmt: skip
        got = found[0][0].cpu().numpy()
        return int(np.count_nonzero(~np.isclose(got, values @ values.T, rtol=1e-10, atol=1e-12)))

    return Prepared(launch, moved(elems, code, source, BF16, count) - 2 * elems, wrong)


def _lowrank(factor: int, rank: int, count: int, device: str, elems: int) -> Prepared:
    rows = columns = 64 * max(1, int(elems**0.5) // 64)
    normal = partial(
        torch.randn, generator=torch.Generator(device).manual_seed(rank), device=device
    )
    base = stored(normal(rows, columns) * SPREAD, BF16)
    adapters = [
        Factors(
            stored(normal(rows, rank) * 0.01, factor), stored(normal(rank, columns) * 0.01, factor),
            factor, 2.0,
        )
        for _ in range(count)
    ]  # fmt: skip
    out, w = torch.empty_like(base), weights(count)

    def wrong() -> int:
        """Elements off by more than a rounding of bf16 and what fp32 sums may lose."""
        some, total = slice(0, 64), 0.0
        for adapter, weight in zip(adapters, w, strict=True):
            left = adapter.left[some].double().cpu()
            total = total + weight * adapter.scale * (left @ adapter.right.double().cpu())
        want = base[some].double().cpu() + total
        off = (out[some].double().cpu() - want).abs()
        return int((off > want.abs() * 2.0**-8 + 1e-6).sum())

    return Prepared(lambda: low_rank(base, BF16, adapters, w, out, BF16), 4 * base.numel(), wrong)


def _unpack(code: int, device: str, elems: int) -> Prepared:
    """A tensor in the exact form, most of whose elements moved a little."""
    elems = min(elems, 1 << 22)  # packed here by the specification, which is slow
    rng = np.random.default_rng(code)
    values = rng.standard_normal(elems) * SPREAD
    base = reference.round_to(values, code)
    trained = reference.round_to(values + rng.standard_normal(elems) * STEP / 50, code)
    origin = reference_packed.reference_bits(base, reference_packed.SAME, code)
    z = reference_packed.distance(origin, trained.view(origin.dtype))
    blocks = [
        reference_packed.pack_block(z[k : k + reference_packed.BLOCK])
        for k in range(0, elems, reference_packed.BLOCK)
    ]
    ends = np.cumsum([0, *map(len, blocks)])
    begins = ends[: len(blocks) : reference_packed.CHUNK_BLOCKS]
    index = torch.from_numpy(np.append(begins, ends[-1]))
    data = torch.from_numpy(np.frombuffer(b"".join(blocks), np.uint8).copy())
    on_gpu = [tensor.to(device) for tensor in (data, index)]
    old = torch.from_numpy(origin.view(f"i{origin.itemsize}")).to(device)
    out = torch.empty_like(old)
    return Prepared(
        lambda: unpack_exact(*on_gpu, old, reference_packed.SAME, out, code),
        data.numel() + 2 * elems * origin.itemsize,
        lambda: differing(as_stored(out, code), trained),
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for dtypes in DTYPES:
        for count in COUNTS if dtypes in PLAIN else (1, 4, 16):
            own = partial(_linear, dtypes, count)
            yield Case("linear", dtypes, count, own, _tail(dtypes, count))
    for dtypes in ("bf16", "fp16", "fp32", "fp8 e4m3"):
        for count in (1, 4, 16):
            yield Case("batch", dtypes, count, partial(_batch, dtypes, count), _tail(dtypes, count))
    for form in _FORMS:
        reads = 3 if form == "sce" else 1
        for dtypes in ("bf16", "bf16 + fp32 vectors"):
            for count in (1, 4, 8):
                own = partial(_sparse, form, dtypes, count)
                yield Case(form, dtypes, count, own, _tail(dtypes, count, reads))
    for dtypes in ("bf16", "fp32"):
        yield Case("della", dtypes, 1, partial(_by_rank, dtypes))
        yield Case("row norms", dtypes, 1, partial(_row_norms, dtypes))
        for stage in range(3):
            yield Case(f"count {stage}", dtypes, 1, partial(_count, stage, dtypes))
        yield Case("norms", dtypes, 1, partial(_norms, "dare", dtypes, 1))
        for count in (1, 4, 8):
            yield Case("moments", dtypes, count, partial(_moments, dtypes, count))
    for code, name in ((BF16, "bf16"), (F32, "fp32")):
        yield Case("unpack exact", name, 1, partial(_unpack, code))
    for factor, name in ((BF16, "bf16"), (F32, "fp32")):
        for rank in (8, 64, 256):
            for count in (1, 4):
                made = partial(_lowrank, factor, rank, count)
                yield Case(f"low rank {rank}", f"{name} factors", count, made)


def _tail(dtypes: str, count: int, reads: int = 1) -> tuple[int, ...]:
    """Element sizes of base, sources, each read so many times, and output."""
    code, source, out = DTYPES[dtypes]
    return (ITEM_BYTES[code], *[ITEM_BYTES[source]] * (count * reads), ITEM_BYTES[out])
