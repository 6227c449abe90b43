"""What the demo ships: real text in disjoint splits, attributed, and a base that loads."""

from __future__ import annotations

import json
import lzma

import pytest

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.demo.assets import ASSETS, BASE, DOMAINS, RETAINED, read_split, unpack

ALL = (*DOMAINS, RETAINED)
LONG_BYTES = 40


def rows(domain: str) -> list[dict[str, str]]:
    with lzma.open(ASSETS / "text" / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def size_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_assets_stay_small() -> None:
    assert size_bytes(ASSETS / "text") < 4_000_000
    assert size_bytes(BASE) < 8_000_000


@pytest.mark.parametrize("domain", ALL)
def test_splits_are_disjoint_and_large_enough(domain: str) -> None:
    texts: dict[str, list[str]] = {}
    for row in rows(domain):
        texts.setdefault(row["split"], []).append(row["text"])
    sizes = {split: sum(len(t.encode()) for t in ts) for split, ts in texts.items()}
    wanted = {"base", "dev", "test"} | ({"cpt"} if domain in DOMAINS else set())
    assert sizes.keys() == wanted
    assert all(60_000 < sizes[split] < 110_000 for split in ("dev", "test"))
    assert all(sizes[split] > 500_000 for split in wanted - {"dev", "test"})

    lines = {
        split: {
            line
            for text in ts
            for line in text.split("\n")
            if len(line.encode()) >= LONG_BYTES and any(c.isalnum() for c in line)
        }
        for split, ts in texts.items()
    }
    trained = set.union(*(lines[split] for split in wanted - {"dev", "test"}))
    assert not trained & (lines["dev"] | lines["test"])
    if domain != "code":  # files of one library share idioms
        assert not lines["dev"] & lines["test"]


@pytest.mark.parametrize("domain", ALL)
def test_every_source_is_attributed(domain: str) -> None:
    attributed = (ASSETS / "SOURCES.md").read_text(encoding="utf-8")
    for source in {row["source"] for row in rows(domain)}:
        assert f"| `{source}` |" in attributed


def test_licence_texts_named_are_there() -> None:
    attributed = (ASSETS / "SOURCES.md").read_text(encoding="utf-8")
    licences = sorted((ASSETS / "licences").iterdir())
    assert licences
    assert all(f"`licences/{path.name}`" in attributed for path in licences)


def test_the_base_is_a_small_bf16_model_with_a_tokenizer_for_every_script() -> None:
    from transformers import AutoTokenizer

    with Checkpoint.open(BASE) as base:
        assert base.kind == "model"
        assert {info.dtype.torch_name for info in base.tensors.values()} == {"bfloat16"}
        assert 2_000_000 < sum(info.elems for info in base.tensors.values()) < 4_000_000
    tokenizer = AutoTokenizer.from_pretrained(BASE, trust_remote_code=False)
    assert tokenizer.eos_token_id is not None
    for domain in ALL:
        text = read_split(domain, "dev")[0]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(text.encode()) / len(ids) > 2.0  # words, not bytes


def test_unpack_cuts_at_the_limit_and_keeps_what_is_there(tmp_path) -> None:
    unpack(tmp_path, limit_bytes=5_000)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"ja.cpt.jsonl", "zh.dev.jsonl", "en.test.jsonl"} <= names
    assert "en.cpt.jsonl" not in names
    lines = (tmp_path / "ja.cpt.jsonl").read_text(encoding="utf-8").splitlines()
    first = [json.loads(line)["text"] for line in lines]
    assert first == read_split("ja", "cpt")[: len(first)]
    assert (tmp_path / "ja.cpt.jsonl").stat().st_size > 5_000
    (tmp_path / "ja.cpt.jsonl").write_text("mine")
    unpack(tmp_path, limit_bytes=5_000)
    assert (tmp_path / "ja.cpt.jsonl").read_text() == "mine"
