"""One run after it is known what it is: pack, train, write."""

from __future__ import annotations

import copy
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.durable import replace_file
from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.redaction import redacted_data
from optimer_engine.report import versions
from optimer_engine.train.config import TrainConfig
from optimer_engine.train.corpus import Corpus
from optimer_engine.train.mixture import Blocks, BlockSchedule, split_exactly
from optimer_engine.train.model import Base, check_separable, load, load_tokenizer, save
from optimer_engine.train.modes import freeze_embeddings, save_adapter, with_adapter
from optimer_engine.train.packing import Packed, pack
from optimer_engine.train.processes import Processes
from optimer_engine.train.report import DatasetReport, TrainReport
from optimer_engine.train.resume import fingerprint_of, link_or_copy, newest_complete

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

_log = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "datasets", "accelerate")


@dataclass(frozen=True)
class Begun:
    """A run as it is known before any text is packed; made by the first process.

    Attributes:
        corpora: those with a share in the run.
        identity: what the run is, by content.
    """

    corpora: list[Corpus]
    identity: dict[str, Any]


class Run:
    """One run on its way from packing to its report; every process has one."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        base: Base,
        begun: Begun,
        arguments: TrainingArguments,
        processes: Processes,
        progress: bool,
    ) -> None:
        self.config, self.out, self.base = config, out, base
        self.begun, self.corpora = begun, begun.corpora
        self.arguments, self.processes, self.progress = arguments, processes, progress
        per_pass = arguments.train_batch_size * arguments.world_size
        self.sequences = per_pass * config.gradient_accumulation
        self.tokens_per_step = self.sequences * config.block_size

    def finish(self, callbacks: list[TrainerCallback]) -> TrainReport:
        """Pack, train, write the results; the report."""
        config, processes = self.config, self.processes
        steps = _steps(config, self.tokens_per_step)
        tokenizer = load_tokenizer(self.base.folder)
        lora = config.mode == "lora"
        # Only trained weights need float32; a frozen base under an adapter does not.
        dtype = "bfloat16" if lora and self.arguments.bf16 else "float32"
        model: Any = load(self.base.folder, config.block_size, dtype)
        if config.separate_documents:
            check_separable(model, tokenizer.eos_token_id)
        rows = model.get_input_embeddings().weight.shape[0]
        if config.mode == "frozen_embeddings":
            freeze_embeddings(model)
        if lora:
            import torch

            torch.manual_seed(config.seed)  # of the adapter's random factor
            model = with_adapter(model, config.lora, config.base)
        packed = processes.on_first(lambda: self._pack(tokenizer, steps * self.sequences))
        self._check_vocabulary(packed, rows)
        datasets, log, resumed_from, weights = self._fit(model, tokenizer, packed, callbacks)
        save_dtype = config.save_dtype or (
            "float32" if config.makes_vector or lora else self.base.dtype
        )

        def write() -> TrainReport:
            if lora:
                save_adapter(model, self.out / "adapter", weights)
            else:
                save(model, tokenizer, save_dtype, self.out / "model", weights)
            if config.makes_vector:
                _write_vector(config, self.base.folder, self.out, self._notes(datasets, log),
                              self.progress)  # fmt: skip
            return self._report(datasets, log, resumed_from, save_dtype)

        return processes.on_first(write)

    def _pack(self, tokenizer: PreTrainedTokenizerBase, n_blocks: int) -> list[Packed]:
        """Every dataset packed, and its held-out documents put into the run folder."""
        folder = Path(self.config.cache) if self.config.cache else self.out / "tokens"
        counts = split_exactly(self.ratios, n_blocks)
        packed = [
            pack(
                corpus, tokenizer, self.config.block_size, folder,
                max_blocks=count, heldout=self.config.heldout, progress=self.progress,
            )
            for corpus, count in zip(self.corpora, counts, strict=True)
        ]  # fmt: skip
        if self.config.heldout:
            (self.out / "heldout").mkdir(exist_ok=True)
            for corpus, found in zip(self.corpora, packed, strict=True):
                text = self.out / "heldout" / f"{corpus.config.name}.jsonl"
                text.unlink(missing_ok=True)
                link_or_copy(found.heldout_text, text)
        return packed

    @property
    def ratios(self) -> list[float]:
        """Shares of the datasets that have one."""
        return [ratio for ratio in self.config.ratios if ratio > 0]

    def _check_vocabulary(self, packed: list[Packed], rows: int) -> None:
        for corpus, found in zip(self.corpora, packed, strict=True):
            largest = max(found.info.largest_token, getattr(found.info.heldout, "largest_token", 0))
            if rows and largest >= rows:  # 0 where weights are spread over processes
                raise MismatchError(
                    f"the tokenizer makes token {largest} of it, the base has {rows} embeddings",
                    where=f"dataset {corpus.config.name!r}",
                    todo="use the tokenizer that the base was trained with",
                )

    def _fit(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        packed: list[Packed],
        callbacks: list[TrainerCallback],
    ) -> tuple[list[DatasetReport], dict[str, float], int, dict[str, Any] | None]:
        """Run the Trainer.

        Returns:
            The datasets' reports, the log's last line, the step that was continued from, and the
            weights where the model does not hold them.
        """
        from optimer_engine.train.callbacks import ProgressBar, TrainLog
        from optimer_engine.train.trainer import gathered_weights, make_trainer

        config, arguments, out = self.config, self.arguments, self.out
        names = [corpus.config.name for corpus in self.corpora]
        separator = tokenizer.eos_token_id if config.separate_documents else None
        n_blocks = _steps(config, self.tokens_per_step) * self.sequences
        arrays = [found.blocks for found in packed]
        schedule = BlockSchedule(arrays, names, self.ratios, n_blocks, config.seed, separator)
        heldout = {
            name: Blocks(found.heldout_blocks, separator)
            for name, found in zip(names, packed, strict=True)
            if found.info.heldout
        }
        mean = sum(
            count * found.info.bytes_per_token
            for count, found in zip(schedule.counts, packed, strict=True)
        )
        bytes_per_token = {"": mean / n_blocks} | {
            name: found.info.heldout.bytes_per_token
            for name, found in zip(names, packed, strict=True)
            if found.info.heldout
        }

        log = TrainLog(out / "train_log.jsonl", self.tokens_per_step, list(heldout))
        own = [log, ProgressBar(self.tokens_per_step)] if self.progress else [log]
        checkpoint, messages = self.processes.on_first(lambda: newest_complete(out / "checkpoints"))
        if self.processes.first:
            for message in messages:
                _log.warning("%s: %s", out, message)
        if self.progress and checkpoint is not None:
            print(f"optimer: {out}: continuing from {checkpoint.name}", file=sys.stderr)
        arguments.eval_on_start = bool(heldout) and checkpoint is None

        before = copy.deepcopy((model.config, model.generation_config))
        trainer = make_trainer(
            model, tokenizer, arguments, schedule, heldout, bytes_per_token,
            out / "trajectory" if config.keep_checkpoints else None, [*callbacks, *own],
        )  # fmt: skip
        if self.processes.first:
            text = msgspec.json.format(msgspec.json.encode(self.begun.identity))
            replace_file(out / "run.json", text)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # The Trainer turns the cache off and copies the tokenizer's special tokens into both.
        if config.mode != "lora":
            model.config, model.generation_config = before
        weights = gathered_weights(trainer, out / "checkpoints")
        resumed_from = 0
        if checkpoint is not None:
            resumed_from = int(checkpoint.name.removeprefix("checkpoint-"))
        reports = [
            DatasetReport(
                name=corpus.config.name,
                fingerprint=corpus.fingerprint,
                files=len(corpus.files),
                bytes=corpus.bytes,
                packed=found.info,
                ratio=ratio,
                blocks=count,
                epochs=count / found.info.blocks,
                heldout_bits_per_byte=log.scores.get(corpus.config.name, {}),
                license=corpus.config.license,
                ids=corpus.ids,
            )
            for corpus, found, ratio, count in zip(
                self.corpora, packed, self.ratios, schedule.counts, strict=True
            )
        ]
        return reports, log.last, resumed_from, weights

    def _notes(self, datasets: list[DatasetReport], log: dict[str, float]) -> dict[str, str]:
        """What the vector's header says of the run."""
        return {
            "dataset": ", ".join(dataset.name for dataset in datasets),
            "dataset_fingerprint": ", ".join(dataset.fingerprint for dataset in datasets),
            "tokens": str(int(log["tokens"])),
            "block_size": str(self.config.block_size),
            "learning_rate": f"{self.config.learning_rate:g}",
            "seed": str(self.config.seed),
            "training": self.config.mode,
        }

    def _report(
        self,
        datasets: list[DatasetReport],
        log: dict[str, float],
        resumed_from: int,
        save_dtype: str,
    ) -> TrainReport:
        """Write the report and remove what only an unfinished run needs."""
        config, out, lora = self.config, self.out, self.config.mode == "lora"
        vector = out / ("adapter" if lora else "vector")
        keeps_model = not lora and config.keep_model
        report = TrainReport(
            config=config,
            base_fingerprint=self.base.fingerprint,
            datasets=datasets,
            tokens=int(log["tokens"]),
            steps=int(log["step"]),
            final_loss=log["loss"],
            final_bits_per_byte=log["bits_per_byte"],
            seconds=log["seconds"],
            tokens_per_s=log["tokens"] / max(log["seconds"], 1e-9),
            precision="bf16" if self.arguments.bf16 else "fp32",
            device=str(self.arguments.device),
            save_dtype=save_dtype,
            resumed_from=resumed_from,
            processes=self.processes.count,
            run=fingerprint_of(self.begun.identity),
            model=str(out / "model") if keeps_model else None,
            vector=str(vector) if lora or config.makes_vector else None,
            versions=versions(*LIBRARIES, *(["peft"] if lora else []), "tokenizers", "numpy"),
        )
        clean = msgspec.json.encode(redacted_data(msgspec.to_builtins(report)))
        replace_file(out / "train_report.json", msgspec.json.format(clean))
        shutil.rmtree(out / "checkpoints")
        if not keeps_model:
            shutil.rmtree(out / "model", ignore_errors=True)
        return report


def _steps(config: TrainConfig, tokens_per_step: int) -> int:
    tokens = config.tokens
    assert isinstance(tokens, int)  # normalised by the Struct
    if tokens < tokens_per_step:
        raise RecipeError(
            f"{tokens} tokens are less than one optimizer step, which takes {tokens_per_step}",
            where="tokens",
            todo="raise the budget or lower block_size, batch_size or gradient_accumulation",
        )
    return tokens // tokens_per_step


def _write_vector(
    config: TrainConfig, base: Path, out: Path, notes: dict[str, str], progress: bool
) -> None:
    from optimer_engine.progress import bar

    callbacks: Any = [bar("vector")] if progress else []
    shutil.rmtree(out / "vector", ignore_errors=True)
    if config.vector_mode == "float32":
        from optimer_engine.engine import extract

        extract(
            str(base), out / "model", out / "vector",
            metadata=notes, discard=True, callbacks=callbacks,
        )  # fmt: skip
    else:
        from optimer_engine.packing import pack as pack_vector

        pack_vector(
            str(base), out / "model", out / "vector",
            mode=config.vector_mode, metadata=notes, discard=True, callbacks=callbacks,
        )  # fmt: skip
