"""Speed of the GPU kernels: `optimer bench kernels`.

On a GPU: every kernel's output is compared with the specification first, and where one is wrong no
speed is printed. Then each is timed by the GPU's own clock and set beside what a plain copy within
the same memory reaches, and, for the linear merge, beside rivals that merge the same tensors. The
pipeline that brings tiles to the GPU and back is set beside copies over the bus.

Without a GPU the ahead-of-time report is printed: what can be known of the speed then.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from benchmarks.gpu_cases import Case
    from benchmarks.gpu_operands import Prepared

GATE_ELEMS = 200_003
"""Of the operands that are checked: whole blocks and a ragged end."""


WARM_UP_S = 0.05
"""Of launches before those that count: an idle GPU takes some milliseconds to its full clocks."""


HEAD_START_CYCLES = 20_000_000


class Speed(msgspec.Struct):
    """One kernel, or rival, at one size.

    Attributes:
        of_ceiling: share of the copy's speed; the median of `rounds`, which are in seconds.
    """

    kernel: str
    dtypes: str
    sources: int
    moved_bytes: int
    rounds: list[float]
    gb_per_s: float
    of_ceiling: float


class Target(msgspec.Struct):
    """What is promised of one kernel, and whether it was reached.

    Attributes:
        least: share of the ceiling; reached: the smallest that was measured.
    """

    what: str
    least: float
    reached: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.reached >= self.least

    def text(self) -> str:
        """One line."""
        verdict = "met" if self.met else "MISSED"
        return (
            f"{self.what}: {self.reached:.0%} of the ceiling, {self.least:.0%} promised: {verdict}"
        )


LARGE_BYTES = 64 << 20
"""Of a base, from which on the promise for one tensor holds."""


def targets(found: list[Speed], bus: float) -> list[Target]:
    """What was promised of what was measured; `bus`: the pipeline's share of it."""
    promised = []
    for kernel, least, small in (("linear", 0.9, LARGE_BYTES), ("batch", 0.85, 0)):
        reached = [
            speed.of_ceiling
            for speed in found
            if (speed.kernel, speed.dtypes, speed.sources) == (kernel, "bf16", 4)
            and speed.moved_bytes >= 6 * small
        ]
        if reached:
            promised.append(Target(f"{kernel}, bf16, 4 sources", least, min(reached)))
    return [*promised, Target("pipeline host to GPU to host", 0.85, bus)]


class GateError(Exception):
    """A kernel's output is wrong: there is no speed to speak of."""


Timer = Callable[[Callable[[], Any], int], list[float]]


