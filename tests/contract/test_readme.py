"""What README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from optimer_engine.cli import optimer
from optimer_engine.recipe import Recipe, decode
from optimer_engine.strict_yaml import parse

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """models/base, models/ja, models/math: tiny, in a real architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2)
    ).bfloat16()  # fmt: skip
    for name in ("base", "ja", "math"):
        model.save_pretrained(tmp_path / "models" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_run(models, capsys):
    examples = blocks("python")
    assert examples
    for code in examples:
        exec(compile(code, "README.md", "exec"), {})
    assert (models / "merged" / "model.safetensors").exists()


def test_the_recipe_is_a_recipe():
    recipes = [text for text in blocks("yaml") if text.startswith("base:") and "weight:" in text]
    assert recipes
    for text in recipes:
        assert decode(parse(text, "README.md"), Recipe, "README.md").sources


def test_the_search_is_a_search():
    from optimer_engine.search import SearchConfig

    searches = [text for text in blocks("yaml") if "objective:" in text]
    assert searches
    for text in searches:
        assert decode(parse(text, "README.md"), SearchConfig, "README.md").objective


def test_every_command_line_names_options_that_exist():
    shown_lines = [line for text in blocks("sh") for line in text.splitlines()]
    lines = [line for line in shown_lines if line.startswith("optimer ")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.split(" #")[0])
        shown = CliRunner().invoke(optimer, [words[1], "--help"]).output
        for word in words[2:]:
            if word.startswith("-"):
                assert re.search(rf"{re.escape(word)}\b", shown), (line, word)


def test_every_path_in_the_table_exists():
    root = Path(__file__).parents[2]
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    assert rows
    for row in rows:
        paths = re.findall(r"`(.*?)`", row)
        for path in paths:
            home = root / "optimer_engine" if "/" not in path else root
            assert (home / path).exists(), path


def test_the_figures_have_been_filled_in():
    assert "@@" not in README
