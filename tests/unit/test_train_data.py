"""What is trained on: the configuration, the corpus, packing, the mixture. No model needed."""

from __future__ import annotations

import gzip
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimer_engine.errors import RecipeError
from optimer_engine.recipe import read_config
from optimer_engine.train.config import DatasetConfig, TrainConfig, token_count
from optimer_engine.train.corpus import find, first_documents, read_documents
from optimer_engine.train.mixture import BlockSchedule, split_exactly, spread_evenly
from optimer_engine.train.packing import Cutter, pack

EOS, BOS = 256, 257


def byte_tokenizer(with_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, numbered through the byte-level alphabet in its own order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<eos>": EOS, "<bos>": BOS}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


def documents_of(blocks: np.ndarray) -> list[int]:
    """Lengths of the documents in a packed stream, EOS not counted."""
    stream = blocks.reshape(-1)
    ends = np.flatnonzero(stream == EOS)
    return [int(n) for n in np.diff(np.concatenate([[-1], ends])) - 1]


def texts(**settings) -> list[str]:
    corpus = find(DatasetConfig(name="d", **settings))
    return [text for batch in read_documents(corpus) for text in batch]


# configuration


@pytest.mark.parametrize(
    ("text", "count"),
    [(1000, 1000), (1e6, 10**6), ("1e8", 10**8), ("100M", 10**8), ("1.5b", 1_500_000_000),
     ("20k", 20_000), ("1_000", 1000)],
)  # fmt: skip
def test_token_counts(text, count):
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "10 apples", "nan", float("inf"), "1e400"])
def test_what_is_no_token_count(text):
    with pytest.raises(RecipeError, match="not a number of tokens"):
        token_count(text)


def test_a_file_gives_the_same_configuration_as_python(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "base: base\ntokens: 1M\nlearning_rate: 3e-4\n"
        "datasets:\n  - {name: ja, data: [a.jsonl, b.jsonl], ratio: 2}\n"
        "  - {name: code, data: 'src/**/*.py', sample_by: document, ratio: 1}\n"
    )
    config = read_config(path, TrainConfig)
    assert config == TrainConfig(
        base="base",
        tokens=10**6,
        learning_rate=3e-4,
        datasets=[
            DatasetConfig(name="ja", data=["a.jsonl", "b.jsonl"], ratio=2),
            DatasetConfig(name="code", data="src/**/*.py", ratio=1),
        ],
    )
    assert config.ratios == [2 / 3, 1 / 3]
    assert not config.makes_vector
    assert msgspec.structs.replace(config, vector=True).makes_vector


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("[{name: a, data: x}, {name: a, data: y}]", "given to two datasets"),
        ("[{name: a, data: x, ratio: 1}, {name: b, data: y}]", "b without a ratio"),
        ("[{name: a, data: x, ratio: 0}]", "no positive"),
        ("[{name: a, data: x, ratio: -1}]", "ratio"),
        ("[{name: ../a, data: x}]", "name"),
        ("[{name: a, data: x, kind: csv}]", "kind"),
        ("[{name: a, path: x}]", "path"),
        ("[]", "datasets"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, datasets, message):
    path = tmp_path / "train.yaml"
    path.write_text(f"base: base\ntokens: 1M\ndatasets: {datasets}\n")
    with pytest.raises(RecipeError, match=message):
        read_config(path, TrainConfig)


# corpus


