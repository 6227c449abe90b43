"""The GPU kernels without a GPU: results in Triton's interpreter, machine code by its compiler."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine import kernels, ops
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.kernels import cpu, reference
from optimer_engine.types import MERGEABLE

triton = pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")

ROOT = Path(__file__).parents[2]
CODES = range(4)
POISON = 0x7E
INFINITY = (0x7F80, 0x7C00, 0x7F800000, 0x7FF0000000000000)
LEADING_BIT = (0x40, 0x200, 0x400000, 0x8000000000000)


def kernels_package(name, interpret):
    """kernels/ once more under another name, run by Triton's interpreter or compiled.

    Triton settles which of the two when it defines a kernel, so this works whatever another test
    has imported before.
    """
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules[name] = package
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        return importlib.import_module(f"{name}.gpu")


gpu = kernels_package("interpreted_kernels", interpret=True)


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of what these tests do on purpose."""
    with np.errstate(all="ignore"):
        yield


def values(rng, elems, code, wild):
    """Stored values; if `wild`, with zeros, denormals, huge numbers, infinities and NaNs."""
    numbers = rng.standard_normal(elems)
    if wild and elems:
        special = [0.0, -0.0, 1e-40, -3e-8, 6e4, -3e38, np.inf, -np.inf, np.nan]
        where = rng.random(elems) < 0.1
        numbers[where] = rng.choice(special, where.sum())
    return reference.round_to(numbers, code)


def as_torch(array):
    return torch.from_numpy(array.view(f"i{array.itemsize}"))


def place(array, offset):
    """A copy that starts `offset` elements past an aligned address, in poisoned surroundings."""
    room = np.full((array.size + 128) * array.itemsize, POISON, np.uint8).view(array.dtype)
    skip = 64 + -room.ctypes.data % 64 // array.itemsize + offset
    room[skip : skip + array.size] = array
    return room, room[skip : skip + array.size]


def assert_same(got, want, code):
    """Equal to the bit; a NaN to any quiet NaN."""
    bits, expected = (array.view(f"u{array.itemsize}") for array in (got, want))
    magnitude = np.array(INFINITY[code], bits.dtype)
    sign = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    is_nan = (expected & ~sign) > magnitude
    assert np.array_equal(bits[~is_nan], expected[~is_nan])
    assert np.all((bits[is_nan] & ~sign) > magnitude)
    assert np.all(bits[is_nan] & np.array(LEADING_BIT[code], bits.dtype))


def check(elems, base_code, codes, out_code, add_base, seed, wild=False, offsets=(0,)):
    rng = np.random.default_rng(seed)
    offset = lambda: int(rng.choice(offsets))  # noqa: E731
    _, base = place(values(rng, elems, base_code, wild), offset())
    sources = [place(values(rng, elems, code, wild), offset())[1] for code in codes]
    is_delta = [bool(b) for b in rng.integers(0, 2, len(codes))]
    weights = list(rng.uniform(-1, 1.5, len(codes)))
    room, out = place(np.zeros(elems, reference.STORAGE[out_code]), offset())
    want = reference.linear(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    nonfinite = gpu.linear(
        as_torch(base), base_code, [as_torch(s) for s in sources], codes, is_delta, weights,
        as_torch(out), out_code, add_base,
    )  # fmt: skip
    assert_same(out, want, out_code)
    assert nonfinite == ops.nonfinite(want, MERGEABLE[out_code]).any()
    out.view(np.uint8)[:] = POISON
    assert np.all(room.view(np.uint8) == POISON), "written outside of the output"


@settings(max_examples=50, deadline=None)
@given(
    elems=st.sampled_from([0, 1, 2, 7, 255, 256, 257, 1025, 2047, 2048, 2049, 4100]),
    base_code=st.sampled_from(CODES),
    codes=st.lists(st.sampled_from(CODES), max_size=9),
    out_code=st.sampled_from(CODES),
    add_base=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
    offsets=st.sampled_from([(0,), (1,), (0, 1, 3)]),
)
def test_linear_equals_the_reference_to_the_bit(**case):
    check(**case)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 32, 33])
def test_any_number_of_sources(code, count):
    check(2049, code, [code] * count, code, True, seed=count)


