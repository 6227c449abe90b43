"""The Python that the pages in docs/ show runs as it stands there, each page from top to bottom."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks import agreement
from optimer_engine import merge, methods
from optimer_engine.methods import registry
from optimer_engine.recipe import Recipe, Source
from tests.contract.test_readme import models  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name, monkeypatch):
    """Run a page's blocks as one module, which other code can import; what it leaves behind."""
    text = (DOCS / name).read_text(encoding="utf-8")
    module = types.ModuleType(name.removesuffix(".md"))
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code in blocks:
        exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def own_methods(monkeypatch):
    """Methods that a page registers are gone afterwards."""
    registry.names()  # ours are imported on demand, and only once
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


class Engine:
    """vLLM's LLM as far as the page uses it: workers of a mixed-in class, and models that load."""

    def __init__(self, model, worker_extension_cls):
        module, _, name = worker_extension_cls.rpartition(".")
        self.folder, self.reset = Path(model), False
        extension = getattr(sys.modules[module], name)
        self.worker = type("Worker", (extension,), {})()
        self.loaded = {}
        inner = types.SimpleNamespace(load_weights=self.load_weights)
        self.worker.model_runner = types.SimpleNamespace(model=inner)

    def load_weights(self, weights):
        known = load_file(self.folder / "model.safetensors")
        for name, tensor in weights:
            assert isinstance(tensor, torch.Tensor) and tensor.shape == known[name].shape
            self.loaded[name] = tensor
        return set(self.loaded)

    def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self):
        self.reset = True


def test_python(models, own_methods, monkeypatch):  # noqa: F811
    made = types.ModuleType("vllm")
    made.LLM = Engine
    monkeypatch.setitem(sys.modules, "vllm", made)
    page = run_page("python.md", monkeypatch)
    merge(page.recipe, models / "merged")
    expected = load_file(models / "merged" / "model.safetensors")
    assert page.llm.reset
    assert page.llm.loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(page.llm.loaded[name], tensor)
        assert page.sink.squares[name] == pytest.approx(tensor.double().square().sum().item())
    assert (models / "agreed" / "model.safetensors").exists()


def test_recipes():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    recipe = Recipe.load(yaml.safe_load(shown))
    default = Recipe("b", [Source("s", "m")])
    for key in ("method", "max_shard_size", "rows", "vocabulary", "rounding", "seed"):
        assert getattr(recipe, key) == getattr(default, key), key
    assert set(yaml.safe_load(shown)) == set(Recipe.__struct_fields__)
    assert set(yaml.safe_load(shown)["sources"][0]) == set(Source.__struct_fields__)


def test_methods(own_methods, monkeypatch):
    page = run_page("methods.md", monkeypatch)
    found = methods.merge_arrays(
        "clipped", np.zeros(2, np.float32), [np.full(2, 0.5, np.float32)], {}, [{"weight": -1.0}]
    )
    assert found.tolist() == pytest.approx([-1e-3, -1e-3])
    assert page.clipped


def test_the_table_of_agreement_is_that_of_the_committed_run():
    rows = agreement.read(Path(agreement.__file__).parent / "results" / "agreement.jsonl")
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert f"<!-- agreement -->\n{agreement.by_method(rows)}\n<!-- end -->" in text


def test_mergekit(models, monkeypatch, capsys):  # noqa: F811
    (models / "config.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: models/base\n"
        "models: [{model: models/ja, parameters: {weight: 0.5}}]\n"
    )
    run_page("mergekit.md", monkeypatch)
    assert "base + 0.5 (ja - base)" in capsys.readouterr().out
