"""What is allowed and probably not meant is said, once and by name; what is usual is not."""

from __future__ import annotations

import json

import pytest
import torch

from optimer_engine import merge, plan
from optimer_engine.errors import MismatchError
from tests.conftest import nearby, random_tensors


@pytest.fixture
def warned(write_checkpoint):
    """warned(tensors, config) -> the warnings of a plan with such a source, on one base."""
    base = random_tensors(0)
    folder = write_checkpoint("base", base, {"rope_theta": 10000.0})

    def warnings(tensors=None, config=None, name="ja", **recipe):
        tensors = nearby(base, 1) if tensors is None else tensors
        source = write_checkpoint(name, tensors, config)
        made = plan(
            {"base": str(folder), "sources": [{"name": name, "model": str(source)}], **recipe}
        )
        made.close()
        return made.warnings

    warnings.base, warnings.folder = base, folder
    return warnings


def test_a_usual_source_is_no_reason_to_warn(warned):
    assert warned() == ()


def test_a_source_of_another_base_is_noticed(warned):
    (line,) = warned(random_tensors(7))
    assert line.startswith("ja seems to be of another base: the cosine between their weights is ")
    (line,) = warned(nearby(warned.base, 1, scale=0.1), name="far")
    assert line.startswith("far is far from the base")


def test_a_source_that_is_the_base_contributes_nothing(warned):
    assert warned(warned.base) == ("ja equals the base and contributes nothing",)
    changed = {**warned.base, "model.norm.weight": warned.base["model.norm.weight"] + 1}
    assert warned(changed, name="almost") == ()


def test_the_same_folder_twice(warned, write_checkpoint, tmp_path):
    one = write_checkpoint("one", nearby(warned.base, 1))
    (tmp_path / "two").symlink_to(one)
    names = {"a": one, "b": tmp_path / "two"}
    sources = [{"name": name, "model": str(folder)} for name, folder in names.items()]
    made = plan({"base": str(warned.folder), "sources": sources})
    assert made.warnings == ("b and a are the same folder, which counts twice",)


def test_another_dtype_is_noted(warned):
    tensors = {name: tensor.float() for name, tensor in nearby(warned.base, 1).items()}
    text = "ja has tensors in F32 where the base has BF16; they are converted exactly"
    assert warned(tensors) == (text,)


def test_another_meaning_of_the_same_weights(warned):
    (line,) = warned(config={"rope_theta": 500000.0})
    assert line == "ja: config.json has rope_theta 500000.0, the base has 10000.0"


def test_another_tokenizer_of_the_same_size(warned, write_checkpoint):
    def tokenizer(folder, vocab):
        text = json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "other": 1})
        (folder / "tokenizer.json").write_text(text)

    tokenizer(warned.folder, {"a": 0, "b": 1, "c": 2})
    source = write_checkpoint("ja", nearby(warned.base, 1))
    recipe = {"base": str(warned.folder), "sources": [{"name": "ja", "model": str(source)}]}
    for vocab, expected in (
        ({"a": 0, "c": 1, "b": 2}, "token 1 is 'c', the base has 'b', and 1 more differ"),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, None),
        ({"\u202ea": 0, "b": 1}, "token 0 is '\\\\u202ea', the base has 'a'"),
    ):
        tokenizer(source, vocab)
        warnings = plan(recipe).warnings
        assert bool(warnings) == (expected is not None)
        assert expected is None or expected in warnings[0]
    (source / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.5]]}}')  # a Unigram
    assert plan(recipe).warnings == ()


def test_a_head_that_is_tied_and_stored_with_other_values(warned):
    (line,) = warned(config={"tie_word_embeddings": True})
    assert line.startswith("ja: config.json ties lm_head to the embeddings, and it is stored with")
    tensors = nearby(warned.base, 1)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert not [
        line
        for line in warned(tensors, {"tie_word_embeddings": True}, name="equal")
        if "ties lm_head" in line
    ]


def test_values_that_a_narrow_dtype_loses(warned, write_checkpoint):
    base = {name: tensor * 1e-7 for name, tensor in warned.base.items()}
    folders = write_checkpoint("small", base), write_checkpoint("tuned", base)
    recipe = {"base": str(folders[0]), "sources": [{"name": "a", "model": str(folders[1])}]}
    lines = plan({**recipe, "out_dtype": "float16"}).warnings
    assert any("of the base's values become 0 in float16" in line for line in lines)
    assert not [line for line in plan(recipe).warnings if "become 0" in line]


def test_names_that_are_not_plain_are_noted_escaped(write_checkpoint, warned):
    tensors = {**warned.base, "\u202emodel": torch.ones(3)}
    folders = write_checkpoint("one", tensors), write_checkpoint("two", nearby(tensors, 1))
    recipe = {"base": str(folders[0]), "sources": [{"name": "a", "model": str(folders[1])}]}
    lines = plan(recipe).warnings
    assert all(line.isascii() for line in lines)
    assert lines[0].endswith(
        "1 tensor names hold characters that are not plain, such as '\\\\u202emodel'"
    )


@pytest.mark.parametrize(
    "tensor", ["layers.0.q.qweight", "layers.0.q.weight.absmax", "layers.0.q.weight_packed"]
)
@pytest.mark.parametrize("place", ["base", "source"])
def test_a_quantised_model_is_refused(warned, write_checkpoint, tmp_path, tensor, place):
    config = {"quantization_config": {"quant_method": "some"}}
    tensors = {**nearby(warned.base, 1), tensor: torch.zeros(4, dtype=torch.int32)}
    packed, plain = write_checkpoint("packed", tensors, config), str(warned.folder)
    base, source = (str(packed), plain) if place == "base" else (plain, str(packed))
    with pytest.raises(MismatchError) as caught:
        merge({"base": base, "sources": [{"name": "a", "model": source}]}, tmp_path / "out")
    assert f"packed: is quantised (some): {tensor}" in str(caught.value)
    assert "dequantise it first" in str(caught.value)
    files = {"merge_method": "linear", "models": [
        {"model": base, "parameters": {"weight": 1}}, {"model": source, "parameters": {"weight": 1}}
    ]}  # fmt: skip
    with pytest.raises(MismatchError, match="is quantised"):
        merge(files, tmp_path / "out")
