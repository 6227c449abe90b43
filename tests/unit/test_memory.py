"""The memory promise: what a plan projects, its run keeps, whatever the model or the sources.

Each case runs in a child process that merges a small recipe first, so that interpreter, libraries
and kernel are there, and then measures what the real one adds: the peak of its whole resident set,
and of anonymous and file-backed memory apart at every tile. Inputs are sparse files, which cost no
disk and are read like any other.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from optimer_engine import methods

SLACK = 6 << 20
"""What a Python process gains by itself: thread stacks, allocator arenas, the page table."""

CHILD = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
from optimer_engine import FolderSink, Sink, plan

kinds = ["VmRSS", "RssAnon", "RssFile"]
def memory(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", text, re.MULTILINE)[1]) * 1024

class Null(Sink):
    def write(self, info, start, tile): pass

small, real, backend, out, limit = json.loads(sys.argv[1])
plan(small, backend=backend, threads=2).run(Null())
before = {name: memory(name) for name in kinds}
made = plan(real, backend=backend, mem_limit=limit, threads=2)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
most = {"RssAnon": 0, "RssFile": 0}
def sample(event):
    for name in most:
        most[name] = max(most[name], memory(name))
report = made.run(FolderSink(out) if out else Null(), callbacks=[sample])
print(json.dumps({
    "projected": made.projected_mem_bytes,
    "peak": memory("VmHWM") - before["VmRSS"],
    "anonymous": most["RssAnon"] - before["RssAnon"],
    "file": most["RssFile"] - before["RssFile"],
    "read": report.bytes_read,
}))
"""


def sparse_checkpoint(folder, shapes):
    """A checkpoint of zeros that takes a page or two of disk."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


@pytest.fixture
def measure(tmp_path):
    def recipe(name, shapes, count, **more):
        folders = [sparse_checkpoint(tmp_path / f"{name}{i}", shapes) for i in range(count + 1)]
        sources = [
            {"name": str(i), "model": str(f), "weight": 0.1, **more.pop(f"source{i}", {})}
            for i, f in enumerate(folders[1:])
        ]
        return {"base": str(folders[0]), "sources": sources, **more}

    def run(shapes, count=2, backend="pread", out=None, limit="512MiB", **more):
        small = recipe("small", dict.fromkeys(shapes, (8, 8)), count, **more)
        real = recipe("real", shapes, count, **more)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps([small, real, backend, out, limit])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LARGE = {"embed": (40_000, 1000), "head": (10_000, 1000)}


@linux
@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_memory_does_not_grow_with_the_sources(measure, count):
    found = measure(LARGE, count)
    assert found["read"] == 100e6 * (count + 1)
    assert found["peak"] <= found["projected"] + SLACK
    assert found["projected"] <= 2 * (2**23 + 2**21) + 300_000
    assert found["file"] <= 2 << 20


@linux
@pytest.mark.parametrize("limit", ["700kB", "4MiB"])
def test_a_lower_limit_is_kept_too(measure, limit):
    found = measure(LARGE, 4, limit=limit)
    assert found["projected"] <= 4.2e6
    assert found["peak"] <= found["projected"] + SLACK


@linux
def test_memory_does_not_grow_with_the_output(measure, tmp_path):
    found = measure(LARGE, 1, out=str(tmp_path / "out"))
    assert found["peak"] <= found["projected"] + SLACK


@linux
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "sce", "karcher", "model_stock"])
def test_methods_with_statistics_keep_it_too(measure, method):
    weighted = "weight" in methods.get(method).parameters
    sources = {f"source{i}": {} if weighted else {"weight": 1.0} for i in range(3)}
    sparse = {"density": 0.5} if weighted else {}
    found = measure(LARGE, 3, method=method, parameters=sparse, **sources)
    assert found["peak"] <= found["projected"] + SLACK
    assert found["projected"] <= 64 << 20, "a source has 100 MB"


@linux
def test_many_small_tensors(measure):
    found = measure({f"layers.{n}.norm": (1, 256) for n in range(20_000)}, 2)
    assert found["peak"] <= found["projected"] + SLACK


@linux
def test_mapped_pages_are_released_behind_the_reader(measure):
    found = measure({"embed": (200_000, 1000)}, 1, backend="mmap")
    assert found["read"] == 800e6
    assert found["anonymous"] <= found["projected"] + SLACK
    assert found["file"] <= 2 * 5 * (32 << 20), "of 800 MB mapped"


@linux
def test_adapters(measure, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    prefix = "base_model.model.embed.lora_"
    save_file(
        {f"{prefix}A.weight": torch.zeros(64, 1000), f"{prefix}B.weight": torch.zeros(40_000, 64)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64}')
    base = sparse_checkpoint(tmp_path / "base", {"embed.weight": (40_000, 1000)})
    real = {"base": str(base), "sources": [{"name": "lora", "model": str(folder)}]}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([real, real, "pread", None, "512MiB"])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["anonymous"] <= found["projected"] + SLACK
    assert found["projected"] <= 16 << 20, "the delta alone has 160 MB"
