"""NVIDIA's and AMD's GPUs for `device`: torch for memory, streams and copies, Triton for merges.

kvikio, where it is installed, reads files straight into GPU memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine import ops
from optimer_engine.device import Devices
from optimer_engine.errors import MemoryLimitError, MissingExtraError, RecipeError
from optimer_engine.gpu_tiles import Adapter, Given
from optimer_engine.types import DType, format_bytes

AUTO, CPU = "auto", "cpu"

KVIKIO = "kvikio"
"""As a way to read: files go to GPU memory directly, or the merge is refused."""


class Cuda:
    """A GPU through torch and Triton; see `device.Backend` for what its methods do.

    Args:
        number: as torch counts.
        direct: whether kvikio reads files; None if it is there.
    """

    def __init__(self, number: int, direct: bool | None = None) -> None:
        import torch

        self.kernels = ops.gpu_kernels()
        self.name, self.max_rank = f"cuda:{number}", self.kernels.max_rank
        self.torch, self.device = torch, torch.device("cuda", number)
        self.open_direct = None if direct is False else _cufile(required=bool(direct))
        self.direct: dict[Path, Any] = {}

    def stream(self) -> Any:  # noqa: D102
        return self.torch.cuda.Stream(self.device)

    def pinned(self, size: int) -> np.ndarray:  # noqa: D102
        try:
            with self.torch.cuda.device(self.device):
                return self.torch.empty(size, dtype=self.torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise MemoryLimitError(
                f"main memory has no {format_bytes(size)} to pin: {_line(error)}",
                where=self.name,
                todo="use a smaller mem_limit, or fewer threads",
            ) from error

    def empty(self, size: int) -> Any:  # noqa: D102
        return self._or_full(self.torch.empty, size, dtype=self.torch.uint8, device=self.device)

    def free_bytes(self) -> int:  # noqa: D102
        return int(self.torch.cuda.mem_get_info(self.device)[0])

    def typed(self, tile: Any, dtype: DType) -> Any:  # noqa: D102
        return tile.view(getattr(self.torch, dtype.torch_name))

    def upload(self, stream: Any, source: np.ndarray, target: Any) -> None:  # noqa: D102
        with self._current(stream):
            target.copy_(self.torch.from_numpy(source), non_blocking=True)

    def download(self, stream: Any, source: Any, target: np.ndarray) -> None:  # noqa: D102
        with self._current(stream):
            self.torch.from_numpy(target).copy_(source, non_blocking=True)

    def launch(  # noqa: D102
        self, stream: Any, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        with self._current(stream):
            return self._or_full(function, *arguments)

    def linear(  # noqa: D102
        self, base: Given, sources: Sequence[Given], weights: Sequence[float], out: Any,
        dtype: DType, add_base: bool,
    ) -> Any:  # fmt: skip
        return self.kernels.linear(
            base.data, ops.code(base.dtype), [source.data for source in sources],
            [ops.code(source.dtype, source.packed) for source in sources],
            [source.is_delta for source in sources], weights, out, ops.code(dtype), add_base,
        )  # fmt: skip

    def low_rank(  # noqa: D102
        self, base: Given | None, shape: tuple[int, int], adapters: Sequence[Adapter],
        weights: Sequence[float], out: Any, dtype: DType,
    ) -> Any:  # fmt: skip
        start = Given(out.zero_(), dtype, False) if base is None else base
        return self.kernels.low_rank(
            start.data.reshape(shape), ops.code(start.dtype),
            [self.kernels.factors(a.left, a.right, ops.code(a.dtype), a.scale) for a in adapters],
            weights, out.reshape(shape), ops.code(dtype),
        )  # fmt: skip

    def unpack(  # noqa: D102
        self, data: Any, index: Any, base: Any, base_dtype: DType, out: Any, dtype: DType
    ) -> Any:
        base_code = self.kernels.same if base_dtype is dtype else ops.code(base_dtype)
        return self.kernels.unpack(data, index, base, base_code, out, ops.code(dtype))

    def wait(self, stream: Any) -> None:  # noqa: D102
        stream.synchronize()

    def read_direct(self, path: Path, offset: int, target: Any) -> bool:  # noqa: D102
        if self.open_direct is None:
            return False
        with self.torch.cuda.device(self.device):
            if path not in self.direct:
                self.direct[path] = self.open_direct(str(path), "r")
            return int(self.direct[path].read(target, file_offset=offset)) == target.numel()

    def close(self) -> None:  # noqa: D102
        for file in self.direct.values():
            file.close()
        self.direct.clear()

    def _current(self, stream: Any) -> Any:
        return self.torch.cuda.stream(stream)

    def _or_full(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except self.torch.cuda.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"GPU memory is full: {_line(error)}",
                where=self.name,
                todo="use a smaller mem_limit, which makes tiles smaller, keep less resident, or"
                " stop what else runs there",
            ) from error


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _cufile(required: bool = False) -> Callable[..., Any] | None:
    """kvikio's file, where it is installed."""
    try:
        import kvikio
    except ImportError as error:
        if required:
            raise MissingExtraError(
                "kvikio is not installed, which reads files straight into GPU memory",
                where=KVIKIO,
                todo="pip install kvikio-cu12 (or -cu13, as your CUDA), or read by pread",
            ) from error
        return None
    return kvikio.CuFile  # type: ignore[no-any-return]


def cuda(text: str = "cuda", direct: bool | None = None) -> Devices:
    """The GPUs that `--device` names: "cuda" for all, "cuda:1" for one, "cuda:0,cuda:2" for some.

    Args:
        direct: see `Cuda`.

    Raises:
        MissingExtraError: without torch, triton, or kvikio where it is asked for.
        RecipeError: without such a GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "torch is not installed",
            where=f"device {text}",
            todo="install torch for your GPU, or use device cpu",
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, numbers = text.partition(":")
    listed = [number.removeprefix("cuda:") for number in numbers.split(",")] if numbers else []
    wanted = listed or [str(k) for k in range(count)]
    usable = kind == "cuda" and all(k.isdecimal() and int(k) < count for k in wanted) and wanted
    if not usable:
        raise RecipeError(
            f"{text!r} asks for a GPU; torch finds {count} here",
            where="device",
            todo="use cpu, or cuda, or cuda:0,1 with the numbers of GPUs that are there",
        )
    return Devices([Cuda(int(k), direct) for k in dict.fromkeys(wanted)])


def devices_for(text: str, backend: str) -> Devices | None:
    """What a plan's `device` and `backend` mean: None for main memory alone.

    Args:
        text: "cpu", "auto" for GPUs if there are any, or what `cuda` takes.
        backend: how files are read; "kvikio" insists on reading into GPU memory.

    Raises:
        RecipeError: for another text, or kvikio without a GPU. As `cuda` does.
    """
    if text == CPU or (text == AUTO and not _found()):
        if backend == KVIKIO:
            raise RecipeError(
                "kvikio reads into GPU memory, and the merge is in main memory",
                where="read backend",
                todo="add device cuda, or read by pread",
            )
        return None
    return cuda("cuda" if text == AUTO else text, True if backend == KVIKIO else None)


def _found() -> bool:
    """Whether a GPU, and what is needed to use it, is here."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError:
        return False
    return bool(torch.cuda.is_available())
