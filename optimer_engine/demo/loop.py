"""The stages of the demo, in order; each writes a folder, and a folder that is done is not redone.

    text/                  corpora, unpacked
    cpt/DOMAIN/            one training run each: model/, vector/
    search-all/            objective A: trials.jsonl, best/
    search-pair/           objective B, from the trials of A
    mixture-*/             the data-mixture baselines
    test-scores.json       every row of both tables on the test split
    demo.json, demo.md     the result

The baselines get what the merge gets: the same base, the same texts, the same optimiser settings,
and the same number of training tokens. The learning rate was chosen on dev text for the mixture
baseline's sake as much as the merge's (see benchmarks/demo_assets/README.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.demo.assets import BASE, DOMAINS, RETAINED, unpack
from optimer_engine.demo.geometry import geometry
from optimer_engine.demo.machine import one_thread, precision
from optimer_engine.demo.report import DemoReport, Winner, make_notes, make_tables
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.search import (
    CorpusObjective,
    Score,
    SearchConfig,
    SearchReport,
    Term,
    Vector,
    run_search,
)
from optimer_engine.search.progress import bar
from optimer_engine.train import DatasetConfig, TrainConfig, TrainReport, run_cpt

PAIR = ("ja", "math")
"""The domains of objective B."""

SCORED_AT_ONCE = 4
"""Blocks per forward pass when scoring: their logits then stay in the cache. Changes no bit."""


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything.

    Attributes:
        tokens: training tokens per vector, T.
        batch_size, block_size: sequences per optimizer step, tokens per sequence.
        learning_rate: peak; cosine decay to 0.
        trials, more_trials: of objective A, and beside the stored ones for objective B.
        dev_blocks, test_blocks: blocks of each domain that a trial and a table row are scored on.
        text_bytes: at most so much text of a split is unpacked.
    """

    tokens: int
    batch_size: int
    block_size: int
    learning_rate: float
    trials: int
    more_trials: int
    dev_blocks: int
    test_blocks: int
    text_bytes: int


SCALES = {
    "full": Scale(
        tokens=81_920, batch_size=16, block_size=256, learning_rate=1e-3,
        trials=24, more_trials=8, dev_blocks=48, test_blocks=64,
        text_bytes=10_000_000,
    ),
    "short": Scale(
        tokens=1_024, batch_size=4, block_size=64, learning_rate=1e-3,
        trials=8, more_trials=2, dev_blocks=4, test_blocks=4,
        text_bytes=30_000,
    ),
}  # fmt: skip


def run_demo(out: str | Path, scale: str = "full") -> DemoReport:
    """Run every stage that is not done yet in `out`, and write `demo.json` and `demo.md` there.

    Messages and bars go to stderr.

    Raises:
        RecipeError: there is no such scale, or `out` was begun at another one.
        MissingExtraError: the `search` or `train` extra is not installed.
        OptimerError: whatever a stage raises; run again to go on.
    """
    if scale not in SCALES:
        raise RecipeError(f"there is no scale {scale!r}", todo="choose " + " or ".join(SCALES))
    _require_extras()
    from optimer_engine.train.trainer import quiet_libraries

    with quiet_libraries(), one_thread():
        return Loop(Path(out), SCALES[scale]).run(scale)


