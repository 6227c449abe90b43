"""`optimer train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import RecipeError

if TYPE_CHECKING:
    from optimer_engine.train import PoolRun, TrainConfig, TrainReport


@click.command(name="train")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Start from this folder, or org/name on the Hub.")
@click.option(
    "--data",
    multiple=True,
    metavar="NAME=WHERE",
    help="A dataset: file, quoted glob, folder or Hub id. Repeat for a mixture; the same NAME twice"
    " joins files.",
)
@click.option("--ratio", multiple=True, metavar="NAME=SHARE", help="Of a mixture; default equal.")
@click.option("--text-field", metavar="FIELD", help="Column with the text; default: text.")
@click.option("--tokens", metavar="N", help="Budget, such as 1e8 or 100M; of a pool, per dataset.")
@click.option("--block-size", type=int, help="Tokens in a sequence; default 1024.")
@click.option("--batch-size", type=int, help="Sequences per device and pass; default 8.")
@click.option("--gradient-accumulation", type=int, help="Passes per step; default 1.")
@click.option("--learning-rate", type=float, help="Peak; default 2e-5.")
@click.option("--lr-scheduler", metavar="NAME", help="As Transformers names it; default cosine.")
@click.option("--warmup", type=float, help="Steps, or a fraction below 1; default 0.03.")
@click.option("--weight-decay", type=float, help="Default 0.")
@click.option("--seed", type=int, help="Of data order and dropout; default 0.")
@click.option("--precision", help="auto, bf16 or fp32; default auto.")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Recompute activations to save memory.",
)
@click.option("--mode", help="full, frozen_embeddings or lora; default full.")
@click.option("--heldout", type=float, metavar="SHARE", help="Of documents, scored, not trained.")
@click.option(
    "--separate-documents/--join-documents",
    default=None,
    help="Keep attention inside each document of a sequence.",
)
@click.option("--save-every", type=int, metavar="STEPS", help="Checkpoint interval; default 500.")
@click.option(
    "--keep-checkpoints/--drop-checkpoints",
    default=None,
    help="Keep the weights of every checkpoint in OUT/trajectory.",
)
@click.option("--save-dtype", metavar="DTYPE", help="Of the trained model.")
@click.option(
    "--keep-model/--drop-model", default=None, help="Keep the trained model beside its vector."
)
@click.option(
    "--vector/--no-vector",
    default=None,
    help="Write the distribution vector; default: for one dataset.",
)
@click.option("--vector-mode", metavar="MODE", help="float32, exact, bf16, int8 or int4.")
@click.option("--cache", metavar="FOLDER", help="Packed tokens; runs may share it.")
@click.option("--pool", metavar="FOLDER", help="A run per dataset; the vectors go into this pool.")
@click.option("--only", multiple=True, metavar="NAME", help="Of a pool, train this dataset.")
@click.option("--job", metavar="I/N", help="Of a pool, train the I-th of N shares of datasets.")
@click.option(
    "--mixture", is_flag=True, help="Of a pool's datasets, train their mixture, at the same cost."
)
@click.option(
    "--ratios-from",
    metavar="SEARCH",
    type=click.Path(path_type=Path),
    help="Train the mixture at the ratios of the best weights in this search's folder.",
)
@click.option("--resume/--no-resume", default=True, help="Continue a run begun in OUT (default).")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Run folder.")
@json_option
def command(
    config: Path | None,
    data: tuple[str, ...],
    ratio: tuple[str, ...],
    text_field: str | None,
    only: tuple[str, ...],
    job: str | None,
    mixture: bool,
    ratios_from: Path | None,
    out: Path,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Continue pre-training a base: on one dataset, on a mixture, or on each of a pool.

    One dataset ends in OUT/model and its distribution vector OUT/vector; several make the
    data-mixture baseline; with a pool folder each ends in a vector there. Settings come from the
    YAML file CONFIG, from options, or from both; options win. The same command continues what was
    interrupted and skips what is done. torchrun and accelerate launch start it on several GPUs.

    \b
    Examples:
      optimer train --base org/base --data 'ja=texts/ja/*.jsonl' --tokens 100M -o runs/ja
      optimer train train.yaml --seed 1 -o runs/ja-1
      optimer train pool.yaml -o runs                       # with `pool: FOLDER` in the file
      optimer train pool.yaml --mixture -o runs/uniform
      optimer train pool.yaml --ratios-from searches/all -o runs/retrained
      torchrun --nproc-per-node 8 $(command -v optimer) train train.yaml -o runs/ja
    """
    from optimer_engine.train import mixture_config, run_cpt, train_pool, with_ratios_from

    wanted = _config(config, data, ratio, text_field, flags)
    first = os.environ.get("RANK", "0") == "0"  # launchers number the processes they start
    if wanted.pool is not None and not (mixture or ratios_from):
        runs = train_pool(
            wanted, out, only=only, job=job, resume=resume, progress=True,
            said=None if as_json else lambda run: click.echo(_pool_line(run)),
        )  # fmt: skip
        if first and as_json:
            emit({"runs": msgspec.to_builtins(runs)}, "", as_json)
        return
    if only or job:
        raise RecipeError(
            "is for the datasets of a pool", where="--only, --job", todo="add --pool FOLDER"
        )
    wanted = mixture_config(wanted)
    if ratios_from is not None:
        if ratio:
            raise RecipeError("give --ratio or --ratios-from, not both", where="train")
        wanted = with_ratios_from(wanted, ratios_from)
    report = run_cpt(wanted, out, resume=resume, progress=True)
    if first:
        emit(msgspec.to_builtins(report), _text(report, out), as_json)


