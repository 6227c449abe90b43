"""Merges through GPUs made of numpy, whose streams do nothing until they are waited for."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from optimer_engine import FolderSink, LiveModelSink, Sink, cuda, merge, plan
from optimer_engine.cli import optimer
from optimer_engine.cuda import _cufile
from optimer_engine.device import TILE_BYTES, Devices
from optimer_engine.errors import (
    CheckpointError,
    MemoryLimitError,
    MissingExtraError,
    NonFiniteError,
    RecipeError,
)
from optimer_engine.kernels.triton_launch import MAX_SOURCES
from optimer_engine.packing import pack
from optimer_engine.runs import GPU_SOURCES
from tests.conftest import nearby, random_tensors
from tests.unit.gpus import FakeGpu, on_gpus

WEIGHTS = {"ja": 0.4, "zh": -0.3}


@pytest.fixture
def pool(write_checkpoint):
    base = random_tensors(0)
    folders = {n: write_checkpoint(n, nearby(base, s)) for s, n in enumerate(WEIGHTS, start=1)}
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [{"name": n, "model": str(folders[n]), "weight": w} for n, w in WEIGHTS.items()],
    }


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def assert_is_the_merge(recipe, out, tmp_path, **options):
    want = merge(recipe, tmp_path / "wanted", **options)
    assert weights_of(out) == weights_of(tmp_path / "wanted")
    return want


def merged_on(devices, recipe, out, **options):
    made = on_gpus(plan(recipe), devices, **options)
    return made.run(FolderSink(out), callbacks=())


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("direct", [False, True])
def test_tiles_through_gpus_are_the_merge_to_the_bit(pool, tmp_path, gpus, direct):
    backends = [FakeGpu(direct, name=f"fake:{k}") for k in range(gpus)]
    report = merged_on(Devices(backends), pool, tmp_path / "gpu")
    want = assert_is_the_merge(pool, tmp_path / "gpu", tmp_path)
    assert all(backend.merges for backend in backends)
    assert all((backend.uploads == 0) == direct for backend in backends)
    assert report.device == ", ".join(f"fake:{k}" for k in range(gpus))
    assert want.device == "cpu"


def test_what_the_output_kept_is_sampled_as_in_main_memory(pool, tmp_path):
    report = merged_on(Devices([FakeGpu(direct=True)]), pool, tmp_path / "gpu", tile_bytes=8192)
    assert report.kept == merge(pool, tmp_path / "cpu").kept


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("ties", {"density": 0.4}, {}),
        ("dare_ties", {"density": 0.5}, {"compat": "mergekit"}),
        ("della_linear", {"density": 0.6}, {}),
        ("breadcrumbs", {"density": 0.6}, {}),
        ("sce", {}, {"select_topk": 0.4}),
        ("linear", {}, {"normalize": False}),
    ],
)
def test_methods_run_their_passes_on_gpus(pool, tmp_path, method, own, shared):
    for source in pool["sources"]:
        source["parameters"] = own
        if method == "sce":
            source["weight"] = 1.0
    recipe = {**pool, "method": method, "parameters": shared}
    devices = Devices([FakeGpu(), FakeGpu()], resident_bytes=1 << 20)
    made = on_gpus(plan(recipe), devices)
    first, again = (made.run(FolderSink(tmp_path / name)) for name in ("gpu", "again"))
    want = assert_is_the_merge(recipe, tmp_path / "gpu", tmp_path)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "gpu")
    assert (first.bytes_read > 0, again.bytes_read) == (True, 0)
    assert first.bytes_read <= want.bytes_read  # a second pass finds what the first one read


@pytest.mark.parametrize("extra", [{"rounding": "stochastic"}, {"out_dtype": "float32"}])
def test_outputs_of_every_kind_are_the_same(pool, tmp_path, extra):
    merged_on(Devices([FakeGpu()]), {**pool, **extra}, tmp_path / "gpu")
    assert_is_the_merge({**pool, **extra}, tmp_path / "gpu", tmp_path)


def test_what_is_resident_is_not_read_again(pool, tmp_path):
    devices = Devices([FakeGpu(), FakeGpu()], resident_bytes=1 << 20)
    made = on_gpus(plan(pool), devices)
    assert made.run(FolderSink(tmp_path / "first")).bytes_read
    uploads = [backend.uploads for backend in devices.backends]
    other = {"ja": -0.1, "zh": 0.9}
    again = made.with_weights(other).run(FolderSink(tmp_path / "second"), threads=2)
    assert again.bytes_read == 0
    assert uploads == [backend.uploads for backend in devices.backends]
    for source in pool["sources"]:
        source["weight"] = other[source["name"]]
    assert_is_the_merge(pool, tmp_path / "second", tmp_path)


def test_another_stream_finds_a_resident_tile_whole(pool):
    run, *_ = plan(pool).runs()
    part, shared = (run, 0, run.elems), Devices([FakeGpu()], resident_bytes=1 << 20)
    found = []
    for devices in (shared, Devices([FakeGpu()])):
        (first,), (second,) = devices.lanes(2, 4, 8 * run.elems)
        first.merge(*part, None, None)  # and nobody waits for it
        merged = np.zeros(run.elems, np.uint16)
        second.fetch(second.merge(*part, None, None), merged)
        second.wait(*part)
        found.append(merged)
    assert found[0].any()
    assert np.array_equal(*found)


def test_what_does_not_fit_streams_as_before(pool, tmp_path):
    devices = Devices([FakeGpu()], resident_bytes=9000)
    made = on_gpus(plan(pool), devices)
    first, second = (made.run(FolderSink(tmp_path / name)) for name in ("first", "second"))
    assert 0 < second.bytes_read < first.bytes_read
    assert devices.resident[0].used_bytes <= 9000
    assert_is_the_merge(pool, tmp_path / "second", tmp_path)


@pytest.mark.parametrize("mode", ["exact", "int8", "int4", "bf16"])
def test_packed_sources_cross_the_bus_packed(write_checkpoint, tmp_path, mode):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (301, 300), "b": (66_001,), "c": (1,)}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    folders = [write_checkpoint("base", base), write_checkpoint("tuned", nearby(base, 1, 0.001))]
    pack(*folders, tmp_path / "packed", mode=mode)
    recipe = {
        "base": str(folders[0]),
        "sources": [{"name": "s", "model": str(tmp_path / "packed"), "weight": 0.7}],
    }
    found = []
    for devices in (
        Devices([FakeGpu(direct=True)]),
        Devices([FakeGpu()]),
        Devices([FakeGpu()], resident_bytes=300_000),
    ):
        made = on_gpus(plan(recipe), devices, tile_bytes=70_000 * 4)
        for _ in range(2):
            out = tmp_path / str(len(found))
            found.append(made.run(FolderSink(out)).bytes_read)
            promised = made.device_mem_bytes + devices.resident_bytes
            assert devices.backends[0].peak_bytes <= promised
            assert len(found) > 1 or assert_is_the_merge(recipe, out, tmp_path)
            assert weights_of(out) == weights_of(tmp_path / "0")
    elems = sum(tensor.numel() for tensor in base.values())
    whole = {"exact": 2, "int8": 4, "int4": 4, "bf16": 2}[mode] + 2
    packed = {"exact": 1.3, "int8": 1.1, "int4": 0.6, "bf16": 2}[mode] + 2
    assert found[2] < packed * elems < whole * elems or mode == "bf16"
    assert found[5] < found[4] == found[2]
    # tiles that cut groups and chunks are decoded in main memory, and the same
    made = on_gpus(plan(recipe), Devices([FakeGpu()]), tile_bytes=1300)
    made.run(FolderSink(tmp_path / "cut"))
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "0")
    ties = {**recipe, "method": "ties"}
    ties["sources"][0]["parameters"] = {"density": 0.3}
    merged_on(Devices([FakeGpu()]), ties, tmp_path / "ties", tile_bytes=140_000)
    merge(ties, tmp_path / "ties-cpu")
    assert weights_of(tmp_path / "ties") == weights_of(tmp_path / "ties-cpu")


def test_a_damaged_vector_is_named_as_in_main_memory(write_checkpoint, tmp_path):
    base = {"w": torch.randn(70_000, generator=torch.Generator().manual_seed(1)).bfloat16()}
    folders = [write_checkpoint("base", base), write_checkpoint("tuned", nearby(base, 1, 0.1))]
    pack(*folders, tmp_path / "packed", mode="exact")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8:begin])["w::stream"]["data_offsets"][0]
    raw[begin + said] = 200  # the width of a layer
    file.write_bytes(raw)
    source = {"name": "s", "model": str(tmp_path / "packed"), "weight": 0.7}
    recipe = {"base": str(folders[0]), "sources": [source]}
    with pytest.raises(CheckpointError, match="block 0 is damaged"):
        merged_on(Devices([FakeGpu()]), recipe, tmp_path / "out", tile_bytes=1 << 20)


def test_nan_is_named_and_no_output_is_left(pool, tmp_path, write_checkpoint):
    bad = nearby(random_tensors(0), 1)
    bad["model.norm.weight"][3] = float("nan")
    pool["sources"][0]["model"] = str(write_checkpoint("bad", bad))
    for method in ("task_arithmetic", "ties"):
        with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds NaN.*element 3"):
            merged_on(Devices([FakeGpu()]), {**pool, "method": method}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class Recorder(Sink):
    """Keeps the kinds of arrays that it was given."""

    def __init__(self):
        self.kinds = set()

    def write(self, info, start, tile):
        self.kinds.add(type(tile))


def test_a_live_model_is_rewritten_where_it_lies(pool, tmp_path):
    class Live(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in random_tensors(5).items():
                self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor))

        def named_parameters(self, *args, **kwargs):
            found = super().named_parameters(*args, **kwargs)
            return [(name.replace("/", "."), value) for name, value in found]

        def state_dict(self, *args, **kwargs):
            found = super().state_dict(*args, **kwargs)
            return {name.replace("/", "."): value for name, value in found.items()}

    class NeverFetched(FakeGpu):
        def download(self, *arguments):
            raise AssertionError("the result left the GPU")

    model = Live()
    on_gpus(plan(pool), Devices([NeverFetched()])).run(LiveModelSink(model))
    merge(pool, tmp_path / "wanted")
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "wanted" / "model.safetensors").items():
        found = dict(model.named_parameters())[name]
        assert torch.equal(found.view(torch.int16), tensor.view(torch.int16)), name
    other = Recorder()
    on_gpus(plan(pool), Devices([FakeGpu()])).run(other)
    assert other.kinds == {np.ndarray}


def fake_cuda(monkeypatch, *backends):
    made = []

    def opened(text, direct=None):
        made.append((text, direct, Devices(backends or [FakeGpu()])))
        return made[-1][2]

    monkeypatch.setattr(cuda, "cuda", opened)
    return made


def test_the_command_line_and_the_call_merge_on_a_gpu(pool, tmp_path, monkeypatch):
    made = fake_cuda(monkeypatch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(pool))
    arguments = ["merge", recipe, "-o", tmp_path / "cli", "--compute-device", "cuda:0,cuda:1"]
    done = CliRunner().invoke(
        optimer, [str(a) for a in [*arguments, "--storage-device", "cuda", "--json"]]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["device"] == "fake:0"
    report = merge(recipe, tmp_path / "call", device="cuda")
    assert [text for text, *_ in made] == ["cuda:0,cuda:1", "cuda"]
    assert made[0][2].resident_bytes > 1 << 30
    assert made[1][2].resident_bytes == 0
    assert all(devices.backends[0].closed for *_, devices in made)
    assert (report.threads, report.tile_bytes) == (4, TILE_BYTES)
    assert report.device_mem_bytes > 4 * 4 * TILE_BYTES
    assert_is_the_merge(recipe, tmp_path / "cli", tmp_path)
    assert weights_of(tmp_path / "cli") == weights_of(tmp_path / "call")


def test_plan_says_what_it_takes_of_gpu_and_pinned_memory(pool, tmp_path, monkeypatch):
    fake_cuda(monkeypatch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(pool))
    arguments = ["plan", str(recipe), "--device", "cuda", "--json"]
    found = json.loads(CliRunner().invoke(optimer, arguments).stdout)
    rows = 4 * 4 * TILE_BYTES  # workers, base, two sources, output
    assert rows <= found["pinned_memory_bytes"] <= found["memory_bytes"] <= rows * 1.01
    assert rows <= found["gpu_memory_bytes"] <= rows * 1.01
    assert (found["device"], found["gpu_resident_bytes"]) == ("fake:0", 0)
    text = CliRunner().invoke(optimer, arguments[:-1]).stdout
    assert "gpu memory" in text
    assert "pinned memory" in text


def test_pinned_buffers_obey_the_memory_limit(pool, tmp_path, monkeypatch):
    fake_cuda(monkeypatch)
    made = plan(pool, device="cuda", mem_limit="64MiB")
    assert made.pinned_mem_bytes <= made.projected_mem_bytes <= 64 << 20
    assert made.tile_bytes == TILE_BYTES // 4
    with pytest.raises(MemoryLimitError, match="the limit is"):
        plan(pool, device="cuda", mem_limit="100KiB")


def test_a_small_gpu_gets_small_tiles_and_a_full_one_is_refused(pool, tmp_path, monkeypatch):
    fake_cuda(monkeypatch, FakeGpu(room_bytes=3 << 20))
    made = plan(pool, device="cuda")
    assert made.tile_bytes < TILE_BYTES // 64
    report = made.run(FolderSink(tmp_path / "gpu"))
    assert report.device_mem_bytes < 3 << 20
    assert_is_the_merge(pool, tmp_path / "gpu", tmp_path)
    fake_cuda(monkeypatch, FakeGpu(room_bytes=100_000))
    with pytest.raises(MemoryLimitError, match="of a GPU's memory, 100 kB are free"):
        plan(pool, device="cuda")


def test_memory_that_is_taken_meanwhile_makes_tiles_smaller(pool, tmp_path):
    gpu = FakeGpu(room_bytes=100_000)
    report = merged_on(Devices([gpu]), pool, tmp_path / "gpu", threads=1, tile_bytes=1 << 20)
    assert report.tile_bytes < 1 << 15
    assert_is_the_merge(pool, tmp_path / "gpu", tmp_path)
    full = FakeGpu(room_bytes=1000)
    with pytest.raises(MemoryLimitError, match="GPU memory is full"):
        merged_on(Devices([full]), pool, tmp_path / "never", tile_bytes=1 << 20)
    assert not (tmp_path / "never").exists()


def test_a_merge_that_runs_out_of_gpu_memory_is_continued(pool, tmp_path):
    with pytest.raises(MemoryLimitError, match="fake:0: GPU memory is full"):
        merged_on(Devices([FakeGpu(full_at=4)]), pool, tmp_path / "gpu", threads=1)
    merged_on(Devices([FakeGpu()]), pool, tmp_path / "gpu")
    assert_is_the_merge(pool, tmp_path / "gpu", tmp_path)


SLERP = {"method": "nuslerp", "parameters": {}}


def test_what_has_no_gpu_form_is_refused_by_name_unless_left_to_us(pool, tmp_path, monkeypatch):
    made = fake_cuda(monkeypatch)
    recipe = {**pool, **SLERP}
    for source in recipe["sources"]:
        source["weight"] = 0.5
    with pytest.raises(RecipeError, match=r"nuslerp of \S+ has no GPU form"):
        merge(recipe, tmp_path / "never", device="cuda")
    assert not (tmp_path / "never").exists()
    monkeypatch.setattr(cuda, "_found", lambda: True)
    merge(recipe, tmp_path / "auto", device="auto")
    assert made[-1][0] == "cuda"
    assert_is_the_merge(recipe, tmp_path / "auto", tmp_path)
    monkeypatch.setattr(cuda, "_found", lambda: False)
    assert plan(recipe, device="auto").devices is None


def test_more_sources_than_a_launch_takes_are_refused_before_the_start(pool, monkeypatch):
    assert GPU_SOURCES == MAX_SOURCES
    fake_cuda(monkeypatch)
    model = pool["sources"][0]["model"]
    many = [{"name": f"s{k}", "model": model, "weight": 0.1} for k in range(GPU_SOURCES + 1)]
    with pytest.raises(RecipeError, match=r"task_arithmetic of \S+ has 65 sources"):
        plan({**pool, "sources": many}, device="cuda", mem_limit="8GiB")
    plan({**pool, "sources": many[1:]}, device="cuda", mem_limit="8GiB")


@pytest.mark.parametrize("text", ["cuda:7", "cuda", "tpu", "cuda:x"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, pool, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: text == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"asks for a GPU; torch finds [02] here"):
        plan(pool, device=text)


def test_inputs_cannot_stay_on_the_gpu_of_a_merge_in_main_memory(pool, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(pool))
    arguments = ["merge", str(recipe), "-o", str(tmp_path / "o"), "--storage-device", "cuda"]
    done = CliRunner().invoke(optimer, arguments)
    assert isinstance(done.exception, RecipeError)
    assert "add --device cuda" in str(done.exception)


def test_kvikio_is_used_where_it_is_installed_and_missed_where_it_is_asked_for(monkeypatch, pool):
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert _cufile() is None
    with pytest.raises(MissingExtraError, match="kvikio is not installed"):
        _cufile(required=True)
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=open))
    assert _cufile() is open
    with pytest.raises(RecipeError, match="kvikio reads into GPU memory"):
        plan(pool, backend="kvikio")
    made = fake_cuda(monkeypatch)
    plan(pool, backend="kvikio", device="cuda")
    assert made[0][1] is True


def test_a_search_keeps_its_vectors_on_the_model_s_gpu(pool, monkeypatch):
    from optimer_engine.search.config import SearchConfig, Vector
    from optimer_engine.search.live import LivePool

    made = fake_cuda(monkeypatch)
    vectors = [Vector(name=s["name"], model=s["model"]) for s in pool["sources"]]
    config = {"base": pool["base"], "vectors": vectors}
    LivePool(SearchConfig(**config, device="cuda", resident_mem="1MB"), lambda model: 0.0)
    assert (made[0][0], made[0][2].resident_bytes) == ("cuda:0", 10**6)
    LivePool(SearchConfig(**config, device="cuda"), lambda model: 0.0)
    assert len(made) == 1
    with pytest.raises(RecipeError, match="resident_mem is of a GPU, the device is cpu"):
        SearchConfig(**config, resident_mem="1MB")
