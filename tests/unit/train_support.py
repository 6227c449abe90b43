"""A tiny Llama with a byte-level tokenizer, and rhymes to train it on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RHYME = "the cat sat on the mat and the dog lay by the log. "
TOKENS_PER_STEP = 4 * 32


def make_base(folder: Path) -> Path:
    """Write the model (bf16, tied embeddings, 64 positions) and its tokenizer (300 tokens)."""
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(
        [RHYME * 20],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            attention_dropout=0.1,  # so that a resumed run must restore the random state
            eos_token_id=0,
            bos_token_id=None,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rhymes(path: Path, rhyme: str = RHYME, documents: int = 100) -> Path:
    """A .jsonl file of documents that differ in number and length."""
    texts = [f"{i} " + rhyme * (1 + i % 7) for i in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
