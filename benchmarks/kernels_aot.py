"""Machine code of the GPU kernels, without a GPU: `python -m benchmarks.kernels_aot`.

A merge kernel does a handful of operations per byte, so it runs at the speed of the GPU's memory if
its machine code lets it: every bulk access 128 bits wide, all loads of a block in flight together,
nothing spilled, few enough registers that many programs share a multiprocessor. All of that can be
read from the code that the compiler makes for a GPU it has never seen. What cannot be read, GB/s,
is left to a GPU.

Triton compiles for any target; NVIDIA's code is disassembled by the tools that Triton ships, AMD's
comes as text. Printed per kernel, dtypes, number of sources and target:

* registers a thread needs; spills, the instructions that move registers to or from memory;
* widths in bits of the accesses to tensors in the whole-block path. The other path, which does the
  ragged end of a tensor one element per thread, has one access per operand, left out here;
* instructions of both paths together, and among them the fused multiply-adds, which would break the
  numerics contract, and the divisions, which would be slow.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import msgspec
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from optimer_engine.kernels import triton_linear as kernels
from optimer_engine.kernels.reference import STORAGE

RESULTS = Path(__file__).parent / "results" / "aot"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CODE = {"bf16": 0, "fp16": 1, "fp32": 2, "fp64": 3}
DTYPES = {
    "bf16": ("bf16", "bf16", "bf16"),
    "fp16": ("fp16", "fp16", "fp16"),
    "fp32": ("fp32", "fp32", "fp32"),
    "fp64": ("fp64", "fp64", "fp64"),
    "bf16 + fp32 vectors": ("bf16", "fp32", "bf16"),
    "bf16 to fp32": ("bf16", "bf16", "fp32"),
}
"""Dtypes of base, sources and output."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of sources; the kernel for one of them serves all down to the next smaller."""


class Code(msgspec.Struct, forbid_unknown_fields=True):
    """What one kernel became.

    Attributes:
        registers: per thread, of 32 bits.
        spills: instructions that spill a register to memory or fetch it back.
        scalar_spills: registers shared by a warp that are kept in lanes of vector registers instead
            (AMD alone; they never reach memory).
        loads, stores: how many accesses of which width in bits the whole-block path makes.
        bytes_per_thread: what a thread loads and stores in that path.
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
    bytes_per_thread: int
    shared_bytes: int
    instructions: int
    fused_multiply_adds: int
    divisions: int

    @property
    def bulk(self) -> bool:
        """Whether every access of the whole-block path is 128 bits wide."""
        return set(self.loads) == set(self.stores) == {128}


def measure(kernel: str, dtypes: str, sources: int, target: str) -> Code:
    """Compile one kernel ("linear" or "batch") for one target and read its machine code."""
    base, source, out = (CODE[name] for name in DTYPES[dtypes])
    gpu = TARGETS[target]
    operands = kernels.with_nulls(base, [source] * sources)
    constants = kernels.constexprs(base, operands, out, True, gpu.warp_size)
    make = _linear_source if kernel == "linear" else _batch_source
    compiled = triton.compile(
        make(base, operands, out, constants), target=gpu, options=dict(kernels.OPTIONS)
    )
    found = _read_nvidia(compiled) if gpu.backend == "cuda" else _read_amd(compiled)
    held = constants["HELD"]
    sizes = [STORAGE[code].itemsize for code in (base, *operands, out)]
    loads = found.pop("loads") - Counter(8 * size for size in sizes[:-1])
    stores = found.pop("stores") - Counter([8 * sizes[-1]])
    return Code(
        kernel=kernel,
        dtypes=dtypes,
        sources=sources,
        target=target,
        loads=dict(loads),
        stores=dict(stores),
        bytes_per_thread=held * sum(sizes),
        shared_bytes=compiled.metadata.shared,
        **found,
    )


def _pointer(code: int) -> str:
    return "*" + next(name for name, number in CODE.items() if number == code)


def _weights(count: int, wide: bool) -> tuple:
    return ((("i64", "i64") if wide else "fp32"),) * count


def _linear_source(base: int, sources: list[int], out: int, constants: dict) -> ASTSource:
    aligned = [["tt.divisibility", 16]]
    return _source(
        kernels.linear_kernel,
        {
            "base": _pointer(base),
            "sources": tuple(_pointer(code) for code in sources),
            "weights": _weights(len(sources), constants["WIDE"]),
            "thetas": "u64",
            "count": "i32",
            "out": _pointer(out),
            "flag": "*i32",
            "elems": "i64",
        },
        constants,
        {(0,): aligned, (5,): aligned, **{(1, i): aligned for i in range(len(sources))}},
    )


def _batch_source(base: int, sources: list[int], out: int, constants: dict) -> ASTSource:
    dtypes = kernels.TRITON_DTYPES
    return _source(
        kernels.batch_kernel,
        {
            "table": "*i64",
            "owners": "*i32",
            "blocks": "i32",
            "weights": _weights(len(sources), constants["WIDE"]),
            "thetas": "u64",
            "count": "i32",
            "flag": "*i32",
        },
        constants
        | {
            "BASE": dtypes[base],
            "SOURCES": tuple(dtypes[code] for code in sources),
            "OUT": dtypes[out],
            "ALIGNED": True,
        },
        {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )


def _source(kernel: Any, signature: dict, constants: dict, attributes: dict) -> ASTSource:
    """What Triton's launcher would make of such arguments."""
    given: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if name not in signature:
            value = constants[name]
            if isinstance(value, tuple):
                signature[name] = ("constexpr",) * len(value)
                given |= {(place, i): item for i, item in enumerate(value)}
            else:
                signature[name] = "constexpr"
                given[(place,)] = value
    ordered = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=ordered, constexprs=given, attrs=attributes)


