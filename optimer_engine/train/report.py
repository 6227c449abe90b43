"""What a training run was and did, as data."""

from __future__ import annotations

import msgspec

from optimer_engine.train.config import TrainConfig
from optimer_engine.train.packing import PackedInfo


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset's part in a run.

    Attributes:
        name: as configured.
        fingerprint: hash of the text and of how it was read.
        files, bytes: of the corpus; 0 for a dataset on the Hub.
        packed: documents, tokens, blocks and the tail left out.
        ratio: share asked for, of 1.
        blocks: blocks trained on.
        epochs: how often the dataset was gone through; above 1 it was too short for its share.
        heldout_bits_per_byte: on the documents held out, of the `base` and the `trained` model.
        license: as configured; `ids`: names on the Hub that the text has.
    """

    name: str
    fingerprint: str
    files: int
    bytes: int
    packed: PackedInfo
    ratio: float
    blocks: int
    epochs: float
    heldout_bits_per_byte: dict[str, float] = {}
    license: str | None = None
    ids: list[str] = []


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run; `train_report.json` in its folder.

    Attributes:
        config: as run, tokens as a number.
        base_fingerprint: of the base's tensors.
        datasets: in the order of the configuration, those with ratio 0 left out.
        tokens, steps: trained on; `tokens` is at most the budget, by less than a step.
        final_loss: mean over the last interval logged, nats per token.
        final_bits_per_byte: the same per byte of text (an estimate, see `TrainLog`).
        seconds: of training, tokenising left out.
        tokens_per_s: over `seconds`.
        precision: `bf16` or `fp32`, as computed.
        device: where.
        save_dtype: of the model.
        resumed_from: the step at which the run was last continued, 0 if it never was.
        processes: that trained side by side.
        run: hash of the run's identity: configuration, base and text.
        model, vector: the folders written, or None. `vector` is what merges as a source: a
            distribution vector, or the adapter of a LoRA run.
        versions: of Python and the libraries that decide the numbers.
    """

    config: TrainConfig
    base_fingerprint: str
    datasets: list[DatasetReport]
    tokens: int
    steps: int
    final_loss: float
    final_bits_per_byte: float
    seconds: float
    tokens_per_s: float
    precision: str
    device: str
    save_dtype: str
    resumed_from: int
    processes: int = 1
    run: str = ""
    model: str | None
    vector: str | None
    versions: dict[str, str]