def test_rounding_to_bf16_matches_torch_on_half_way_cases():
    high = np.arange(0, 2**16, 37, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    singles = (high | low).reshape(-1).view(np.float32)
    singles = singles[np.isfinite(singles) & (singles != 0)]
    want = torch.from_numpy(singles).to(torch.bfloat16).view(torch.int16)
    out = torch.empty(singles.size, dtype=torch.int16)
    base = torch.zeros_like(out)
    gpu.linear(base, 0, [torch.from_numpy(singles)], [2], [True], [1.0], out, 0)
    assert torch.equal(out, want)


def test_fp64_is_rounded_to_a_half_once_not_twice():
    for out_code, digits in ((reference.BF16, 8), (reference.F16, 11)):
        above = 1 + 2.0**-digits + 2.0**-40
        just_above_a_tie = torch.tensor([above, -above], dtype=torch.float64)
        out = torch.empty(2, dtype=torch.int16)
        gpu.linear(
            torch.zeros(2, dtype=torch.float64), 3, [just_above_a_tie], [3], [True], [1.0],
            out, out_code,
        )  # fmt: skip
        rounded = reference.upcast(out.numpy().view(np.uint16), out_code, np.float64)
        assert list(rounded) == [1 + 2.0 ** (1 - digits), -(1 + 2.0 ** (1 - digits))]


@pytest.mark.parametrize("weight", [0.1, 1e300, 5e-324, 2.0, 0.0, -0.0])
def test_fp64_weights_arrive_to_the_bit(weight):
    out = torch.empty(3, dtype=torch.float64)
    source = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    gpu.linear(torch.zeros(3, dtype=torch.float64), 3, [source], [3], [True], [weight], out, 3)
    assert torch.equal(out, source * weight)


def test_unchanged_elements_keep_their_bits_with_negative_zero_and_denormals():
    base = np.array([0x8000, 0x0000, 0x0001, 0x8001, 0x3F80, 0x7F7F], np.uint16)
    out, same = np.zeros_like(base), as_torch(base)
    assert not gpu.linear(same, 0, [same] * 2, [0] * 2, [False] * 2, [0.7, -2], as_torch(out), 0)
    assert np.array_equal(out, base)


def test_merging_in_place_is_allowed():
    rng = np.random.default_rng(0)
    base, source = (values(rng, 5001, 0, False) for _ in range(2))
    want = reference.linear(base, 0, [source], [0], [False], [0.4], 0)
    gpu.linear(as_torch(base), 0, [as_torch(source)], [0], [False], [0.4], as_torch(base), 0)
    assert np.array_equal(base, want)


def batch_of(seed, sizes, count, wild=False):
    """Bases, sources and outputs of mixed dtypes and alignments; output 0 is its base."""
    rng = np.random.default_rng(seed)
    bases, sources, outs = [], [], []
    for size in sizes:
        base_code, code, out_code = (int(c) for c in rng.integers(0, 4, 3))
        start = lambda: int(rng.choice([0, 0, 1]))  # noqa: E731

        def typed(code, size=size, start=start):
            stored = place(values(rng, size, code, wild), start())[1]
            return as_torch(stored).view(gpu.TORCH_DTYPES[code])

        bases.append(typed(base_code))
        sources.append([typed(code) for _ in range(count)])
        outs.append(typed(out_code) if outs else bases[0])
    return bases, sources, outs


def stored(tensor):
    code = gpu.TORCH_DTYPES.index(tensor.dtype)
    array = tensor.view(torch.int16).numpy() if tensor.itemsize == 2 else tensor.numpy()
    return array.view(reference.STORAGE[code]), code


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 256, 2048, 2049, 7000]), min_size=1, max_size=7),
    count=st.sampled_from([0, 1, 2, 5]),
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
)
def test_a_batch_equals_the_reference_to_the_bit(sizes, count, seed, wild):
    bases, sources, outs = batch_of(seed, sizes, count, wild)
    is_delta = [i % 2 == 0 for i in range(count)]
    weights = list(np.random.default_rng(seed).uniform(-1, 1.5, count))
    wanted, verdict = [], False
    for base, own, out in zip(bases, sources, outs, strict=True):
        stored_own, codes = [stored(s)[0] for s in own], [stored(s)[1] for s in own]
        code = stored(out)[1]
        wanted.append(reference.linear(*stored(base), stored_own, codes, is_delta, weights, code))
        verdict |= bool(ops.nonfinite(wanted[-1], MERGEABLE[code]).any())
    assert gpu.Batch(bases, sources, is_delta, outs).merge(weights) == verdict
    for out, want in zip(outs, wanted, strict=True):
        assert_same(stored(out)[0], want, stored(out)[1])


def test_a_batch_is_merged_again_with_other_weights():
    bases, outs = ([torch.zeros(size) for size in (3, 300)] for _ in range(2))
    sources = [[torch.ones(size)] for size in (3, 300)]
    batch = gpu.Batch(bases, sources, [False], outs)
    for weight in (0.5, 2.0):
        assert not batch.merge([weight])
        assert all(torch.equal(out, torch.full_like(out, weight)) for out in outs)


def test_offsets_beyond_32_bits():
    # A tensor of 2^33 elements of which only the last ones exist: the table says it began earlier.
    bases, sources, outs = [torch.zeros(100)], [[torch.ones(100)]], [torch.empty(100)]
    batch = gpu.Batch(bases, sources, [False], outs)
    (table, *_, constants), before = batch.groups[0], 2**33
    table[0, 0] += before
    table[0, 1] -= before // constants["BLOCK"]
    table[0, 2:] -= before * 4
    batch.merge([0.25])
    assert torch.equal(outs[0], torch.full((100,), 0.25))


