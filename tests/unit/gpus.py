"""GPUs for tests that have none.

`FakeGpu` is made of numpy and puts everything off until it is waited for, as far as a GPU may; its
kernels are the CPU's specifications. `Interpreted` runs the real kernels in Triton's interpreter,
in order and at once, through everything of `cuda.Cuda` that needs no GPU.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from optimer_engine import kernels, ops
from optimer_engine.cuda import Cuda
from optimer_engine.device import Devices
from optimer_engine.errors import MemoryLimitError
from optimer_engine.kernels import reference, reference_packed
from optimer_engine.methods.tiles import CODE


class Later:
    """What a launch will have returned."""

    def __init__(self):
        self.done, self.value = False, None

    def __bool__(self):
        assert self.done, "looked at before the stream was waited for"
        return bool(self.value)


class FakeGpu:
    """A `device.Backend`.

    Attributes:
        room_bytes: of its memory; `empty` refuses more.
        full_at: the launch, by number, at which its memory turns out to be full.
    """

    max_rank = 64

    def __init__(self, direct=False, room_bytes=1 << 40, name="fake:0", full_at=None):
        self.direct, self.room_bytes, self.name, self.full_at = direct, room_bytes, name, full_at
        self.uploads, self.uploaded_bytes, self.merges, self.launches = 0, 0, 0, 0
        self.closed, self.lock = False, threading.Lock()
        self.all_bytes = self.least_bytes = room_bytes

    def stream(self):
        return []

    def pinned(self, size):
        return np.full(size, 0x7E, np.uint8)

    def empty(self, size):
        with self.lock:
            if size > self.room_bytes:
                raise MemoryLimitError("GPU memory is full", where=self.name)
            self.room_bytes -= size
            self.least_bytes = min(self.least_bytes, self.room_bytes)
        room = self.pinned(size)
        weakref.finalize(room, self.give_back, size)
        return room

    def give_back(self, size):
        self.room_bytes += size

    @property
    def peak_bytes(self):
        return self.all_bytes - self.least_bytes

    def free_bytes(self):
        return self.room_bytes

    def typed(self, tile, dtype):
        return tile.view(dtype.storage)

    def upload(self, stream, source, target):
        with self.lock:
            self.uploads += 1
            self.uploaded_bytes += source.nbytes
        stream.append(lambda: np.copyto(target, source))

    def download(self, stream, source, target):
        stream.append(lambda: np.copyto(target, source))

    def launch(self, stream, function, *arguments):
        with self.lock:
            self.launches += 1
            if self.launches == self.full_at:
                raise MemoryLimitError("GPU memory is full", where=self.name)
        answer = Later()

        def run():
            answer.value = function(*arguments)
            answer.done = True

        stream.append(run)
        return answer

    def linear(self, base, sources, weights, out, dtype, add_base):
        self.merges += 1
        read = [
            reference_packed.dequantise(s.data[0], s.data[1], s.packed)[: len(out)]
            if s.packed
            else s.data
            for s in sources
        ]
        out[:] = reference.linear(
            base.data, CODE[base.dtype], read, [CODE[s.dtype] for s in sources],
            [s.is_delta for s in sources], weights, CODE[dtype], add_base,
        )  # fmt: skip
        return not np.isfinite(reference.upcast(out, CODE[dtype], np.float64)).all()

    def low_rank(self, base, shape, adapters, weights, out, dtype):
        total = np.zeros(shape)
        for a, weight in zip(adapters, weights, strict=True):
            left, right = (reference.upcast(f, CODE[a.dtype], np.float64) for f in a[:2])
            total += weight * a.scale * (left @ right)
        start = 0 if base is None else reference.upcast(base.data, CODE[base.dtype], np.float64)
        out[:] = reference.round_to(start + total.reshape(-1), CODE[dtype])

    def unpack(self, data, index, base, base_dtype, out, dtype):
        same = base_dtype is dtype
        code = reference_packed.SAME if same else CODE[base_dtype]
        origin = reference_packed.reference_bits(base, code, CODE[dtype])
        packed, z = data.tobytes(), []
        while packed:
            if max(packed[:3]) > 64:
                return True
            block, size = reference_packed.unpack_block(packed, origin.dtype)
            z.append(block)
            packed = packed[size:]
        out.view(origin.dtype)[:] = reference_packed.moved(origin, np.concatenate(z)[: len(out)])
        return False

    def wait(self, stream):
        while stream:
            stream.pop(0)()

    def read_direct(self, path, offset, target):
        if self.direct:
            with path.open("rb") as file:
                file.seek(offset)
                target[:] = np.frombuffer(file.read(len(target)), np.uint8)
        return self.direct

    def close(self):
        self.closed = True


class Interpreted(Cuda):
    """`cuda.Cuda` without a GPU; for one thread, as the interpreter is."""

    def __init__(self, monkeypatch):
        from tests.unit.triton_interpreter import interpreted

        names = ("gpu", "gpu_sparse", "triton_lowrank", "triton_packed")
        for name in names:
            module = interpreted(name)
            monkeypatch.setitem(__import__("sys").modules, f"optimer_engine.kernels.{name}", module)
            monkeypatch.setattr(kernels, name, module, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        self.kernels = ops.gpu_kernels()
        self.name, self.max_rank = "interpreter:0", self.kernels.max_rank
        self.torch, self.device = torch, torch.device("cpu")
        self.open_direct, self.direct = None, {}

    def stream(self):
        return None

    def pinned(self, size):
        return np.full(size, 0x7E, np.uint8)

    def free_bytes(self):
        return 1 << 40

    def wait(self, stream):
        pass

    def _current(self, stream):
        return nullcontext()


def on_gpus(made, devices, threads=3, tile_bytes=1400):
    """A plan of main memory, for GPUs and with tiles small enough to need many."""
    return replace(made, devices=devices, threads=threads, spare_threads=0, tile_bytes=tile_bytes)


def interpreted_gpu(monkeypatch):
    return Devices([Interpreted(monkeypatch)])
