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

from optimer_engine.kernels import gpu, gpu_sparse, reference, reference_packed, sparse
from optimer_engine.kernels import reference_methods as methods
from optimer_engine.kernels.reference import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from optimer_engine.kernels.triton_elements import INT4, INT8, ITEM_BYTES
from optimer_engine.kernels.triton_lowrank import Factors, low_rank
from optimer_engine.kernels.triton_moments import moments

DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "fp32": (F32, F32, F32),
    "fp64": (F64, F64, F64),
    "bf16 + fp32 vectors": (BF16, F32, BF16),
    "bf16 to fp32": (BF16, BF16, F32),
    "bf16 + fp8 e4m3": (BF16, F8_E4M3, BF16),
    "fp8 e4m3": (F8_E4M3, F8_E4M3, F8_E4M3),
    "fp8 e5m2": (F8_E5M2, F8_E5M2, F8_E5M2),
    "bf16 + int8 vectors": (BF16, INT8, BF16),
    "bf16 + int4 vectors": (BF16, INT4, BF16),
}
"""Codes of base, sources and output."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of sources; the kernel for one of them serves all down to the next smaller."""

SPREAD, STEP = 0.02, 0.001
CHECKED_ELEMS = 1 << 18


@dataclass
class Prepared:
    """A case on a device.

    Attributes:
        launch: runs the kernel once, on the current stream.
        moved_bytes: what it must read and write.
        wrong: how many of the elements that were looked at differ from the specification, after a
            launch; a NaN is not checked.
        operands: base, sources and weights of a merge, for rivals.
    """

    launch: Callable[[], Any]
    moved_bytes: int
    wrong: Callable[[], int]
    operands: tuple[torch.Tensor, list[torch.Tensor], list[float]] | None = None


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


def weights(count: int) -> list[float]:
    """Of the sources of a case."""
    return [0.3 + 0.4 * (i % 3) for i in range(count)]


def stored(values: torch.Tensor, code: int) -> torch.Tensor:
    """fp32 values in a dtype; for INT8 and INT4 as a pair of numbers and scales."""
    if code in (INT8, INT4):
        bits = 8 if code == INT8 else 4
        numbers, scales = reference_packed.quantise(values.cpu().numpy(), bits)
        pair = torch.from_numpy(numbers), torch.from_numpy(scales.view(np.int16))
        return tuple(part.to(values.device) for part in pair)  # type: ignore[return-value]
    return values.to(gpu.TORCH_DTYPES[code])


def operands(device: str, elems: int, code: int, source: int, count: int) -> tuple[Any, list[Any]]:
    """A base and sources near it, or small vectors where sources are packed or wider."""
    generator = torch.Generator(device).manual_seed(count)
    normal = partial(torch.randn, elems, generator=generator, device=device)
    base = normal() * SPREAD
    deltas = source in (INT8, INT4) or source != code
    theta = 0.0 if deltas else base
    return stored(base, code), [stored(theta + normal() * STEP, source) for _ in range(count)]


