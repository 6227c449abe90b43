"""Every benchmark case runs, small, and its gate can be trusted. Nothing here is timed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import __main__ as cli
from benchmarks import (
    accuracy,
    checkpoints,
    kernel,
    measure,
    merge,
    mergekit,
    overhead,
    rival_torch,
    runner,
)
from benchmarks.accuracy import Accuracy
from benchmarks.cases import CASES
from benchmarks.measure import Cost
from benchmarks.record import Record, summary
from optimer_engine.kernels import reference
from optimer_engine.kernels.reference import BF16, F32

MIB = 1 << 20


def operands(code: int, elems: int = 5000) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(elems, np.float32)
    sources = [base + np.float32(0.03) * rng.standard_normal(elems, np.float32) for _ in range(3)]
    return (
        reference.round_to(base, code),
        [reference.round_to(source, code) for source in sources],
        [0.5, 0.37, -0.21],
    )


@pytest.mark.parametrize("code", [BF16, F32])
def test_the_gate_passes_the_reference_and_sees_a_single_wrong_bit(code: int) -> None:
    base, sources, weights = operands(code)
    out = reference.linear(base, code, sources, [code] * 3, [False] * 3, weights, code)
    assert accuracy.compare(out, base, sources, weights, code).passes

    out.view(np.uint8)[1234 * out.itemsize] ^= 1
    wrong = accuracy.compare(out, base, sources, weights, code)
    assert not wrong.passes
    assert wrong.unlike_reference_elems == 1
    assert wrong.worst_error_steps > 0.5


def test_the_gate_counts_what_arithmetic_in_bfloat16_misrounds() -> None:
    import torch

    base, sources, weights = operands(BF16)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    merged = tensor(base).clone()
    for source, weight in zip(sources, weights, strict=True):
        merged += weight * (tensor(source) - tensor(base))
    out = merged.view(torch.int16).numpy().view(np.uint16)
    found = accuracy.compare(out, base, sources, weights, BF16)
    assert 0.001 < found.misrounded_share < 0.5
    assert not found.passes


def test_an_output_that_fails_the_gate_is_never_timed() -> None:
    runs = []

    def once() -> Cost:
        runs.append(1)
        return Cost(1.0)

    bad = Accuracy(checked_elems=10, misrounded_elems=10, worst_error_steps=3.0)
    ours = runner.Contestant("ours", "ours", 1, once, check=lambda: bad)
    other = runner.Contestant("other", "rival", 1, once, "ours", check=lambda: bad)
    with pytest.raises(runner.GateError, match="no speed is printed"):
        runner.run(runner.Case("x", "x", {}, [other, ours], lambda: None), rounds=3)
    assert len(runs) == 1, "ours is checked before anyone else runs"


def test_checkpoints_are_the_same_for_everyone_and_load_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = checkpoints.make(tmp_path / "a", MIB, 2)
    second = checkpoints.make(tmp_path / "b", MIB, 2)
    assert [f.read_bytes() for f in first.files] == [f.read_bytes() for f in second.files]
    assert len({f.read_bytes() for f in first.files}) == len(first.files) == 3 * checkpoints.SHARDS
    model, loading = AutoModelForCausalLM.from_pretrained(
        first.base, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) * 2 < first.base_bytes < 1.2 * MIB
    assert AutoTokenizer.from_pretrained(first.base).bos_token == "<s>"


@pytest.mark.parametrize("cold", [False, True])
def test_case_merge_measures_everybody_and_checks_their_outputs(tmp_path: Path, cold: bool) -> None:
    rivals = () if cold else ("torch per tensor",)
    record = runner.run(merge.case(tmp_path, MIB, 3, cold, rivals, "command"), rounds=1)
    check_shape(record)
    rows = {row.name: row for row in record.rows}
    assert set(rows) >= {merge.OURS, *rivals, "engine into nothing", "read the files"}
    for name in (merge.OURS, *rivals):
        found = rows[name].accuracy
        assert found is not None and found.passes
        for part in ("peak_rss_bytes", "peak_anon_bytes", "peak_file_bytes"):
            assert (rows[name].most(part) or 0) > 10 * MIB
    assert rows["read the files"].moved_bytes == pytest.approx(4 * MIB, rel=0.2)
    assert record.parameters["page_cache"] == ("cold" if cold else "warm")


@pytest.mark.parametrize("form", ["per-tensor", "whole"])
def test_the_torch_scripts_merge_as_accurately_as_they_claim(tmp_path: Path, form: str) -> None:
    inputs = checkpoints.make(tmp_path, MIB, 2)
    out = tmp_path / "out"
    sources = list(zip(inputs.weights, inputs.sources, strict=True))
    rival_torch.main(form, out, inputs.base, sources)
    found = accuracy.of_folder(out, inputs)
    assert found.checked_elems > 0.4 * MIB and found.misrounded_share < 1e-3


def test_case_kernel_checks_bfloat16_and_float32(tmp_path: Path) -> None:
    record = runner.run(kernel.case(tmp_path, MIB, 4, False, kernel.RIVALS, "command"), rounds=1)
    check_shape(record)
    checked = [row for row in record.rows if row.accuracy is not None]
    assert {row.kind for row in checked} == {"ours", "rival"}
    assert all(row.accuracy.passes for row in checked if row.kind == "ours")


def test_case_overhead_times_one_trial_and_checks_the_live_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "TRIALS", 9)
    record = runner.run(overhead.case(tmp_path, MIB, 4, False, (), "command"), rounds=1)
    check_shape(record)
    rows = {row.name: row for row in record.rows}
    whole, proposal, merged = (rows[n].wall_s.p50 for n in rows)
    assert whole > 0 and proposal > 0 and merged > 0
    found = rows["of it, the merge in place"].accuracy
    assert found is not None and found.passes
    trials = (tmp_path / "trial" / "run" / "trials.jsonl").read_text().splitlines()
    assert sum('"told"' in line for line in trials) == 11


@pytest.mark.parametrize("name", ["memory", "methods", "startup"])
def test_cases_without_a_gate_measure_whole_processes(tmp_path: Path, name: str) -> None:
    case = CASES[name].case(tmp_path, 4 * MIB, 2, False, (), "command")
    record = runner.run(case, rounds=1)
    check_shape(record)
    ours = [row for row in record.rows if row.kind == "ours"]
    assert len(ours) >= 4
    assert all((row.most("peak_rss_bytes") or 0) > 5 * MIB for row in ours)


def test_case_vectors_checks_what_it_unpacks_and_states_what_entropy_allows(tmp_path: Path) -> None:
    case = CASES["vectors"].case(tmp_path, 4 * MIB, 2, False, (), "command")
    record = runner.run(case, rounds=1)
    check_shape(record)
    (checked,) = [row for row in record.rows if row.accuracy is not None]
    assert checked.name == "unpack exact" and checked.accuracy.passes
    found = record.parameters
    assert found["merge_int8_reads_bytes"] < found["merge_full_reads_bytes"]
    for dtype in ("bf16", "fp16", "fp32"):
        taken, least = found[f"exact_share_{dtype}"], found[f"entropy_share_{dtype}"]
        assert all(low < share < low + 0.15 for share, low in zip(taken, least, strict=True))


def test_case_inspect_measures_the_process_and_reading(tmp_path: Path) -> None:
    record = runner.run(CASES["inspect"].case(tmp_path, 4 * MIB, 2, False, (), "c"), rounds=1)
    check_shape(record)
    assert [row.kind for row in record.rows] == ["ours", "ceiling"]
    assert 5 * MIB < (record.rows[0].most("peak_rss_bytes") or 0) < 300 * MIB


def check_shape(record: Record) -> None:
    assert record.rows and all(len(row.rounds) == 1 for row in record.rows)
    names = [row.name for row in record.rows]
    assert len(set(names)) == len(names)
    for row in record.rows:
        assert row.kind in ("ours", "rival", "ceiling")
        assert (row.ratio is None) == (row.compared_to is None)
        assert row.compared_to is None or row.compared_to in names
        assert row.wall_s.p20 <= row.wall_s.p50 <= row.wall_s.p80
    assert {"cpu", "cores", "memory_gib", "system", "python"} == set(record.machine)
    assert "numba" in record.versions
    line = record.to_json()
    assert "\n" not in line
    import msgspec

    assert msgspec.json.decode(line, type=Record).rows[0] == record.rows[0]
    assert all(name in summary(record) for name in names)


def test_the_launcher_sees_memory_time_and_failure(tmp_path: Path) -> None:
    def run(code: str) -> Cost:
        return measure.of_process([sys.executable, "-c", code], tmp_path / "log")

    small = run("import time; time.sleep(0.1)")
    large = run("import time; held = bytes(range(250)) * 400_000; time.sleep(0.1)")
    assert large.peak_anon_bytes - small.peak_anon_bytes == pytest.approx(100e6, rel=0.1)
    assert large.peak_rss_bytes - small.peak_rss_bytes == pytest.approx(100e6, rel=0.1)
    assert small.wall_s > 0.1
    # What this process holds is not counted: torch is loaded here.
    assert small.peak_rss_bytes < 30e6
    with pytest.raises(RuntimeError, match="no such luck"):
        run("raise SystemExit('no such luck')")


def test_a_file_is_read_from_the_disk_when_evicted_and_not_when_warm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))

    def disk_bytes() -> int:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counters["read_bytes"])

    measure.evict([path])
    start = disk_bytes()
    measure.warm([path])
    cold = disk_bytes()
    measure.warm([path])
    if cold == start:
        pytest.skip("this file system has no disk under it")
    assert cold - start >= MIB
    assert disk_bytes() == cold


def test_mergekit_gets_the_same_merge(tmp_path: Path) -> None:
    inputs = checkpoints.Inputs(tmp_path / "base", (tmp_path / "a", tmp_path / "b"), (0.4, 0.3))
    config = yaml.safe_load(mergekit.config(inputs, "float32"))
    assert config["merge_method"] == "task_arithmetic"
    assert config["base_model"] == str(tmp_path / "base")
    assert [m["parameters"]["weight"] for m in config["models"]] == [0.4, 0.3]
    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")


def test_the_command_line_prints_a_table_and_ends_with_one_line_of_json(tmp_path: Path) -> None:
    from click.testing import CliRunner

    arguments = ["run", "kernel", "--size-gb", "0.001", "--repeats", "1", "--without", "all"]
    out = tmp_path / "record.json"
    done = CliRunner().invoke(cli.main, [*arguments, "--work", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("| |")
    assert Record.load(out).command.startswith("python -m benchmarks run kernel --size-gb 0.001")
    import msgspec

    assert msgspec.json.decode(done.stdout.splitlines()[-1], type=Record).case == "kernel"
    refused = CliRunner().invoke(cli.main, [*arguments, "--without", "nobody"])
    assert refused.exit_code == 2 and "rivals are torch" in refused.output


def test_the_readme_shows_the_committed_results() -> None:
    text = (cli.HERE / "README.md").read_text("utf-8")
    assert cli.with_tables(text) == text
    for name in CASES:
        assert f"run {name}" in text
    for path in (cli.HERE / "results").glob("*.json"):
        assert f"<!-- {path.stem} -->" in text
