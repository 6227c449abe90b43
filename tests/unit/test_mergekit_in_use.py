"""Recipes as people publish them, through the program: written, explained, loaded, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from optimer_engine.cli import optimer
from tests import recipes_in_use
from tests.recipes_in_use import RECIPES, REFUSED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return recipes_in_use.models(tmp_path_factory.mktemp("in_use"))


def run(*arguments):
    return CliRunner().invoke(optimer, ["merge", *map(str, arguments)])


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_as_it_is_and_transformers_loads_the_result(folder, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "merge.yml"
    path.write_text(recipes_in_use.text(name, folder))
    dry = run(path, "-o", tmp_path / "out", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    done = run(path, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert str(model.dtype) == f"torch.{config['torch_dtype']}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == config["vocab_size"] >= len(tokenizer)
    with torch.no_grad():
        logits = model(**tokenizer("ab cd", return_tensors="pt")).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(folder, tmp_path, name):
    method, rest, says = (part.replace("M/", f"{folder}/") for part in REFUSED[name])
    (tmp_path / "merge.yml").write_text(f"{method}\n{rest}\n")
    done = run(tmp_path / "merge.yml", "-o", tmp_path / "out")
    assert isinstance(done.exception, ValueError)
    assert says in str(done.exception)
    assert not (tmp_path / "out").exists()