def as_stored(tensor: torch.Tensor, code: int) -> np.ndarray:
    """A tensor in main memory in the storage of its code."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.detach().cpu().view(width).numpy().view(reference.STORAGE[code])


def _source(tensor: Any, code: int, elems: int) -> tuple[np.ndarray, int]:
    """The first elements of a source as the CPU's specification takes them."""
    if code in (INT8, INT4):
        groups = -(-elems // reference_packed.GROUP)
        bits = 8 if code == INT8 else 4
        numbers = tensor[0][: groups * reference_packed.GROUP * bits // 8].cpu().numpy()
        scales = tensor[1][:groups].cpu().numpy().view(np.uint16)
        return reference_packed.dequantise(numbers, scales, bits)[:elems], F32
    return as_stored(tensor[:elems], code), code


def differing(got: np.ndarray, want: np.ndarray) -> int:
    """Elements whose bits differ."""
    width = f"u{got.itemsize}"
    return int(np.count_nonzero(got.view(width) != want.view(width)))


def _expected(base: Any, code: int, sources: list[Any], source: int, out: int) -> np.ndarray:
    elems = min(base.numel(), CHECKED_ELEMS)
    read = [_source(tensor, source, elems) for tensor in sources]
    deltas = [source != code] * len(sources)
    return reference.linear(
        as_stored(base[:elems], code), code, [array for array, _ in read], [c for _, c in read],
        deltas, weights(len(sources)), out,
    )  # fmt: skip


def _bytes(elems: int, code: int, source: int, out: int, count: int) -> int:
    packed = {INT8: 1 + 2 / reference_packed.GROUP, INT4: 0.5 + 2 / reference_packed.GROUP}
    each = packed.get(source, ITEM_BYTES[source])
    return int(elems * (ITEM_BYTES[code] + count * each + ITEM_BYTES[out]))


def _linear(dtypes: str, count: int, device: str, elems: int) -> Prepared:
    code, source, out_code = DTYPES[dtypes]
    base, sources = operands(device, elems, code, source, count)
    out = torch.empty(elems, dtype=gpu.TORCH_DTYPES[out_code], device=device)
    deltas, w = [source != code] * count, weights(count)
    return Prepared(
        lambda: gpu.linear(base, code, sources, [source] * count, deltas, w, out, out_code),
        _bytes(elems, code, source, out_code, count),
        lambda: differing(
            as_stored(out[:CHECKED_ELEMS], out_code),
            _expected(base, code, sources, source, out_code),
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
        _bytes(elems, code, source, out_code, count),
        lambda: differing(
            as_stored(out[:CHECKED_ELEMS], out_code),
            _expected(base, code, sources, source, out_code),
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
        _bytes(elems, *DTYPES[dtypes][:2], out_code, count),
        wrong,
    )


def _count(stage: int, dtypes: str, device: str, elems: int) -> Prepared:
    inputs, _ = _inputs(dtypes, 1, device, elems)
    masks, width = _masks("ties", 1), (methods.HIGH, methods.LOW, 0)[stage]
    wanted = np.array([[0, (0, _KEY >> 16, _KEY)[stage]]])
    granules = -(-elems // methods.GRANULE)

    def wrong() -> int:
        cpu, n = _on_cpu(inputs), min(elems, CHECKED_ELEMS)
        part = sparse.Inputs(
            inputs.base[:n], inputs.base_code, [s[:n] for s in inputs.sources], inputs.codes,
            inputs.is_delta, 0, inputs.wide,
        )  # fmt: skip
        results = []
        for kernel, given in ((sparse.count, cpu), (gpu_sparse.count, part)):
            bins, equal = np.zeros((1, width), np.int64), np.zeros((1, granules), np.int64)
            kernel(given, masks, stage, wanted, bins, equal)  # type: ignore[operator]
            results.append(np.concatenate([bins, equal], 1))
        return differing(*results)

    return Prepared(
        lambda: gpu_sparse._count(inputs, masks, 0, stage, int(wanted[0, 1]), granules),
        _bytes(elems, *DTYPES[dtypes][:2], BF16, 1) - 2 * elems,
        wrong,
    )


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

    return Prepared(launch, _bytes(elems, code, source, BF16, count) - 2 * elems, wrong)


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


def cases() -> Iterator[Case]:
    """All of them."""
    for dtypes in DTYPES:
        for count in COUNTS:
            yield Case(
                "linear", dtypes, count, partial(_linear, dtypes, count), _tail(dtypes, count)
            )
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
        for stage in range(3):
            yield Case(f"count {stage}", dtypes, 1, partial(_count, stage, dtypes))
        yield Case("norms", dtypes, 1, partial(_norms, "dare", dtypes, 1))
        for count in (1, 4, 8):
            yield Case("moments", dtypes, count, partial(_moments, dtypes, count))
    for factor, name in ((BF16, "bf16"), (F32, "fp32")):
        for rank in (8, 64, 256):
            for count in (1, 4):
                made = partial(_lowrank, factor, rank, count)
                yield Case(f"low rank {rank}", f"{name} factors", count, made)


def _tail(dtypes: str, count: int, reads: int = 1) -> tuple[int, ...]:
    """Element sizes of base, sources, each read so many times, and output."""
    code, source, out = DTYPES[dtypes]
    return (ITEM_BYTES[code], *[ITEM_BYTES[source]] * (count * reads), ITEM_BYTES[out])
