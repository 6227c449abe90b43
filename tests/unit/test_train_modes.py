"""What can be chosen of a run: adapters, frozen embeddings, documents apart, held-out text,
trajectories, storage of the vector, reporters, several processes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from optimer_engine.checkpoint import Checkpoint  # noqa: E402
from optimer_engine.engine import merge  # noqa: E402
from optimer_engine.errors import RecipeError  # noqa: E402
from optimer_engine.train import DatasetConfig, TrainConfig, run_cpt  # noqa: E402
from optimer_engine.train.corpus import find  # noqa: E402
from optimer_engine.train.mixture import NO_LABEL, Blocks, BlockSchedule, example  # noqa: E402
from optimer_engine.train.model import check_separable  # noqa: E402
from optimer_engine.train.packing import is_held_out, pack  # noqa: E402
from optimer_engine.train.resume import defect  # noqa: E402
from tests.unit.train_support import TOKENS_PER_STEP, make_base, write_rhymes  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Iterator[Path]:
    folder = make_base(tmp_path_factory.mktemp("modes") / "base")
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(scope="module")
def rhymes(tmp_path_factory) -> Path:
    return write_rhymes(tmp_path_factory.mktemp("text") / "rhymes.jsonl")


@pytest.fixture(scope="module")
def config(base, rhymes) -> TrainConfig:
    return TrainConfig(
        base=str(base),
        datasets=[DatasetConfig(name="rhymes", data=str(rhymes))],
        tokens=6 * TOKENS_PER_STEP,
        block_size=32,
        batch_size=4,
        learning_rate=3e-3,
        save_every=2,
    )


def replaced(config: TrainConfig, **changes) -> TrainConfig:
    return msgspec.structs.replace(config, **changes)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


class StopAt(TrainerCallback):
    """Interrupts the run after a step, before its checkpoint is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# adapters


# PEFT asks the model for an attribute that Transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("lora", "moves"),
    [
        ({"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, 14),
        ({"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, 4),
        ({"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["norm"]}, 7),
    ],
)
def test_an_adapter_merges_to_what_peft_merges(config, base, tmp_path, lora, moves):
    chosen = replaced(config, mode="lora", lora=lora, gradient_checkpointing=True)
    report = run_cpt(chosen, tmp_path / "run")
    assert report.model is None and report.vector == str(tmp_path / "run" / "adapter")
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, report.vector)
    wanted = adapted.merge_and_unload().state_dict()

    source = {"name": "a", "model": report.vector, "weight": 1.0}
    merge({"base": str(base), "sources": [source], "out_dtype": "float32"}, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    moved = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
        moved += bool((tensor != before[name].float()).any())
    assert moved == moves


def test_an_adapter_run_is_resumed_to_the_same_bytes(config, tmp_path):
    chosen = replaced(config, mode="lora", lora={"r": 2, "lora_dropout": 0.1})
    run_cpt(chosen, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run_cpt(chosen, tmp_path / "cut", callbacks=[StopAt(5)])
    assert defect(tmp_path / "cut" / "checkpoints" / "checkpoint-4") is None
    assert run_cpt(chosen, tmp_path / "cut").resumed_from == 4
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cut" / "adapter" / name).read_bytes() == (
            tmp_path / "straight" / "adapter" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4}}, "mode is full"),
        ({"mode": "lora", "lora": {"rank": 4}}, "lora: rank: is no field of LoraConfig"),
        ({"mode": "lora", "lora": {"use_dora": True}}, "could not be merged: has use_dora"),
        ({"mode": "lora", "lora": {"init_lora_weights": "pissa"}}, "changes the base's weights"),
        ({"mode": "lora", "lora": {"target_modules": ["nothing"]}}, "refused by PEFT"),
        ({"mode": "lora", "vector": False}, "an adapter is the result"),
        ({"mode": "lora", "vector_mode": "int8"}, "an adapter is the result"),
        ({"vector": False, "keep_model": False}, "nothing would be left"),
        ({"training_arguments": {"eval_strategy": "steps"}}, "no held-out text"),
        ({"heldout": 0.001}, "held out: .*fewer than one block"),
    ],
)
def test_unusable_settings_leave_nothing_behind(config, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run_cpt(replaced(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# what is trained


def test_frozen_embeddings_keep_their_bits(config, tmp_path):
    run_cpt(
        replaced(config, mode="frozen_embeddings", gradient_checkpointing=True), tmp_path / "run"
    )
    tau = load_file(tmp_path / "run" / "vector" / "vector.safetensors")
    frozen = [name for name, tensor in tau.items() if not tensor.any()]
    assert frozen == ["model.embed_tokens.weight"]  # tied: the output's as well
    with Checkpoint.open(tmp_path / "run" / "vector") as opened:
        assert opened.metadata["training"] == "frozen_embeddings"


def test_an_exact_vector_restores_the_model_that_was_dropped(config, base, tmp_path):
    from optimer_engine.packing import unpack

    run_cpt(replaced(config, save_dtype="bfloat16"), tmp_path / "kept")
    report = run_cpt(
        replaced(config, save_dtype="bfloat16", vector_mode="exact", keep_model=False),
        tmp_path / "run",
    )
    assert report.model is None and not (tmp_path / "run" / "model").exists()
    unpack(base, tmp_path / "run" / "vector", tmp_path / "restored")
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "kept" / "model" / "model.safetensors").items():
        assert torch.equal(restored[name].view(torch.int16), tensor.view(torch.int16))


def test_a_trajectory_is_kept_without_the_optimizer(config, tmp_path):
    chosen = replaced(config, keep_checkpoints=True)
    with pytest.raises(KeyboardInterrupt):
        run_cpt(chosen, tmp_path / "run", callbacks=[StopAt(5)])
    run_cpt(chosen, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "trajectory").iterdir())
    assert [path.name for path in kept] == ["step-0000002", "step-0000004", "step-0000006"]
    assert not list((tmp_path / "run").rglob("optimizer.pt"))
    last = load_file(kept[-1] / "model.safetensors")
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, last[name]) for name, tensor in trained.items())
    with Checkpoint.open(kept[0]) as first, Checkpoint.open(kept[1]) as second:
        assert first.kind == "model" and first.fingerprint != second.fingerprint


