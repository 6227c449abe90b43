"""examples/mergekit_plugin.py: mergekit's own program, with this engine's methods in it.

OPTIMER_MERGEKIT_PYTHON names an interpreter that has mergekit 0.1.5. The plug-in also needs what
this engine needs there: `pip install optimer-engine` into it, or a PYTHONPATH that has it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from optimer_engine import merge

PYTHON = os.environ.get("OPTIMER_MERGEKIT_PYTHON")
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="OPTIMER_MERGEKIT_PYTHON names no interpreter"),
]


@pytest.fixture
def theirs():
    """The environment in which mergekit runs, with this checkout on its path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [PYTHON, "-c", "import mergekit, optimer_engine.methods, numba"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"OPTIMER_MERGEKIT_PYTHON has not both: {done.stderr.splitlines()[-1]}")
    return env


@pytest.fixture
def models(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "of_sources", "of_all"),
    [
        ("task_arithmetic", {}, {"lambda": 0.9}),
        ("ties", {"density": 0.5}, {"normalize": False}),
        ("dare_ties", {"density": 0.5}, {"seed": 3}),
    ],
)
def test_mergekits_program_calls_our_methods(theirs, models, method, of_sources, of_all):
    base, one, two = (str(models / name) for name in ("base", "one", "two"))
    weights = {one: 0.5, two: -0.25}
    config = {
        "merge_method": f"optimer_{method}",
        "base_model": base,
        "models": [
            {"model": folder, "parameters": {"weight": weight, **of_sources}}
            for folder, weight in weights.items()
        ],
        "parameters": of_all,
    }
    (models / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [PYTHON, ROOT / "examples" / "mergekit_plugin.py", "config.yaml", "out",
         "--no-copy-tokenizer"],
        cwd=models, env=theirs, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sources = [
        {"name": str(number), "model": folder, "weight": weight, "parameters": of_sources}
        for number, (folder, weight) in enumerate(weights.items())
    ]
    shared = {key: value for key, value in of_all.items() if key != "seed"}
    recipe = {"base": base, "method": method, "parameters": shared, "sources": sources}
    merge(recipe, models / "ours", seed=of_all.get("seed"))
    ours, found = (load_file(models / name / "model.safetensors") for name in ("ours", "out"))
    assert ours.keys() == found.keys()
    for name in ours:
        assert torch.equal(ours[name], found[name]), name
    assert not torch.equal(
        ours["model.norm.weight"], load_file(models / "base/model.safetensors")["model.norm.weight"]
    )
