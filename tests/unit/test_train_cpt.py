"""Training end to end with a tiny random Llama: it learns, resumes to the bit, and refuses."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

from optimer_engine.checkpoint import Checkpoint  # noqa: E402
from optimer_engine.cli import optimer  # noqa: E402
from optimer_engine.errors import (  # noqa: E402
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from optimer_engine.train import DatasetConfig, TrainConfig, run_cpt  # noqa: E402
from optimer_engine.train.resume import defect, mark_complete  # noqa: E402
from tests.unit.train_support import RHYME, TOKENS_PER_STEP, make_base  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Iterator[Path]:
    folder = make_base(tmp_path_factory.mktemp("train") / "base")
    gc.freeze()  # each run collects garbage; the libraries' own objects are none
    yield folder
    gc.unfreeze()


@pytest.fixture(scope="session")
def rhymes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rhymes.jsonl"
    path.write_text("".join(json.dumps({"text": RHYME * (1 + i % 7)}) + "\n" for i in range(100)))
    return path


@pytest.fixture(scope="session")
def config(base, rhymes) -> TrainConfig:
    return TrainConfig(
        base=str(base),
        datasets=[DatasetConfig(name="rhymes", data=str(rhymes))],
        tokens=12 * TOKENS_PER_STEP,
        block_size=32,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=3e-3,
        save_every=4,
    )


@pytest.fixture(scope="session")
def straight(config, tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run_cpt(config, out)
    return out


def replaced(config: TrainConfig, **changes) -> TrainConfig:
    return msgspec.structs.replace(config, **changes)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


class StopAt(TrainerCallback):
    """Interrupts the run like Ctrl-C after a step, before its checkpoint is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupt(config: TrainConfig, out: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_cpt(config, out, callbacks=[StopAt(step)])


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def test_loss_falls_and_the_run_folder_is_complete(config, base, tmp_path, capfd):
    out = tmp_path / "run"
    report = run_cpt(replaced(config, tokens=40 * TOKENS_PER_STEP), out)

    curve = log(out)
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert (report.steps, report.tokens) == (40, 40 * TOKENS_PER_STEP)
    assert curve[-1]["tokens"] == report.tokens
    assert report.final_loss == curve[-1]["loss"]
    packed = report.datasets[0].packed
    expected = curve[-1]["loss"] / np.log(2) * packed.tokens / packed.text_bytes
    assert curve[-1]["bits_per_byte"] == pytest.approx(expected)

    assert {path.name for path in out.iterdir()} == {
        ".lock", "run.json", "tokens", "train_log.jsonl", "model", "vector", "train_report.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in (out / "model").iterdir()}) == 1
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))
    assert capfd.readouterr().out == ""
    json.loads((out / "train_report.json").read_text())

    trained = json.loads((out / "model" / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    assert trained | {"dtype": 0, "transformers_version": 0} == before | {
        "dtype": 0,
        "transformers_version": 0,
    }
    assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.float32


def test_vector_is_trained_minus_base_and_says_of_what(straight, base):
    with Checkpoint.open(straight / "vector") as opened, Checkpoint.open(base) as before:
        assert opened.base_fingerprint == before.fingerprint
        assert opened.metadata["dataset"] == "rhymes"
        assert opened.metadata["tokens"] == str(12 * TOKENS_PER_STEP)
    before = load_file(base / "model.safetensors")
    trained = load_file(straight / "model" / "model.safetensors")
    vector = load_file(straight / "vector" / "vector.safetensors")
    assert vector.keys() == before.keys() == trained.keys()
    for name, tau in vector.items():
        assert trained[name].dtype == tau.dtype == torch.float32
        assert torch.equal(tau, trained[name] - before[name].float())
        assert tau.abs().max() > 0


@pytest.mark.parametrize("step", [4, 6, 11])
def test_a_resumed_run_ends_with_the_same_bytes(config, straight, tmp_path, step):
    interrupt(config, tmp_path / "cut", step)
    assert not (tmp_path / "cut" / "model").exists()

    report = run_cpt(config, tmp_path / "cut")

    assert report.resumed_from == (step - 1) // 4 * 4
    assert weights(tmp_path / "cut") == weights(straight)
    keys = ("step", "loss", "learning_rate", "grad_norm")
    assert [[line[key] for key in keys] for line in log(tmp_path / "cut")] == [
        [line[key] for key in keys] for line in log(straight)
    ]


def test_an_incomplete_checkpoint_is_passed_over(config, straight, tmp_path, caplog):
    interrupt(config, tmp_path / "cut", 11)
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-8"
    assert defect(newest) is None
    (newest / "optimizer.pt").unlink()  # the Trainer would go on with a fresh optimizer

    report = run_cpt(config, tmp_path / "cut")

    assert report.resumed_from == 4
    assert "checkpoint-8 is incomplete and was removed: optimizer.pt is missing" in caplog.text
    assert weights(tmp_path / "cut") == weights(straight)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
             "trainer_state.json", "checkpoint.ok"]
)  # fmt: skip
def test_every_part_of_a_checkpoint_is_checked(tmp_path, file):
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "trainer_state.json", "training_args.bin"):  # fmt: skip
        (tmp_path / name).write_bytes(b"0123456789")
    mark_complete(tmp_path)
    assert defect(tmp_path) is None
    assert not (tmp_path / "training_args.bin").exists()

    whole = (tmp_path / file).read_bytes()
    for damaged in (whole[:-1], whole[:4] + bytes([whole[4] ^ 1]) + whole[5:]):
        (tmp_path / file).write_bytes(damaged)
        assert defect(tmp_path) is not None
    (tmp_path / file).unlink()
    assert file in (defect(tmp_path) or "")