def _read_nvidia(compiled: CompiledKernel) -> dict[str, Any]:
    """Tensor accesses are those marked evict-first; the batch's table is read without the mark."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    names = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )
    count = _counter(names)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spills": count(r"(LDL|STL)\b.*"),
        "scalar_spills": 0,
        "loads": _widths(names, r"LDG\.E\.EF(?:\.U?(\d+))?", 32),
        "stores": _widths(names, r"STG\.E\.EF(?:\.U?(\d+))?", 32),
        "instructions": len(names) - count("NOP"),
        "fused_multiply_adds": count(r"[FD]FMA\b.*"),
        "divisions": count(r"MUFU\.RCP.*") + len(re.findall(r"CALL.*_(?:div|rem)_", listing)),
    }


def _read_amd(compiled: CompiledKernel) -> dict[str, Any]:
    """Tensor accesses go through buffer descriptors; the batch's table is read without.

    A `v_fma_mix_f32` that multiplies by 1.0 widens one operand of an addition, and is no fusion.
    """
    text = compiled.asm["amdgcn"]
    body = text.partition(".amdhsa_kernel")[0]
    lines = re.findall(r"^\t([a-z]\w+)(.*)", body, re.MULTILINE)
    names = [name for name, _ in lines]
    count = _counter(names)
    widening = sum(name == "v_fma_mix_f32" and "1.0" in rest for name, rest in lines)
    bits = {"ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx4": 128}
    named = [re.sub(r"_([a-z]+(?:x\d)?)$", lambda m: f"_{bits.get(m[1], 0)}", n) for n in names]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),  # type: ignore[index]
        "spills": count(r"scratch_.*"),
        "scalar_spills": int(re.search(r"\.sgpr_spill_count:\s+(\d+)", text)[1]),  # type: ignore[index]
        "loads": _widths(named, r"buffer_load_(\d+)", 0),
        "stores": _widths(named, r"buffer_store_(\d+)", 0),
        "instructions": len(names),
        "fused_multiply_adds": count(r"v_(pk_)?fma.*") - widening,
        "divisions": count(r"v_(rcp|div).*"),
    }


def _output(tool: str, *arguments: str) -> str:
    command = [str(NVIDIA_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _counter(names: list[str]) -> Any:
    return lambda pattern: sum(re.fullmatch(pattern, name) is not None for name in names)


def _widths(names: list[str], pattern: str, default: int) -> Counter[int]:
    found = (re.fullmatch(pattern, name) for name in names)
    return Counter(int(match[1] or default) for match in found if match)


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
    if not code.bulk:
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
@click.option("--kernel", type=click.Choice(["linear", "batch"]), multiple=True, help="Only these.")
@click.option("--dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Only these.")
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
        (kernel_name, dtypes_name, count, target_name)
        for kernel_name in kernel or ("linear", "batch")
        for dtypes_name in dtypes or DTYPES
        for count in sources or COUNTS
        for target_name in target or TARGETS
    ]
    codes = [measure(*one) for one in tqdm(chosen, unit="kernel", file=sys.stderr)]
    report = {"triton": triton.__version__, "codes": codes}
    text = table(codes)
    click.echo(text)
    if not (kernel or dtypes or sources or target):
        RESULTS.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
        (RESULTS / "kernels_aot.json").write_bytes(encoded + b"\n")
        (RESULTS / "kernels_aot.md").write_text(
            "# Machine code of the GPU kernels\n\n"
            f"Triton {triton.__version__}, from `python -m benchmarks.kernels_aot`. Registers per"
            " thread · instructions. Where nothing else is said every bulk access is 128 bits wide"
            " and there are no spills, no fused multiply-adds, no divisions and no shared memory."
            f"\n\n{text}\n",
            "utf-8",
        )
    click.echo(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.kernels_aot")
