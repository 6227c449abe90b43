"""Every recipe of the unit tests as mergekit 0.1.5 itself resolves it, tensor by tensor.

mergekit lives in an environment of its own (it pins other versions): name that interpreter in
OPTIMER_MERGEKIT_PYTHON. Its planner is asked for each tensor's inputs and parameters; recipes with
a tokenizer are run whole, and the rows compared by token.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from optimer_engine.mergekit.settings import SIGNATURES
from tests.unit.test_mergekit_recipes import RECIPES, models, run  # noqa: F401
from tests.unit.test_mergekit_tokenizer import Opened, pool, recipe  # noqa: F401

PYTHON = os.environ.get("OPTIMER_MERGEKIT_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="OPTIMER_MERGEKIT_PYTHON names no interpreter"),
]

DUMP = """
import json, sys, yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

found = {}
for name, text in json.load(sys.stdin).items():
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    out = _model_out_config(config, architecture)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out)
    planner._plan()
    rows = {}
    for weight, task in planner._tensors:
        inputs = task.gather_tensors.weight_info
        rows[weight.name] = {
            "models": [str(model) for model in task.model_order],
            "names": {str(model): info.name for model, info in inputs.items()},
            "base": str(task.base_model) if task.base_model else None,
            "shared": dict(task.parameters.items()),
            "per": {str(m): dict(p.items()) for m, p in task.input_parameters.items()},
        }
    found[name] = {"rows": rows, "layers": out.num_hidden_layers}
json.dump(found, sys.stdout)
"""


def test_mergekits_planner_resolves_every_recipe_alike(run, models):  # noqa: F811
    texts = {name: text.replace("M/", f"{models}/") for name, text in RECIPES.items()}
    done = subprocess.run(
        [PYTHON, "-c", DUMP], input=json.dumps(texts), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    for name, text in RECIPES.items():
        found = run(text)
        labels = [str(model) for model in found.models]
        assert {row.name for row in found.rows} == set(theirs[name]["rows"]), name
        assert found.config["num_hidden_layers"] == theirs[name]["layers"], name
        for row in found.rows:
            want, at = theirs[name]["rows"][row.name], f"{name}: {row.name}"
            signature = SIGNATURES[row.method]
            base = None if signature.base == "ordinary" else want["base"]
            assert (row.base and labels[row.base.checkpoint]) == base, at
            sources = [labels[ref.checkpoint] for ref in row.sources]
            assert sources == [model for model in want["models"] if model != base], at
            assert [ref.name for ref in row.sources] == [want["names"][s] for s in sources], at
            assert dict(row.settings.shared) == pytest.approx(_used(want["shared"], signature)), at
            for source, own in zip(sources, row.settings.per_source, strict=True):
                assert dict(own) == pytest.approx(_used(want["per"][source], signature)), at


def _used(parameters, signature):
    return {
        key: 1.0 if key == "scale" and value is None else value
        for key, value in parameters.items()
        if key not in signature.inert
    }


@pytest.mark.parametrize("case", ["union", "base", "model", "padded", "tokens", "baseless"])
def test_mergekit_aligns_rows_alike(case, pool, tmp_path):  # noqa: F811
    base, one, two = map(str, pool)
    asked = {
        "union": {"tokenizer_source": "union"},
        "base": {"tokenizer_source": "base"},
        "model": {"tokenizer_source": one},
        "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}},
        "tokens": {"tokenizer": {"source": "union", "tokens": {
            "cd": {"source": two},
            "ab": {"source": one, "force": True},
            "<new>": {"source": {"kind": "model_token", "model": one, "token": "<|im_end|>"}},
            "<zero>": {"source": {"kind": "zero"}},
        }}},
        "baseless": {"tokenizer_source": base},
    }[case]  # fmt: skip
    written = recipe(
        pool, base=case != "baseless", dtype="float32", parameters={"normalize": False}, **asked
    )
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    done = subprocess.run(
        [PYTHON, "-m", "mergekit.scripts.run_yaml", "recipe.json", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    opened = Opened(written)
    ours, theirs = (
        opened.ids if "tokenizer.json" in opened.found.files else _ids(pool[0]),
        _ids(tmp_path / "out"),
    )
    assert ours.keys() == theirs.keys()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert opened.found.config["vocab_size"] == json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )["vocab_size"]  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        total = sum(opened.operand(number, name).astype(np.float64) for number in range(3))
        assert merged[name].shape == total.shape
        order = np.arange(len(total))
        for token, number in ours.items():
            order[number] = theirs[token]  # mergekit numbers new tokens in no fixed order
        np.testing.assert_allclose(merged[name][order], total, atol=1e-6)


def _ids(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    return data["model"]["vocab"] | {e["content"]: e["id"] for e in data["added_tokens"]}
