"""fp8: as plain numbers, and with scales that are multiplied on reading."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import FolderSink, OptimerError, merge, plan
from optimer_engine.operands import fp8_values
from optimer_engine.types import DType

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(("code", "dtype"), [("F8_E4M3", FP8[0]), ("F8_E5M2", FP8[1])])
def test_every_bit_pattern_has_torchs_value(code, dtype):
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(dtype).float().numpy()
    assert np.array_equal(fp8_values(DType[code]), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_checkpoints_merge_like_any_other(write_checkpoint, tmp_path, dtype):
    torch.manual_seed(0)
    base, ja = (torch.randn(33, 17).to(dtype) for _ in range(2))
    recipe = {
        "base": str(write_checkpoint("base", {"w": base})),
        "sources": [
            {"name": "ja", "model": str(write_checkpoint("ja", {"w": ja})), "weight": 0.25}
        ],
    }
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    exact = base.double() + 0.25 * (ja.double() - base.double())
    assert found.dtype == dtype
    assert torch.equal(found.float(), exact.float().to(dtype).float())
    bad = ja.clone()
    bad.view(torch.uint8)[3, 4] = 0x7F
    recipe["sources"][0]["model"] = str(write_checkpoint("bad", {"w": bad}))
    with pytest.raises(OptimerError, match="w holds NaN or infinity: first at element 55"):
        merge(recipe, tmp_path / "out2")


def scaled(form, rows=70, columns=45, seed=0):
    """(fp8 weight, scale as stored, its name, the numbers meant)."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    shape = {"tensor": (), "one": (1,), "row": (rows,), "column": (rows, 1), "grid": (3, 2)}[form]
    scale = torch.rand(shape) + 0.5
    full = torch.ones(rows, columns, dtype=torch.float64)
    if form in ("row", "column"):
        full *= scale.reshape(rows, 1).double()
    elif form == "grid":
        grid = scale.double().repeat_interleave(32, 0).repeat_interleave(32, 1)
        full *= grid[:rows, :columns]
    else:
        full *= scale.double()
    name = "w.weight_scale_inv" if form == "grid" else "w.weight_scale"
    return weight, scale, name, weight.double() * full


@pytest.mark.parametrize("tile_bytes", [60, 2**19])
@pytest.mark.parametrize("form", ["tensor", "one", "row", "column", "grid"])
def test_scales_are_multiplied_on_reading(write_checkpoint, tmp_path, form, tile_bytes):
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config = {"quantization_config": quantization, "hidden_size": 45}
    made = []
    for number, name in enumerate(("base", "ja")):
        weight, scale, scale_name, meant = scaled(form, seed=number)
        tensors = {
            "w.weight": weight, scale_name: scale, "w.input_scale": torch.ones(1),
            "norm.weight": torch.ones(45).bfloat16(),
        }  # fmt: skip
        made.append((write_checkpoint(name, tensors, config), meant))
    (base, theta0), (ja, theta1) = made
    recipe = {
        "base": str(base),
        "sources": [{"name": "ja", "model": str(ja), "weight": 0.5}],
        "out_dtype": "float32",
    }
    replace(plan(recipe), tile_bytes=tile_bytes).run(FolderSink(tmp_path / "out"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert set(out) == {"w.weight", "norm.weight"}
    exact = theta0 + 0.5 * (theta1 - theta0)
    assert torch.allclose(out["w.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["hidden_size"] == 45
    del recipe["out_dtype"]
    merge(recipe, tmp_path / "bf16")
    found = load_file(tmp_path / "bf16" / "model.safetensors")["w.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, out["w.weight"].bfloat16())


def test_a_scale_that_fits_no_form_is_refused(write_checkpoint):
    weight, _, _, _ = scaled("tensor")
    tensors = {"w.weight": weight, "w.weight_scale": torch.ones(40, 3)}
    folder = str(write_checkpoint("base", tensors))
    recipe = {"base": folder, "sources": [{"name": "x", "model": folder}]}
    with pytest.raises(OptimerError, match=r"w.weight \[70, 45\] has a scale of shape \[40, 3\]"):
        plan(recipe)