@pytest.mark.parametrize("stage", ["save", "_write_vector"])
def test_a_run_cut_after_its_last_step_is_finished(config, straight, tmp_path, monkeypatch, stage):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"optimer_engine.train.run.{stage}", killed)
        run_cpt(config, tmp_path / "cut")
    report = run_cpt(config, tmp_path / "cut")
    assert (report.resumed_from, report.steps) == (12, 12)
    assert report.final_loss == log(straight)[-1]["loss"]
    assert weights(tmp_path / "cut") == weights(straight)


def test_tokens_are_not_packed_again_on_resume(config, tmp_path):
    interrupt(config, tmp_path / "run", 6)
    (packed,) = (tmp_path / "run" / "tokens").glob("*.npy")
    before = packed.stat().st_mtime_ns
    run_cpt(config, tmp_path / "run")
    assert packed.stat().st_mtime_ns == before


def test_a_finished_run_is_only_reported(config, straight):
    before = weights(straight)
    report = run_cpt(config, straight, callbacks=[StopAt(1)])
    assert msgspec.json.encode(report) == msgspec.json.encode(
        msgspec.json.decode((straight / "train_report.json").read_bytes())
    )
    assert weights(straight) == before


def test_another_configuration_is_refused_with_the_keys_that_differ(config, rhymes, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(rhymes.read_bytes())
    config = replaced(config, datasets=[DatasetConfig(name="rhymes", data=str(mine))])
    interrupt(config, tmp_path / "run", 6)
    with pytest.raises(RecipeError) as error:
        run_cpt(replaced(config, learning_rate=1e-3, seed=5), tmp_path / "run")
    assert "config.learning_rate (0.003 then, 0.001 now)" in str(error.value)
    assert "config.seed (0 then, 5 now)" in str(error.value)
    assert "batch" not in str(error.value)

    with mine.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(RecipeError, match=r"data\.rhymes"):
        run_cpt(config, tmp_path / "run")
    with pytest.raises(OutputError, match="not to be resumed"):
        run_cpt(config, tmp_path / "run", resume=False)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a training run"):
        run_cpt(config, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_mixture_meets_its_ratios_and_repeats_what_is_short(config, rhymes, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("fish swim in the deep blue sea. " * 10)
    unread = tmp_path / "unread.txt"
    unread.write_text("no")
    datasets = [
        DatasetConfig(name="rhymes", data=str(rhymes), ratio=3),
        DatasetConfig(name="other", data=str(other), ratio=1),
        DatasetConfig(name="unread", data=str(unread), ratio=0),
    ]
    report = run_cpt(replaced(config, datasets=datasets), tmp_path / "run")

    rhymes_part, other_part = report.datasets
    assert (rhymes_part.blocks, other_part.blocks) == (36, 12)
    assert other_part.epochs == 12 / other_part.packed.blocks > 1
    assert report.vector is None and not (tmp_path / "run" / "vector").exists()
    assert report.save_dtype == "bfloat16"  # as the base has it, where no vector is taken


def test_every_step_has_the_mixture(config, base, rhymes, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 400)
    (z,) = AutoTokenizer.from_pretrained(base)("z")["input_ids"]
    from_other: list[bool] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            def look(module, given):
                from_other.extend((given[0] == z).any(dim=1).tolist())

            model.get_input_embeddings().register_forward_pre_hook(look)

    datasets = [
        DatasetConfig(name="rhymes", data=str(rhymes), ratio=0.75),
        DatasetConfig(name="other", data=str(other), ratio=0.25),
    ]
    run_cpt(replaced(config, datasets=datasets), tmp_path / "run", callbacks=[Watch()])
    assert len(from_other) == 48
    assert [sum(from_other[i : i + 4]) for i in range(0, 48, 4)] == [1] * 12


def test_seed_decides_the_run(config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_cpt(replaced(config, tokens=2 * TOKENS_PER_STEP, seed=seed), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_bf16_accumulation_and_checkpointing_train(config, tmp_path):
    chosen = replaced(config, precision="bf16", gradient_checkpointing=True, vector=False)
    report = run_cpt(chosen, tmp_path / "run")
    assert report.precision == "bf16"
    assert log(tmp_path / "run")[-1]["loss"] < log(tmp_path / "run")[0]["loss"]


def test_divergence_stops_the_run_with_its_step(config, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                model.model.norm.weight.data[0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"loss became nan at step 7"):
        run_cpt(config, tmp_path / "run", callbacks=[Poison()])
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["checkpoint-4"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_gradient_gone_wrong_is_never_saved(config, tmp_path):
    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                parameter = model.model.norm.weight
                parameter.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(NonFiniteError, match=r"grad norm became (nan|inf) at step 4"):
        run_cpt(config, tmp_path / "run", callbacks=[Explode()])
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 128}, "128 tokens, but the base has 64 positions"),
        ({"tokens": 100}, "less than one optimizer step"),
        ({"tokens": "many"}, "not a number of tokens"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"precision": "int3"}, "precision"),
        ({"lr_scheduler": "zigzag"}, "zigzag"),
        ({"training_arguments": {"output_dir": "x"}}, "is set by the output folder"),
        ({"training_arguments": {"seed": 3}}, "is set by seed"),
        ({"training_arguments": {"hub_token": "x"}}, "decided by the run"),
        ({"training_arguments": {"push_to_hub": True}}, "decided by the run"),
        ({"training_arguments": {"learning_rat": 1}}, "is no field"),
        ({"training_arguments": {"optim": "no_such"}}, "no_such"),
    ],
)
def test_unusable_settings_leave_nothing_behind(config, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        run_cpt(replaced(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_training_arguments_reach_the_trainer(config, tmp_path):
    seen = {}

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.update(beta=args.adam_beta2, logging=args.logging_steps)

    chosen = replaced(config, training_arguments={"adam_beta2": 0.95, "logging_steps": 1})
    run_cpt(chosen, tmp_path / "run", callbacks=[Spy()])
    assert seen == {"beta": 0.95, "logging": 1}
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 13))


def test_a_base_without_its_parts_is_refused(config, base, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(CheckpointError, match="tokenizer"):
        run_cpt(replaced(config, base=str(bare)), tmp_path / "run")

    lacking = tmp_path / "lacking"
    shutil.copytree(base, lacking)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        run_cpt(replaced(config, base=str(lacking)), tmp_path / "run")
    tensors["model.norm.weight"], tensors["model.extra.weight"] = torch.ones(32), torch.ones(32)
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 1 tensors.*model\.extra\.weight"):
        run_cpt(replaced(config, base=str(lacking)), tmp_path / "run")

    small = tmp_path / "small"
    shutil.copytree(base, small)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*(f"<{i}>" for i in range(100)), " cat sat"])
    tokenizer.save_pretrained(small)
    with pytest.raises(MismatchError, match=r"makes token 3\d\d of it, the base has 300"):
        run_cpt(replaced(config, base=str(small)), tmp_path / "run")

    with pytest.raises(CheckpointError, match="no such folder"):
        run_cpt(replaced(config, base=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command_line_trains_and_prints_the_report(config, base, rhymes, tmp_path, capfd):
    out = tmp_path / "run"
    command = [
        "train", "--base", str(base), "--data", f"rhymes={rhymes}", "--tokens", "512",
        "--block-size", "32", "--batch-size", "4", "--learning-rate", "3e-3", "--json",
        "-o", str(out),
    ]  # fmt: skip
    optimer(command, standalone_mode=False)
    printed = capfd.readouterr().out
    assert json.loads(printed) == json.loads((out / "train_report.json").read_text())
    assert json.loads(printed)["tokens"] == 512


def test_command_line_options_win_over_the_file(config, base, rhymes, tmp_path, capfd):
    settings = tmp_path / "train.yaml"
    settings.write_text(
        f"base: {base}\ntokens: 100M\nblock_size: 32\nbatch_size: 4\n"
        f"datasets: [{{name: a, data: {rhymes}}}, {{name: b, data: {rhymes}}}]\n"
    )
    command = ["train", str(settings), "--tokens", "1024", "--ratio", "a=0.75", "--ratio", "b=0.25"]
    optimer([*command, "-o", str(tmp_path / "run")], standalone_mode=False)
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert report["tokens"] == 1024
    assert [part["blocks"] for part in report["datasets"]] == [24, 8]
    assert "a: 24 blocks of 32 tokens" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "a=x.txt", "--tokens", "1k"], "add --base"),
        (["--base", "b", "--data", "x.txt", "--tokens", "1k"], "not NAME=VALUE"),
        (["--base", "b", "--data", "a=x.txt", "--ratio", "c=1", "--tokens", "1k"], "there is a"),
        (["--base", "b", "--data", "a=x.txt", "--ratio", "a=x", "--tokens", "1k"], "not a number"),
        (["--base", "b", "--data", "a=x.txt", "--tokens", "1k", "--batch-size", "0"], "batch_size"),
    ],
)  # fmt: skip
def test_command_line_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        optimer(["train", *options, "-o", str(tmp_path / "run")], standalone_mode=False)
    assert not (tmp_path / "run").exists()
