"""A pool on the disk: what it holds is whole, described, of one base, and survives a crash."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from optimer_engine import pool as pools
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.cli.pool import command
from optimer_engine.engine import extract, merge
from optimer_engine.errors import CheckpointError, MismatchError, OutputError, RecipeError
from optimer_engine.pool import Note, add, read, remove, verify
from optimer_engine.pool.manifest import read_manifest
from tests.conftest import nearby, random_tensors


@pytest.fixture
def base(write_checkpoint) -> Path:
    return write_checkpoint("base", random_tensors(0))


@pytest.fixture
def vector(base, write_checkpoint, tmp_path):
    """vector(seed) -> a vector's folder."""

    def make(seed: int) -> Path:
        out = tmp_path / f"vector-{seed}"
        trained = write_checkpoint(f"trained-{seed}", nearby(random_tensors(0), seed))
        extract(base, trained, out, metadata={"dataset": f"text {seed}", "tokens": "5000"})
        return out

    return make


def adapter(folder: Path, rank: int = 2) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.mlp"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(rank, 53), f"{name}.lora_B.weight": torch.ones(24, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["mlp"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_what_is_added_is_described_merges_and_can_be_removed(base, vector, tmp_path):
    pool = tmp_path / "pool"
    first = add(pool, vector(1), "ja", base=str(base), note=Note(license="cc0-1.0", seed=3))
    add(pool, vector(2), "math")

    manifest = read(pool)
    with Checkpoint.open(base) as opened:
        assert manifest.base_fingerprint == opened.fingerprint
    assert manifest.base == "base"  # a folder's own name: no path of this machine goes out
    assert manifest.find("ja") == first
    assert (first.dataset, first.tokens, first.license, first.seed) == (
        "text 1", 5000, "cc0-1.0", 3,
    )  # fmt: skip
    assert set(first.files) == {"vector.safetensors"}
    assert verify(pool) == []
    assert str(tmp_path) not in (pool / "pool.json").read_text()

    recipe = {"base": str(base), "sources": [{"name": "ja", "model": str(pool / "ja")}]}
    merge(recipe, tmp_path / "merged")
    with Checkpoint.open(tmp_path / "merged") as merged, Checkpoint.open(base) as before:
        assert merged.fingerprint != before.fingerprint

    remove(pool, "ja")
    assert [entry.name for entry in read(pool).vectors] == ["math"]
    assert not (pool / "ja").exists() and verify(pool) == []
    with pytest.raises(RecipeError, match="no vector 'ja'; there is math"):
        remove(pool, "ja")


def test_adding_the_same_again_changes_nothing_and_another_is_refused(base, vector, tmp_path):
    pool, one, two = tmp_path / "pool", vector(1), vector(2)
    add(pool, one, "ja", base=str(base))
    before = tree(pool)
    add(pool, one, "ja")
    assert tree(pool) == before
    with pytest.raises(RecipeError, match="another 'ja'"):
        add(pool, two, "ja")
    assert tree(pool) == before
    add(pool, two, "ja", replace=True)
    assert (pool / "ja" / "vector.safetensors").read_bytes() == (
        two / "vector.safetensors"
    ).read_bytes()
    assert verify(pool) == []
    with pytest.raises(RecipeError, match="there is 'ja' in the pool"):
        add(pool, one, "JA")  # the same folder, to some file systems


def test_linked_files_take_no_second_copy(base, vector, tmp_path):
    source = vector(1)
    add(tmp_path / "pool", source, "ja", base=str(base), link=True)
    stored = tmp_path / "pool" / "ja" / "vector.safetensors"
    assert stored.samefile(source / "vector.safetensors")
    shutil.rmtree(source)
    assert verify(tmp_path / "pool") == []


