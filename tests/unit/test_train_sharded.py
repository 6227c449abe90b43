"""FSDP with two real processes: a run whose weights no process holds ends in a whole checkpoint.

Accelerate takes FSDP only where there are accelerators, though PyTorch shards on CPUs as well. The
script that the launchers start lifts that restriction and nothing else, so all that the Trainer and
this package do under FSDP is done: sharding, saving, resuming, gathering the weights.

Launching two processes six times takes a minute or two:
`pytest -m slow tests/unit/test_train_sharded.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from optimer_engine import merge  # noqa: E402
from optimer_engine.errors import RecipeError  # noqa: E402
from optimer_engine.train import DatasetConfig, TrainConfig, run_cpt  # noqa: E402
from optimer_engine.train.trainer import training_arguments  # noqa: E402
from tests.unit.test_train_modes import ROOT, replaced  # noqa: E402
from tests.unit.train_support import make_base, write_rhymes  # noqa: E402

LAUNCH = """
import os, sys, msgspec
from accelerate import state

made = state.AcceleratorState.__init__

def with_fsdp(self, *arguments, fsdp_plugin=None, **more):
    made(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
    plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")  # set again by each later call
    if plugin and os.environ.get("SHARD", "1") == "1":
        self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, plugin

state.AcceleratorState.__init__ = with_fsdp

from optimer_engine.train import TrainConfig, run_cpt
from transformers import TrainerCallback

class Look(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step == 1:
            kinds = {type(p).__name__ for p in model.parameters()}
            print("parameters are", sorted(kinds), flush=True)
        if state.global_step == int(os.environ.get("DIE_AT", "0")):
            os.kill(os.getpid(), 9)

config = msgspec.json.decode(sys.argv[1], type=TrainConfig)
report = run_cpt(config, sys.argv[2], callbacks=[Look()])
"""

TORCHRUN = [
    "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
    "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
]  # fmt: skip
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2",
    "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type",
    "FULL_STATE_DICT", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def config(base, tmp_path):
    rhymes = write_rhymes(tmp_path / "rhymes.jsonl")
    return TrainConfig(
        base=str(base), datasets=[DatasetConfig(name="rhymes", data=str(rhymes))],
        tokens=6 * 4 * 32, block_size=32, batch_size=2, learning_rate=1e-3, save_every=3,
        training_arguments={"logging_steps": 1, **FSDP},
    )  # fmt: skip


def launch(launcher, config, out, **environment):
    script = out.with_name("launch.py")
    script.write_text(LAUNCH)
    command = [sys.executable, *launcher, str(script), msgspec.json.encode(config).decode(), out]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(part) for part in command], env=os.environ | settings | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_sharded_run_ends_in_a_whole_checkpoint_and_its_vector(config, base, tmp_path, launcher):
    if launcher is ACCELERATE:  # then the launcher asks for it, as its configuration file would
        config = replaced(config, training_arguments={"logging_steps": 1})
    done = launch(launcher, config, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "parameters are ['DTensor']" in done.stdout

    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert (report["processes"], report["steps"]) == (2, 6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    whole = load_file(base / "model.safetensors")
    assert {n: t.shape for n, t in trained.items()} == {n: t.shape for n, t in whole.items()}

    # The same sequences in the same steps as in one process: the same run but for rounding.
    alone = run_cpt(
        replaced(config, batch_size=4, training_arguments={"logging_steps": 1}), tmp_path / "alone"
    )
    assert report["final_loss"] == pytest.approx(alone.final_loss, rel=0.05)
    a, b = (
        flat(load_file(tmp_path / r / "vector" / "vector.safetensors")) for r in ("run", "alone")
    )
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9
    source = {"name": "rhymes", "model": str(tmp_path / "run" / "vector"), "weight": 1.0}
    merge({"base": str(base), "sources": [source], "out_dtype": "float32"}, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(flat(merged), flat(trained), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_sharded_run_killed_on_its_way_is_continued(config, tmp_path):
    straight = launch(TORCHRUN, config, tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    killed = launch(TORCHRUN, config, tmp_path / "run", DIE_AT="5")
    assert killed.returncode != 0
    assert not (tmp_path / "run" / "train_report.json").exists()
    again = launch(TORCHRUN, config, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert report["resumed_from"] == 3
    names = [tmp_path / r / "model" / "model.safetensors" for r in ("straight", "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_fsdp_that_the_trainer_would_leave_out_is_refused(config, tmp_path):
    done = launch(TORCHRUN, config, tmp_path / "run", SHARD="0")
    assert done.returncode != 0
    assert "FSDP was asked for and is not in effect" in done.stderr
    assert not (tmp_path / "run").exists()


def test_deepspeed_s_weights_are_taken_from_its_last_checkpoint(monkeypatch, tmp_path):
    """DeepSpeed is seldom installed; what is asked of it is held by a stand-in."""
    from optimer_engine.train.trainer import gathered_weights

    asked = []

    def stand_in(folder):
        asked.append(folder)
        return {"w": torch.ones(2)}

    module = ModuleType("deepspeed.utils.zero_to_fp32")
    module.get_fp32_state_dict_from_zero_checkpoint = stand_in
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trainer = SimpleNamespace(
        is_deepspeed_enabled=True,
        is_world_process_zero=lambda: True,
        state=SimpleNamespace(global_step=12),
    )
    assert gathered_weights(trainer, tmp_path)["w"].sum() == 2
    assert asked == [str(tmp_path / "checkpoint-12")]
    trainer.is_world_process_zero = lambda: False
    assert gathered_weights(trainer, tmp_path) == {}


def test_a_deepspeed_configuration_reaches_the_trainer(config, tmp_path):
    zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    chosen = replaced(config, training_arguments={"deepspeed": zero})
    if find_spec("deepspeed") is None:
        with pytest.raises(RecipeError, match=r"refused by the Trainer.*deepspeed"):
            run_cpt(chosen, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        pytest.skip("deepspeed is not installed: that it is asked for is all that can be seen")
    arguments = training_arguments(chosen, tmp_path / "run")
    assert arguments.hf_deepspeed_config.is_zero3()


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="pip install deepspeed; wants a compiler"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_itself_shards_a_run_that_is_killed_and_continued(config, base, tmp_path, stage):
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto")}
    chosen = replaced(
        config, training_arguments={"logging_steps": 1, "use_cpu": True, "deepspeed": zero}
    )
    cpu = {"DS_ACCELERATOR": "cpu"}
    straight = launch(TORCHRUN, chosen, tmp_path / "straight", **cpu)
    assert straight.returncode == 0, straight.stderr
    killed = launch(TORCHRUN, chosen, tmp_path / "run", DIE_AT="5", **cpu)
    assert killed.returncode != 0 and not (tmp_path / "run" / "train_report.json").exists()
    again = launch(TORCHRUN, chosen, tmp_path / "run", **cpu)
    assert again.returncode == 0, again.stderr
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert (report["processes"], report["resumed_from"]) == (2, 3)
    for name in ("model/model.safetensors", "vector/vector.safetensors"):
        ends = [(tmp_path / run / name).read_bytes() for run in ("straight", "run")]
        assert ends[0] == ends[1]
    moved = flat(load_file(tmp_path / "run" / "vector" / "vector.safetensors"))
    assert moved.isfinite().all() and moved.norm() > 0
