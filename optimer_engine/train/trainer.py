"""The only module that knows the Trainer of Transformers: its arguments, its log, its checkpoints.

The loop, the optimizer, mixed precision and the resuming of their states are the Trainer's. Added
here is what it leaves open: a loss that is not finite stops the run at once, every checkpoint is
marked once it is whole, and the log is a JSONL file instead of text on standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimer_engine.errors import NonFiniteError, RecipeError
from optimer_engine.progress import QUIET_S
from optimer_engine.train.config import TrainConfig
from optimer_engine.train.mixture import BlockSchedule
from optimer_engine.train.resume import mark_complete

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
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_on_start",
    "local_rank", "push_to_hub",
}  # fmt: skip
"""TrainingArguments that would break what the run promises: its budget, its order, its resuming."""


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for `config`, with checkpoints in `folder`.

    Raises:
        RecipeError: an unknown argument, one that has a key of its own here, or a refused value.
    """
    given = config.training_arguments
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
    if arguments.world_size > 1:
        raise RecipeError(
            f"started as {arguments.world_size} processes, expected one",
            where="training",
            todo="start it without a launcher",
        )
    return arguments


class CptTrainer(Trainer):
    """The Trainer, stopping at a loss that is not a number."""

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
    callbacks: list[TrainerCallback],
) -> CptTrainer:
    """A Trainer that prints nothing, marks its checkpoints and calls `callbacks`."""
    trainer = CptTrainer(
        model=model,
        args=arguments,
        train_dataset=schedule,
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        callbacks=[*callbacks, MarkCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    return trainer


def non_finite(what: str, value: float, step: int, arguments: TrainingArguments) -> NonFiniteError:
    """The error of a run that has diverged."""
    return NonFiniteError(
        f"the {what} became {value} at step {step}",
        where="training",
        todo=f"lower learning_rate (now {arguments.learning_rate:g}) or lengthen warmup, in a new"
        f" output folder; checkpoints before this step are in {arguments.output_dir}",
    )


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint when it is whole (see `resume`)."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written its files."""
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class TrainLog(TrainerCallback):
    """Writes `train_log.jsonl`, one object a line; a resumed run goes on where its checkpoint was.

    Keys: `step`; `tokens` trained on so far; `loss`, the mean in nats per token since the line
    before; `bits_per_byte`, the same over the mean bytes per token of the whole text, so an
    estimate for the few blocks concerned; `learning_rate`; `grad_norm` of the last step, before
    clipping; `seconds` of training, those before an interruption included.

    Args:
        path: the file.
        tokens_per_step: tokens in an optimizer step.
        bytes_per_token: mean over the run's mixture.
    """

    def __init__(self, path: Path, tokens_per_step: int, bytes_per_token: float) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.bytes_per_token = bytes_per_token
        self.last: dict[str, float] = {}
        self._before_s = self._start_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines after the step that is continued from."""
        lines = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(msgspec.DecodeError):  # a line cut short by a kill
                if (entry := msgspec.json.decode(line))["step"] <= state.global_step:
                    lines.append(line)
                    self.last = entry
        self.path.write_bytes(b"".join(line + b"\n" for line in lines))
        self._before_s = self.last.get("seconds", 0.0)
        self._start_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step, and before every save: a run gone wrong must not be saved."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append one line.

        Raises:
            NonFiniteError: the loss or the gradient's norm is not finite.
        """
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        for key in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise non_finite(key.replace("_", " "), logs[key], state.global_step, args)
        self.last = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "bits_per_byte": logs["loss"] / math.log(2) / self.bytes_per_token,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", 0.0),
            "seconds": round(self._before_s + time.monotonic() - self._start_s, 3),
        }
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(self.last) + b"\n")


class ProgressBar(TrainerCallback):
    """A bar over the run's tokens, on stderr."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the step that is continued from."""
        per_step = self.tokens_per_step
        self._bar = tqdm(
            desc="training", unit="tok", unit_scale=True, delay=QUIET_S,
            total=state.max_steps * per_step, initial=state.global_step * per_step,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by one step."""
        self._bar.update(self.tokens_per_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the loss."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()


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
