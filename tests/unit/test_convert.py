"""Pickles become safetensors of the same tensors; pickles that do more than that do nothing."""

from __future__ import annotations

import json
import os
import pickle
import time

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from optimer_engine import Checkpoint
from optimer_engine import convert as module
from optimer_engine.cli.convert import command
from optimer_engine.convert import convert
from optimer_engine.errors import CheckpointError, OutputError
from optimer_engine.verify import verify_output
from tests.conftest import random_tensors


@pytest.fixture
def pickled(tmp_path):
    def write(files, config="{}"):
        folder = tmp_path / "old"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "code.py").write_text("raise SystemExit")
        for name, content in files.items():
            torch.save(content, folder / name)
        return folder

    return write


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def test_tensors_come_out_as_they_were(pickled, tmp_path):
    tensors = random_tensors(0) | {
        "steps": torch.arange(7), "flag": torch.tensor([True]), "half": torch.ones(3).half(),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
    }  # fmt: skip
    tensors["tied"] = tensors["lm_head.weight"]
    folder = pickled({"pytorch_model.bin": tensors})
    done = CliRunner().invoke(command, [str(folder), "-o", str(tmp_path / "new"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["tensors"] == len(tensors)
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json", "model.safetensors", "report.json", "tokenizer.json",
    ]  # fmt: skip
    verify_output(tmp_path / "new", full=True)
    with Checkpoint.open(tmp_path / "new") as opened:
        assert opened.kind == "model"


def test_several_files_and_an_index(pickled, tmp_path):
    shard = "pytorch_model-0000{}-of-00002.bin".format
    folder = pickled({shard(n): {f"w{n}": torch.ones(n)} for n in (1, 2)})
    weight_map = {f"w{n}": shard(n) for n in (1, 2)}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "new")
    with Checkpoint.open(tmp_path / "new") as opened:
        assert sorted(opened.tensors) == ["w1", "w2"]
    for name in ("../x.bin", "/etc/passwd", "x.py", 3):
        index.write_text(json.dumps({"weight_map": {"w1": name}}))
        with pytest.raises(CheckpointError, match=r"not a plain file name that ends in \.bin"):
            convert(folder, tmp_path / "newer")
    index.write_text(json.dumps({"weight_map": {"w1": "absent.bin"}}))
    with pytest.raises(CheckpointError, match=r"absent\.bin is missing"):
        convert(folder, tmp_path / "newer")


class Command:
    """What a hostile pickle looks like."""

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


@pytest.mark.parametrize("wrapped", ["alone", "among tensors", "old format", "not a pickle"])
def test_a_pickle_that_runs_commands_runs_none(tmp_path, wrapped):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    evil, path = Command(f"touch {tmp_path / 'owned'}"), folder / "pytorch_model.bin"
    if wrapped == "alone":
        path.write_bytes(pickle.dumps(evil))
    elif wrapped == "not a pickle":
        path.write_bytes(b"<html>" * 100)
    else:
        zipped = wrapped != "old format"
        torch.save({"w": torch.ones(2), "x": evil}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not loadable as weights only"):
        convert(folder, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), "holds a Tensor, a map from names to tensors expected"),
        ({"w": torch.ones(2), "step": 3}, "step is a int, a tensor expected"),
        ({"state_dict": {"w": torch.ones(2)}}, "state_dict is a dict, a tensor expected"),
        ({3: torch.ones(2)}, "3 is a Tensor, a tensor expected"),
        ({"w": torch.eye(3).to_sparse()}, "w is torch.float32, torch.sparse_coo; plain expected"),
    ],
)
def test_what_is_not_a_map_of_tensors_is_refused(pickled, tmp_path, content, words):
    folder = pickled({"pytorch_model.bin": content})
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "new")
    assert words in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_limits_and_secrets(pickled, tmp_path, monkeypatch):
    folder = pickled({"pytorch_model.bin": {"w": torch.ones(10**6)}})
    monkeypatch.setattr(module, "_SPARE_BYTES", 1 << 20)
    script = tmp_path / "child.py"
    script.write_text(
        "import os, resource, sys, optimer_engine.convert as c\n"
        "assert 'HF_TOKEN' not in os.environ, 'a secret'\n"
        "c._SPARE_BYTES = 1 << 20\n"
        "c._child(c.Path(sys.argv[1]), c.Path(sys.argv[2]), int(sys.argv[3]))\n"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    real = module.subprocess.run

    def run(child, **options):
        return real([child[0], str(script), *child[3:]], **options)

    monkeypatch.setattr(module.subprocess, "run", run)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "new")
    assert "a secret" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_places_that_cannot_be_used(pickled, tmp_path):
    folder = pickled({"pytorch_model.bin": {"w": torch.ones(2)}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        convert(folder, tmp_path / "full")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"no pytorch_model\.bin"):
        convert(tmp_path / "full", tmp_path / "new")
    started = time.time()
    convert(folder, tmp_path / "new")
    assert (tmp_path / "new" / "report.json").stat().st_mtime >= started - 5