def by_events(launch: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` launches by the GPU's clock, once its clocks are up."""
    import torch

    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_UP_S:
        launch()
        torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)  # so that no launch waits for the program that makes it
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        begin.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def gate(chosen: Iterable[Case], device: str) -> int:
    """Launch every case once on small operands; returns how many were checked.

    Raises:
        GateError: at the first that differs from the specification.
    """
    count = 0
    for case in chosen:
        prepared = case.make(device, GATE_ELEMS)
        prepared.launch()
        if wrong := prepared.wrong():
            raise GateError(
                f"{case.kernel}, {case.dtypes}, {case.sources} sources: {wrong} wrong elements,"
                " no speed is printed"
            )
        count += 1
    return count


def copy_ceiling(device: str, size_bytes: int, timer: Timer, rounds: int) -> float:
    """GB/s, read and written, of a copy from one tensor to another."""
    import torch

    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(timer(lambda: target.copy_(source), rounds))
    return 2 * size_bytes / seconds / 1e9


def speeds(
    case: Case, device: str, elems: int, ceiling: float, timer: Timer, rounds: int, rivals: bool
) -> list[Speed]:
    """A case at one size, and its rivals where it has any and the GPU's memory holds them."""
    import torch

    from benchmarks.gpu_rivals import RIVALS

    prepared = case.make(device, elems)
    found = [_speed(case, case.kernel, prepared, timer(prepared.launch, rounds), ceiling)]
    if rivals and prepared.operands is not None and case.kernel == "linear":
        for name, make in RIVALS.items():
            try:
                seconds = timer(make(*prepared.operands), rounds)
            except torch.OutOfMemoryError:
                print(f"{name}, {case.sources} sources: out of memory", file=sys.stderr)
                continue
            found.append(_speed(case, name, prepared, seconds, ceiling))
    return found


def _speed(
    case: Case, name: str, prepared: Prepared, seconds: list[float], ceiling: float
) -> Speed:
    """Rivals are credited with the bytes that must move, whatever they move besides."""
    gb_per_s = prepared.moved_bytes / statistics.median(seconds) / 1e9
    return Speed(
        name, case.dtypes, case.sources, prepared.moved_bytes, seconds, gb_per_s,
        gb_per_s / ceiling,
    )  # fmt: skip


def table(found: list[Speed], ceiling: float) -> str:
    """Speeds as Markdown."""
    lines = [
        f"Copy within the GPU's memory: {ceiling:,.0f} GB/s, read and written.",
        "",
        "| kernel | dtypes | sources | moved | time (20–80 %) | GB/s | of the copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in found:
        low, middle, high = (1e3 * _quantile(s.rounds, q) for q in (0.2, 0.5, 0.8))
        lines.append(
            f"| {s.kernel} | {s.dtypes} | {s.sources} | {s.moved_bytes / 2**20:,.0f} MiB"
            f" | {middle:.3f} ms ({low:.3f}–{high:.3f}) | {s.gb_per_s:,.0f}"
            f" | {s.of_ceiling:.0%} |"
        )
    return "\n".join(lines)


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def run(
    kernels: tuple[str, ...], sizes_mib: tuple[int, ...], rounds: int, rivals: bool
) -> tuple[str, dict[str, Any]]:
    """(table, record) of the GPU at hand.

    Args:
        kernels: only those whose names begin so; all by default.
        sizes_mib: of the base.

    Raises:
        GateError: see `gate`; nothing has been timed then.
    """
    import torch
    from tqdm import tqdm

    from benchmarks.gpu_cases import cases
    from benchmarks.gpu_operands import DTYPES
    from benchmarks.gpu_pipeline import pipeline
    from optimer_engine.kernels.triton_elements import ITEM_BYTES

    chosen = [case for case in cases() if not kernels or case.kernel.startswith(kernels)]
    checked = gate(tqdm(chosen, desc="check", file=sys.stderr), "cuda")
    ceiling = copy_ceiling("cuda", max(sizes_mib) << 20, by_events, rounds)
    found: list[Speed] = []
    for case in tqdm(chosen, desc="time", file=sys.stderr):
        for size in sizes_mib:
            width = ITEM_BYTES[DTYPES[case.dtypes][0]] if case.dtypes in DTYPES else 2
            elems = (size << 20) // width
            found += speeds(case, "cuda", elems, ceiling, by_events, rounds, rivals)
            torch.cuda.empty_cache()
    bus = pipeline(rounds)
    verdicts = targets(found, bus.copies_s / bus.pipeline_s)
    lines = [table(found, ceiling), "", bus.text(), "", *(target.text() for target in verdicts)]
    record = {
        "device": torch.cuda.get_device_name(), "torch": str(torch.__version__), "checked": checked,
        "copy_gb_per_s": ceiling, "pipeline": msgspec.to_builtins(bus),
        "speeds": msgspec.to_builtins(found),
        "targets": [msgspec.to_builtins(target) | {"met": target.met} for target in verdicts],
    }  # fmt: skip
    return "\n".join(lines), record


def without_gpu() -> tuple[str, dict[str, Any]]:
    """(text, record) of what is known without a GPU: the committed ahead-of-time report."""
    from benchmarks.kernels_aot import RESULTS

    report = msgspec.json.decode((RESULTS / "kernels_aot.json").read_bytes())
    text = (RESULTS / "kernels_aot.md").read_text("utf-8").rstrip()
    note = (
        "No GPU here, so no speeds: this is the machine code that GPUs would run, from"
        " `python -m benchmarks.kernels_aot`."
    )
    return f"{note}\n\n{text}", {"device": None, "aot": report}
