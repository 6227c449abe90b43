"""The Trainer of Transformers: its arguments, and what is added to its loop.

The loop, the optimizer, mixed precision, several GPUs and the resuming of their states are the
Trainer's. Added is what it leaves open: a loss that is not finite stops the run at once, every
checkpoint is marked once it is whole, and the log, with bits per byte, is a JSONL file instead of
text on standard output (see `callbacks`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimer_engine.errors import RecipeError
from optimer_engine.train.callbacks import MarkCheckpoints, non_finite
from optimer_engine.train.config import TrainConfig
from optimer_engine.train.mixture import Blocks, BlockSchedule

_OWN_KEYS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "seed": "seed",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "save_every",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "output_dir": "the output folder",
}
"""TrainingArguments that have a key of their own in the configuration."""

_REFUSED = {
    "save_strategy", "save_total_limit", "save_only_model", "save_on_each_node",
    "enable_jit_checkpoint", "resume_from_checkpoint", "ignore_data_skip", "logging_nan_inf_filter",
    "load_best_model_at_end", "auto_find_batch_size", "dataloader_drop_last",
    "train_sampling_strategy", "remove_unused_columns", "label_names", "data_seed", "disable_tqdm",
    "do_train", "do_eval", "do_predict", "eval_on_start", "prediction_loss_only", "push_to_hub",
}  # fmt: skip
"""TrainingArguments that would break what the run promises: its budget, its order, its resuming."""


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for `config`, with checkpoints in `folder`.

    Raises:
        RecipeError: an unknown argument, one that has a key of its own here, or a refused value.
    """
    given = copy.deepcopy(config.training_arguments)  # the Trainer fills in its mappings
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in given:
        where = f"training_arguments: {name}"
        if name in _OWN_KEYS:
            raise RecipeError(f"is set by {_OWN_KEYS[name]}", where=where, todo="use that key")
        if name in _REFUSED or name.startswith("hub_"):
            raise RecipeError(
                "is decided by the run itself", where=where, todo="remove it from the mapping"
            )
        if name not in known:
            raise RecipeError(
                f"is no field of TrainingArguments in Transformers {transformers.__version__}",
                where=where,
                todo="see the Trainer's documentation for the names",
            )
    has_cuda = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and has_cuda and torch.cuda.is_bf16_supported()
    )
    # Renamed within Transformers 5; the old name warns.
    recompute = (
        "activation_checkpointing"
        if "activation_checkpointing" in known
        else "gradient_checkpointing"
    )
    defaults: dict[str, Any] = {
        "logging_steps": 10,
        "logging_first_step": True,
        "report_to": "none",
        "dataloader_pin_memory": has_cuda,
        recompute: config.gradient_checkpointing,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if config.heldout:
        defaults |= {
            "eval_strategy": "steps",
            "eval_steps": config.save_every,
            "per_device_eval_batch_size": config.batch_size,
        }
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,  # the schedule is the whole run, once through
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler,
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            seed=config.seed,
            bf16=bf16,
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=2,
            train_sampling_strategy="sequential",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            **(defaults | given),
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"refused by the Trainer: {error}", where="training config") from error
    if not config.heldout and arguments.eval_strategy != "no":
        raise RecipeError(
            f"is {arguments.eval_strategy}, and there is no held-out text",
            where="training_arguments: eval_strategy",
            todo="set heldout, such as 0.01",
        )
    return arguments


class CptTrainer(Trainer):
    """The Trainer, stopping at a loss that is not a number and logging bits per byte.

    Attributes:
        bytes_per_token: of the mixture (key ""), and of each held-out dataset.
    """

    bytes_per_token: Mapping[str, float]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand a log to every callback, the user's reporters among them, with bits per byte."""
        for name, size in self.bytes_per_token.items():
            prefix = f"eval_{name}_" if name else ""
            if f"{prefix}loss" in logs:
                logs[f"{prefix}bits_per_byte"] = logs[f"{prefix}loss"] / math.log(2) / size
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            NonFiniteError: before the optimizer has seen the gradients of a non-finite loss.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise non_finite("loss", loss.item(), self.state.global_step + 1, self.args)
        return loss


def make_trainer(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    schedule: BlockSchedule,
    heldout: dict[str, Blocks],
    bytes_per_token: Mapping[str, float],
    trajectory: Path | None,
    callbacks: list[TrainerCallback],
) -> CptTrainer:
    """A Trainer that prints nothing, marks its checkpoints and calls `callbacks`.

    Args:
        heldout: what is evaluated on, by dataset.
        bytes_per_token: see `CptTrainer`.
        trajectory: where the weights of all checkpoints are kept.

    Raises:
        RecipeError: FSDP was asked for where it has no effect.
    """
    trainer = CptTrainer(
        model=model,
        args=arguments,
        train_dataset=schedule,
        eval_dataset=heldout or None,
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        callbacks=[*callbacks, MarkCheckpoints(trajectory)],
    )
    if arguments.fsdp and not (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled):
        raise RecipeError(
            "FSDP was asked for and is not in effect: every process would hold the whole model",
            where="training_arguments: fsdp",
            todo="Accelerate shards over accelerators only; leave it out on CPUs",
        )
    trainer.bytes_per_token = bytes_per_token
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    return trainer


def gathered_weights(trainer: CptTrainer, checkpoints: Path) -> dict[str, torch.Tensor] | None:
    """The trained weights where the model in memory holds a part of them only, or a 16-bit copy.

    Called by every process; the first one gets the result. None where the model itself is whole.
    """
    if trainer.is_deepspeed_enabled:
        if not trainer.is_world_process_zero():
            return {}
        # The engine's module is a 16-bit copy; the float32 weights are in the last checkpoint.
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        last = checkpoints / f"checkpoint-{trainer.state.global_step}"
        found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(last))
        return found
    if trainer.is_fsdp_enabled:
        gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(
            trainer.model_wrapped
        )
        return gathered
    return None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the loading and saving bars of Transformers and datasets, which say nothing here."""
    import datasets
    from transformers.utils import logging

    bars, dataset_bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()