def test_an_adapter_needs_its_base_said(base, vector, tmp_path):
    source = adapter(tmp_path / "adapter")
    with pytest.raises(RecipeError, match="do not say what base"):
        add(tmp_path / "pool", source)
    entry = add(tmp_path / "pool", source, "lora", base=str(base))
    assert entry.kind == "adapter_model"
    assert set(entry.files) == {"adapter_model.safetensors", "adapter_config.json"}
    add(tmp_path / "pool", vector(1), "ja")
    assert verify(tmp_path / "pool") == []


def test_vectors_of_another_base_and_full_checkpoints_are_refused(
    base, vector, tmp_path, write_checkpoint
):
    pool = tmp_path / "pool"
    add(pool, vector(1), "ja", base=str(base))
    before = tree(pool)
    other = write_checkpoint("other", random_tensors(9))
    extract(other, write_checkpoint("other-t", nearby(random_tensors(9), 1)), tmp_path / "v")
    with pytest.raises(MismatchError, match="vectors of different bases cannot be merged"):
        add(pool, tmp_path / "v", "x")
    with pytest.raises(MismatchError, match="was taken from a base of fingerprint"):
        add(tmp_path / "second", tmp_path / "v", "x", base=str(base))
    with pytest.raises(CheckpointError, match="full checkpoint, expected a distribution vector"):
        add(pool, base, "base")
    with pytest.raises(RecipeError, match="the first vector of a pool needs its base"):
        add(tmp_path / "third", vector(2))
    assert tree(pool) == before


