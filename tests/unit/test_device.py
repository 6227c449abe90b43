"""The GPU pipeline with a GPU made of numpy, whose streams do nothing until they are waited for."""

from __future__ import annotations

import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import merge, plan
from optimer_engine.cuda import _cufile, cuda
from optimer_engine.device import Devices
from optimer_engine.errors import RecipeError
from optimer_engine.kernels import reference
from optimer_engine.methods.tiles import CODE
from tests.conftest import nearby, random_tensors

WEIGHTS = {"ja": 0.4, "zh": -0.3}


class FakeGpu:
    """A `device.Backend`: copies and merges are put off until `wait`, as far as is allowed."""

    def __init__(self, direct=False):
        self.direct, self.uploads, self.merges, self.lock = direct, 0, 0, threading.Lock()

    def stream(self):
        return []

    def pinned(self, size):
        return np.full(size, 0x7E, np.uint8)

    empty = pinned

    def upload(self, stream, source, target):
        with self.lock:
            self.uploads += 1
        stream.append(lambda: np.copyto(target, source))

    def download(self, stream, source, target):
        stream.append(lambda: np.copyto(target, source))

    def merge(self, stream, base, base_dtype, sources, dtypes, is_delta, weights, out, out_dtype,
              add_base):  # fmt: skip
        flag = np.zeros(1, bool)

        def run():
            self.merges += 1
            merged = reference.linear(
                base.view(base_dtype.storage), CODE[base_dtype],
                [s.view(d.storage) for s, d in zip(sources, dtypes, strict=True)],
                [CODE[d] for d in dtypes], is_delta, weights, CODE[out_dtype], add_base,
            )  # fmt: skip
            out[:] = merged.view(np.uint8)
            flag[0] = not np.isfinite(reference.upcast(merged, CODE[out_dtype], np.float64)).all()

        stream.append(run)
        return flag

    def wait(self, stream):
        while stream:
            stream.pop(0)()

    def read_direct(self, path, offset, target):
        if self.direct:
            with path.open("rb") as file:
                file.seek(offset)
                target[:] = np.frombuffer(file.read(len(target)), np.uint8)
        return self.direct


@pytest.fixture
def pool(write_checkpoint):
    base = random_tensors(0)
    folders = {n: write_checkpoint(n, nearby(base, s)) for s, n in enumerate(WEIGHTS, start=1)}
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [{"name": n, "model": str(folders[n]), "weight": w} for n, w in WEIGHTS.items()],
    }


def merged_on(devices, made, tile_elems=700, threads=3):
    """(a plan's output tensors, bytes read), by lanes in several threads."""
    found = {info.name: np.zeros(info.elems, info.dtype.storage)
             for shard in made.shards for info in shard.tensors}  # fmt: skip
    operands = 1 + len(made.sources)
    tiles = [
        (run, start, min(start + tile_elems, run.elems))
        for run in made.runs()
        for start in range(0, run.elems, tile_elems)
    ]
    read = []

    def work(number):
        lanes = devices.lanes(operands, tile_elems * 8)
        for run, start, stop in tiles[number::threads]:
            lane = lanes[devices.owner(run, start, stop)]
            weights = [run.treatment.weights[k] for k, _ in run.sources]
            begun = lane.merge(run, start, stop, weights, True)
            out = lane.fetch(begun.out).view(run.computed.storage)
            assert not begun.nonfinite
            read.append(begun.read_bytes)
            for info, first, low, high in run.parts(start, stop):
                found[info.name][first : first + high - low] = out[low - start : high - start]

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(work, range(threads)))
    return found, sum(read)


def assert_is_the_merge(found, recipe, folder):
    merge(recipe, folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        want = tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(found[name], want), name


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("direct", [False, True])
def test_tiles_through_gpus_are_the_merge_to_the_bit(pool, tmp_path, gpus, direct):
    backends = [FakeGpu(direct) for _ in range(gpus)]
    found, _ = merged_on(Devices(backends), plan(pool))
    assert_is_the_merge(found, pool, tmp_path / "out")
    assert all(backend.merges for backend in backends)
    assert all((backend.uploads == 0) == direct for backend in backends)


def test_what_is_resident_is_not_read_again(pool, tmp_path):
    devices, made = Devices([FakeGpu(), FakeGpu()], resident_bytes=1 << 20), plan(pool)
    _, read = merged_on(devices, made)
    assert read
    uploads = [backend.uploads for backend in devices.backends]
    other = {"ja": -0.1, "zh": 0.9}
    again, read = merged_on(devices, made.with_weights(other), threads=2)
    assert read == 0
    assert uploads == [backend.uploads for backend in devices.backends]
    for source in pool["sources"]:
        source["weight"] = other[source["name"]]
    assert_is_the_merge(again, pool, tmp_path / "out")


def test_another_stream_finds_a_resident_tile_whole(pool):
    devices, (run, *_) = Devices([FakeGpu()], resident_bytes=1 << 20), plan(pool).runs()
    owners = devices, devices, Devices([FakeGpu()])
    lanes = [owner.lanes(3, 8 * run.elems)[0] for owner in owners]
    begun = [lane.merge(run, 0, run.elems, [0.4, -0.3], True) for lane in lanes]
    second, alone = (lanes[k].fetch(begun[k].out) for k in (1, 2))
    assert np.array_equal(second, alone)


def test_what_does_not_fit_streams_as_before(pool, tmp_path):
    devices, made = Devices([FakeGpu()], resident_bytes=9000), plan(pool)
    _, first = merged_on(devices, made)
    found, second = merged_on(devices, made)
    assert 0 < second < first
    assert devices.resident[0].used_bytes <= 9000
    assert_is_the_merge(found, pool, tmp_path / "out")


def test_packed_sources_find_their_base_wherever_it_lies(pool, tmp_path):
    from optimer_engine.packing import pack

    for source in pool["sources"]:
        packed = tmp_path / f"{source['name']}-packed"
        pack(pool["base"], source["model"], packed)
        source["model"] = str(packed)
    for devices in (Devices([FakeGpu(direct=True)]), Devices([FakeGpu()], resident_bytes=5000)):
        for _ in range(2):
            found, _ = merged_on(devices, plan(pool))
    assert_is_the_merge(found, pool, tmp_path / "out")


def test_infinity_is_reported(pool):
    (run, *_) = plan(pool).runs()
    (lane,) = Devices([FakeGpu()]).lanes(3, 8 * run.elems)
    begun = lane.merge(run, 0, run.elems, [1e40, 0.3], True)
    lane.wait()
    assert begun.nonfinite
    assert begun.tiles is not None
    assert [len(tile) for tile in begun.tiles] == [run.elems] * 3


@pytest.mark.parametrize("text", ["cuda:7", "cuda", "tpu", "cuda:x"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: text == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"asks for a GPU; torch finds [02] here"):
        cuda(text)


def test_kvikio_is_used_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert _cufile() is None
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=open))
    assert _cufile() is open
