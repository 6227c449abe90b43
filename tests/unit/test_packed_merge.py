"""Packed vectors as sources of a merge: decoded tile by tile, as good as their mode says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from optimer_engine import FolderSink, merge, plan
from optimer_engine.cli import optimer
from optimer_engine.sink import Sink
from tests.conftest import nearby

SHAPES = {"model.a": (301, 257), "model.b": (70_003,), "model.c": (1,), "model.d": (64, 2048)}


@pytest.fixture
def pool(write_checkpoint, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    tuned = nearby(base, 1, 0.02)
    folders = {"base": write_checkpoint("base", base), "ja": write_checkpoint("ja", tuned)}
    for mode in ("exact", "bf16", "int8", "int4"):
        out = tmp_path / mode
        arguments = ["pack", folders["base"], folders["ja"], "--mode", mode, "-o", out]
        done = CliRunner().invoke(optimer, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        folders[mode] = out
    return {name: str(folder) for name, folder in folders.items()}, base, tuned


class Nowhere(Sink):
    def write(self, info, start, tile):
        pass


def recipe(folders, *names, **more):
    sources = [{"name": n, "model": folders[n], "weight": 0.5} for n in names]
    return {"base": folders["base"], "sources": sources, **more}


@pytest.mark.parametrize("mode", ["exact", "bf16", "int8", "int4"])
def test_any_mode_merges_and_bits_do_not_depend_on_tiles(pool, tmp_path, mode):
    folders, base, tuned = pool
    out = {"out_dtype": "float32"}
    merge(recipe(folders, mode, **out), tmp_path / "whole")
    cut = replace(plan(recipe(folders, mode, **out), threads=3), tile_bytes=3000)
    cut.run(FolderSink(tmp_path / "cut"))
    found = load_file(tmp_path / "whole" / "model.safetensors")
    again = load_file(tmp_path / "cut" / "model.safetensors")
    worst = {"exact": 0.0, "bf16": 2**-8, "int8": 0.02, "int4": 0.2}[mode]
    for name in SHAPES:
        assert torch.equal(found[name], again[name])
        delta = tuned[name].double() - base[name].double()
        exact = base[name].double() + 0.5 * delta
        error = (found[name].double() - exact).abs().max()
        assert error <= worst * delta.abs().max() + 1e-6


def test_exact_merges_to_the_bytes_of_the_full_checkpoint(pool, tmp_path):
    folders, *_ = pool
    for method in ("task_arithmetic", "ties"):
        for name in ("exact", "ja"):
            merge(recipe(folders, name, method=method), tmp_path / f"{method}-{name}")
        files = [tmp_path / f"{method}-{n}" / "model.safetensors" for n in ("exact", "ja")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_fewer_bytes_are_read(pool):
    folders, *_ = pool
    from optimer_engine.explain import facts

    read = {}
    for name in ("ja", "exact", "int8", "int4"):
        made = plan(recipe(folders, name))
        read[name] = facts(made)["read_bytes"]
        assert all(opened.fingerprint for opened in made.checkpoints)
        before = [opened.read_bytes for opened in made.checkpoints]
        said = made.run(Nowhere()).bytes_read
        after = [opened.read_bytes for opened in made.checkpoints]
        # What the report says is what was fetched, and by this the inputs' speed is judged.
        assert abs(said - read[name]) <= len(SHAPES)
        padding = 3 * 66 * len(SHAPES)  # of the last groups: counted, and not fetched
        assert abs(sum(after) - sum(before) - said) <= padding
    assert read["int4"] < read["exact"] < read["ja"] and read["int8"] < read["ja"]