class Loop:
    """The stages, each callable alone; `run` is all of them.

    Args:
        out: the folder of everything.
        scale: how much of everything.
    """

    def __init__(self, out: Path, scale: Scale) -> None:
        self.out, self.scale, self.text = out, scale, out / "text"

    def run(self, name: str) -> DemoReport:
        """Every stage, and the report under the scale's `name`."""
        n, tokens = len(DOMAINS), self.scale.tokens
        _say("texts")
        unpack(self.text, self.scale.text_bytes)
        singles = {domain: self.train(f"cpt/{domain}", {domain: 1.0}, tokens) for domain in DOMAINS}
        all_domains = self.search("search-all", DOMAINS, self.scale.trials)
        pair = self.search("search-pair", PAIR, self.scale.more_trials, reuse="search-all")
        even = dict.fromkeys(DOMAINS, 1.0)
        found = all_domains.ratios if any(all_domains.ratios.values()) else even  # the base won
        mixed = self.train("mixture-uniform", even, n * tokens)
        self.train("mixture-uniform-T", even, tokens)
        self.train("mixture-searched", found, n * tokens)
        self.train("mixture-pair", dict.fromkeys(PAIR, 1.0), len(PAIR) * tokens)

        scores = self.test_scores()
        winners = Winner.of(all_domains), Winner.of(pair)
        tables = make_tables(scores, winners, PAIR, tokens)
        vectors_s = sum(run.seconds for run in singles.values())
        report = DemoReport(
            scale=name,
            settings={**msgspec.structs.asdict(self.scale), "precision": mixed.precision},
            tables=tables,
            geometry=geometry(BASE, {d: self.out / "cpt" / d / "vector" for d in DOMAINS}),
            winners={table.title: winner for table, winner in zip(tables, winners, strict=True)},
            seconds={
                f"training {n} vectors, {tokens:,} tokens each": vectors_s,
                f"search A, {winners[0].trials} trials": winners[0].seconds,
                f"search B, {winners[1].trials} trials more": winners[1].seconds,
                f"one data-mixture run, {mixed.tokens:,} tokens": mixed.seconds,
            },
            notes=make_notes(all_domains, mixed, tokens),
        )
        (self.out / "demo.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(report.to_dict()), indent=2) + b"\n"
        )
        (self.out / "demo.md").write_text(report.markdown(), encoding="utf-8")
        return report

    def train(self, folder: str, ratios: Mapping[str, float], tokens: int) -> TrainReport:
        """One CPT run, of one domain or of a mixture, from the base."""
        _say(f"{folder}: {tokens:,} tokens of " + " + ".join(d for d in ratios if ratios[d] > 0))
        config = TrainConfig(
            base=str(BASE),
            datasets=[
                DatasetConfig(name=d, data=str(self.text / f"{d}.cpt.jsonl"), ratio=ratio)
                for d, ratio in ratios.items()
            ],
            tokens=tokens,
            block_size=self.scale.block_size,
            batch_size=self.scale.batch_size,
            learning_rate=self.scale.learning_rate,
            precision=precision(),
            save_dtype="float32",
            training_arguments={"use_cpu": True},
        )
        return run_cpt(config, self.out / folder, progress=True)

    def search(
        self, folder: str, domains: tuple[str, ...], trials: int, reuse: str | None = None
    ) -> SearchReport:
        """Search the weights of all vectors for the mean over `domains` on dev text."""
        _say(f"{folder}: {trials} trials on " + " + ".join(domains))
        config = SearchConfig(
            base=str(BASE),
            vectors=[Vector(name=d, model=str(self.out / "cpt" / d / "vector")) for d in DOMAINS],
            objective=[
                Term(
                    name=d,
                    corpus=str(self.text / f"{d}.dev.jsonl"),
                    limit=self.scale.dev_blocks,
                )
                for d in domains
            ],
            trials=trials,
            patience=0,
            block_length=self.scale.block_size,
            batch_size=SCORED_AT_ONCE,
            out_dtype="float32",
        )
        return run_search(
            config,
            self.out / folder,
            reuse=None if reuse is None else self.out / reuse,
            callbacks=[bar(folder)],
        )

    def test_scores(self) -> dict[str, dict[str, Score]]:
        """Scores of every model of the tables on the test split, from disk where they are there."""
        from optimer_engine.search.live import load_model

        path = self.out / "test-scores.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Score]])
        _say("test scores")
        objective = self.objective("test", (*DOMAINS, RETAINED), self.scale.test_blocks)
        mixtures = ("mixture-uniform", "mixture-uniform-T", "mixture-searched", "mixture-pair")
        folders = {
            "base": BASE,
            **{f"only {d}": self.out / "cpt" / d / "model" for d in DOMAINS},
            "uniform": self.merged("uniform", dict.fromkeys(DOMAINS, 1 / len(DOMAINS))),
            "uniform pair": self.merged("uniform-pair", dict.fromkeys(PAIR, 1 / len(PAIR))),
            "search-all": self.out / "search-all" / "best",
            "search-pair": self.out / "search-pair" / "best",
            **{name: self.out / name / "model" for name in mixtures},
        }
        scores = {}
        for name, folder in _bar(folders.items(), "test scores"):
            scores[name] = objective(load_model(str(folder)))
        path.write_bytes(msgspec.json.encode(scores))
        return scores

    def objective(self, split: str, domains: tuple[str, ...], blocks: int) -> CorpusObjective:
        """Bits per byte on the first blocks of a split."""
        from optimer_engine.search.live import load_tokenizer

        return CorpusObjective(
            {d: self.text / f"{d}.{split}.jsonl" for d in domains},
            load_tokenizer(str(BASE)),
            block_length=self.scale.block_size,
            batch_size=SCORED_AT_ONCE,
            limits=dict.fromkeys(domains, blocks),
        )

    def merged(self, name: str, weights: Mapping[str, float]) -> Path:
        """A merge with fixed weights, on disk."""
        from optimer_engine.engine import merge

        folder = self.out / "merges" / name
        if not folder.exists():
            sources = [
                {"name": d, "model": str(self.out / "cpt" / d / "vector"), "weight": w}
                for d, w in weights.items()
            ]
            merge({"base": str(BASE), "sources": sources, "out_dtype": "float32"}, folder)
        return folder


def _require_extras() -> None:
    from importlib.util import find_spec

    for library in ("smac", "transformers", "datasets", "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(
                f"{library} is not installed", todo="pip install 'optimer-engine[search,train]'"
            )


def _say(text: str) -> None:
    print(f"optimer demo: {text}", file=sys.stderr, flush=True)


def _bar(items: Any, description: str) -> Any:
    from tqdm import tqdm

    return tqdm(list(items), desc=description, delay=2)
