"""Every refusal names file, tensor, got and expected, exits with 2 and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from optimer_engine import merge, plan, verify_output
from optimer_engine.cli import optimer
from optimer_engine.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OptimerError,
    RecipeError,
)
from tests.conftest import nearby, random_tensors


@pytest.fixture
def case(write_checkpoint, tmp_path):
    """A base and one source that the test may damage: returns (recipe, base, source folders)."""
    base = random_tensors(0)
    folders = write_checkpoint("base", base), write_checkpoint("tuned", nearby(base, 1), files=2)
    recipe = {
        "base": str(folders[0]),
        "sources": [{"name": "ja", "model": str(folders[1]), "weight": 0.5}],
    }
    return recipe, *folders


def refused(recipe, tmp_path, kind, *words):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        merge(recipe, tmp_path / "out")
    message = str(caught.value)
    for word in words:
        assert word in message
    assert caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_missing_folder(case, tmp_path):
    recipe, _, _ = case
    recipe["sources"][0]["model"] = str(tmp_path / "nowhere")
    refused(recipe, tmp_path, CheckpointError, "nowhere: no such folder")


def test_missing_shard(case, tmp_path):
    recipe, _, source = case
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(
        recipe, tmp_path, CheckpointError, "tuned", "model-00002-of-00002.safetensors is missing"
    )


def test_shape_mismatch_lists_every_tensor(case, tmp_path, write_checkpoint):
    recipe, _, _ = case
    tensors = nearby(random_tensors(0), 1)
    tensors["model.norm.weight"] = torch.zeros(25, dtype=torch.bfloat16)
    tensors["model.layers.0.norm.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    recipe["sources"][0]["model"] = str(write_checkpoint("other", tensors))
    refused(
        recipe,
        tmp_path,
        MismatchError,
        "ja: model.norm.weight has shape [25], the base has [24]",
        "ja: model.layers.0.norm.weight has shape [7], the base has [24]",
    )


def test_extra_and_missing_tensors(case, tmp_path, write_checkpoint):
    recipe, _, _ = case
    tensors = nearby(random_tensors(0), 1)
    tensors["extra"] = tensors.pop("model.norm.weight")
    recipe["sources"][0]["model"] = str(write_checkpoint("other", tensors))
    refused(
        recipe,
        tmp_path,
        MismatchError,
        "ja lacks model.norm.weight [24]",
        "ja has extra, which the base lacks",
    )


def test_another_architecture(case, tmp_path, write_checkpoint):
    recipe, _, _ = case
    other = write_checkpoint("other", nearby(random_tensors(0), 1), {"model_type": "qwen3"})
    recipe["sources"][0]["model"] = str(other)
    refused(recipe, tmp_path, MismatchError, "model_type 'qwen3', the base has 'llama'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_values_in_a_source_are_named(case, tmp_path, write_checkpoint, value):
    recipe, _, _ = case
    tensors = nearby(random_tensors(0), 1)
    tensors["model.layers.1.mlp.weight"][3, 5] = value
    recipe["sources"][0]["model"] = str(write_checkpoint("other", tensors))
    refused(
        recipe,
        tmp_path,
        NonFiniteError,
        "source 'ja': model.layers.1.mlp.weight holds NaN or infinity: first at element 164, 1 in",
    )


def test_overflow_of_the_output_is_named(case, tmp_path, write_checkpoint):
    recipe, _, _ = case
    tensors = {n: t.float() for n, t in random_tensors(0).items()}
    tensors["model.norm.weight"][0] = 7e4
    recipe["sources"][0]["model"] = str(write_checkpoint("other", tensors))
    recipe["out_dtype"] = "float16"
    recipe["sources"][0]["weight"] = 1.0
    refused(recipe, tmp_path, NonFiniteError, "output", "model.norm.weight", "float16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nonfinite_values_are_kept_on_request(case, tmp_path, write_checkpoint, dtype):
    recipe, _, _ = case
    base = {n: t.to(dtype) for n, t in random_tensors(0).items()}
    source = {n: t.to(dtype) for n, t in nearby(random_tensors(0), 1).items()}
    name = "model.layers.1.mlp.weight"
    base[name][0, :2] = source[name][0, :2] = torch.tensor([float("-inf"), float("nan")])
    source[name][3, 5] = float("inf")
    recipe["base"] = str(write_checkpoint("odd-base", base))
    recipe["sources"][0]["model"] = str(write_checkpoint("odd", source))
    refused(recipe, tmp_path, NonFiniteError, "--allow-nonfinite")
    plain = {n: t.nan_to_num(0, 0, 0) for n, t in base.items()}
    report = merge(recipe, tmp_path / "kept", nonfinite="keep")
    assert "3 values that are NaN, infinite or too large" in report.warnings[-1]
    merged = load_file(tmp_path / "kept" / "model.safetensors")
    assert merged[name][0, 0] == float("-inf")
    assert merged[name][0, 1].isnan()
    assert merged[name][3, 5] == float("inf")
    odd = ~base[name].isfinite() | ~source[name].isfinite()
    assert merged[name][~odd].isfinite().all()
    assert odd.sum() == 3
    recipe["base"] = str(write_checkpoint("even-base", plain))
    tamed = {n: t.nan_to_num(0, 0, 0) for n, t in source.items()}
    recipe["sources"][0]["model"] = str(write_checkpoint("even", tamed))
    merge(recipe, tmp_path / "even-out")
    even = load_file(tmp_path / "even-out" / "model.safetensors")
    assert torch.equal(even[name][~odd], merged[name][~odd])
    verify_output(tmp_path / "kept", full=True)
    recipe["method"] = "ties"
    with pytest.raises(RecipeError, match="ties orders and measures"):
        merge(recipe, tmp_path / "sparse", nonfinite="keep")


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_overflow_is_clamped_on_request(case, tmp_path, write_checkpoint, out_dtype):
    recipe, _, _ = case
    base = {n: t.double() for n, t in random_tensors(0).items()}
    source = {n: t.clone() for n, t in base.items()}
    name = "model.norm.weight"
    source[name][:2] = torch.tensor([1e300, -1e300], dtype=torch.float64)
    recipe["base"] = str(write_checkpoint("wide-base", base))
    recipe["sources"][0] |= {"model": str(write_checkpoint("wide", source)), "weight": 1.0}
    recipe["out_dtype"] = out_dtype
    refused(recipe, tmp_path, NonFiniteError, "--on-overflow clamp")
    merge(recipe, tmp_path / "clamped", overflow="clamp")
    merged = load_file(tmp_path / "clamped" / "model.safetensors")[name]
    largest = torch.finfo(getattr(torch, out_dtype)).max
    assert merged[:2].double().tolist() == [largest, -largest]
    assert torch.equal(merged[2:].double(), base[name][2:].to(merged.dtype).double())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: b\nsources: [{name: a, model: m, wieght: 1}]", ["wieght", "did you mean 'weight'"]),
        ("base: b\nsources: []", ["no sources"]),
        ("base: b\nbase: c\nsources: []", ["line 2", "'base' stands twice"]),
        ("base: b\nsources: [{name: a, model: m, weight: .nan}]", ["weight"]),
        ("base: b\nsources: [{name: a, model: m, weight: .inf}]", ["weight"]),
        ("base: b\nsources: [{name: a, model: m, parameters: {x: 1e999}}]", ["line 2", "1e999"]),
        ("base: b\nsources: [{name: a, model: m}, {name: a, model: n}]", ["twice: a"]),
        ("base: &x b\nsources: [{name: a, model: *x}]", ["anchors"]),
        ("base: !!python/object:os.system b\nsources: []", ["tags"]),
        ("base: [b\n", ["line"]),
        ("base: b\nsources: [{name: a, model: m}]\nout_dtype: int8", ["'int8'", "bfloat16"]),
        ("base: b\nsources: [{name: a, model: m}]\nmax_shard_size: 5 apples", ["5 apples"]),
        ("- a", ["recipe.yaml"]),
        ("[" * 40 + "]" * 40, ["nested deeper than 16"]),
        ("- a\n" * 200_000, ["line 30000", "more than 30000 keys and values"]),
    ],
)
def test_recipes_that_are_refused(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        plan(path)
    assert "recipe.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "endless", "huge", "bytes", "nul"])
def test_what_is_no_recipe_file_is_refused_at_once(tmp_path, kind):
    import os

    path, words = tmp_path / "recipe.yaml", "is not a regular file"
    if kind == "fifo":
        os.mkfifo(path)
        words = "Expected `object`"
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.write_bytes(b"#" * 1_000_001)
        words = "more than 1000000 bytes"
    elif kind == "bytes":
        path.write_bytes(b"base: \xff")
        words = "not UTF-8 at byte 6"
    elif kind == "nul":
        path, words = tmp_path / "a\0b", "cannot be read"
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    with pytest.raises(RecipeError, match=words):
        plan(path)


def test_a_recipe_may_come_from_a_pipe():
    import os

    reader, writer = os.pipe()
    os.write(writer, b"base: nowhere\nsources: [{name: a, model: m}]\n")
    os.close(writer)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        plan(f"/dev/fd/{reader}")
    os.close(reader)


def test_a_file_too_large_to_be_copied_is_found_at_the_start(case, tmp_path):
    recipe, base, _ = case
    with (base / "huge.model").open("wb") as file:
        file.truncate((256 << 20) + 1)
    refused(recipe, tmp_path, CheckpointError, "huge.model: has 268435457 bytes; it would be")


def test_numbers_are_read_by_the_rules_of_yaml_1_2(tmp_path):
    from optimer_engine.strict_yaml import parse

    text = "[1e-3, no, 012, 1:30, true, ~, -4, .5, '1', 0x10]"
    assert parse(text, "x") == [0.001, "no", "012", "1:30", True, None, -4, 0.5, "1", "0x10"]


@pytest.mark.parametrize("place", ["{base}", "{base}/inside", "{parent}"])
def test_an_output_in_or_around_an_input_is_refused(case, tmp_path, place):
    recipe, base, _ = case
    out = place.format(base=base, parent=base.parent)
    with pytest.raises(RecipeError, match="in or around the input"):
        merge(recipe, out)
    assert not list(tmp_path.glob("**/*.partial"))


def test_an_output_that_holds_files_is_left_alone(case, tmp_path):
    recipe, _, _ = case
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(RecipeError, match="not an empty folder"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_a_folder_that_no_merge_left_is_not_emptied(case, tmp_path):
    recipe, _, _ = case
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_bytes(b"mine")
    with pytest.raises(RecipeError, match="holds precious, which no merge left there"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / "out.partial" / "precious").read_bytes() == b"mine"
    merge(recipe, tmp_path / "out", discard=True)
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "precious").exists()
    plan({**recipe, "base": str(tmp_path / "out")})


@pytest.mark.parametrize("discard", [False, True])
def test_an_input_is_never_taken_for_a_work_folder(case, tmp_path, discard):
    recipe, base, _ = case
    moved = base.rename(tmp_path / "out.partial")
    before = sorted(p.name for p in moved.iterdir())
    with pytest.raises(RecipeError, match="in or around the input"):
        merge({**recipe, "base": str(moved)}, tmp_path / "out", discard=discard)
    assert sorted(p.name for p in moved.iterdir()) == before


@pytest.mark.parametrize("place", ["out/report.json", "out.partial/merge.journal"])
def test_a_fifo_where_we_write_is_not_waited_for(case, tmp_path, place):
    import os

    from optimer_engine import verify_output

    recipe, _, _ = case
    (tmp_path / place).parent.mkdir()
    os.mkfifo(tmp_path / place)
    with pytest.raises(OptimerError):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / place).is_fifo()
    with pytest.raises(CheckpointError, match="no readable report"):
        verify_output(tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "link at work", "dangling", "nothing", "above"])
def test_a_place_that_nothing_can_be_renamed_to_is_refused_at_once(case, tmp_path, kind):
    recipe, _, _ = case
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_bytes(b"mine")
    out, words = tmp_path / "out", "is a link"
    if kind == "link":
        out.symlink_to(tmp_path / "elsewhere")
    elif kind == "link at work":
        (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out = tmp_path / ("." if kind == "nothing" else "elsewhere/..")
        words = "in or around" if kind == "nothing" else "not the name of a folder"
    refused_with = pytest.raises(RecipeError, match=words)
    with refused_with:
        merge(recipe, out)
    assert (tmp_path / "elsewhere" / "precious").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_source_that_shrinks_while_it_is_read_is_an_error(case, tmp_path):
    recipe, _, source = case
    made = plan(recipe)
    shard = source / "model-00001-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    from optimer_engine import FolderSink

    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: ended at byte"):
        made.run(FolderSink(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_source_overwritten_while_it_is_read_is_an_error(case, tmp_path):
    import os

    from optimer_engine import FolderSink

    recipe, _, source = case
    made = plan(recipe)
    os.utime(source / "model-00001-of-00002.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed while it was being read"):
        made.run(FolderSink(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_source_may_be_called_base_and_both_are_watched(case, tmp_path):
    import os

    from optimer_engine import FolderSink

    recipe, base, _ = case
    recipe["sources"][0]["name"] = "base"
    report = merge(recipe, tmp_path / "first")
    assert len(set(report.fingerprints.values())) == 2
    made = plan(recipe)
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"base/model\.safetensors: was changed"):
        made.run(FolderSink(tmp_path / "out"))


def folder_with(tmp_path, **files):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


GOOD = {"w": torch.ones(3)}


def index(**weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


def test_folders_that_loaders_read_differently_are_refused(tmp_path):
    from optimer_engine import Checkpoint

    save_file(GOOD, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    shard = {"model-1__safetensors": good}
    index_name = "model__safetensors__index__json"
    cases = [
        ({}, "no model.safetensors"),
        ({"pytorch_model__bin": b"x"}, "a pickle"),
        ({"adapter_model__bin": b"x", "adapter_config__json": b"{}"}, "a pickle"),
        ({"model__safetensors": good, index_name: index(w="model-1.safetensors")}, "both"),
        ({**shard, index_name: index(w="../model-1.safetensors")}, "not a plain file name"),
        ({**shard, index_name: index(w="/etc/passwd")}, "not a plain file name"),
        ({**shard, index_name: index(w="model-1.safetensors", v="model-1.safetensors")},
         "v lies nowhere, listed in model-1.safetensors"),
        ({**shard, "model-2__safetensors": good,
          index_name: index(w="model-1.safetensors", x="model-2.safetensors")}, "and in"),
        ({**shard, index_name: b'{"weight_map": {"w": "a", "w": "b"}}'}, "stands twice"),
        ({**shard, index_name: b"{}"}, "no weight_map"),
        ({**shard, index_name: b"{"}, "not readable JSON"),
        ({"model__safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS"),
        ({"model__safetensors": b"<!DOCTYPE html><html></html>"}, "HTML page"),
        ({"model__safetensors": b"GGUF" + bytes(60)}, "GGUF"),
        ({"model__safetensors": b"PK\3\4" + bytes(60)}, "zip"),
        ({"model__safetensors": bytes(64)}, "zeros"),
        ({"model__safetensors": b"abc"}, "3 bytes, not a safetensors file"),
        ({"model__safetensors": good[:-1]}, "short by 1 bytes"),
        ({"model__safetensors": good + b"12"}, "2 extra bytes"),
    ]  # fmt: skip
    for number, (files, words) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        folder = folder_with(tmp_path / str(number), **files)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder)
        assert words in str(caught.value), (number, str(caught.value))
        assert str(folder) in str(caught.value)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    import os

    from optimer_engine import Checkpoint

    folder = folder_with(tmp_path)
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "{base}", "--add", "{tuned}"], "is not MODEL=WEIGHT"),
        (["--base", "{base}", "--add", "{tuned}=nan"], "weight is nan"),
        (["--base", "{base}"], "no sources"),
        (["recipe.yaml", "--base", "{base}"], "not both"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["--base", "{base}", "--add", "{tuned}=1", "--out-dtype", "int4"], "'int4'"),
        (["--base", "{base}", "--add", "{tuned}=1", "--mem-limit", "1kB"], "the limit is 1 kB"),
    ],
)
def test_command_line_mistakes(case, tmp_path, arguments, words):
    _, base, tuned = case
    filled = [text.format(base=base, tuned=tuned) for text in arguments]
    result = CliRunner().invoke(optimer, ["merge", *filled, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, OptimerError)
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()