# documents


def test_positions_and_labels_restart_after_each_separator():
    block = np.array([5, 6, 0, 7, 0, 0, 8, 9], dtype=np.uint16)
    given = example(block, 0)
    assert given["input_ids"].tolist() == block.tolist()
    assert given["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert given["labels"].tolist() == [5, 6, 0, NO_LABEL, 0, NO_LABEL, NO_LABEL, 9]
    joined = example(block, None)
    assert joined.keys() == {"input_ids", "labels"}
    assert joined["labels"].tolist() == block.tolist()
    assert len(Blocks(block[None], 0)) == 1
    schedule = BlockSchedule([block[None]], ["a"], [1.0], 2, 0, 0)
    assert schedule[1]["position_ids"].tolist() == given["position_ids"].tolist()


def test_documents_apart_do_not_see_each_other_in_training(config, tmp_path):
    same: dict[bool, bool] = {}

    class Look(TrainerCallback):
        """Changes what stands before the last document, in the Trainer's own model and batch."""

        def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
            model.eval()
            for batch in train_dataloader:
                tokens = batch["input_ids"][:1]
                ends = (tokens[0, :-1] == 0).nonzero()
                if len(ends):
                    break
            rest = {k: v[:1] for k, v in batch.items() if k == "position_ids"}
            start = int(ends[-1]) + 1
            other = tokens.clone()
            other[0, : start - 1] = 5
            with torch.no_grad():
                a, b = (model(input_ids=t, **rest).logits[0, start:] for t in (tokens, other))
            same[bool(rest)] = torch.equal(a, b)
            model.train()

    for separate in (True, False):
        chosen = replaced(config, separate_documents=separate)
        run_cpt(chosen, tmp_path / str(separate), callbacks=[Look()])
    assert same == {True: True, False: False}


def test_an_architecture_that_cannot_keep_documents_apart_is_refused():
    class Recurrent(torch.nn.Module):
        """Carries its state on, whatever the positions say."""

        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.embeddings = torch.nn.Embedding(20, 4)
            self.carry = torch.nn.GRU(4, 4, batch_first=True)

        def get_input_embeddings(self):
            return self.embeddings

        def forward(self, input_ids, position_ids, use_cache):
            return SimpleNamespace(logits=self.carry(self.embeddings(input_ids))[0])

    with pytest.raises(RecipeError, match="Recurrent attends across documents"):
        check_separable(Recurrent(), 0)


def test_held_out_documents_are_scored_and_never_trained_on(config, base, rhymes, tmp_path):
    seen = []

    class Spy(TrainerCallback):
        """A reporter as a user has one."""

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    chosen = replaced(config, heldout=0.2, learning_rate=1e-2)
    report = run_cpt(chosen, tmp_path / "run", callbacks=[Spy()])
    (part,) = report.datasets
    scores = part.heldout_bits_per_byte
    assert scores["trained"] < scores["base"]

    lines = (tmp_path / "run" / "heldout" / "rhymes.jsonl").read_text().splitlines()
    apart = [json.loads(line)["text"] for line in lines]
    every = [json.loads(line)["text"] for line in rhymes.read_text().splitlines()]
    assert apart == [text for text in every if is_held_out(text.encode(), 0.2)]
    assert 5 < len(apart) < 40
    packed = part.packed
    assert packed.heldout is not None
    assert packed.documents + packed.heldout.documents == 100
    assert packed.text_bytes + packed.heldout.text_bytes == sum(len(t) for t in every)

    # The base's score is what its own loss on these blocks says.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    (file,) = (tmp_path / "run" / "tokens").glob("*-heldout.npy")
    blocks = torch.from_numpy(np.load(file).astype(np.int64))
    with torch.no_grad():
        losses = [float(model(input_ids=b[None], labels=b[None]).loss) for b in blocks]
    bits = np.mean(losses) / np.log(2) / packed.heldout.bytes_per_token
    assert scores["base"] == pytest.approx(bits, rel=1e-5)

    curve = [line for line in log(tmp_path / "run") if "heldout" in line]
    assert [line["step"] for line in curve] == [0, 2, 4, 6]
    assert curve[-1]["heldout_bits_per_byte"] == scores["trained"]
    assert [s["bits_per_byte"] for s in seen if "loss" in s] == [
        line["bits_per_byte"] for line in log(tmp_path / "run") if "loss" in line
    ]
    assert sum("eval_rhymes_bits_per_byte" in s for s in seen) == 4


def test_a_run_with_held_out_text_is_resumed_to_the_same_bytes(config, tmp_path):
    chosen = replaced(config, heldout=0.2)
    straight = run_cpt(chosen, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run_cpt(chosen, tmp_path / "cut", callbacks=[StopAt(5)])
    cut = run_cpt(chosen, tmp_path / "cut")
    assert cut.datasets == straight.datasets
    for name in ("model", "vector"):
        file = f"{name}/{name}.safetensors"
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    assert [(x["step"], "heldout" in x) for x in log(tmp_path / "cut")] == [
        (x["step"], "heldout" in x) for x in log(tmp_path / "straight")
    ]


def test_held_out_is_decided_by_the_text_alone(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    written = write_rhymes(one).read_text().splitlines(keepends=True)
    two.write_text("".join(reversed(written)) + "".join(written[:30]))
    texts = []
    for path in (one, two):
        corpus = find(DatasetConfig(name="d", data=str(path)))
        packed = pack(corpus, tokenizer, 16, tmp_path / "t", max_blocks=1, heldout=0.3)
        lines = packed.heldout_text.read_text().splitlines()
        texts.append({json.loads(line)["text"] for line in lines})
    assert texts[0] == texts[1]


def test_packed_tokens_are_shared_and_only_a_hub_dataset_is_cut(
    config, rhymes, tmp_path, monkeypatch
):
    import datasets

    real, asked = datasets.load_dataset, []

    def stand_in(path, **options):
        if path != "org/corpus":
            return real(path, **options)
        asked.append((options.pop("name"), options.pop("revision"), options["streaming"]))
        return real("json", data_files=str(rhymes), **options)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    remote = DatasetConfig(name="far", data="org/corpus", subset="ja", revision="v1", license="mit")
    chosen = replaced(config, datasets=[remote], cache=str(tmp_path / "cache"))
    report = run_cpt(chosen, tmp_path / "run")
    assert set(asked) == {("ja", "v1", True)}  # streamed: no more is fetched than is used
    (part,) = report.datasets
    assert part.blocks == part.packed.blocks == 24 and part.packed.documents < 100
    assert (part.ids, part.license) == (["org/corpus"], "mit")

    before = len(asked)
    run_cpt(replaced(chosen, seed=1), tmp_path / "second")
    assert len(asked) == before + 1  # looked at, not tokenised again
    assert not (tmp_path / "run" / "tokens").exists()


# several processes

LAUNCH = """
import sys, msgspec
from optimer_engine.train import TrainConfig, run_cpt
config = msgspec.json.decode(sys.argv[1], type=TrainConfig)
report = run_cpt(config, sys.argv[2])
open(f"{sys.argv[2]}-{__import__('os').environ['RANK']}.json", "wb").write(
    msgspec.json.encode(report))
"""


def test_two_processes_train_one_run_and_one_of_them_writes(config, tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCH)
    chosen = replaced(config, batch_size=2, save_every=3, heldout=0.2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0",
        str(tmp_path / "launch.py"), msgspec.json.encode(chosen).decode(), str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"run-{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert (first["processes"], first["steps"]) == (2, 6)
    assert first["tokens"] == 6 * TOKENS_PER_STEP
    assert [line["step"] for line in log(tmp_path / "run") if "loss" in line] == [1, 3, 6]

    # The same sequences in the same steps as in one process: the same run but for rounding.
    alone = run_cpt(replaced(config, heldout=0.2), tmp_path / "alone")
    assert alone.final_loss == pytest.approx(first["final_loss"], rel=0.05)
    taus = [load_file(tmp_path / run / "vector" / "vector.safetensors") for run in ("run", "alone")]
    a, b = (torch.cat([t.flatten() for t in tau.values()]) for tau in taus)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
