"""Continual pre-training and the data-mixture baseline, from a configuration to a run folder.

    RUN/run.json            what the run is: configuration, base and text by fingerprint
    RUN/tokens/             packed blocks, mapped while training
    RUN/train_log.jsonl     the loss curve
    RUN/checkpoints/        to resume from; removed when the run is done
    RUN/model/              the trained checkpoint, as save_pretrained writes it
    RUN/vector/             its distribution vector (for one dataset, by default)
    RUN/train_report.json   written last: a run with a report is done

The same call continues an interrupted run, and on a CPU ends with the same bytes as a run that was
never interrupted. The weights are trained in float32 whatever the base's dtype: a step of a usual
learning rate is smaller than the spacing of most bf16 weights, and would round to nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.durable import replace_file
from optimer_engine.errors import (
    MismatchError,
    MissingExtraError,
    OutputError,
    RecipeError,
)
from optimer_engine.report import versions
from optimer_engine.train.config import TrainConfig, checked
from optimer_engine.train.corpus import Corpus, find, first_documents
from optimer_engine.train.mixture import BlockSchedule, split_exactly
from optimer_engine.train.model import find_base, load, save
from optimer_engine.train.packing import pack
from optimer_engine.train.report import DatasetReport, TrainReport
from optimer_engine.train.resume import check_same_run, newest_complete

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainingArguments,
    )

_log = logging.getLogger(__name__)
_LIBRARIES = ("torch", "transformers", "datasets", "accelerate")


def run_cpt(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
) -> TrainReport:
    """Train `config.base` on `config.datasets` until the token budget is spent.

    A run that was interrupted is continued by the same call, from its newest complete checkpoint;
    of a finished one only the report is read.

    Args:
        config: what to train.
        out: the run folder; made if absent, otherwise empty or this very run's.
        resume: False refuses a folder in which a run was begun.
        callbacks: `transformers.TrainerCallback` objects, handed to the Trainer.
        progress: bars and messages on stderr.

    Returns:
        The report, which also lies in `out`.

    Raises:
        RecipeError: a configuration that cannot be run, or `out` belongs to another one.
        CheckpointError: the base cannot be read, or lacks a tokenizer or tensors.
        MismatchError: the tokenizer has more tokens than the base.
        NonFiniteError: the loss or a gradient became NaN or infinite; names the step.
        OutputError: `out` holds something else, or is not to be resumed.
        MissingExtraError: a library of the `train` extra is not installed.
    """
    for library in _LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(
                f"{library} is not installed", todo="pip install 'optimer-engine[train]'"
            )
    config, out = checked(config), Path(out)
    base = find_base(config.base, config.base_revision)
    corpora = [find(dataset) for dataset in config.datasets if dataset.ratio != 0]
    identity = {
        "config": config,
        "base": base.fingerprint,
        "data": {corpus.config.name: corpus.fingerprint for corpus in corpora},
    }
    done = _earlier_report(out, identity, resume)
    if done is not None:
        return done

    from optimer_engine.train.trainer import quiet_libraries, training_arguments

    with quiet_libraries(), _nothing_left_if_refused(out):
        arguments = training_arguments(config, out / "checkpoints")
        sequences = arguments.train_batch_size * config.gradient_accumulation
        steps = _steps(config, sequences * config.block_size)
        for corpus in corpora:
            first_documents(corpus)
        model, tokenizer = load(base.folder, config.block_size)
        schedule, datasets = _pack_all(
            config, corpora, tokenizer, steps * sequences, out / "tokens", progress
        )
        _check_vocabulary(model, datasets)
        replace_file(out / "run.json", msgspec.json.format(msgspec.json.encode(identity)))

        log, resumed_from = _fit(
            model, tokenizer, arguments, schedule, datasets, out, list(callbacks), progress
        )
        save_dtype = config.save_dtype or ("float32" if config.makes_vector else base.dtype)
        save(model, tokenizer, save_dtype, out / "model")
        if config.makes_vector:
            metadata = {
                "dataset": ", ".join(dataset.name for dataset in datasets),
                "dataset_fingerprint": ", ".join(dataset.fingerprint for dataset in datasets),
                "tokens": str(int(log["tokens"])),
                "block_size": str(config.block_size),
                "learning_rate": f"{config.learning_rate:g}",
                "seed": str(config.seed),
            }
            _extract(base.folder, out, metadata, progress)
        report = TrainReport(
            config=config,
            base_fingerprint=base.fingerprint,
            datasets=datasets,
            tokens=int(log["tokens"]),
            steps=int(log["step"]),
            final_loss=log["loss"],
            final_bits_per_byte=log["bits_per_byte"],
            seconds=log["seconds"],
            tokens_per_s=log["tokens"] / max(log["seconds"], 1e-9),
            precision="bf16" if arguments.bf16 else "fp32",
            device=str(arguments.device),
            save_dtype=save_dtype,
            resumed_from=resumed_from,
            model=str(out / "model"),
            vector=str(out / "vector") if config.makes_vector else None,
            versions=versions(*_LIBRARIES, "tokenizers", "numpy"),
        )
        replace_file(out / "train_report.json", msgspec.json.format(msgspec.json.encode(report)))
        shutil.rmtree(out / "checkpoints")
    return report


def _earlier_report(out: Path, identity: dict[str, Any], resume: bool) -> TrainReport | None:
    """The report of a finished run in `out`, after the check that `out` may be used at all."""
    if (out / "run.json").is_file():
        if not resume:
            raise OutputError(
                "a run was begun here and is not to be resumed",
                where=str(out),
                todo="choose another output folder, or leave out --no-resume to continue",
            )
        check_same_run(out / "run.json", identity)
    elif out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {"tokens"}):
        raise OutputError(
            "exists and is not a training run", where=str(out), todo="choose another output folder"
        )
    report = out / "train_report.json"
    return msgspec.json.decode(report.read_bytes(), type=TrainReport) if report.is_file() else None


@contextmanager
def _nothing_left_if_refused(out: Path) -> Iterator[None]:
    """Remove a run folder made here if the run fails before its first step."""
    existed = out.exists()
    try:
        yield
    except BaseException:
        if not existed and not (out / "run.json").exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


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


def _pack_all(
    config: TrainConfig,
    corpora: list[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    n_blocks: int,
    folder: Path,
    progress: bool,
) -> tuple[BlockSchedule, list[DatasetReport]]:
    ratios = [ratio for ratio in config.ratios if ratio > 0]
    packed = [
        pack(corpus, tokenizer, config.block_size, folder, max_blocks=count, progress=progress)
        for corpus, count in zip(corpora, split_exactly(ratios, n_blocks), strict=True)
    ]
    names = [corpus.config.name for corpus in corpora]
    arrays = [blocks for blocks, _ in packed]
    schedule = BlockSchedule(arrays, names, ratios, n_blocks, config.seed)
    reports = [
        DatasetReport(
            name=corpus.config.name,
            fingerprint=corpus.fingerprint,
            files=len(corpus.files),
            bytes=corpus.bytes,
            packed=info,
            ratio=ratio,
            blocks=count,
            epochs=count / info.blocks,
        )
        for corpus, (_, info), ratio, count in zip(
            corpora, packed, ratios, schedule.counts, strict=True
        )
    ]
    return schedule, reports


def _check_vocabulary(model: PreTrainedModel, datasets: list[DatasetReport]) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    for dataset in datasets:
        if dataset.packed.largest_token >= rows:
            raise MismatchError(
                f"the tokenizer makes token {dataset.packed.largest_token} of it, the base has"
                f" {rows} embeddings",
                where=f"dataset {dataset.name!r}",
                todo="use the tokenizer that the base was trained with",
            )


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    schedule: BlockSchedule,
    datasets: list[DatasetReport],
    out: Path,
    callbacks: list[TrainerCallback],
    progress: bool,
) -> tuple[dict[str, float], int]:
    """Run the Trainer; the last line of the log, and the step that was continued from."""
    from optimer_engine.train.trainer import ProgressBar, TrainLog, make_trainer

    tokens_per_step = (
        arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * datasets[0].packed.block_size
    )
    bytes_per_token = sum(d.blocks * d.packed.bytes_per_token for d in datasets) / len(schedule)
    log = TrainLog(out / "train_log.jsonl", tokens_per_step, bytes_per_token)
    own = [log, ProgressBar(tokens_per_step)] if progress else [log]
    checkpoint, messages = newest_complete(out / "checkpoints")
    for message in messages:
        _log.warning("%s: %s", out, message)
    if progress and checkpoint is not None:
        print(f"optimer: {out}: continuing from {checkpoint.name}", file=sys.stderr)

    config, generation_config = copy.deepcopy((model.config, model.generation_config))
    trainer = make_trainer(model, tokenizer, arguments, schedule, [*callbacks, *own])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # The Trainer turns the cache off and copies the tokenizer's special tokens into both.
    model.config, model.generation_config = config, generation_config
    return log.last, 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def _extract(base: Path, out: Path, metadata: dict[str, str], progress: bool) -> None:
    from optimer_engine.engine import extract
    from optimer_engine.progress import bar

    shutil.rmtree(out / "vector", ignore_errors=True)
    extract(
        str(base),
        out / "model",
        out / "vector",
        metadata=metadata,
        discard=True,
        callbacks=[bar("vector")] if progress else [],
    )
