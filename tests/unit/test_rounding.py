"""Small deltas and the bf16 grid: stochastic rounding is unbiased, and the report says the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import FolderSink, OptimerError, merge, plan, verify_output
from optimer_engine.kernels.reference_methods import uniform_words
from optimer_engine.kernels.stochastic import round_stochastically


def test_each_value_goes_up_with_the_chance_of_its_distance():
    stream = [1, 2, 3, 4]
    for value in (1.0, 1.001, -1.0035, 1e-40, 0.0, -0.0, 3.0e38):
        values = np.full(40_001, value, np.float32)
        out = np.empty(len(values), np.uint16)
        assert not round_stochastically(values, out, 7, stream)
        words = uniform_words(np.array(stream), 7, len(values)) & np.uint32(0xFFFF)
        expected = (values.view(np.uint32) + words) >> np.uint32(16)
        assert np.array_equal(out, expected)
        found = (out.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        step = 2.0 ** (np.floor(np.log2(abs(value))) - 7) if abs(value) > 1e-37 else 1e-40
        assert abs(found.mean() - np.float32(value)) < 4 * step / np.sqrt(len(values))


def test_what_is_not_finite_is_found():
    for value in (np.nan, np.inf, -np.inf, 3.4e38):
        values = np.full(50, 1, np.float32)
        values[33] = value
        out = np.empty(50, np.uint16)
        assert round_stochastically(values, out, 0, [0, 0, 0, 0])


@pytest.fixture
def recipe(write_checkpoint):
    torch.manual_seed(0)
    base = {f"model.{i}": torch.randn(70_001 + i).bfloat16() for i in range(3)}
    tau = {n: 0.001 * torch.randn(t.shape) for n, t in base.items()}
    tuned = {n: base[n].float() + tau[n] for n in base}
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [{"name": "ja", "model": str(write_checkpoint("ja", tuned))}],
    }, base, tau  # fmt: skip


def moved(out, base, tau):
    """Projection of the change on the delta that was asked for."""
    found = load_file(out / "model.safetensors")
    change = torch.cat([(found[n].double() - base[n].double()).flatten() for n in base])
    delta = torch.cat([tau[n].double().flatten() for n in base])
    return float(change @ delta / (delta @ delta))


def test_small_deltas_survive_on_average_and_the_report_says_what_was_kept(recipe, tmp_path):
    recipe, base, tau = recipe
    nearest = merge(recipe, tmp_path / "nearest")
    chance = merge({**recipe, "rounding": "stochastic"}, tmp_path / "stochastic")
    wide = merge({**recipe, "out_dtype": "float32"}, tmp_path / "wide")
    kept = moved(tmp_path / "nearest", base, tau)
    assert kept < 0.8
    assert abs(nearest.kept["ja"] - kept) < 0.1
    assert abs(moved(tmp_path / "stochastic", base, tau) - 1) < 0.05
    assert abs(chance.kept["ja"] - 1) < 0.1
    assert wide.kept["ja"] == 1.0
    assert verify_output(tmp_path / "stochastic", full=True)["recomputed"] > 0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_chance_depends_on_seed_and_name_alone(recipe, tmp_path, method):
    recipe = {**recipe[0], "rounding": "stochastic", "seed": 5, "method": method}
    whole = merge(recipe, tmp_path / "whole")
    cut = replace(plan({**recipe, "max_shard_size": "150kB"}, threads=3), tile_bytes=1000)
    cut.run(FolderSink(tmp_path / "cut"))
    first = load_file(tmp_path / "whole" / "model.safetensors")
    shards = [load_file(file) for file in (tmp_path / "cut").glob("*.safetensors")]
    assert len(shards) > 1
    for shard in shards:
        for name, tensor in shard.items():
            assert torch.equal(tensor, first[name])
    other = merge({**recipe, "seed": 6}, tmp_path / "other")
    assert other.files != whole.files
    with pytest.raises(OptimerError, match="rounding"):
        plan({**recipe, "rounding": "random"})
