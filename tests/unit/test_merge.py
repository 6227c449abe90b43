"""Merging and extracting folders: the arithmetic, the layout, and what must not matter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import Checkpoint, FolderSink, LiveModelSink, Sink, extract, merge, plan
from optimer_engine.errors import MismatchError
from optimer_engine.events import Advanced, Finished, Started
from tests.conftest import nearby, random_tensors

WEIGHTS = {"ja": 0.4, "zh": 0.3, "math": -0.2, "code": 0.7}


def load(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def bits(tensors):
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else t.item()
            for name, t in tensors.items()}  # fmt: skip


@pytest.fixture
def pool(write_checkpoint):
    """A base and four fine-tuned copies, in bf16."""

    def make(dtype=torch.bfloat16, files=1):
        base = random_tensors(0, dtype)
        folders = {"base": write_checkpoint(f"base-{files}-{dtype}", base, files=files)}
        sources = {}
        for seed, name in enumerate(WEIGHTS, start=1):
            sources[name] = nearby(base, seed)
            folders[name] = write_checkpoint(f"{name}-{files}-{dtype}", sources[name], files=files)
        recipe = {
            "base": str(folders["base"]),
            "sources": [
                {"name": n, "model": str(folders[n]), "weight": w} for n, w in WEIGHTS.items()
            ],
        }
        return recipe, base, sources

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_is_the_fp64_sum_rounded_once(pool, tmp_path, dtype):
    recipe, base, sources = pool(dtype)
    merge(recipe, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert set(merged) == set(base)
    wrong = total = 0
    for name, tensor in base.items():
        exact = tensor.double()
        deltas = sum(w * (sources[n][name].double() - exact) for n, w in WEIGHTS.items())
        oracle = (exact + deltas).to(dtype)
        assert merged[name].dtype == dtype
        assert merged[name].shape == tensor.shape
        torch.testing.assert_close(merged[name], oracle, rtol=2**-7, atol=0, equal_nan=False)
        wrong += int((merged[name] != oracle).sum())
        total += tensor.numel()
    # fp32 sums land within a hair of a tie now and then; fp64 sums as good as never do.
    assert wrong <= (0 if dtype == torch.float32 else 1e-2 * total)


def test_tile_size_threads_shards_and_source_files_do_not_change_a_bit(pool, tmp_path):
    recipe, _, _ = pool()
    merge(recipe, tmp_path / "plain")
    want = bits(load(tmp_path / "plain"))
    split, _, _ = pool(files=3)
    for number, (wanted, tile_bytes, threads, shard) in enumerate(
        [
            (recipe, 1, 1, "5GB"),
            (recipe, 1001, 2, "5GB"),
            (recipe, 8192, 3, "3kB"),
            (split, 65536, 2, 700),
            (split, 1, 4, 5000),
        ]
    ):
        made = replace(
            plan({**wanted, "max_shard_size": shard}, threads=threads), tile_bytes=tile_bytes
        )
        out = tmp_path / f"out-{number}"
        made.run(FolderSink(out))
        assert bits(load(out)) == want
        index = out / "model.safetensors.index.json"
        assert index.exists() == (shard != "5GB")
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            assert set(weight_map) == set(want)
            assert set(weight_map.values()) == {p.name for p in out.glob("*.safetensors")}


def test_output_bytes_are_those_of_the_reference_writer(pool, tmp_path):
    from safetensors.torch import save_file

    recipe, _, _ = pool()
    merge(recipe, tmp_path / "out")
    save_file(load(tmp_path / "out"), tmp_path / "again.safetensors", {"format": "pt"})
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "again.safetensors").read_bytes()


def test_all_weights_zero_gives_the_bytes_of_the_base(pool, tmp_path):
    recipe, base, _ = pool()
    for source in recipe["sources"]:
        source["weight"] = 0
    report = merge(recipe, tmp_path / "out")
    assert bits(load(tmp_path / "out")) == bits(base)
    assert set(report.fingerprints) == {"base"}


def test_a_tensor_equal_in_every_source_keeps_its_bits(pool, tmp_path, write_checkpoint):
    base = {"a": torch.tensor([-0.0, 1e-40, 3.0]), "b": torch.ones(3)}
    base["a"] = base["a"].to(torch.bfloat16)
    source = write_checkpoint("tuned", {"a": base["a"], "b": base["b"] * 2})
    recipe = {
        "base": str(write_checkpoint("base", base)),
        "sources": [{"name": "s", "model": str(source), "weight": 0.37}],
    }
    merge(recipe, tmp_path / "out")
    assert bits({"a": load(tmp_path / "out")["a"]}) == bits({"a": base["a"]})


def test_out_dtype_is_written_and_named_in_the_config(pool, tmp_path):
    recipe, _, _ = pool()
    merge({**recipe, "out_dtype": "float32"}, tmp_path / "out")
    assert {t.dtype for t in load(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extract_then_merge_with_weight_one_restores_the_checkpoint_to_the_bit(
    pool, tmp_path, dtype
):
    recipe, _, sources = pool(dtype)
    trained = recipe["sources"][0]["model"]
    extract(recipe["base"], trained, tmp_path / "vector", metadata={"dataset": "ja"})
    vector = Checkpoint.open(tmp_path / "vector")
    assert vector.kind == "vector"
    assert vector.metadata["dataset"] == "ja"
    assert {info.dtype.torch_name for info in vector.tensors.values()} == {"float32"}
    back = {
        "base": recipe["base"],
        "sources": [{"name": "ja", "model": str(tmp_path / "vector"), "weight": 1.0}],
    }
    merge(back, tmp_path / "out")
    assert bits(load(tmp_path / "out")) == bits(sources["ja"])


def test_extract_then_merge_of_a_float32_checkpoint_is_within_one_rounding(pool, tmp_path):
    recipe, base, sources = pool(torch.float32)
    extract(recipe["base"], recipe["sources"][0]["model"], tmp_path / "vector")
    back = {
        "base": recipe["base"],
        "sources": [{"name": "ja", "model": str(tmp_path / "vector")}],
    }
    merge(back, tmp_path / "out")
    merged = load(tmp_path / "out")
    for name, want in sources["ja"].items():
        step = torch.finfo(torch.float32).eps * torch.maximum(want.abs(), (want - base[name]).abs())
        assert torch.all((merged[name] - want).abs() <= step)


def test_vectors_and_full_checkpoints_mix_and_agree(pool, tmp_path):
    recipe, _, _ = pool()
    merge(recipe, tmp_path / "full")
    for source in recipe["sources"][::2]:
        extract(recipe["base"], source["model"], tmp_path / f"v-{source['name']}")
        source["model"] = str(tmp_path / f"v-{source['name']}")
    merge(recipe, tmp_path / "mixed")
    assert bits(load(tmp_path / "mixed")) == bits(load(tmp_path / "full"))


def test_a_vector_of_another_base_is_refused(pool, tmp_path):
    recipe, _, _ = pool()
    extract(recipe["base"], recipe["sources"][0]["model"], tmp_path / "vector")
    wrong = {
        "base": recipe["sources"][1]["model"],
        "sources": [{"name": "ja", "model": str(tmp_path / "vector")}],
    }
    with pytest.raises(MismatchError, match="ja is a vector of another base"):
        merge(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_follows_the_values_and_not_the_files(write_checkpoint):
    base = random_tensors(0)
    one = Checkpoint.open(write_checkpoint("one", base)).fingerprint
    three = Checkpoint.open(write_checkpoint("three", base, files=3)).fingerprint
    changed = dict(base)
    changed["model.norm.weight"] = base["model.norm.weight"] * 1.01
    other = Checkpoint.open(write_checkpoint("other", changed)).fingerprint
    assert one == three != other


def test_a_tied_head_may_be_stored_or_not(write_checkpoint, tmp_path):
    base = random_tensors(0)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    without = {n: t for n, t in base.items() if n != "lm_head.weight"}
    tuned = nearby(without, 1)
    with_head = {**tuned, "lm_head.weight": tuned["model.embed_tokens.weight"].clone()}
    tied = {"tie_word_embeddings": True}
    recipes = {}
    for label, base_tensors, source_tensors in [
        ("stored", base, tuned),
        ("absent", without, with_head),
    ]:
        recipes[label] = {
            "base": str(write_checkpoint(f"{label}-base", base_tensors, tied)),
            "sources": [
                {
                    "name": "s",
                    "model": str(write_checkpoint(f"{label}-s", source_tensors, tied)),
                    "weight": 0.5,
                }
            ],
        }
        report = merge(recipes[label], tmp_path / label)
        assert bool(report.warnings) == (label == "absent")
    stored, absent = load(tmp_path / "stored"), load(tmp_path / "absent")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["lm_head.weight"], absent["model.embed_tokens.weight"])
    assert "lm_head.weight" not in absent


def test_a_missing_head_that_is_not_tied_is_refused(write_checkpoint, tmp_path):
    base = random_tensors(0)
    tuned = {n: t for n, t in nearby(base, 1).items() if n != "lm_head.weight"}
    untied = {"tie_word_embeddings": False}
    recipe = {
        "base": str(write_checkpoint("base", base, untied)),
        "sources": [{"name": "s", "model": str(write_checkpoint("s", tuned, untied))}],
    }
    with pytest.raises(MismatchError, match=r"s lacks lm_head.weight \[37, 24\]"):
        merge(recipe, tmp_path / "out")


def test_tensors_that_are_not_floating_point_are_copied_when_equal(write_checkpoint, tmp_path):
    base = {"w": torch.ones(5), "ids": torch.arange(7), "mask": torch.tensor([True, False])}
    recipe = {
        "base": str(write_checkpoint("base", base)),
        "sources": [
            {"name": "s", "model": str(write_checkpoint("s", {**base, "w": torch.zeros(5)})),
             "weight": 0.5}
        ],
    }  # fmt: skip
    merge(recipe, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["ids"], base["ids"])
    assert torch.equal(merged["mask"], base["mask"])
    assert torch.equal(merged["w"], torch.full((5,), 0.5))
    extract(recipe["base"], recipe["sources"][0]["model"], tmp_path / "vector")
    assert set(load(tmp_path / "vector")) == {"w"}

    other = write_checkpoint("other", {**base, "ids": torch.arange(7) + 1})
    recipe["sources"][0]["model"] = str(other)
    with pytest.raises(MismatchError, match="ids is I64 and differs"):
        merge(recipe, tmp_path / "out2")


class TwoParameters(torch.nn.Module):
    """Names as in a checkpoint, a tied head, and a buffer that no checkpoint stores."""

    def __init__(self, tensors, dtype):
        super().__init__()
        self.embed = torch.nn.Linear(24, 37, bias=False, dtype=dtype)
        self.head = self.embed
        self.norm = torch.nn.LayerNorm(24, dtype=dtype)
        self.register_buffer("cache", torch.full((3,), 5.0), persistent=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_live_model_gets_the_values_of_the_folder(write_checkpoint, tmp_path, dtype):
    base = {
        name: (torch.randn(shape) * 0.1).bfloat16()
        for name, shape in [
            ("embed.weight", (37, 24)),
            ("norm.weight", (24,)),
            ("norm.bias", (24,)),
        ]
    }
    recipe = {
        "base": str(write_checkpoint("base", base)),
        "sources": [
            {"name": "s", "model": str(write_checkpoint("s", nearby(base, 3))), "weight": 0.6}
        ],
    }
    merge(recipe, tmp_path / "out")
    want = load(tmp_path / "out")
    model = TwoParameters(base, dtype)
    made = plan(recipe)
    for weight in (0.1, 0.6):  # rewritten from the base every time, not accumulated
        made.with_weights({"s": weight}).run(LiveModelSink(model))
    for name, value in want.items():
        assert torch.equal(model.state_dict()[name], value.to(dtype))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.cache, torch.full((3,), 5.0))


def test_a_live_model_with_other_tensors_is_refused(pool):
    recipe, base, _ = pool()
    with pytest.raises(MismatchError, match="live model"):
        plan(recipe).run(LiveModelSink(TwoParameters(base, torch.float32)))


def test_a_sink_of_ones_own_sees_every_element_once(pool):
    recipe, base, _ = pool()

    class Count(Sink):
        def __init__(self):
            self.seen = {name: np.zeros(t.numel(), int) for name, t in base.items()}

        def write(self, info, start, tile):
            self.seen[info.name][start : start + tile.size] += 1

    sink = Count()
    replace(plan(recipe), tile_bytes=1).run(sink)
    assert all((count == 1).all() for count in sink.seen.values())


def test_events_tell_the_progress_and_the_report(pool, tmp_path):
    recipe, base, _ = pool()
    events = []
    report = merge(recipe, tmp_path / "out", callbacks=[events.append])
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    done = sum(event.output_bytes for event in events if isinstance(event, Advanced))
    size = sum(t.numel() * t.element_size() for t in base.values())
    assert done == events[0].total_bytes == report.bytes_written == size
    assert report.bytes_read == 5 * size
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert on_disk == json.loads(json.dumps(report.to_dict()))
    assert on_disk["recipe"]["sources"][0]["weight"] == 0.4
    assert on_disk["peak_mem_bytes"] > 0


def test_companion_files_are_copied_and_nothing_else(pool, tmp_path):
    recipe, _, _ = pool()
    base = tmp_path / f"base-1-{torch.bfloat16}"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json",
                 "merges.txt", "chat_template.jinja", "training_args.bin", "modeling_evil.py",
                 "trainer_state.json", "README.md"):  # fmt: skip
        (base / name).write_bytes(b"{}")
    merge(recipe, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "vocab.json", "merges.txt", "chat_template.jinja", "model.safetensors", "report.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_runs_join_tensors_that_adjoin_everywhere(pool):
    recipe, base, _ = pool()
    runs = plan(recipe).runs()
    assert len(runs) == 1
    assert runs[0].elems == sum(t.numel() for t in base.values())
    assert [info.name for info in runs[0].tensors] == sorted(base)


def test_memory_is_bounded_and_a_limit_too_small_is_refused(pool):
    recipe, _, _ = pool()
    small = plan(recipe, mem_limit="1MiB", threads=2)
    assert small.projected_mem_bytes <= 2**20
    assert small.tile_bytes < plan(recipe, threads=2).tile_bytes
    with pytest.raises(MemoryError, match="the limit is 100 kB"):
        plan(recipe, mem_limit="100kB", threads=2)


def test_a_view_is_the_tensor_lazily(pool):
    recipe, base, _ = pool(files=3)
    with Checkpoint.open(recipe["base"]) as checkpoint:
        for name, tensor in base.items():
            view = checkpoint.view(name)
            assert view.shape == tuple(tensor.shape)
            assert not view.flags.writeable
            assert np.array_equal(view, tensor.view(torch.int16).numpy().view(np.uint16))
