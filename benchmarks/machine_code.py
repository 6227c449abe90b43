"""Compile what a launch would run, for a GPU that is not there, and read the machine code.

Triton compiles for any target. `compiled` puts a target in the place of Triton's driver and turns
launches into compilations, so that what is looked at is what a launch on such a GPU would compile,
from the same call. NVIDIA's code is disassembled by tools that Triton ships; AMD's comes as text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """Triton's driver, as far as compiling goes; each target is a device of its own."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        """Its number, under which Triton keeps what it compiled."""
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def compiled(target: str, launch: Callable[[], Any]) -> list[CompiledKernel]:
    """The kernels that `launch` would run on `target`, on tensors in main memory."""
    made: list[CompiledKernel] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(run(self, *arguments, grid=grid, warmup=True, **options))

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only),
        mock.patch.object(triton.runtime.driver, "_active", Driver(target)),
    ):
        launch()
    return made


def read(kernel: CompiledKernel) -> dict[str, Any]:
    """What the machine code of a kernel holds; keys as in `kernels_aot.Code`."""
    found = _read_amd(kernel) if "amdgcn" in kernel.asm else _read_nvidia(kernel)
    return found | {"shared_bytes": kernel.metadata.shared}


def _read_nvidia(compiled: CompiledKernel) -> dict[str, Any]:
    """Tensor accesses are those marked evict-first; tables and scales are read without the mark."""
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
        "loads": _widths(names, r"LDG\.E\.EF(?:\.[US]?(\d+))?", 32),
        "stores": _widths(names, r"STG\.E\.EF(?:\.[US]?(\d+))?", 32),
        "instructions": len(names) - count("NOP"),
        "fused_multiply_adds": count(r"[FD]FMA\b.*"),
        "matrix_instructions": count(r"([HIDQ]G?|UTC\w*)MMA\b.*"),
        "divisions": count(r"MUFU\.RCP.*") + len(re.findall(r"CALL.*_(?:div|rem)_", listing)),
    }


def _read_amd(compiled: CompiledKernel) -> dict[str, Any]:
    """Tensor accesses go through buffer descriptors; the batch's table is read without.

    A `v_fma_mix_f32` that multiplies by 1.0 or adds -0 widens an operand of the other operation; it
    is no fusion.
    """
    text = compiled.asm["amdgcn"]
    body = text.partition(".amdhsa_kernel")[0]
    lines = re.findall(r"^\t([a-z]\w+)(.*)", body, re.MULTILINE)
    names = [name for name, _ in lines]
    count = _counter(names)
    plain = ("1.0", "neg(0)")
    widening = sum(n == "v_fma_mix_f32" and any(p in rest for p in plain) for n, rest in lines)
    bits = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}
    bits |= {"dword": 32, "dwordx2": 64, "dwordx4": 128}
    named = [re.sub(r"_([a-z]+(?:x\d)?)$", lambda m: f"_{bits.get(m[1], 0)}", n) for n in names]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),  # type: ignore[index]
        "spills": count(r"scratch_.*"),
        "scalar_spills": int(re.search(r"\.sgpr_spill_count:\s+(\d+)", text)[1]),  # type: ignore[index]
        "loads": _widths(named, r"buffer_load_(\d+)", 0),
        "stores": _widths(named, r"buffer_store_(\d+)", 0),
        "instructions": len(names),
        "fused_multiply_adds": count(r"v_(pk_)?fma.*") - widening,
        "matrix_instructions": count(r"v_mfma.*"),
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