def test_each_kind_is_read_in_order_of_its_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for i in (2, 1):
        (tmp_path / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": f"j{i}.{k}", "n": k}) + "\n" for k in range(2))
        )
    table = pyarrow.table({"body": ["p1", None, "p3"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')

    assert texts(data=str(tmp_path / "*.jsonl")) == ["j1.0", "j1.1", "j2.0", "j2.1"]
    assert texts(data=str(tmp_path / "t.parquet"), text_field="body") == ["p1", "", "p3"]
    assert texts(data=str(tmp_path / "z.jsonl.gz")) == ["zipped"]


def test_what_a_document_is_in_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.py").write_text("x = 1\n\n\ny = 2\n")
    both = [str(tmp_path / "a.txt"), str(tmp_path / "b.py")]
    assert texts(data=both) == ["one\ntwo\n\nthree\n", "x = 1\n\n\ny = 2\n"]
    paragraphs = texts(data=both[0], sample_by="paragraph")
    assert [text.strip() for text in paragraphs] == ["one\ntwo", "three"]
    assert texts(data=both[0], sample_by="line") == ["one", "two", "", "three"]


def test_a_folder_is_read_as_a_dataset_and_odd_names_as_they_are(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "from a folder"}\n')
    assert texts(data=str(tmp_path / "set")) == ["from a folder"]
    (tmp_path / "[odd] *name.txt").write_text("odd")
    (tmp_path / "o *name.txt").write_text("not meant")
    assert texts(data=str(tmp_path / "[odd] *name.txt")) == ["odd"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.jsonl", None, {}, "no such file"),
        ("*.jsonl", None, {}, "no file matches"),
        ("a.dat", "x", {}, "cannot tell one kind"),
        ("a.jsonl", '{"title": "t", "body": "b"}\n', {}, "no field 'text'.*body, title"),
        ("a.jsonl", '{"text": 3}\n', {}, "holds int, expected text"),
        ("a.jsonl", "{broken\n", {}, "cannot be read as jsonl"),
        ("a.parquet", "PAR0", {}, "cannot be read as parquet"),
        ("a.jsonl", "", {}, "has no documents"),
        ("a.jsonl", "\n\n", {}, "has no documents"),
        ("a.jsonl.gz", gzip.compress(b""), {}, "cannot be read as jsonl: it has no rows"),
        ("a.txt", b"\xff\xfe\xfa", {}, "cannot be read as text"),
    ],
)  # fmt: skip
def test_an_unusable_corpus_is_refused(tmp_path, name, content, settings, message):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecipeError, match=message):
        first_documents(find(DatasetConfig(name="d", data=str(tmp_path / name), **settings)))


def test_the_fingerprint_follows_the_contents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    dataset = DatasetConfig(name="d", data=str(path))
    before = find(dataset).fingerprint
    (tmp_path / "b.txt").write_text("one")
    assert find(DatasetConfig(name="e", data=str(tmp_path / "b.txt"))).fingerprint == before
    path.write_text("two")
    assert find(dataset).fingerprint != before


# packing


@given(
    st.lists(st.lists(st.integers(0, 2**31), max_size=40), max_size=30),
    st.integers(min_value=2, max_value=17),
)
def test_packing_neither_loses_nor_repeats_a_token(documents, block_size):
    cutter = Cutter(block_size)
    full = []
    for document in documents:
        full.append(cutter.push(document))
        assert full[-1].shape[1:] == (block_size,) and len(cutter.carry) < block_size
    stream = [token for document in documents for token in document]
    assert [*(t for array in full for t in array.reshape(-1)), *cutter.carry] == stream


def test_packed_file_holds_the_stream_to_its_tail(tmp_path):
    # More documents than one batch of reading, so that a carry lost between batches would show.
    lengths = [i % 23 for i in range(700)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    corpus = find(DatasetConfig(name="a", data=str(path)))
    packed = pack(corpus, byte_tokenizer(), 16, tmp_path / "tokens", max_blocks=5)
    blocks, info = packed.blocks, packed.info

    written = [n for n in lengths if n]
    assert (info.documents, info.empty_documents) == (len(written), len(lengths) - len(written))
    assert info.text_bytes == sum(written)
    assert info.tokens == sum(written) + len(written)
    assert info.blocks == len(blocks) == info.tokens // 16
    assert info.tail_tokens == info.tokens % 16
    assert blocks.dtype == np.uint16 and isinstance(blocks, np.memmap)
    assert documents_of(blocks) == written[: len(documents_of(blocks))]
    assert blocks.size - sum(n + 1 for n in documents_of(blocks)) < 23
    assert info.largest_token == EOS


def test_bos_is_put_where_the_tokenizer_puts_it(tmp_path):
    (tmp_path / "a.txt").write_text("ab\ncd\n")
    corpus = find(DatasetConfig(name="a", data=str(tmp_path / "a.txt"), sample_by="line"))
    folder = tmp_path / "tokens"
    plain = pack(corpus, byte_tokenizer(), 6, folder, max_blocks=1).blocks
    begun = pack(corpus, byte_tokenizer(with_bos=True), 8, folder, max_blocks=1).blocks
    assert plain[0, [2, 5]].tolist() == [EOS, EOS] and BOS not in plain
    assert begun[0, [0, 3, 4, 7]].tolist() == [BOS, EOS, BOS, EOS]


def test_packing_is_done_once_for_one_tokenizer_text_and_block_size(tmp_path):
    (tmp_path / "a.txt").write_text("some text, long enough")
    corpus = find(DatasetConfig(name="a", data=str(tmp_path / "a.txt")))

    def packed(tokenizer, block_size) -> set[str]:
        pack(corpus, tokenizer, block_size, tmp_path / "tokens", max_blocks=1)
        return {path.name for path in (tmp_path / "tokens").glob("*.npy")}

    one = packed(byte_tokenizer(), 4)
    assert len(one) == 1
    (file,) = (tmp_path / "tokens" / name for name in one)
    file.chmod(0o400)
    before = file.stat().st_mtime_ns
    assert packed(byte_tokenizer(), 4) == one and file.stat().st_mtime_ns == before
    assert len(packed(byte_tokenizer(), 8)) == 2
    assert len(packed(byte_tokenizer(with_bos=True), 8)) == 3


def test_too_little_text_for_a_block(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    corpus = find(DatasetConfig(name="a", data=str(tmp_path / "a.txt")))
    with pytest.raises(RecipeError, match="6 tokens in 1 documents, fewer than one block of 64"):
        pack(corpus, byte_tokenizer(), 64, tmp_path / "tokens", max_blocks=1)
    assert {path.suffix for path in (tmp_path / "tokens").iterdir()} == {".lock"}


# mixture


def numbered(n_blocks: int) -> np.ndarray:
    return np.arange(n_blocks, dtype=np.uint16).repeat(4).reshape(n_blocks, 4)


ratio_lists = st.lists(st.floats(0.01, 1), min_size=1, max_size=6).map(
    lambda ratios: [ratio / sum(ratios) for ratio in ratios]
)


@given(ratio_lists, st.integers(1, 3000))
def test_counts_are_exact_to_one_block_and_spread_evenly(ratios, total):
    counts = split_exactly(ratios, total)
    assert sum(counts) == total
    assert all(abs(count - ratio * total) < 1 for count, ratio in zip(counts, ratios, strict=True))

    order = spread_evenly(counts)
    half = order[: total // 2]
    for i, count in enumerate(counts):
        assert (order == i).sum() == count
        assert abs((half == i).sum() - count * len(half) / total) <= len(counts) / 2 + 0.5


def test_a_dataset_is_gone_through_in_whole_epochs():
    schedule = BlockSchedule([numbered(7)], ["a"], [1.0], 7 * 3 + 2, seed=3)
    seen = [int(schedule[i]["input_ids"][0]) for i in range(len(schedule))]
    epochs = [seen[0:7], seen[7:14], seen[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(seen[21:])) == 2


def test_the_order_follows_the_seed_and_the_name_alone():
    def order(names: list[str], seed: int) -> list[tuple[int, ...]]:
        arrays = [numbered(50) for _ in names]
        schedule = BlockSchedule(arrays, names, [1 / len(names)] * len(names), 100, seed)
        return [tuple(schedule[i]["labels"]) for i in range(100)]

    assert order(["a", "b"], 1) == order(["a", "b"], 1) != order(["a", "b"], 2)
    mixture = order(["a", "b"], 1)[::2]
    assert mixture == order(["a"], 1)[:50]
