"""`rows: by_token`: vocabularies in another order, with other tokens, with padding, in a recipe."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from optimer_engine import FolderSink, OptimerError, extract, merge, plan, verify_output
from optimer_engine.packing import pack
from tests.unit.test_mergekit_tokenizer import write_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def pool(tmp_path):
    """base: a b c d ab and three rows of padding; one: + cd and two added; two: + bc, cd, one."""
    return [
        write_model(tmp_path / "base", ["ab"], rows=10, seed=1),
        write_model(tmp_path / "one", ["cd", "ab"], ["<|im_start|>", "<|im_end|>"], seed=2),
        write_model(tmp_path / "two", ["bc", "cd"], ["<|im_end|>"], seed=3),
    ]


def recipe(pool, **more):
    sources = [
        {"name": f.name, "model": str(f), "weight": w}
        for f, w in zip(pool[1:], (0.5, 0.25), strict=False)
    ]
    return {"base": str(pool[0]), "sources": sources, "rows": "by_token", **more}


def ids(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def tensors(folder):
    return load_file(folder / "model.safetensors")


def expected(pool, name, out_ids, rows, weights=(0.5, 0.25)):
    """Token by token, in fp64."""
    own = [(ids(folder), tensors(folder)[name].double()) for folder in pool]
    base = own[0][1]
    out = torch.zeros(rows, base.shape[1], dtype=torch.float64)
    out[: len(base)] = base[:rows]
    for token, row in out_ids.items():
        having = [(number, e[numbers[token]]) for number, (numbers, e) in enumerate(own)
                  if token in numbers]  # fmt: skip
        start = base[own[0][0][token]] if token in own[0][0] else (
            sum(e for _, e in having) / len(having))  # fmt: skip
        moved = [weights[number - 1] * (e - start) for number, e in having if number]
        out[row] = start + sum(moved)
    return out


@pytest.mark.parametrize("tile_bytes", [64, 4096])
def test_the_union_of_all_tokens(pool, tmp_path, tile_bytes):
    made = plan(recipe(pool))
    replace(made, tile_bytes=tile_bytes).run(FolderSink(tmp_path / "out"))
    found, numbers = tensors(tmp_path / "out"), ids(tmp_path / "out")
    # The base's numbers; then the ordinary tokens of the others, then the added ones. The base has
    # ten rows: new tokens take its padding first.
    assert sorted(numbers, key=numbers.get) == [
        "<s>", "</s>", "a", "b", "c", "d", "ab", "cd", "bc", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    for name in (EMBED, HEAD):
        assert torch.allclose(found[name].double(), expected(pool, name, numbers, 11), atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 11
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("cd").ids == [7]
    verify_output(tmp_path / "out", full=True)


def test_the_base_s_tokens_and_its_padding_stay(pool, tmp_path):
    merge(recipe(pool, vocabulary="base"), tmp_path / "out")
    found = tensors(tmp_path / "out")
    for name in (EMBED, HEAD):
        wanted = expected(pool, name, ids(pool[0]), 10)
        assert torch.allclose(found[name].double(), wanted, atol=1e-6)
        assert torch.equal(found[name][7:], tensors(pool[0])[name][7:])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (pool[0] / file).read_bytes()


def test_equal_vocabularies_are_read_as_they_are(pool, tmp_path):
    again = write_model(tmp_path / "again", ["ab"], rows=10, seed=5)
    merge(recipe([pool[0], again]), tmp_path / "by_token")
    merge(recipe([pool[0], again], rows="strict"), tmp_path / "strict")
    names = [path.name for path in (tmp_path / "strict").iterdir() if path.name != "report.json"]
    for name in names:
        ours, theirs = (tmp_path / n / name for n in ("by_token", "strict"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_vector_and_a_method_with_statistics(pool, tmp_path):
    trained = write_model(tmp_path / "trained", ["ab"], rows=10, seed=6)
    extract(pool[0], trained, tmp_path / "vector")
    given = recipe(pool, method="ties", parameters={"density": 1.0, "normalize": False})
    given["sources"] = [
        given["sources"][0],
        {"name": "v", "model": str(tmp_path / "vector"), "weight": 0.25},
    ]
    merge(given, tmp_path / "out")
    found, numbers = tensors(tmp_path / "out")[EMBED].double(), ids(tmp_path / "out")
    tau = load_file(tmp_path / "vector" / "vector.safetensors")[EMBED].double()
    base, one = tensors(pool[0])[EMBED].double(), tensors(pool[1])[EMBED].double()
    for token, row in ids(pool[0]).items():
        terms = [0.25 * tau[row]]
        if token in ids(pool[1]):
            terms.append(0.5 * (one[ids(pool[1])[token]] - base[row]))
        sign = sum(terms).sign()
        wanted = base[row] + sum(torch.where(t * sign > 0, t, 0) for t in terms)
        assert torch.allclose(found[numbers[token]], wanted, atol=1e-6), token
    assert len(found) == 10
    # A token of its own takes a row of the base's padding; the vector moved that, not the token.
    assert torch.equal(found[numbers["cd"]].float(), one[ids(pool[1])["cd"]].float())
    pack(pool[0], trained, tmp_path / "exact", mode="exact")
    given["sources"][1]["model"] = str(tmp_path / "exact")
    with pytest.raises(OptimerError, match="distances to the base's rows"):
        plan({**given, "vocabulary": "union"})


def test_a_tied_head_and_an_adapter_with_tokens_of_its_own(pool, tmp_path):
    from safetensors.torch import save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    trained = torch.randn(11, 16)
    base = "base_model.model.model"
    save_file({f"{base}.embed_tokens.weight": trained,
               f"{base}.layers.0.mlp.up_proj.lora_A.weight": torch.randn(2, 16),
               f"{base}.layers.0.mlp.up_proj.lora_B.weight": torch.randn(24, 2)},
              lora / "adapter_model.safetensors")  # fmt: skip
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (lora / "tokenizer.json").write_bytes((pool[1] / "tokenizer.json").read_bytes())
    sources = [{"name": "lora", "model": str(lora), "weight": 0.5}]
    try:
        merge({**recipe(pool), "sources": sources}, tmp_path / "out")
    except OptimerError as error:
        raise AssertionError(str(error)) from error
    found, numbers = tensors(tmp_path / "out"), ids(tmp_path / "out")
    start, own = tensors(pool[0])[EMBED], ids(pool[1])
    for token, row in numbers.items():
        new = token not in ids(pool[0])
        wanted = trained[own[token]] if new else (start[row] + trained[own[token]]) / 2
        assert torch.allclose(found[EMBED][row], wanted, atol=1e-6), token


def test_what_is_not_usable_is_refused(pool, tmp_path):
    with pytest.raises(OptimerError, match="only looked at where rows are aligned by token"):
        plan(recipe(pool, rows="common", vocabulary="base"))
    (pool[0] / "tokenizer.json").unlink()
    with pytest.raises(OptimerError, match=r"no tokenizer\.json"):
        plan(recipe(pool))
