"""How the demo uses the CPU it finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


def precision() -> Literal["bf16", "fp32"]:
    """bf16 where the CPU computes in it (about twice as fast), else fp32."""
    import torch

    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core.

    At this size a second thread gains next to nothing on a free machine and multiplies the time on
    a shared one; and sums over one thread do not depend on how many cores there are.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
