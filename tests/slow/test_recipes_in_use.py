"""Published recipes through both programs: the same tensors, the same numbers, token by token.

OPTIMER_MERGEKIT_PYTHON names an interpreter that has mergekit 0.1.5. Both compute in fp32 here, as
mergekit's `dtype` is also that of its arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from optimer_engine import merge
from tests import recipes_in_use
from tests.recipes_in_use import CHANCE, RECIPES

PYTHON = os.environ.get("OPTIMER_MERGEKIT_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="OPTIMER_MERGEKIT_PYTHON names no interpreter"),
]

THEIRS = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
work = sys.argv[1]
failed = {}
for name, (text, out) in json.load(sys.stdin).items():
    options = MergeOptions(write_model_card=False, quiet=True, lora_merge_cache=work + "/cache")
    try:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options=options)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
json.dump(failed, open(work + "/failed.json", "w"))
"""

THEY_FAIL: set[str] = set()
"""Recipes that mergekit itself does not run."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    work = tmp_path_factory.mktemp("in_use")
    folder = recipes_in_use.models(work)
    calls = {}
    for number, name in enumerate(RECIPES):
        recipe = yaml.safe_load(recipes_in_use.text(name, folder))
        recipe = {**recipe, "dtype": "float32"}
        recipe.pop("out_dtype", None)
        calls[name] = (yaml.safe_dump(recipe), str(work / f"theirs-{number}"))
        merge(recipe, work / f"ours-{number}", compat="mergekit")
    done = subprocess.run(
        [PYTHON, "-c", THEIRS, str(work)], input=json.dumps(calls), text=True, check=False,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return work, json.loads((work / "failed.json").read_text())


def vocabulary(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    return {**data["model"]["vocab"], **{e["content"]: e["id"] for e in data["added_tokens"]}}


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_mergekit_s(outputs, name):
    work, failed = outputs
    number = list(RECIPES).index(name)
    assert (name in failed) == (name in THEY_FAIL), failed.get(name)
    if name in failed:
        return
    ours, theirs = (work / f"{who}-{number}" for who in ("ours", "theirs"))
    mine, yours = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert mine.keys() == yours.keys()
    tokens, their_tokens = vocabulary(ours), vocabulary(theirs)
    assert tokens.keys() == their_tokens.keys()
    order = sorted(tokens)
    for key in mine:
        a, b = mine[key], yours[key]
        assert a.shape == b.shape, key
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            a, b = (
                array[[ids[t] for t in order]] for array, ids in ((a, tokens), (b, their_tokens))
            )
        if name == "arcee_fusion":  # rests on fp32 sums that cancel; see docs/methods.md
            assert np.mean(np.abs(a - b) > 2e-6) < 0.01, key
        elif name not in CHANCE:
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6, err_msg=key)
    said = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    for key in ("vocab_size", "num_hidden_layers", "tie_word_embeddings", "architectures"):
        assert said[0].get(key) == said[1].get(key), key
