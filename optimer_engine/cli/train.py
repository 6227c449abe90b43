"""`optimer train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import RecipeError


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
@click.option("--tokens", metavar="N", help="Budget, such as 1e8 or 100M.")
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
@click.option("--save-every", type=int, metavar="STEPS", help="Checkpoint interval; default 500.")
@click.option("--save-dtype", metavar="DTYPE", help="Of the trained model.")
@click.option(
    "--vector/--no-vector",
    default=None,
    help="Write the distribution vector; default: for one dataset.",
)
@click.option("--resume/--no-resume", default=True, help="Continue a run begun in OUT (default).")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Run folder.")
@json_option
def command(
    config: Path | None,
    data: tuple[str, ...],
    ratio: tuple[str, ...],
    text_field: str | None,
    out: Path,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Continue pre-training a base on one dataset, or on a mixture of several.

    One dataset ends in OUT/model and its distribution vector OUT/vector; several make the
    data-mixture baseline. Settings come from the YAML file CONFIG, from options, or from both;
    options win. The same command continues a run that was interrupted.

    \b
    Examples:
      optimer train --base org/base --data 'ja=texts/ja/*.jsonl' --tokens 100M -o runs/ja
      optimer train --base org/base --data ja=ja.txt --data math=math.parquet \\
          --ratio ja=0.7 --ratio math=0.3 --tokens 100M -o runs/mixture
      optimer train train.yaml --seed 1 -o runs/ja-1
    """
    from optimer_engine.recipe import decode, read_config
    from optimer_engine.train import TrainConfig, run_cpt

    settings: dict[str, Any] = {}
    if config is not None:
        settings = msgspec.to_builtins(read_config(config, TrainConfig))
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
    wanted = decode(settings, TrainConfig, str(config) if config else "train")
    report = run_cpt(wanted, out, resume=resume, progress=True)
    lines = [
        f"{out}: {report.tokens} tokens in {report.steps} steps, {report.seconds:.1f} s"
        f" ({report.tokens_per_s:,.0f} tokens/s, {report.precision} on {report.device}),"
        f" final loss {report.final_loss:.4f}, about {report.final_bits_per_byte:.3f} bits/byte"
    ]
    lines += [
        f"  {part.name}: {part.blocks} blocks of {part.packed.block_size} tokens,"
        f" {part.epochs:.2f} epochs; {part.packed.tail_tokens} tokens at its end left out"
        for part in report.datasets
    ]
    lines.append(f"  model {report.model}" + (f", vector {report.vector}" if report.vector else ""))
    emit(msgspec.to_builtins(report), "\n".join(lines), as_json)


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