def test_what_does_not_fit_is_refused():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="65 sources in one launch; at most 64"):
        gpu.linear(one, 2, [one] * 65, [2] * 65, [True] * 65, [0.0] * 65, one, 2)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        gpu.Batch([one], [[one, one]], [True, True], [one]).merge([1.0])


class OneH100:
    """Triton's driver, as far as compiling goes."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_other_weights_lengths_and_counts_compile_nothing_anew(monkeypatch):
    compiled = kernels_package("compiled_kernels", interpret=False)
    made = []

    def compile_only(self, *arguments, grid, warmup, **options):
        made.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    launch = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", OneH100())
    for dtype in (torch.bfloat16, torch.float64):
        for elems, weights in (
            (5000, [0.3, 0.5, 1.0]),
            (1, [1, 16.0, 2.0]),
            (16, [0.0, 1e30, -0.0, 0.1]),
        ):
            tensor = torch.zeros(elems, dtype=dtype)
            code, count = compiled.TORCH_DTYPES.index(dtype), len(weights)
            deltas = [w == 1.0 for w in weights]
            sources = [tensor] * count
            compiled.linear(tensor, code, sources, [code] * count, deltas, weights, tensor, code)
            compiled.Batch([tensor] * 20, [sources] * 20, deltas, [tensor] * 20).merge(weights)
    assert len(made) == 12
    assert len({id(kernel) for kernel in made}) == 4


def test_machine_code_keeps_wide_accesses_and_does_not_spill(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.kernels_aot", "--dtypes", "bf16", "--sources", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])["codes"]
    assert [(code["kernel"], code["target"]) for code in codes] == [
        (kernel, target)
        for kernel in ("linear", "batch")
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    ]
    for code in codes:
        what = code["kernel"], code["target"]
        assert (code["loads"], code["stores"]) == ({"128": 5}, {"128": 1}), what
        for trouble in ("spills", "scalar_spills", "fused_multiply_adds", "divisions"):
            assert code[trouble] == 0, (*what, trouble)
        assert code["registers"] <= 64, what


def test_the_committed_report_shows_what_is_promised():
    import msgspec

    from benchmarks.kernels_aot import RESULTS, Code, table

    report = json.loads((RESULTS / "kernels_aot.json").read_text())
    codes = [msgspec.convert(code, Code, strict=False) for code in report["codes"]]
    assert table(codes) in (RESULTS / "kernels_aot.md").read_text("utf-8")
    for code in codes:
        assert (code.spills, code.fused_multiply_adds, code.divisions) == (0, 0, 0), code
        if code.dtypes == "bf16" and (code.sources <= 16 or code.target != "gfx942"):
            assert code.bulk, code


def test_the_readme_shows_the_roofline():
    from benchmarks.roofline import seconds, table

    assert table() in (ROOT / "kernels" / "README.md").read_text("utf-8")
    assert seconds(27e9, 2, 4)["HBM"] == pytest.approx(6 * 54 / 3000)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """As if there were a GPU, whose memory is main memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "optimer_engine.kernels.gpu", gpu)
    monkeypatch.setattr(kernels, "gpu", gpu, raising=False)
    monkeypatch.setattr(ops, "_on_gpu", lambda array: isinstance(array, torch.Tensor))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_merge_tensors_runs_where_the_tensors_are(pretend_gpu, monkeypatch, impl):
    monkeypatch.setattr(cpu, "linear", None)
    base = torch.randn(3, 5, 7).to(torch.bfloat16)
    source = base + 1
    merged = ops.merge_tensors(base, [source], [1.0], impl=impl, out_dtype="float32")
    assert (merged.dtype, merged.shape) == (torch.float32, base.shape)
    assert torch.equal(merged, source.float())


def test_tensors_elsewhere_are_refused_not_moved(pretend_gpu):
    array = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match="all on one GPU expected"):
        ops.linear_kernel("triton")(
            array, MERGEABLE[2], [array], [MERGEABLE[2]], [True], [1.0], array,
            MERGEABLE[2], True,
        )  # fmt: skip
    with pytest.raises(RecipeError, match="main memory expected"):
        ops.merge_tensors(torch.ones(3), [torch.ones(3)], [1.0], impl="cpu")


def test_triton_asked_for_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="no CUDA or ROCm device"):
        ops.merge_tensors(torch.ones(3), [torch.ones(3)], [1.0], impl="triton")


def test_triton_asked_for_without_triton_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimer_engine.kernels.gpu", None)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    with pytest.raises(MissingExtraError, match="triton cannot be imported") as caught:
        ops.linear_kernel("triton")
    assert "optimer-engine[gpu]" in str(caught.value)
