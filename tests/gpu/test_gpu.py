"""On a GPU: `python -m pytest tests/gpu`. Every kernel against the specification; a pipeline."""

from __future__ import annotations

import pytest
import torch

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


def test_tiles_through_the_gpu_are_the_merge_to_the_bit(write_checkpoint, tmp_path):
    from optimer_engine import plan
    from optimer_engine.cuda import cuda
    from tests.conftest import nearby, random_tensors
    from tests.unit.test_device import WEIGHTS, assert_is_the_merge, merged_on

    base = random_tensors(0)
    recipe = {"base": str(write_checkpoint("base", base)), "sources": []}
    for seed, (name, weight) in enumerate(WEIGHTS.items(), start=1):
        folder = write_checkpoint(name, nearby(base, seed))
        recipe["sources"].append({"name": name, "model": str(folder), "weight": weight})
    devices, made = cuda(resident_bytes=1 << 20), plan(recipe)
    for _ in range(2):
        found, read = merged_on(devices, made)
    assert read == 0
    assert_is_the_merge(found, recipe, tmp_path / "out")
