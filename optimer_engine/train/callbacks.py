"""What happens beside the Trainer's loop: checkpoints marked, the log written, the bar moved.

Every process of a run calls them; the first one alone writes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from optimer_engine.errors import NonFiniteError
from optimer_engine.progress import QUIET_S
from optimer_engine.train.resume import keep_weights, mark_complete

_log = logging.getLogger(__name__)


def non_finite(what: str, value: float, step: int, arguments: TrainingArguments) -> NonFiniteError:
    """The error of a run that has diverged."""
    return NonFiniteError(
        f"the {what} became {value} at step {step}",
        where="training",
        todo=f"lower learning_rate (now {arguments.learning_rate:g}) or lengthen warmup, in a new"
        f" output folder; checkpoints before this step are in {arguments.output_dir}",
    )


class MarkCheckpoints(TrainerCallback):
    """Marks each checkpoint when it is whole (see `resume`), and keeps its weights on request.

    Args:
        trajectory: folder for the weights of all checkpoints, `step-0000500` and so on; or None.
    """

    def __init__(self, trajectory: Path | None = None) -> None:
        self.trajectory = trajectory

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer has written its files: this process's, so the others are waited for."""
        if args.world_size > 1:
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.trajectory is not None:
            if any(checkpoint.glob("*.safetensors")):
                # Before the mark, so that a kill in between repeats both.
                keep_weights(checkpoint, self.trajectory / f"step-{state.global_step:07d}")
            else:
                _log.warning("%s has no safetensors files to keep", checkpoint)
        mark_complete(checkpoint)


class TrainLog(TrainerCallback):
    """Writes `train_log.jsonl`, one object a line; a resumed run goes on where its checkpoint was.

    Keys: `step`; `tokens` trained on so far; `loss`, the mean in nats per token since the line
    before; `bits_per_byte`, the same over the mean bytes per token of the whole text, so an
    estimate for the few blocks concerned; `learning_rate`; `grad_norm` of the last step, before
    clipping; `seconds` of training, those before an interruption included. A line on held-out text
    has `step`, `tokens`, `heldout`, the dataset's name, `heldout_loss` and
    `heldout_bits_per_byte`; at step 0 it is the base's.

    Args:
        path: the file.
        tokens_per_step: tokens in an optimizer step.
        heldout: names of the datasets evaluated on.

    Attributes:
        last: the last line on the training text.
        scores: bits per byte on held-out text by dataset, of the base and at the last step.
    """

    def __init__(self, path: Path, tokens_per_step: int, heldout: list[str]) -> None:
        self.path, self.tokens_per_step, self.heldout = path, tokens_per_step, heldout
        self.last: dict[str, float] = {}
        self.scores: dict[str, dict[str, float]] = {name: {} for name in heldout}
        self._before_s = self._start_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines after the step that is continued from."""
        lines = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(msgspec.DecodeError):  # a line cut short by a kill
                entry = msgspec.json.decode(line)
                # Held-out text is scored before a save; the base, before the first step, anew.
                if entry["step"] <= state.global_step and state.global_step:
                    lines.append(line)
                    self._take(entry)
        if state.is_world_process_zero:
            self.path.write_bytes(b"".join(line + b"\n" for line in lines))
        self._before_s = self.last.get("seconds", 0.0)
        self._start_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last step, and before every save: a run gone wrong must not be saved."""
        if control.should_save or control.should_training_stop:
            control.should_log = True
        if self.heldout and control.should_training_stop:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append one line.

        Raises:
            NonFiniteError: the loss or the gradient's norm is not finite.
        """
        logs = kwargs["logs"]
        place = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        if "loss" in logs:
            for key in ("loss", "grad_norm"):
                if not math.isfinite(logs.get(key, 0.0)):
                    raise non_finite(key.replace("_", " "), logs[key], state.global_step, args)
            self._append(state, {
                **place,
                "loss": logs["loss"],
                "bits_per_byte": logs["bits_per_byte"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm", 0.0),
                "seconds": round(self._before_s + time.monotonic() - self._start_s, 3),
            })  # fmt: skip
        for name in self.heldout:
            if f"eval_{name}_loss" in logs:
                self._append(state, {
                    **place,
                    "heldout": name,
                    "heldout_loss": logs[f"eval_{name}_loss"],
                    "heldout_bits_per_byte": logs[f"eval_{name}_bits_per_byte"],
                })  # fmt: skip

    def _append(self, state: Any, entry: dict[str, Any]) -> None:
        self._take(entry)
        if state.is_world_process_zero:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(entry) + b"\n")

    def _take(self, entry: dict[str, Any]) -> None:
        if "loss" in entry:
            self.last = entry
        elif entry["heldout"] in self.scores:
            which = "trained" if entry["step"] else "base"
            self.scores[entry["heldout"]][which] = entry["heldout_bits_per_byte"]


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
