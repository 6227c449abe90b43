"""Two runs and one output: never a mixture, nor a silent wait, nor the loss of finished work."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from optimer_engine import Checkpoint, FolderSink, merge, plan, verify_output
from optimer_engine.errors import BusyError, OutputError, RecipeError
from tests.faults.disk import Dying, Killed
from tests.faults.recipes import contents


def interrupted(case, out, at, **options):
    with pytest.raises(Killed):
        case.run(out, Dying(at), **options)


def test_parts_of_two_recipes_are_not_joined(make_case):
    case = make_case("shards")
    out = case.folder / "out"
    merge(case.recipe, out, part=(1, 2))
    other = {**case.recipe, "sources": [{**case.recipe["sources"][0], "weight": 0.25}]}
    with pytest.raises(RecipeError, match=r"interrupted merge of other sources .*part-1-of-2"):
        merge(other, out, part=(2, 2))
    merge(case.recipe, out, part=(2, 2))
    assert contents(out) == case.expected


def test_parts_that_began_at_the_same_moment_are_still_told_apart(make_case):
    case = make_case("shards")
    out = case.folder / "out"
    other = {**case.recipe, "sources": [{**case.recipe["sources"][0], "weight": 0.25}]}
    first, second = (plan(r, part=(n, 2)) for n, r in ((1, case.recipe), (2, other)))
    sinks = [FolderSink(out), FolderSink(out)]
    sinks[0]._plan = first
    from optimer_engine import work_folder

    with pytest.MonkeyPatch.context() as patch:  # neither saw the other's journal
        patch.setattr(work_folder.WorkFolder, "_check_others", lambda *_: None)
        first.run(sinks[0])
        with pytest.raises(OutputError, match="part 1 cannot be joined: is of another merge"):
            second.run(sinks[1])
    assert not out.exists()


def test_a_part_that_runs_is_not_restarted_under_its_feet(make_case):
    case = make_case("shards")
    out = case.folder / "out"
    running = FolderSink(out)
    running.open(plan(case.recipe, part=(1, 2)))
    before = sorted((case.folder / "out.partial").iterdir())
    for discard in (False, True):
        with pytest.raises(BusyError, match="another run is writing it now: process"):
            merge(case.recipe, out, part=(1, 2), discard=discard)
    assert sorted((case.folder / "out.partial").iterdir()) == before
    running.abort(KeyboardInterrupt())
    for number in (1, 2):
        merge(case.recipe, out, part=(number, 2))
    assert contents(out) == case.expected


def test_a_shard_of_a_finished_part_that_vanished_is_noticed(make_case):
    case = make_case("shards")
    out = case.folder / "out"
    merge(case.recipe, out, part=(1, 2))
    next(case.folder.glob("out.partial/model-00001*")).unlink()
    with pytest.raises(OutputError, match=r"part 1 cannot be joined: model-.* has 0 bytes"):
        merge(case.recipe, out, part=(2, 2))
    for number in (1, 2):
        merge(case.recipe, out, part=(number, 2), discard=number == 1)
    assert contents(out) == case.expected


def test_a_source_written_to_between_two_runs_is_not_mixed_with_itself(make_case):
    """Its fingerprint samples the ends, so that a change elsewhere does not show in it."""
    case = make_case("single")
    out = case.folder / "run" / "out"
    out.parent.mkdir()
    interrupted(case, out, 70)
    source = case.sources[1] / "model.safetensors"
    with Checkpoint.open(source.parent) as opened:
        changed, before = opened.tensors["model.1"], opened.fingerprint
        place = changed.offset + changed.nbytes // 2
    content = bytearray(source.read_bytes())
    content[place] ^= 1
    source.write_bytes(content)
    with Checkpoint.open(source.parent) as opened:
        assert opened.fingerprint == before
    with pytest.raises(RecipeError, match=r"differs in files\)"):
        case.run(out)
    case.run(out, discard=True)
    verify_output(out, full=True)
    assert contents(out) != case.expected


def test_another_order_of_layers_is_another_merge(make_case, write_checkpoint, tmp_path):
    """Same files, same settings, same layout: only which tensor goes where differs."""
    import torch

    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 8,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {
        "input_layernorm": (8,), "post_attention_layernorm": (8,),
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 8), "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8),
        "mlp.down_proj": (8, 8),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.ones(4, 8), "model.norm.weight": torch.ones(8)}
    for layer in range(4):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.full(shape, layer + 1.0)
    model = str(write_checkpoint("layers", tensors, config))

    def recipe(*ranges):
        slices = [{"sources": [{"model": model, "layer_range": list(r)}]} for r in ranges]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}

    case, out = make_case("single"), tmp_path / "out"
    case.recipe = recipe((0, 2), (1, 3))
    interrupted(case, out, case.effects() - 25)
    assert list(tmp_path.glob("out.partial/*.safetensors"))
    with pytest.raises(RecipeError, match="differs in recipe"):
        merge(recipe((0, 3), (2, 3)), out)
    merge(recipe((0, 3), (2, 3)), out, discard=True)
    verify_output(out, full=True)


def test_an_output_that_is_there_already_is_checked_and_kept(make_case):
    case = make_case("shards")
    out = case.folder / "out"
    first = merge(case.recipe, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = merge(case.recipe, out)
    assert again.warnings == ["the output was complete already, and is as it was published"]
    assert again.files == first.files
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    shard = next(out.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RecipeError, match="exists and is not an empty folder"):
        merge(case.recipe, out)


def test_verify_gives_the_sha256_of_every_file(make_case):
    case = make_case("parts")
    out = case.folder / "out"
    case.run(out)
    files = {name: content for name, content in contents(out).items() if name != "report.json"}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert verify_output(out)["sha256"] == found


def compete(case, out, count, prelude=""):
    script = f"{prelude}\nimport sys\nfrom optimer_engine.cli import main\nmain()"
    source = case.recipe["sources"][0]
    arguments = [
        "merge", "--base", case.recipe["base"], "--add", f"{source['model']}=0.5", "-o", str(out),
        "--max-shard-size", case.recipe["max_shard_size"], "--threads", "1",
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(count)
    ]  # fmt: skip
    return [(p.communicate()[1], p.returncode) for p in running]


def check_competition(case, out, ended):
    assert {code for _, code in ended} <= {0, 2, 3, 4}, ended
    assert not [text for text, _ in ended if "Traceback" in text]
    if not out.exists():
        merge(case.recipe | {"sources": [{**case.recipe["sources"][0]}]}, out, discard=True)
    assert contents(out) == case.expected


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_many_processes_and_one_output(make_case, locks):
    """Even on a file system whose locks do nothing, what is published is right."""
    check_many(make_case("shards"), "out", 4, locks)


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_eight_processes_and_one_output_twenty_times(make_case, locks):
    case = make_case("shards")
    for number in range(20):
        check_many(case, f"out{number}", 8, locks)


def check_many(case, name, count, locks):
    out = case.folder / name
    prelude = "" if locks == "locks" else "import fcntl; fcntl.flock = lambda *_: None"
    ended = compete(case, out, count, prelude)
    if locks == "locks":
        assert 0 in {code for _, code in ended}
    check_competition(case, out, ended)