@pytest.mark.parametrize(
    "name", ["../ja", "a/b", "/ja", ".ja", "", "..", "pool.json", "README.md", "x" * 65, "a\n", "é"]
)
def test_a_name_cannot_lead_out_of_the_pool(base, vector, tmp_path, name):
    with pytest.raises(RecipeError, match="cannot be a vector's name"):
        add(tmp_path / "pool", vector(1), name, base=str(base))
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", "../../etc"),
        ("name", "a/b"),
        ("name", ".hidden"),
        ("name", "pool.json"),
        ("file", "../pool.json"),
        ("file", "/etc/passwd.json"),
        ("file", "x/y.json"),
        ("file", "run.py"),
        ("sha256", "0"),
        ("version", 2),
    ],
)
def test_a_manifest_from_others_cannot_name_a_path(base, vector, tmp_path, where, value):
    pool = tmp_path / "pool"
    add(pool, vector(1), "ja", base=str(base))
    data = json.loads((pool / "pool.json").read_text())
    (entry,) = data["vectors"]
    if where == "name":
        entry["name"] = value
    elif where == "file":
        entry["files"][value] = entry["files"]["vector.safetensors"]
    elif where == "sha256":
        entry["files"]["vector.safetensors"]["sha256"] = value
    else:
        data["version"] = value
    (pool / "pool.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        read_manifest(pool / "pool.json")


def test_verify_names_every_kind_of_damage(base, vector, tmp_path):
    pool = tmp_path / "pool"
    for seed, name in enumerate(["flipped", "cut", "lost", "gone", "more"]):
        add(pool, vector(seed), name, base=str(base))
    file = pool / "flipped" / "vector.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    file = pool / "cut" / "vector.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (pool / "lost" / "vector.safetensors").unlink()
    shutil.rmtree(pool / "gone")
    (pool / "more" / "notes.txt").write_text("")
    (pool / "stray").mkdir()
    said = "\n".join(verify(pool))
    for part in (
        "flipped: vector.safetensors has other content", "cut: vector.safetensors has",
        "lost: vector.safetensors is missing", "gone: its folder is missing",
        "more: notes.txt is not in the manifest", "stray: not in the manifest",
    ):  # fmt: skip
        assert part in said
    assert verify(pool, ["more"]) == ["more: notes.txt is not in the manifest"]
    with pytest.raises(CheckpointError, match="flipped"):
        command(["verify", str(pool)], standalone_mode=False)


STEPS = ["_take_files", "sync", "replace_file", "_delete"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_crash_in_any_step_loses_nothing(
    base, vector, tmp_path, monkeypatch, step, after, replace
):
    pool, old, new = tmp_path / "pool", vector(1), vector(2)
    add(pool, old, "kept", base=str(base))
    if replace:
        add(pool, vector(3), "ja")
    before = read(pool)
    real = getattr(pools.folder, step)

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(pools.folder, step, killed)
        # A killed process runs no handler: nothing may be cleaned on the way out.
        patched.setattr(pools.folder.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            add(pool, new, "ja", replace=replace)

    names = [entry.name for entry in read(pool).vectors]
    assert names[0] == "kept" and read(pool).find("kept") == before.find("kept")
    assert verify(pool, ["kept"]) == []
    add(pool, new, "ja", replace=replace)
    assert verify(pool) == []
    assert (pool / "ja" / "vector.safetensors").read_bytes() == (
        new / "vector.safetensors"
    ).read_bytes()
    assert {p.name for p in pool.iterdir()} == {".lock", "pool.json", "kept", "ja"}


def test_a_crash_while_one_takes_anothers_place_brings_the_first_back(
    base, vector, tmp_path, monkeypatch
):
    pool = tmp_path / "pool"
    add(pool, vector(1), "ja", base=str(base))
    before = tree(pool)
    real = Path.rename

    def killed(self, target):
        if self.name.startswith(".incoming-"):
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        add(pool, vector(2), "ja", replace=True)
    assert verify(pool) == ["ja: its folder is missing"]
    add(pool, tmp_path / "vector-1", "ja")  # any step puts things right first
    assert tree(pool) == before
    assert {path.name for path in pool.iterdir()} == {".lock", "pool.json", "ja"}


def test_a_crash_in_removing_leaves_a_pool_without_it(base, vector, tmp_path, monkeypatch):
    pool = tmp_path / "pool"
    add(pool, vector(1), "ja", base=str(base))
    add(pool, vector(2), "math")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pools.folder, "_delete", _interrupted)
        remove(pool, "ja")
    assert [entry.name for entry in read(pool).vectors] == ["math"]
    assert verify(pool) == ["ja: not in the manifest"]
    add(pool, vector(3), "zh")
    with pytest.raises(OutputError, match="is in the way, and the pool does not know it"):
        add(pool, tmp_path / "vector-3", "ja")  # not ours to delete
    add(pool, tmp_path / "vector-1", "ja")  # the very same files are adopted
    assert verify(pool) == []


def _interrupted(*args):
    raise KeyboardInterrupt


def _add(arguments: tuple[str, str, str]) -> None:
    pool, source, name = arguments
    add(pool, source, name)


def test_jobs_add_side_by_side(base, vector, tmp_path):
    pool = tmp_path / "pool"
    add(pool, vector(0), "v0", base=str(base))
    jobs = [(str(pool), str(tmp_path / "vector-0"), f"v{i}") for i in range(1, 9)]
    with multiprocessing.get_context("fork").Pool(4) as workers:
        workers.map(_add, jobs, chunksize=1)
    assert sorted(entry.name for entry in read(pool).vectors) == [f"v{i}" for i in range(9)]
    assert verify(pool) == []


def test_command_line(base, vector, tmp_path, capsys):
    pool = str(tmp_path / "pool")

    def run(*arguments: str) -> str:
        command(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    run("add", pool, str(vector(1)), "--name", "ja", "--base", str(base), "--license", "mit")
    shown = run("list", pool)
    assert "ja" in shown and "text 1" in shown and "5000" in shown and "mit" in shown
    listed = msgspec.json.decode(run("list", pool, "--json"))
    assert listed["vectors"][0]["name"] == "ja"
    assert "1 vectors are whole" in run("verify", pool)
    assert json.loads(run("verify", pool, "--json"))["problems"] == []
    run("remove", pool, "ja")
    assert json.loads(run("list", pool, "--json"))["vectors"] == []
    with pytest.raises(CheckpointError, match="is no pool"):
        run("list", str(tmp_path / "none"))