def _config(
    path: Path | None,
    data: tuple[str, ...],
    ratio: tuple[str, ...],
    text_field: str | None,
    flags: dict[str, Any],
) -> TrainConfig:
    """The file's settings with the options over them."""
    from optimer_engine.recipe import decode, read_config
    from optimer_engine.train import TrainConfig

    settings: dict[str, Any] = {}
    if path is not None:
        settings = msgspec.to_builtins(read_config(path, TrainConfig))
    settings |= {key: value for key, value in flags.items() if value is not None}
    if data:
        settings["datasets"] = _datasets(data)
    for dataset in settings.get("datasets", []):
        if text_field is not None:
            dataset["text_field"] = text_field
    for name, share in _pairs("--ratio", ratio):
        _set_ratio(settings.get("datasets", []), name, share)
    for key, option in (("base", "--base"), ("datasets", "--data"), ("tokens", "--tokens")):
        if key not in settings:
            raise RecipeError(
                f"{key} is not given",
                where="train",
                todo=f"add {option}, or a configuration file that has it",
            )
    return decode(settings, TrainConfig, str(path) if path else "train")


def _pool_line(run: PoolRun) -> str:
    if run.report is None:
        return f"{run.name}: done before, {run.vector}"
    report = run.report
    return (
        f"{run.name}: {report.tokens} tokens in {report.seconds:.1f} s, final loss"
        f" {report.final_loss:.4f}, {run.vector}"
    )


def _text(report: TrainReport, out: Path) -> str:
    lines = [
        f"{out}: {report.tokens} tokens in {report.steps} steps, {report.seconds:.1f} s"
        f" ({report.tokens_per_s:,.0f} tokens/s, {report.precision} on {report.device}),"
        f" final loss {report.final_loss:.4f}, about {report.final_bits_per_byte:.3f} bits/byte"
    ]
    for part in report.datasets:
        lines.append(
            f"  {part.name}: {part.blocks} blocks of {part.packed.block_size} tokens,"
            f" {part.epochs:.2f} epochs; {part.packed.tail_tokens} tokens at its end left out"
        )
        if scores := part.heldout_bits_per_byte:
            said = ", ".join(f"{which} {value:.4f}" for which, value in scores.items())
            lines.append(f"  {part.name}, held out: {said} bits/byte")
    if origin := report.config.ratios_from:
        ratios = ", ".join(f"{part.name} {part.ratio:.3f}" for part in report.datasets)
        lines.append(f"  ratios {ratios}: {origin.rule}")
    made = {"model": report.model, "vector": report.vector}
    lines.append("  " + ", ".join(f"{what} {where}" for what, where in made.items() if where))
    return "\n".join(lines)


def _pairs(option: str, texts: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = [tuple(text.split("=", 1)) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise RecipeError(f"{text!r} is not NAME=VALUE", where=option)
    return [(name, value) for name, value in pairs]


def _datasets(data: tuple[str, ...]) -> list[dict[str, Any]]:
    places: dict[str, list[str]] = {}
    for name, place in _pairs("--data", data):
        places.setdefault(name, []).append(place)
    return [
        {"name": name, "data": found if len(found) > 1 else found[0]}
        for name, found in places.items()
    ]


def _set_ratio(datasets: list[dict[str, Any]], name: str, share: str) -> None:
    named = [dataset for dataset in datasets if dataset["name"] == name]
    if not named:
        known = ", ".join(dataset["name"] for dataset in datasets)
        raise RecipeError(f"no dataset is called {name!r}; there is {known}", where="--ratio")
    try:
        named[0]["ratio"] = float(share)
    except ValueError:
        raise RecipeError(f"{share!r} is not a number", where=f"--ratio {name}") from None
