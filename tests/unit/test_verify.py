"""`verify` finds what changed; `plan` says what a merge needs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from optimer_engine import extract, merge, plan
from optimer_engine.cli import optimer
from optimer_engine.errors import CheckpointError
from optimer_engine.explain import facts
from optimer_engine.verify import verify_output
from tests.conftest import nearby, random_tensors


@pytest.fixture
def merged(write_checkpoint, tmp_path):
    base = random_tensors(0)
    recipe = {
        "base": str(write_checkpoint("base", base)),
        "sources": [
            {"name": "ja", "model": str(write_checkpoint("ja", nearby(base, 1))), "weight": 0.5}
        ],
        "max_shard_size": "3kB",
    }
    merge(recipe, tmp_path / "out")
    return recipe, tmp_path / "out"


def test_an_untouched_output_verifies_and_recomputes(merged, tmp_path):
    recipe, out = merged
    size = sum(p.stat().st_size for p in out.iterdir() if p.name != "report.json")
    assert verify_output(out)["bytes"] == size
    assert verify_output(out, full=True)["recomputed"] > 0
    extract(recipe["base"], recipe["sources"][0]["model"], tmp_path / "v", metadata={"a": "b"})
    assert verify_output(tmp_path / "v", full=True)["recomputed"] > 0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_sample_is_computed_again_of_every_file(merged, tmp_path, method):
    from optimer_engine import verify

    recipe, _ = merged
    recipe = {**recipe, "method": method}
    merge(recipe, tmp_path / "other")
    whole = verify_output(tmp_path / "other", full=True)["recomputed"]
    for share in (1, 3, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "SAMPLED_SHARE", share)
            assert 0 < verify_output(tmp_path / "other", sampled=True)["recomputed"] <= whole
    for file in sorted((tmp_path / "other").glob("*.safetensors")):
        content = bytearray(file.read_bytes())
        report = json.loads((tmp_path / "other" / "report.json").read_text())
        content[-1 if len(content) % 8 else 8 + int.from_bytes(content[:8], "little")] ^= 1
        (tmp_path / "other" / "report.json").write_text(json.dumps(_signed(report, file, content)))
        before = file.read_bytes()
        file.write_bytes(content)
        verify_output(tmp_path / "other")  # as whoever changed it says it should be
        with pytest.raises(CheckpointError, match="differs from what the sources give now"):
            verify_output(tmp_path / "other", full=True)
        file.write_bytes(before)
        (tmp_path / "other" / "report.json").write_text(json.dumps(report))


def _signed(report, file, content):
    """A report of other bytes."""
    import xxhash

    digest = [0, len(content), xxhash.xxh3_128_hexdigest(bytes(content))]
    return {**report, "files": {**report["files"], file.name: [digest]}}


@pytest.mark.parametrize("pattern", ["model-00001*", "model-00002*", "*.index.json", "config.json"])
def test_one_flipped_bit_anywhere_is_found(merged, pattern):
    _, out = merged
    path = next(out.glob(pattern))
    content = bytearray(path.read_bytes())
    for at in {0, len(content) // 2, len(content) - 1}:
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.name):
            verify_output(out)
        content[at] ^= 1
    path.write_bytes(content)
    verify_output(out)


def test_missing_cut_and_added_files_are_found(merged):
    _, out = merged
    shard = next(out.glob("model-00001*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{len(content) - 1} bytes, {len(content)} were"):
        verify_output(out)
    shard.write_bytes(content)
    (out / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="was not written by the merge"):
        verify_output(out)
    (out / "extra.safetensors").unlink()
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify_output(out)


def test_full_finds_a_source_that_changed(merged, write_checkpoint):
    recipe, out = merged
    import shutil

    source = recipe["sources"][0]["model"]
    shutil.rmtree(source)
    write_checkpoint("ja", nearby(random_tensors(0), 2))
    verify_output(out)
    with pytest.raises(CheckpointError, match="differs from what the sources give now"):
        verify_output(out, full=True)


def test_plan_prints_what_the_merge_then_does(merged, tmp_path):
    recipe, out = merged
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    shown = CliRunner().invoke(optimer, ["plan", str(tmp_path / "recipe.yaml"), "--json"])
    found = json.loads(shown.output)
    dry = ["merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "x"), "--dry-run", "--json"]
    assert json.loads(CliRunner().invoke(optimer, dry).output).keys() == found.keys()
    assert not (tmp_path / "x").exists()
    report = json.loads((out / "report.json").read_text())
    assert found["read_bytes"] == report["bytes_read"]
    assert found["write_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert found["memory_bytes"] == report["projected_mem_bytes"]
    assert found["formula"] == "base + 0.5*(ja - base)"
    assert found["disk_bytes"] == found["write_bytes"]
    assert found["seconds"] >= 0
    assert facts(plan(recipe).with_weights({"ja": 0}))["read_bytes"] < found["read_bytes"]
    text = CliRunner().invoke(optimer, ["plan", str(tmp_path / "recipe.yaml")]).output
    assert "memory" in text
