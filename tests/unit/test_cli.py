"""The `optimer` program as a user meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from optimer_engine import __version__
from optimer_engine.cli import bench, optimer
from optimer_engine.errors import MissingExtraError
from tests.conftest import nearby, random_tensors


def program(*arguments, cwd=None):
    code = "from optimer_engine.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def folders(write_checkpoint):
    base = random_tensors(0)
    return write_checkpoint("base", base), write_checkpoint("ja", nearby(base, 1))


def test_merge_by_flags_and_by_recipe_give_the_same_bytes(folders, tmp_path):
    base, ja = folders
    flags = ["--base", base, "--add", f"{ja}=0.25", "-o", tmp_path / "a", "--json"]
    done = program("merge", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"]["sources"][0]["weight"] == 0.25
    (tmp_path / "recipe.yaml").write_text(
        f"base: {base}\nsources:\n  - {{name: ja, model: {ja}, weight: 0.25}}\n"
    )
    done = program("merge", "recipe.yaml", "-o", "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "9 tensors" in done.stdout
    assert [line for line in done.stderr.splitlines() if "compiling kernels" not in line] == []
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_extract_prints_the_base_and_the_vector_merges(folders, tmp_path):
    base, ja = folders
    done = program("extract", base, ja, "-o", tmp_path / "v", "--json")
    assert done.returncode == 0, done.stderr
    fingerprint = json.loads(done.stdout)["fingerprints"]["base"]
    done = program("merge", "--base", base, "--add", f"{tmp_path / 'v'}=1", "-o", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "m" / "report.json").read_text())["fingerprints"]["base"]
        == fingerprint
    )


def test_errors_are_two_lines_on_stderr_and_exit_code_2(folders, tmp_path):
    base, _ = folders
    done = program("merge", "--base", base, "--add", "nowhere/at/all=1", "-o", tmp_path / "m")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "optimer: nowhere/at/all: no such folder\n  check the path\n"
    done = program("--debug", "merge", "--base", base, "--add", "x/y/z=1", "-o", tmp_path / "m")
    assert "Traceback" in done.stderr
    assert program("merge", "--nonsense").returncode == 2
    assert not (tmp_path / "m").exists()


def test_an_output_that_cannot_be_written_exits_with_3(folders, tmp_path):
    base, ja = folders
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "m"
    done = program("merge", "--base", base, "--add", f"{ja}=1", "-o", out)
    assert done.returncode == 3, done.stderr
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        ("OSError(28, 'No space left on device', 'some/file')",
         "optimer: some/file: No space left on device\n  check the disk"),
        ("MemoryError()", "optimer: not enough memory\n  give a lower --mem-limit"),
    ],
)  # fmt: skip
def test_what_no_command_foresaw_is_no_traceback(raised, words):
    code = f"""
from optimer_engine import verify
def fails(*_, **__): raise {raised}
verify.verify_output = fails
from optimer_engine.cli import main
main()
"""
    for debug in ([], ["--debug"]):
        run = [sys.executable, "-c", code, *debug, "verify", "x"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.startswith(words)) == (
            (1, False) if debug else (3, True)
        )
        assert ("Traceback" in done.stderr) == bool(debug)


@pytest.mark.parametrize("command", ["merge", "extract", "search", "train", "demo"])
def test_help_teaches_with_an_example(command):
    result = CliRunner().invoke(optimer, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"optimer {command}" in result.output
    assert "--json" in result.output


def test_the_benchmarks_answer_in_a_clone_and_elsewhere_it_is_said_why_not(tmp_path, monkeypatch):
    done = program("bench", "run", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: optimer bench run")
    monkeypatch.setattr(bench, "CLONE", tmp_path)
    with pytest.raises(MissingExtraError, match="no part of the installed package"):
        CliRunner().invoke(optimer, ["bench", "run"], catch_exceptions=False)


def test_help_lists_every_command_and_version_is_printed():
    listed = CliRunner().invoke(optimer, ["--help"]).output
    for command in ("merge", "extract", "search", "train", "demo"):
        assert command in listed
    assert CliRunner().invoke(optimer, ["--version"]).output.strip().endswith(__version__)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGKILL", -9)]
)
def test_a_signal_ends_the_merge_and_the_same_command_continues(folders, tmp_path, name, code):
    base, ja = folders
    arguments = ["merge", "--base", base, "--add", f"{ja}=1", "-o", "m", "--max-shard-size", "2kB"]
    script = f"""
import os, signal, sys, threading
import optimer_engine.shard_file as shard_file
from optimer_engine import FolderSink
from optimer_engine.cli import main
if "{name}" != "SIGKILL":  # a background job inherits that it is ignored, and main leaves it so
    signal.signal(signal.{name}, signal.SIG_DFL)
write, written = FolderSink.write_run, 0
def signalled(self, run, start, tile):
    global written
    write(self, run, start, tile)
    self._settle(1)
    written += 1
    if written == 3:
        os.kill(os.getpid(), signal.{name})
        threading.Event().wait(0.2)
FolderSink.write_run = signalled
FolderSink.settle = lambda self: None
sys.argv = ["optimer", *{[str(a) for a in arguments]!r}, "--threads", "1"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    if code > 0:
        assert done.stderr == "optimer: interrupted; run the same command to continue\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "ja", "m.partial"]
    done = program(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bytes_read"] < 2 * report["bytes_written"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "ja", "m"]


def test_merged_checkpoints_load_and_run_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01)
    base.save_pretrained(tmp_path / "tuned", max_shard_size="4KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    done = program(
        "merge", "--base", tmp_path / "base", "--add", f"{tmp_path / 'tuned'}=1",
        "--max-shard-size", "4KB", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    for ours, theirs in zip(merged.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    generated = merged.generate(torch.tensor([[1, 2]]), min_new_tokens=3, max_new_tokens=3)
    assert generated.shape == (1, 5)
