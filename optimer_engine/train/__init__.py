"""Training of the sources: continual pre-training on one dataset, a pool of them, or a mixture.

    config = TrainConfig(base="base", tokens="10M",
                         datasets=[DatasetConfig(name="ja", data="texts/ja/*.jsonl")])
    report = run_cpt(config, "runs/ja")        # runs/ja/model and runs/ja/vector

The loop is the Trainer of Transformers, wrapped thinly. A loop of our own would be shorter to read
than the wrapper, and would then have to be taught mixed precision, accumulation, checkpointing and
every optimizer and launcher that users have; what the Trainer leaves open (an exact budget and
mixture, packing without loss, checkpoints known to be whole) is what the modules here add.
"""

from __future__ import annotations

from optimer_engine.train.config import DatasetConfig, RatioOrigin, TrainConfig
from optimer_engine.train.cpt import run_cpt
from optimer_engine.train.pool import PoolRun, mixture_config, train_pool
from optimer_engine.train.ratios import ratios_of, with_ratios_from
from optimer_engine.train.report import DatasetReport, TrainReport

__all__ = [
    "DatasetConfig",
    "DatasetReport",
    "PoolRun",
    "RatioOrigin",
    "TrainConfig",
    "TrainReport",
    "mixture_config",
    "ratios_of",
    "run_cpt",
    "train_pool",
    "with_ratios_from",
]
