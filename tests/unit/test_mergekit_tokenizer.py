"""Vocabularies put together by token, against expectations worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import CheckpointError, RecipeError
from optimer_engine.mergekit import GatheredRows, RowMap, expand, load
from optimer_engine.mergekit.rowmap import MEAN, PADDING, ZERO
from optimer_engine.mergekit.templates import TEMPLATES
from optimer_engine.types import DType
from tests.unit.test_mergekit_recipes import write_llama

EMBED = "model.embed_tokens.weight"


def write_model(folder, words, added=(), rows=None, seed=0, template=None):
    """A one-layer model whose BPE knows <s>, </s>, a to d, `words`, and `added` tokens."""
    tokens = ["<s>", "</s>", *"abcd", *words]
    merges = [(word[:-1], word[-1]) for word in words]
    built = Tokenizer(models.BPE({t: n for n, t in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    for token in added:
        special = isinstance(token, str) and token.startswith("<|")
        built.add_tokens([AddedToken(token, special=special, normalized=False)])
    size = built.get_vocab_size()
    write_llama(folder, 1, seed, vocab=rows or size)
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pool(tmp_path):
    """base: a b c d ab; one: + cd and two added; two: + bc, cd, one added."""
    return (
        write_model(tmp_path / "base", ["ab"], rows=10, seed=1),  # three rows of padding
        write_model(tmp_path / "one", ["cd", "ab"], ["<|im_start|>", "<|im_end|>"], seed=2),
        write_model(tmp_path / "two", ["bc", "cd"], ["<|im_end|>"], seed=3),
    )


class Opened:
    def __init__(self, recipe):
        self.config = load(recipe)
        checkpoints = {model: Checkpoint.open(model.path) for model in self.config.models()}
        folders = {model: Path(model.path) for model in self.config.tokenizer_models()}
        self.found = expand(self.config, checkpoints, folders)
        self.matrices = {
            number: load_file(f"{model.path}/model.safetensors")
            for number, model in enumerate(self.found.models)
        }

    def operand(self, model, name=EMBED):
        """One model's matrix in the output's order, read as the engine would, in fp32."""
        arrays = {number: Matrix(tensors[name]) for number, tensors in self.matrices.items()}
        return read_all(GatheredRows(self.found.row_maps[name], model, arrays), step=7)

    @property
    def ids(self):
        data = json.loads(self.found.files["tokenizer.json"])
        added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
        return {**data["model"]["vocab"], **added}


class Matrix:
    """An operand over an array."""

    is_delta = False
    reads = ()

    def __init__(self, values, dtype=DType.F32):
        self.values, self.dtype, self.shape = values.reshape(-1), dtype, values.shape
        self.read_bytes_per_elem = values.itemsize

    def read(self, start, stop, buffer, base):
        out = buffer[: (stop - start) * self.values.itemsize].view(self.values.dtype)
        out[:] = self.values[start:stop]
        return out

    def scratch_bytes(self, elems):
        return 0


def read_all(operand, step):
    elems = int(np.prod(operand.shape))
    out = []
    for start in range(0, elems, step):
        stop = min(start + step, elems)
        buffer = np.full((stop - start) * operand.dtype.itemsize, 0xFF, np.uint8)
        out.append(operand.read(start, stop, buffer, None).copy())
    return np.concatenate(out).reshape(operand.shape)


def recipe(folders, base=True, **keys):
    given = {"models": [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders],
             "merge_method": "linear", **keys}  # fmt: skip
    return given | ({"base_model": str(folders[0])} if base else {})


def test_a_union_keeps_the_base_numbers_and_appends_in_the_models_order(pool):
    opened = Opened(recipe(pool, tokenizer_source="union"))
    assert sorted(opened.ids, key=opened.ids.get) == [
        "<s>", "</s>", "a", "b", "c", "d", "ab",  # the base
        "cd", "bc",  # ordinary tokens, model by model
        "<|im_start|>", "<|im_end|>",  # then added ones
    ]  # fmt: skip
    assert opened.found.config["vocab_size"] == 11
    shapes = {row.name: row.shape for row in opened.found.rows}
    assert shapes[EMBED] == shapes["lm_head.weight"] == (11, 16)
    assert shapes["model.norm.weight"] == (16,)
    data = json.loads(opened.found.files["tokenizer.json"])
    by_token = {entry["content"]: entry for entry in data["added_tokens"]}
    assert by_token["<|im_end|>"]["special"] and not by_token["cd"]["special"]
    read = Tokenizer.from_str(opened.found.files["tokenizer.json"].decode())
    assert read.encode("ab <|im_end|>").tokens == ["ab", "<|im_end|>"]


def test_rows_of_a_union(pool):
    opened = Opened(recipe(pool, tokenizer_source="union"))
    base, one, two = (opened.matrices[n][EMBED] for n in range(3))
    ids = opened.ids
    for number, own in enumerate((base, one, two)):
        got = opened.operand(number)
        for token in ("<s>", "a", "d"):
            np.testing.assert_array_equal(got[ids[token]], own[ids[token]])
        # one and two have it at 6 and 7; the base lacks it, so their mean stands in.
        mean = ((one[6].astype(np.float64) + two[7]) / 2).astype(np.float32)
        np.testing.assert_array_equal(got[ids["cd"]], (mean, one[6], two[7])[number])
        # the base has it, so its row stands in.
        np.testing.assert_array_equal(got[ids["ab"]], (base[6], one[7], base[6])[number])
        # only one model has it.
        np.testing.assert_array_equal(got[ids["bc"]], two[6])
        np.testing.assert_array_equal(got[ids["<|im_start|>"]], one[8])


def test_the_heads_rows_follow_too(pool):
    opened = Opened(recipe(pool, tokenizer_source="union"))
    got, head = opened.operand(2, "lm_head.weight"), opened.matrices[2]["lm_head.weight"]
    np.testing.assert_array_equal(got[opened.ids["bc"]], head[6])


def test_without_a_base_absent_tokens_are_the_mean_of_all_that_have_them(pool):
    opened = Opened(recipe(pool, base=False, tokenizer_source="union"))
    base, one = (opened.matrices[n][EMBED] for n in range(2))
    mean = ((base[6].astype(np.float64) + one[7]) / 2).astype(np.float32)
    np.testing.assert_array_equal(opened.operand(2)[opened.ids["ab"]], mean)
    assert opened.found.donor == 0


def test_the_bases_vocabulary_drops_padding_and_keeps_its_files(pool):
    opened = Opened(recipe(pool, tokenizer_source="base"))
    assert opened.found.files == {} and opened.found.omitted == ()
    assert opened.found.config["vocab_size"] == 7
    np.testing.assert_array_equal(opened.operand(1)[6], opened.matrices[1][EMBED][7])
    np.testing.assert_array_equal(opened.operand(2)[6], opened.matrices[0][EMBED][6])


def test_one_vocabulary_for_all_needs_no_gathering(tmp_path):
    folders = [write_model(tmp_path / n, ["ab"], seed=s) for s, n in enumerate("xyz")]
    found = Opened(recipe(folders, tokenizer_source="base")).found
    assert found.row_maps == {} and found.files == {}
    assert {row.shape for row in found.rows if row.name == EMBED} == {(7, 16)}


def test_the_tokenizer_of_a_model(pool):
    opened = Opened(recipe(pool, tokenizer_source=str(pool[1])))
    assert opened.found.files["tokenizer.json"] == (pool[1] / "tokenizer.json").read_bytes()
    assert opened.found.config["vocab_size"] == 10
    np.testing.assert_array_equal(opened.operand(0)[7], opened.matrices[0][EMBED][6])  # ab


def test_the_tokenizer_of_a_model_that_is_not_merged(pool):
    opened = Opened(recipe(pool[:2], tokenizer_source=str(pool[2])))
    assert len(opened.found.models) == 2
    assert opened.found.config["vocab_size"] == 9
    assert any("1 tokens of the output are in no model" in w for w in opened.found.warnings)
    np.testing.assert_array_equal(opened.operand(0)[6], np.zeros(16))  # bc: in neither


def test_padding_rows_are_each_models_mean(pool):
    opened = Opened(recipe(pool, tokenizer={"source": "union", "pad_to_multiple_of": 8}))
    assert opened.found.config["vocab_size"] == 16
    for number in range(3):
        got = opened.operand(number)
        mean = got[:11].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(got[11:], np.tile(mean, (5, 1)), rtol=1e-6)


def test_tokens_with_sources_of_their_own(pool):
    _, one, two = map(str, pool)
    opened = Opened(recipe(pool, tokenizer={"source": "union", "tokens": {
        "cd": {"source": two},
        "ab": {"source": one, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": one, "token": "<|im_end|>"}},
        "<row>": {"source": {"kind": "model_token", "model": two, "token_id": 3}, "force": True},
        "<zero>": {"source": {"kind": "zero"}},
        "bc": {},
    }}))  # fmt: skip
    ids, (zero, first, second) = opened.ids, (opened.matrices[n][EMBED] for n in range(3))
    assert [ids[t] for t in ("<new>", "<row>", "<zero>")] == [11, 12, 13]
    for number in range(3):
        got = opened.operand(number)
        np.testing.assert_array_equal(got[ids["cd"]], first[6] if number == 1 else second[7])
        np.testing.assert_array_equal(got[ids["ab"]], first[7])
        np.testing.assert_array_equal(got[ids["<new>"]], first[9])
        np.testing.assert_array_equal(got[ids["<row>"]], second[3])
        np.testing.assert_array_equal(got[ids["<zero>"]], np.zeros(16))
        np.testing.assert_array_equal(got[ids["bc"]], second[6])
        np.testing.assert_array_equal(got[2], (zero, first, second)[number][2])


@pytest.mark.parametrize(
    ("token", "source", "says"),
    [
        ("cd", "base", "has no token 'cd'"),
        ("<x>", {"kind": "model_token", "model": "base", "token": "zz"}, "has no token 'zz'"),
        ("<x>", {"kind": "model_token", "model": "base", "token_id": 99}, "has no row 99"),
        ("<x>", "elsewhere", "is not among the models merged"),
    ],
)
def test_tokens_that_their_source_lacks(pool, token, source, says):
    folder = {"base": str(pool[0])}
    if isinstance(source, dict):
        source = {**source, "model": folder[source["model"]]}
    source = folder.get(source, source) if isinstance(source, str) else source
    asked = {"source": "union", "tokens": {token: {"source": source}}}
    with pytest.raises(RecipeError, match=r"tokenizer\.tokens") as caught:
        Opened(recipe(pool, tokenizer=asked))
    assert says in caught.value.what


def test_tokens_beyond_the_models_rows_are_taken_out(tmp_path):
    # The base's tokenizer knows 9 tokens, its embeddings have 7 rows.
    base = write_model(tmp_path / "base", ["ab", "abc"], ["<|x|>"], rows=7, seed=1)
    one = write_model(tmp_path / "one", ["ab"], seed=2)
    opened = Opened(recipe([base, one], tokenizer_source="base"))
    assert sorted(opened.ids) == sorted(["<s>", "</s>", *"abcd", "ab"])
    assert len(json.loads(opened.found.files["tokenizer.json"])["model"]["merges"]) == 1


def test_tokens_without_a_row_are_not_added_to_a_union(tmp_path):
    base = write_model(tmp_path / "base", ["ab"], seed=1)
    one = write_model(tmp_path / "one", ["cd", "bc"], ["<|x|>"], rows=7, seed=2)
    opened = Opened(recipe([base, one], tokenizer_source="union"))
    assert sorted(opened.ids, key=opened.ids.get)[7:] == ["cd"]
    assert opened.operand(1).shape == (8, 16)


def test_rows_that_are_copies_stay_in_the_inputs_dtype(tmp_path):
    base = write_model(tmp_path / "base", ["ab"], seed=1)
    one = write_model(tmp_path / "one", ["ab", "cd"], ["<|x|>"], seed=2)
    row_map = Opened(recipe([base, one], tokenizer_source="union")).found.row_maps[EMBED]
    halves = {n: Matrix(np.ones((rows, 4), np.uint16), DType.BF16) for n, rows in ((0, 7), (1, 9))}
    assert {GatheredRows(row_map, n, halves).dtype for n in (0, 1)} == {DType.BF16}


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(pool, tmp_path):
    bare = write_llama(tmp_path / "bare", 1, vocab=7)
    found = Opened(recipe([pool[0], bare], tokenizer_source="base")).found
    assert any("has no tokenizer; taken to be" in warning for warning in found.warnings)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Opened(recipe([bare, pool[0]], tokenizer_source="base"))


def test_a_tokenizer_that_is_none(pool):
    (pool[1] / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Opened(recipe(pool, tokenizer_source="union"))


# Chat templates.


def template_in(found):
    return json.loads(found.files["tokenizer_config.json"])["chat_template"]


def test_auto_takes_the_template_that_most_models_have(tmp_path):
    texts = ["{{ first }}", "{{ second }}", " {{ second }}\n", None]
    folders = [
        write_model(tmp_path / f"m{number}", ["ab"], seed=number, template=text)
        for number, text in enumerate(texts)
    ]
    assert template_in(Opened(recipe(folders, chat_template="auto")).found) == "{{ second }}"
    (folders[1] / "chat_template.jinja").write_text("{{ first }}")
    assert template_in(Opened(recipe(folders, chat_template="auto")).found) == "{{ first }}"
    assert Opened(recipe(folders[3:], chat_template="auto")).found.files == {}


def test_templates_as_text_and_by_name(pool):
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = Opened(recipe(pool[:1], chat_template=text)).found
    assert template_in(found) == text
    assert set(found.files) == {"tokenizer_config.json"}
    found = Opened(recipe(pool, chat_template="chatml", tokenizer_source="union")).found
    assert template_in(found) == TEMPLATES["chatml"]
    with pytest.raises(RecipeError, match="neither auto"):
        Opened(recipe(pool[:1], chat_template="gibberish"))


SAID = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
              "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
              "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n"
              "[|assistant|]",
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n"
              "### Response:\n",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_templates_that_have_a_name(pool, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    found = Opened(recipe(pool, chat_template=name, tokenizer_source="union")).found
    (tmp_path / "written").mkdir()
    for file, data in found.files.items():
        (tmp_path / "written" / file).write_bytes(data)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    turns = zip(("system", "user", "assistant", "user"), "SUAV", strict=True)
    said = read.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert said == SAID[name]


def test_a_template_file_of_the_donor_gives_way(pool):
    (pool[0] / "chat_template.jinja").write_text("{{ old }}")
    found = Opened(recipe(pool[:1], chat_template="chatml")).found
    assert found.omitted == ("chat_template.jinja",)


def test_transformers_reads_what_is_written(pool, tmp_path):
    transformers = pytest.importorskip("transformers")
    found = Opened(recipe(pool, chat_template="chatml", tokenizer_source="union")).found
    out = tmp_path / "written"
    out.mkdir()
    for name, data in found.files.items():
        (out / name).write_bytes(data)
    read = transformers.AutoTokenizer.from_pretrained(out)
    assert len(read) == 11
    assert read.tokenize("ab <|im_start|>") == ["ab", "<|im_start|>"]
    said = read.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# Rows, for any map, in any tiles.


@st.composite
def maps(draw):
    count, rows = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    heights = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    own = {
        m: np.array(draw(st.lists(st.integers(-1, heights[m] - 1), min_size=rows, max_size=rows)))
        for m in range(count)
    }
    kinds = st.sampled_from([ZERO, MEAN, PADDING, *range(count)])
    donor = np.array(draw(st.lists(kinds, min_size=rows, max_size=rows)))
    present = np.max(list(own.values()), axis=0) >= 0
    donor = np.where((donor == MEAN) & ~present, ZERO, donor)
    for each in own.values():
        each[donor == PADDING] = -1
    donor_row = np.array([draw(st.integers(0, heights[max(d, 0)] - 1)) for d in donor])
    return RowMap(rows, own, donor, donor_row), heights


@settings(max_examples=60, deadline=None)
@given(maps(), st.integers(1, 4), st.integers(1, 50), st.booleans())
def test_rows_do_not_depend_on_tiles_and_equal_a_plain_loop(made, width, step, halves):
    row_map, heights = made
    random = np.random.default_rng(0)
    values = [random.standard_normal((h, width)).astype(np.float32) for h in heights]
    dtype = DType.F32
    if halves:
        values, dtype = [v.astype(np.float16) for v in values], DType.F16
    arrays = {n: Matrix(v.view(np.uint16) if halves else v, dtype) for n, v in enumerate(values)}
    for model, own in row_map.own.items():
        want = np.zeros((row_map.rows, width))
        for row in range(row_map.rows):
            if own[row] >= 0:
                want[row] = values[model][own[row]]
            elif row_map.donor[row] >= 0:
                want[row] = values[row_map.donor[row]][row_map.donor_row[row]]
            elif row_map.donor[row] == MEAN:
                having = [values[m][o[row]].astype(np.float64)
                          for m, o in row_map.own.items() if o[row] >= 0]  # fmt: skip
                want[row] = np.float32(np.mean(having, axis=0))
        tokens = row_map.donor != PADDING
        if tokens.any():
            want[~tokens] = np.float32(want[tokens].mean(axis=0))
        operand = GatheredRows(row_map, model, arrays)
        got = read_all(operand, step)
        assert operand.dtype in (dtype, DType.F32)
        if operand.dtype is DType.F16:
            got = got.view(np.float16)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-6, atol=1e-7)
        whole = read_all(operand, 10_000)
        assert whole.tobytes() == read_all(operand, step).tobytes()
