"""What a user writes to train: one base, one or more datasets, a budget of tokens.

    base: org/base
    tokens: 100M
    datasets:
      - {name: ja,   data: "texts/ja/*.jsonl", ratio: 0.7}
      - {name: code, data: "src/**/*.py",      ratio: 0.3}
    learning_rate: 2e-5
    block_size: 4096
    training_arguments: {adam_beta2: 0.95}      # anything else of TrainingArguments

One dataset makes a continual pre-training (CPT) run, and by default its distribution vector;
several datasets make the data-mixture baseline that merging is compared with. Both are the same run
under the same budget in tokens, so their costs can be compared: the budget decides the number of
optimizer steps, never the number of epochs. With `pool: FOLDER` the same file means a run for each
dataset (see `pool`), and the mixture of equal cost is one option away (see `ratios`).

Two defaults differ from the habit of the field, for the sake of the vectors:

* `weight_decay` is 0. Decay adds a multiple of -base to every vector, the same direction in all of
  them, which is neither learnt from the data nor wanted in a sum of vectors.
* the trained model is saved in float32 when a vector is taken from it. A bf16 grid swallows most of
  a small change (three quarters of it where the change is a thousandth of the weight), so the
  rounding belongs after the merge and not before it.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from optimer_engine.errors import RecipeError
from optimer_engine.recipe import decode

Count = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=64)]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class DatasetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One corpus.

    Attributes:
        name: the user's name for it, unique in a run; names its token file and its report entry.
        data: a file, a glob, a list of either, a folder, or a dataset id on the Hub.
        kind: how local files are read; told from the suffix when absent.
        text_field: the column that holds the text (`text` files have just that one).
        sample_by: what one document is in a `text` file: the whole file (right for code and for
            anything with blank lines inside), a paragraph between blank lines, or a line.
        ratio: share of the tokens, relative to the other datasets'; all or none give it, and none
            means equal shares. 0 leaves the dataset out.
        split, subset, revision: of a folder or Hub dataset; `subset` is its configuration name.
        license: of the text, as a model card names it (`cc-by-4.0`); travels with the vector.
    """

    name: Name
    data: str | list[str]
    kind: Literal["text", "jsonl", "parquet"] | None = None
    text_field: str = "text"
    sample_by: Literal["document", "paragraph", "line"] = "document"
    ratio: NonNegative | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    license: str | None = None


