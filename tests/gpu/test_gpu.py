"""On a GPU: `python -m pytest tests/gpu`. Every kernel against the specification; whole merges."""

from __future__ import annotations

import pytest
import torch

from optimer_engine import FolderSink, merge, plan

pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def case_ids():
    from benchmarks.gpu_cases import cases

    return [(c.kernel, c.dtypes, c.sources, c) for c in cases()]


@pytest.mark.parametrize(("kernel", "dtypes", "sources", "case"), case_ids())
def test_a_kernel_gives_the_specified_numbers(kernel, dtypes, sources, case):
    for elems in (1, 2047, 200_003):
        prepared = case.make("cuda", elems)
        prepared.launch()
        assert prepared.wrong() == 0


SHAPES = {"a": (301, 300), "b": (70_001,), "c": (1,), "d": (64, 2048)}
FORMS = {
    "models": ("task_arithmetic", {}, None),
    "ties": ("ties", {"density": 0.3}, None),
    "dare_ties": ("dare_ties", {"density": 0.5}, None),
    "della": ("della", {"density": 0.5}, None),
    "sce": ("sce", {}, None),
    "exact": ("task_arithmetic", {}, "exact"),
    "int8": ("task_arithmetic", {}, "int8"),
    "int4": ("task_arithmetic", {}, "int4"),
}


@pytest.fixture
def recipe(write_checkpoint, tmp_path):
    from optimer_engine.packing import pack
    from tests.conftest import nearby

    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    folder = write_checkpoint("base", base)

    def written(form):
        method, own, mode = FORMS[form]
        sources = []
        for seed, name in enumerate(("ja", "zh"), start=1):
            model = write_checkpoint(name, nearby(base, seed))
            if mode is not None:
                pack(folder, model, tmp_path / f"{name}-packed", mode=mode)
                model = tmp_path / f"{name}-packed"
            weight = 1.0 if method == "sce" else 0.3 * seed
            source = {"name": name, "model": str(model), "weight": weight, "parameters": own}
            sources.append(source)
        return {"base": str(folder), "sources": sources, "method": method}

    return written


@pytest.mark.parametrize("form", FORMS)
def test_merges_through_the_gpu_have_the_cpu_s_bytes(recipe, tmp_path, form):
    asked = recipe(form)
    made = plan(asked, device="cuda", resident_mem="256MiB")
    read = [made.run(FolderSink(tmp_path / f"gpu{k}")).bytes_read for k in range(2)]
    assert read[1] == 0
    merge(asked, tmp_path / "cpu")
    files = [tmp_path / name / "model.safetensors" for name in ("gpu0", "gpu1", "cpu")]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_model_on_the_gpu_is_merged_into_without_leaving_it(recipe, tmp_path):
    from safetensors.torch import load_file

    from optimer_engine import LiveModelSink

    model = torch.nn.ParameterDict({n: torch.zeros(s) for n, s in SHAPES.items()}).cuda()
    asked = recipe("models")
    plan(asked, device="cuda").run(LiveModelSink(model))
    merge(asked, tmp_path / "cpu")
    for name, want in load_file(tmp_path / "cpu" / "model.safetensors").items():
        assert torch.equal(model[name].cpu(), want.float()), name
