"""Continual pre-training and the data-mixture baseline, from a configuration to a run folder.

    RUN/run.json            what the run is: configuration, base and text by fingerprint
    RUN/tokens/             packed blocks, mapped while training
    RUN/heldout/            on request: documents not trained on, NAME.jsonl
    RUN/train_log.jsonl     the loss curve
    RUN/checkpoints/        to resume from; removed when the run is done
    RUN/trajectory/         on request: the weights of every checkpoint
    RUN/model/              the trained checkpoint, as save_pretrained writes it
    RUN/vector/             its distribution vector (for one dataset, by default)
    RUN/adapter/            instead of both, for a LoRA run
    RUN/train_report.json   written last: a run with a report is done

The same call continues an interrupted run, and on a CPU ends with the same bytes as a run that was
never interrupted. The weights are trained in float32 whatever the base's dtype: a step of a usual
learning rate is smaller than the spacing of most bf16 weights, and would round to nothing.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.errors import MissingExtraError, OutputError
from optimer_engine.lock import locked
from optimer_engine.redaction import redacted_data
from optimer_engine.train.config import TrainConfig, checked, identity_of
from optimer_engine.train.corpus import find, first_documents
from optimer_engine.train.model import Base, find_base
from optimer_engine.train.processes import Processes
from optimer_engine.train.report import TrainReport
from optimer_engine.train.resume import check_same_run, fingerprint_of
from optimer_engine.train.run import LIBRARIES, Begun, Run

if TYPE_CHECKING:
    from transformers import TrainerCallback

_OURS = {"tokens", ".lock"}
"""What may lie in a run folder before the run."""


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
    of a finished one only the report is read. Started by a launcher, every process calls this with
    the same arguments; `out` must be a folder that all of them see.

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
        OutputError: `out` holds something else, is not to be resumed, or another process is
            training in it.
        MissingExtraError: a library of the `train` extra is not installed.
    """
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(
                f"{library} is not installed", todo="pip install 'optimer-engine[train]'"
            )
    config, out = checked(config), Path(out)
    config.check_result()
    base = find_base(config.base, config.base_revision)

    from optimer_engine.train.trainer import quiet_libraries, training_arguments

    with quiet_libraries(), ExitStack() as held:
        arguments = training_arguments(config, out / "checkpoints")
        processes = held.enter_context(Processes(arguments))

        def begin() -> tuple[Begun, TrainReport | None]:
            begun = _begin(config, base, processes.count)
            if done := _earlier_report(out, begun.identity, resume):
                return begun, done
            for corpus in begun.corpora:
                first_documents(corpus)
            held.enter_context(_nothing_left_if_refused(out))
            held.enter_context(locked(out, by="training"))
            return begun, _earlier_report(out, begun.identity, resume)

        begun, done = processes.on_first(begin)
        if done is not None:
            return done
        run = Run(config, out, base, begun, arguments, processes, progress and processes.first)
        return run.finish(list(callbacks))


def run_fingerprint(config: TrainConfig, processes: int = 1) -> str:
    """What `TrainReport.run` of a finished run of `config` is; text and base are looked at.

    Raises:
        RecipeError, CheckpointError: as `run_cpt`.
    """
    config = checked(config)
    base = find_base(config.base, config.base_revision)
    return fingerprint_of(_begin(config, base, processes).identity)


def _begin(config: TrainConfig, base: Base, processes: int) -> Begun:
    corpora = [find(dataset) for dataset in config.datasets if dataset.ratio != 0]
    identity = {
        "config": identity_of(config),
        "base": base.fingerprint,
        "data": {corpus.config.name: corpus.fingerprint for corpus in corpora},
        "processes": processes,
    }
    return Begun(corpora, redacted_data(msgspec.to_builtins(identity)))


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
    elif out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - _OURS):
        raise OutputError(
            "exists and is not a training run", where=str(out), todo="choose another output folder"
        )
    report = out / "train_report.json"
    if not report.is_file():
        return None
    try:
        return msgspec.json.decode(report.read_bytes(), type=TrainReport)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OutputError(
            f"cannot be read: {error}",
            where=str(report),
            todo="the run was done: restore the file, or remove it to finish the run again",
        ) from error


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