class RatioOrigin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where ratios came from that `--ratios-from` filled in.

    Attributes:
        weights: of the search's best point, by vector.
        left_out: vectors without a dataset here, such as the instruct vector.
        rule: how weights became ratios.
    """

    weights: dict[str, float]
    left_out: list[str]
    rule: str


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run.

    Attributes:
        base: folder of the checkpoint to start from, or its id on the Hub.
        datasets: one for CPT, several for a data mixture.
        tokens: budget, `100000000`, `1e8` or `"100M"`; cut down to whole optimizer steps.
        base_revision: of a Hub base.
        block_size: tokens in a training sequence.
        batch_size: sequences per device and forward pass.
        gradient_accumulation: forward passes per optimizer step.
        learning_rate: peak of the schedule.
        lr_scheduler: a schedule's name as Transformers spells it.
        warmup: optimizer steps, or below 1 their fraction of the run.
        weight_decay: 0 by default; the module's docstring says why.
        seed: of the order of the data and of dropout.
        precision: `bf16` computes in bfloat16 with float32 master weights, `fp32` in float32;
            `auto` is bf16 on a GPU that has it and fp32 elsewhere.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        save_every: optimizer steps between two checkpoints to resume from.
        save_dtype: dtype of the trained model; by default float32 where a vector is taken from it
            and the base's dtype where not.
        vector: write the distribution vector; by default for one dataset and not for a mixture.
        mode: `full` trains every parameter, `frozen_embeddings` all but input and output token
            embeddings, `lora` an adapter, which is the run's result and merges as it is.
        lora: of mode lora, settings of `peft.LoraConfig` by their names there.
        separate_documents: keep attention and prediction inside each document of a block (needs an
            architecture that restarts attention where positions restart; checked).
        heldout: share of each dataset's documents that is not trained on; they are written to the
            run folder, and the base and the trained model are scored on them.
        vector_mode: how the vector is stored, see `optimer pack`; a LoRA run keeps its adapter.
        keep_checkpoints: keep the weights of every checkpoint in RUN/trajectory.
        keep_model: False removes the trained checkpoint once its vector is written.
        cache: folder for packed tokens, shared by runs; by default in the run folder.
        pool: a pool folder; each dataset is then trained by itself and its vector put there.
        training_arguments: anything else of `transformers.TrainingArguments`, by its name there.
        ratios_from: filled in by `with_ratios_from`.

    Raises:
        RecipeError: a value that cannot be meant.
    """

    base: str
    datasets: Annotated[list[DatasetConfig], Meta(min_length=1)]
    tokens: int | float | str
    base_revision: str | None = None
    block_size: Annotated[int, Meta(ge=2)] = 1024
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-5
    lr_scheduler: str = "cosine"
    warmup: NonNegative = 0.03
    weight_decay: NonNegative = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    save_every: Count = 500
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vector: bool | None = None
    mode: Literal["full", "frozen_embeddings", "lora"] = "full"
    lora: dict[str, Any] = {}
    separate_documents: bool = False
    heldout: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    vector_mode: Literal["float32", "exact", "bf16", "int8", "int4"] = "float32"
    keep_checkpoints: bool = False
    keep_model: bool = True
    cache: str | None = None
    pool: str | None = None
    training_arguments: dict[str, Any] = {}
    ratios_from: RatioOrigin | None = None

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "tokens", token_count(self.tokens))
        names = [dataset.name for dataset in self.datasets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(
                f"the name {twice[0]!r} is given to two datasets",
                where="datasets",
                todo="give each dataset a name of its own",
            )
        given = [d.ratio for d in self.datasets if d.ratio is not None]
        if given and len(given) < len(names):
            missing = [d.name for d in self.datasets if d.ratio is None]
            raise RecipeError(
                f"{', '.join(missing)} without a ratio beside datasets that have one",
                where="datasets",
                todo="give every dataset a ratio, or none for equal shares",
            )
        if given and not (math.isfinite(sum(given)) and sum(given) > 0):
            raise RecipeError(f"ratios {given} have no positive, finite sum", where="datasets")

    def check_result(self) -> None:
        """Refuse settings of a run's result that exclude each other.

        Raises:
            RecipeError: with the setting to change.
        """
        lora = self.mode == "lora"
        if self.lora and not lora:
            raise RecipeError(f"mode is {self.mode}", where="lora", todo="set mode: lora")
        if lora and (self.vector is False or self.vector_mode != "float32"):
            raise RecipeError(
                "an adapter is the result of a LoRA run, as it is", where="mode: lora",
                todo="leave out vector and vector_mode",
            )  # fmt: skip
        if not (self.keep_model or lora or self.makes_vector):
            raise RecipeError(
                "nothing would be left of the run", where="keep_model",
                todo="set vector: true, or leave out keep_model",
            )  # fmt: skip

    @property
    def makes_vector(self) -> bool:
        """Whether the run ends with a distribution vector (an adapter is one of its own kind)."""
        if self.mode == "lora":
            return False
        return len(self.datasets) == 1 if self.vector is None else self.vector

    @property
    def ratios(self) -> list[float]:
        """Shares of the datasets, in order, with sum 1."""
        given = [1.0 if d.ratio is None else float(d.ratio) for d in self.datasets]
        return [ratio / sum(given) for ratio in given]


def checked(config: TrainConfig) -> TrainConfig:
    """`config` with every type and range checked, as if it had been read from a file.

    A Struct checks these when it is decoded but not when it is constructed.

    Raises:
        RecipeError: with the key and the reason.
    """
    return decode(msgspec.to_builtins(config), TrainConfig, "training config")


_NOT_THE_RUN = ("pool", "cache", "keep_model", "keep_checkpoints")


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides a run's numbers, as plain data."""
    settings = msgspec.to_builtins(config)
    for key in _NOT_THE_RUN:
        del settings[key]
    for dataset in settings["datasets"]:
        del dataset["license"]
    return settings


def token_count(text: int | float | str) -> int:
    """Tokens meant by `100000000`, `1e8`, `"1e8"`, `"100M"` or `"1.5B"`; units are powers of ten.

    Raises:
        RecipeError: not a positive whole number of tokens.
    """
    number = r"(\d[\d_]*\.?\d*(?:[eE]\+?\d+)?)"
    match = re.fullmatch(number + r"\s*([kKmMbBtT]?)", str(text).strip())
    count = float(match[1]) * _UNITS[match[2].lower()] if match else math.nan
    if not math.isfinite(count) or count < 1 or count != round(count):
        raise RecipeError(
            f"{text!r} is not a number of tokens", where="tokens", todo="write it as 1e8 or 100M"
        )
    return round(count)
