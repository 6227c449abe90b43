"""NVIDIA's and AMD's GPUs for `device`: torch for memory, streams and copies, Triton for the merge.

kvikio, where it is installed, reads files straight into GPU memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine import ops
from optimer_engine.device import Devices
from optimer_engine.errors import RecipeError
from optimer_engine.types import DType


class Cuda:
    """A GPU through torch and Triton; see `device.Backend` for what its methods do."""

    def __init__(self, number: int) -> None:
        import torch

        self.torch, self.device = torch, torch.device("cuda", number)
        self.kernel = ops.linear_kernel("triton")
        self.open_direct = _cufile()
        self.direct: dict[Path, Any] = {}

    def stream(self) -> Any:  # noqa: D102
        return self.torch.cuda.Stream(self.device)

    def pinned(self, size: int) -> np.ndarray:  # noqa: D102
        with self.torch.cuda.device(self.device):
            return self.torch.empty(size, dtype=self.torch.uint8, pin_memory=True).numpy()

    def empty(self, size: int) -> Any:  # noqa: D102
        return self.torch.empty(size, dtype=self.torch.uint8, device=self.device)

    def upload(self, stream: Any, source: np.ndarray, target: Any) -> None:  # noqa: D102
        with self.torch.cuda.stream(stream):
            target.copy_(self.torch.from_numpy(source), non_blocking=True)

    def download(self, stream: Any, source: Any, target: np.ndarray) -> None:  # noqa: D102
        with self.torch.cuda.stream(stream):
            self.torch.from_numpy(target).copy_(source, non_blocking=True)

    def merge(  # noqa: D102
        self, stream: Any, base: Any, base_dtype: DType, sources: Sequence[Any],
        dtypes: Sequence[DType], is_delta: Sequence[bool], weights: Sequence[float], out: Any,
        out_dtype: DType, add_base: bool,
    ) -> Any:  # fmt: skip
        def typed(tile: Any, dtype: DType) -> Any:
            return tile.view(getattr(self.torch, dtype.torch_name))

        with self.torch.cuda.stream(stream):
            return self.kernel(
                typed(base, base_dtype), base_dtype,
                [typed(tile, dtype) for tile, dtype in zip(sources, dtypes, strict=True)], dtypes,
                is_delta, weights, typed(out, out_dtype), out_dtype, add_base,
            )  # fmt: skip

    def wait(self, stream: Any) -> None:  # noqa: D102
        stream.synchronize()

    def read_direct(self, path: Path, offset: int, target: Any) -> bool:  # noqa: D102
        if self.open_direct is None:
            return False
        with self.torch.cuda.device(self.device):
            if path not in self.direct:
                self.direct[path] = self.open_direct(str(path), "r")
            return int(self.direct[path].read(target, file_offset=offset)) == target.numel()


def _cufile() -> Callable[..., Any] | None:
    """kvikio's file, where it is installed."""
    try:
        import kvikio
    except ImportError:
        return None
    return kvikio.CuFile  # type: ignore[no-any-return]


def cuda(text: str = "cuda", resident_bytes: int = 0) -> Devices:
    """The GPUs that `--device` names: "cuda" for all, "cuda:1" for one, "cuda:0,2" for some.

    Raises:
        MissingExtraError: without triton. RecipeError: without such a GPU.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, numbers = text.partition(":")
    wanted = numbers.split(",") if numbers else [str(k) for k in range(count)]
    usable = kind == "cuda" and all(k.isdecimal() and int(k) < count for k in wanted) and wanted
    if not usable:
        raise RecipeError(
            f"{text!r} asks for a GPU; torch finds {count} here",
            where="--device",
            todo="use cpu, or cuda, or cuda:0,1 with the numbers of GPUs that are there",
        )
    return Devices([Cuda(int(k)) for k in dict.fromkeys(wanted)], resident_bytes)
