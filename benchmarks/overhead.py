"""Case `overhead`: what passes between two evaluations of a search, at trial 100.

    ours    a search with a hundred trials in its journal makes one more, with an evaluation that
            costs next to nothing: ask (surrogate and SMAC), write down, merge into the live model,
            score, decide, tell, write down. What is timed is all from one trial's end to the
            next one's, by the search's own callbacks.
    rival   what a search with checkpoints pays for the merge alone: `mergekit-yaml` with default
            options, and loading its output.

The pool is a base and full checkpoints of its size in bf16, in the page cache. The rows below ours
take it apart: the proposal alone, and the merge into the live model, whose values are checked.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy, checkpoints, measure, mergekit
from benchmarks.checkpoints import Inputs
from benchmarks.measure import Cost
from benchmarks.runner import Case, Contestant
from optimer_engine.search import Score, SearchConfig, TrialDone, Vector, run_search

DEFAULT_BYTES = 1_000_000_000
OURS = "between two evaluations"
RIVALS = ("mergekit and load",)
TRIALS = 100
EXAMPLES = 128


class Glance:
    """An objective that costs nothing: how far some weights of the model are from a chosen place.

    It is a bowl over the merge's weights with errors of its own on each example, like a real one.
    """

    def __init__(self) -> None:
        self.counts = {"glance": EXAMPLES}
        self.identity = {"glance": {"kind": "glance", "examples": EXAMPLES}}
        drawn = np.random.default_rng(0).standard_normal(EXAMPLES)
        self._goal = 0.0004 * drawn

    def __call__(
        self, model: Any, examples: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Score]:
        """One part per example asked for."""
        at = np.arange(EXAMPLES) if examples is None else np.array(examples["glance"])
        weights = model.get_input_embeddings().weight.detach().flatten()
        spread = len(weights) // EXAMPLES
        seen = weights[: EXAMPLES * spread : spread].float().numpy()[at]
        return {"glance": Score.of(1.0 + 1e4 * (seen - self._goal[at]) ** 2)}


class _Enough(Exception):
    """The trials that were wanted are made."""


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make the files, and let the first round make the hundred trials."""
    inputs = checkpoints.make(work, size_bytes, sources)
    out = work / "out"
    moved = inputs.read_bytes + inputs.base_bytes
    contestants = [
        Contestant(OURS, "ours", moved, lambda: _trial(inputs, work)),
        Contestant("of it, the proposal", "ours", 0, lambda: _proposal(inputs, work), OURS),
        _merge(inputs, moved),
    ]
    if rivals:
        config = work / "mergekit-overhead.yaml"
        config.write_text(mergekit.config(inputs, "bfloat16"))
        program: list[str | Path] = [mergekit.install(work), config, out]
        contestants.append(
            Contestant(
                RIVALS[0],
                "rival",
                moved,
                lambda: _merged_and_loaded(program, out, work / "log.txt"),
                OURS,
                lambda: accuracy.of_folder(out, inputs),
            )
        )

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        (measure.evict if cold else measure.warm)(inputs.files)

    return Case(
        name="overhead",
        command=command,
        parameters={
            "base_bytes": inputs.base_bytes,
            "sources": sources,
            "trials": TRIALS,
            "page_cache": "cold" if cold else "warm",
        },
        contestants=contestants,
        before=before,
        versions={"mergekit": mergekit.VERSION} if rivals else {},
    )


def _config(inputs: Inputs, trials: int) -> SearchConfig:
    return SearchConfig(
        base=str(inputs.base),
        vectors=[Vector(f"source {i}", str(s)) for i, s in enumerate(inputs.sources)],
        trials=trials,
        patience=0,
        dtype="bfloat16",
    )


def _search(inputs: Inputs, run: Path, upto: int) -> list[float]:
    """Search until ``upto`` trials are made; when each of those made here ended, s."""
    ends: list[float] = []

    def ended(event: TrialDone) -> None:
        ends.append(time.perf_counter())
        if event.done >= upto:
            raise _Enough

    try:
        run_search(_config(inputs, upto + 1), run, objective=Glance(), callbacks=[ended])
    except _Enough:
        pass
    finally:
        gc.collect()  # the model goes, before another one comes
    return ends


def _hundred(inputs: Inputs, work: Path) -> Path:
    """The journal of a search that made its trials, made once."""
    run = work / f"{inputs.base.parent.name}-{TRIALS}-trials" / "run"
    if not (run.parent / "complete").exists():
        _search(inputs, run, TRIALS)
        (run.parent / "complete").touch()
    return run / "trials.jsonl"


def _trial(inputs: Inputs, work: Path) -> Cost:
    """Two more trials; the second one is timed from the end of the first."""
    copy = work / "trial" / "run"
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.mkdir(parents=True)
    shutil.copy(_hundred(inputs, work), copy)
    before, after = _search(inputs, copy, TRIALS + 2)
    return Cost(after - before)


def _proposal(inputs: Inputs, work: Path) -> Cost:
    """Fit the surrogate to the hundred trials and ask SMAC."""
    from optimer_engine.search.cost import Goal
    from optimer_engine.search.landscape import Landscape
    from optimer_engine.search.proposals import proposal
    from optimer_engine.search.space import Space
    from optimer_engine.search.trials import read

    _, told = read(_hundred(inputs, work))
    config = _config(inputs, TRIALS + 1)
    space, goal = Space.of(config), Goal.of(config)

    def ask() -> None:
        proposal(config, space, Landscape(space, told, goal), told)

    return measure.of_call(ask)


def _merge(inputs: Inputs, moved: int) -> Contestant:
    """Merge into a loaded model that was merged into before, as a search does."""
    from optimer_engine import LiveModelSink, plan
    from optimer_engine.search.live import load_model

    held: dict[str, Any] = {}
    named = [
        {"name": folder.name, "model": str(folder), "weight": weight}
        for folder, weight in zip(inputs.sources, inputs.weights, strict=True)
    ]

    def run() -> Cost:
        made = plan({"base": str(inputs.base), "sources": named})
        held["model"] = load_model(str(inputs.base), dtype="bfloat16")
        made.run(LiveModelSink(held["model"]))
        cost = measure.of_call(lambda: made.run(LiveModelSink(held["model"])))
        made.close()
        return cost

    def check() -> accuracy.Accuracy:
        return accuracy.of_model(held.pop("model"), inputs)

    return Contestant("of it, the merge in place", "ours", moved, run, OURS, check)


def _merged_and_loaded(program: list[str | Path], out: Path, log: Path) -> Cost:
    from optimer_engine.search.live import load_model

    merged = measure.of_process(program, log)
    loaded = measure.of_call(lambda: load_model(str(out), dtype="bfloat16"))
    return Cost(merged.wall_s + loaded.wall_s)
