"""Pretrain the demo's base: a tokenizer and a small Llama, from the shipped base texts.

The idea: continual pre-training needs something to continue from. A few million parameters,
trained once here until the learning rate has decayed to nothing, stand in for a pretrained
model, so that the demo can start where the method starts. The alternative, pretraining inside
the demo, leaves minutes for a base that is still learning anything it is shown; on such a base
mixed training wins by default and merging shows nothing.

English makes up half of the tokens; the other four share the rest. The base knows a little of
everything, which is what makes distribution vectors small beside it.

Run (about 40 minutes on one core)::

    OMP_NUM_THREADS=1 python benchmarks/demo_assets/pretrain_base.py --work /tmp/demo-base

It resumes from its newest checkpoint in ``--work`` and writes ``assets/base`` at the end. The
learning rate is constant before it decays over the last quarter, and the blocks come in one order
whatever ``--tokens`` says; so a run that takes too long can be stopped and resumed with fewer
tokens, and ends as if it had been started with them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import shutil
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "optimer_engine/demo/assets"
RATIOS = {"en": 0.52, "ja": 0.12, "zh": 0.10, "code": 0.14, "math": 0.12}
VOCABULARY = 4096
CONTEXT = 256
BATCH = 16
MOST_TOKENS = 8_000_000
END = "<|endoftext|>"


def base_texts(domain: str) -> list[str]:
    """The documents that the base may see."""
    with lzma.open(ASSETS / "text" / f"{domain}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return [row["text"] for row in rows if row["split"] == "base"]


def train_tokenizer(texts: dict[str, list[str]], folder: Path) -> None:
    """Byte-level BPE over the domains in equal parts, so that no script is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def portions(limit_bytes: int = 400_000) -> Any:
        for rows in texts.values():
            used_bytes = 0
            for row in rows:
                yield row
                used_bytes += len(row.encode())
                if used_bytes > limit_bytes:
                    break

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(portions(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    ).save_pretrained(folder)


def blocks(texts: dict[str, list[str]], folder: Path, seed: int) -> Any:
    """MOST_TOKENS as shuffled blocks of CONTEXT; each domain repeats to fill its ratio."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    draw = random.Random(seed)
    rows: list[list[int]] = []
    for domain, documents in texts.items():
        encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
        wanted = round(RATIOS[domain] * MOST_TOKENS / CONTEXT)
        stream: list[int] = []
        unique = sum(map(len, encoded))
        print(f"{domain}: {unique} tokens, {wanted * CONTEXT / unique:.1f} passes", flush=True)
        while len(stream) < wanted * CONTEXT:
            draw.shuffle(encoded)
            stream += [token for document in encoded for token in document]
        rows += [stream[i * CONTEXT : (i + 1) * CONTEXT] for i in range(wanted)]
    draw.shuffle(rows)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def pretrain(work: Path, tokens: int, seed: int = 0) -> None:
    """Train tokenizer and model in `work`, and write them to the assets."""
    import torch
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    set_seed(seed)
    folder = work / "tokenizer"
    texts = {domain: base_texts(domain) for domain in RATIOS}
    if not folder.exists():
        train_tokenizer(texts, folder)
    end = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    steps = tokens // (BATCH * CONTEXT)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(work / "run"),
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=3e-3,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 4},
            warmup_steps=60,
            adam_beta2=0.98,
            weight_decay=0.1,
            logging_steps=50,
            save_steps=50,
            save_total_limit=2,
            use_cpu=True,
            bf16=True,
            report_to=[],
            seed=seed,
            disable_tqdm=True,
        ),
        data_collator=default_data_collator,
        train_dataset=blocks(texts, folder, seed),
    )
    trainer.train(resume_from_checkpoint=any((work / "run").glob("checkpoint-*")))
    out = ASSETS / "base"
    shutil.rmtree(out, ignore_errors=True)
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(out)
    shutil.copytree(folder, out, dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--tokens", type=int, default=6_283_264)
    arguments = parser.parse_args()
    pretrain(arguments.work, arguments.tokens)
