"""Machine code of the GPU kernels, without a GPU: `python -m benchmarks.kernels_aot`.

A merge kernel does a handful of operations per byte, so it runs at the speed of the GPU's memory if
its machine code lets it: every bulk access 128 bits wide, all loads of a block in flight together,
nothing spilled, few enough registers that many programs share a multiprocessor. All of that can be
read from the code that the compiler makes for a GPU it has never seen. What cannot be read, GB/s,
is left to a GPU.

Printed per kernel, dtypes, number of sources and target:

* registers a thread needs; spills, the instructions that move registers to or from memory;
* widths in bits of the accesses to tensors. Where the ragged end of a tensor is done one element
  per thread (all merges but low rank), that path's access per operand is left out; `count`,
  `norms`, `row norms`, `moments` and `della` do it as a masked block, whose narrow accesses are
  listed. INT4's
  loads are not seen on NVIDIA, as each byte is wanted by two threads and stays in the cache;
* instructions of all paths together, and among them the fused multiply-adds, which would break the
  numerics contract, and the divisions, which would be slow. A correctly rounded division is made of
  both, so the kernels that average terms (ties, sce) or divide by a probability (della) have
  them.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click
import msgspec
import triton
from tqdm import tqdm

from benchmarks.gpu_cases import Case, cases
from benchmarks.machine_code import TARGETS, compiled, read

RESULTS = Path(__file__).parent / "results" / "aot"
ELEMS = 5000
"""Of the operands that are launched with; what is compiled does not depend on it."""

DIVIDES = ("ties", "sce", "della")
"""Kernels with correctly rounded divisions."""


class Code(msgspec.Struct, forbid_unknown_fields=True):
    """What one kernel became.

    Attributes:
        registers: per thread, of 32 bits.
        spills: instructions that spill a register to memory or fetch it back.
        scalar_spills: registers shared by a warp that are kept in lanes of vector registers instead
            (AMD alone; they never reach memory).
        loads, stores: how many accesses to tensors of which width in bits.
        matrix_instructions: of the tensor cores.
        shared_bytes: shared memory of a program.
    """

    kernel: str
    dtypes: str
    sources: int
    target: str
    registers: int
    spills: int
    scalar_spills: int
    loads: dict[int, int]
    stores: dict[int, int]
    shared_bytes: int
    instructions: int
    fused_multiply_adds: int
    matrix_instructions: int
    divisions: int

    @property
    def bulk(self) -> bool:
        """Whether every access to a tensor is 128 bits wide."""
        return set(self.loads) == {128} and set(self.stores) <= {128}


def measure(case: Case, target: str) -> list[Code]:
    """Compile what a case launches on one target, and read its machine code."""
    codes = []
    for kernel in compiled(target, lambda: case.make("cpu", ELEMS).launch()):
        found = read(kernel)
        *loaded, written = (8 * size for size in case.tail_bytes or (0, 0))
        found["loads"] = dict(found["loads"] - Counter(loaded))
        found["stores"] = dict(found["stores"] - Counter([written]))
        codes.append(Code(case.kernel, case.dtypes, case.sources, target, **found))
    return codes


def table(codes: list[Code]) -> str:
    """The report as Markdown: one row per kernel, dtypes and count, one column per target."""
    targets = list(dict.fromkeys(code.target for code in codes))
    lines = [
        "| kernel | dtypes | sources | " + " | ".join(targets) + " |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    cells = {(c.kernel, c.dtypes, c.sources, c.target): _cell(c) for c in codes}
    for kernel, dtypes, sources in dict.fromkeys((c.kernel, c.dtypes, c.sources) for c in codes):
        row = [cells.get((kernel, dtypes, sources, target), "") for target in targets]
        lines.append(f"| {kernel} | {dtypes} | {sources} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(code: Code) -> str:
    parts = [f"{code.registers} · {code.instructions}"]
    if not code.bulk and code.loads:
        widths = {**code.loads, **code.stores}
        parts.append("/".join(str(width) for width in sorted(widths)) + " bit")
    for count, what in (
        (code.shared_bytes, "B shared"),
        (code.scalar_spills, "scalar spills"),
        (code.spills, "**spills**"),
        (code.fused_multiply_adds, "**fused**"),
        (code.divisions, "**divisions**"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return ", ".join(parts)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--kernel", multiple=True, help="Only those whose name begins so.")
@click.option("--dtypes", multiple=True, help="Only these.")
@click.option("--sources", type=click.IntRange(1, 64), multiple=True, help="Only these numbers.")
@click.option("--target", type=click.Choice(list(TARGETS)), multiple=True, help="Only these.")
def main(
    kernel: tuple[str, ...],
    dtypes: tuple[str, ...],
    sources: tuple[int, ...],
    target: tuple[str, ...],
) -> None:
    """Compile the GPU kernels for GPUs that need not be there; print a table, then one JSON line.

    Without options every variant is compiled, which takes minutes, and results/aot is rewritten.
    """
    chosen = [
        (case, name)
        for case in cases()
        for name in target or TARGETS
        if (not kernel or case.kernel.startswith(kernel))
        and (not dtypes or case.dtypes in dtypes)
        and (not sources or case.sources in sources)
    ]
    codes = [code for one in tqdm(chosen, unit="kernel", file=sys.stderr) for code in measure(*one)]
    report = {"triton": triton.__version__, "codes": codes}
    text = table(codes)
    click.echo(text)
    if not (kernel or dtypes or sources or target):
        write(report, text)
    click.echo(msgspec.json.encode(report).decode())


def write(report: dict, text: str) -> None:
    """The committed report."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    (RESULTS / "kernels_aot.json").write_bytes(encoded + b"\n")
    (RESULTS / "kernels_aot.md").write_text(
        "# Machine code of the GPU kernels\n\n"
        f"Triton {triton.__version__}, from `python -m benchmarks.kernels_aot`. Registers per"
        " thread · instructions. Where nothing else is said every bulk access is 128 bits wide"
        " and there are no spills, no fused multiply-adds, no divisions and no shared memory."
        " Fused operations and divisions of `ties`, `sce` and `della` are those of correctly"
        f" rounded quotients, of fp32 factors those of the product.\n\n{text}\n",
        "utf-8",
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.kernels_aot")
