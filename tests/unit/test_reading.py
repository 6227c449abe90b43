"""How inputs are read does not change a bit, and what need not be read is not."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from optimer_engine import FolderSink, OptimerError, merge, plan, shard_file
from tests.conftest import nearby, random_tensors


@pytest.fixture
def recipe(write_checkpoint):
    base = random_tensors(0) | {"model.steps": torch.arange(5), "model.flag": torch.tensor([True])}
    tuned = nearby({k: v for k, v in base.items() if v.is_floating_point()}, 1)
    files = {**base, **tuned}
    return {
        "base": str(write_checkpoint("base", base, files=2)),
        "sources": [{"name": "ja", "model": str(write_checkpoint("ja", files)), "weight": 0.5}],
    }


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


@pytest.mark.parametrize("tile_bytes", [1, 100, 2**19])
def test_both_backends_give_the_same_bits(recipe, tmp_path, tile_bytes, monkeypatch):
    monkeypatch.setattr("optimer_engine.checkpoint.RELEASE_BYTES", 4096)
    merge(recipe, tmp_path / "pread")
    mapped = replace(plan(recipe, backend="mmap"), tile_bytes=tile_bytes)
    mapped.run(FolderSink(tmp_path / "mmap"))
    assert contents(tmp_path / "mmap") == contents(tmp_path / "pread")


def test_a_source_of_weight_zero_is_never_opened(recipe, tmp_path):
    merge(recipe, tmp_path / "without")
    recipe["sources"].append({"name": "absent", "model": "no/such/folder", "weight": 0})
    report = merge(recipe, tmp_path / "with")
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert set(report.fingerprints) == {"base", "ja"}
    with pytest.raises(OptimerError, match="no such folder"):
        plan(recipe)  # whose weights may be turned on later
    made = plan(recipe, every_source=False)
    with pytest.raises(OptimerError, match="was not opened, since its weight was 0"):
        made.with_weights({"absent": 0.1})


@pytest.mark.parametrize("fails", [None, "EXDEV", "EINVAL", "short", "no call"])
def test_unchanged_tensors_are_copied_from_file_to_file(recipe, tmp_path, monkeypatch, fails):
    import errno

    real, copied = getattr(os, "copy_file_range", None), []
    if real is None:
        pytest.skip("this platform has no copy_file_range")

    def copy(source, target, size, *offsets):
        if fails in ("EXDEV", "EINVAL"):
            raise OSError(getattr(errno, fails), "cannot")
        copied.append(real(source, target, min(size, 1000) if fails == "short" else size, *offsets))
        return copied[-1]

    monkeypatch.setattr(shard_file, "COPY_BYTES", 777)
    if fails == "no call":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy)
    recipe["sources"][0]["weight"] = 0
    report = merge(recipe, tmp_path / "out")
    base = contents(tmp_path / "base")
    for name, tensor in load(tmp_path / "out").items():
        assert torch.equal(tensor, load(tmp_path / "base")[name]), name
    assert sum(copied) == (report.bytes_written if fails in (None, "short") else 0)
    assert base == contents(tmp_path / "base")


def load(folder):
    from safetensors.torch import load_file

    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
