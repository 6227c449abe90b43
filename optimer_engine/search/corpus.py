"""Bits per byte on held-out text, block by block.

**Bits per byte** rather than perplexity: the count of bytes does not depend on the tokenizer, so
domains and models can be compared and averaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.search.objective import Score, Scores

LONGEST_DEFAULT_BLOCK = 1024


@dataclass(frozen=True)
class _Blocks:
    tokens: np.ndarray  # int64 [n, block_length]; column 0 is context only
    scored: np.ndarray  # bool [n, block_length - 1]
    nbytes: np.ndarray  # int64 [n]: UTF-8 bytes of the scored tokens


class CorpusObjective:
    """Bits per byte of a causal language model on held-out texts.

    A ``.jsonl`` file holds one document per line under ``text``; any other file is one document.
    Documents are tokenised without special tokens, joined by EOS, and cut into blocks of
    ``block_length - 1`` tokens, each preceded by BOS (EOS where there is none). Every token of the
    text is scored exactly once; BOS and the joining EOS are context and never scored. Bits are
    −log2 of the probabilities, bytes are those of the UTF-8 text, so the value is

        Σ bits / Σ bytes    over the whole text, or over the first ``limit`` blocks.

    The first tokens of a block see little context; that costs all models alike, and in return
    blocks are independent: they batch, and any subset of them is an unbiased sample.

    Args:
        files: name of each corpus and its file.
        tokenizer: a Transformers tokenizer; a fast one attributes bytes to blocks exactly, a slow
            one evenly over the tokens of a document (totals are exact for both).
        block_length: tokens per forward pass, context token included.
        batch_size: blocks per forward pass.
        limits: number of blocks kept of a corpus, by name.

    Raises:
        RecipeError: a file is missing, empty, not UTF-8 or not jsonl with ``text``; the tokenizer
            has neither BOS nor EOS.
    """

    def __init__(
        self,
        files: Mapping[str, str | Path],
        tokenizer: Any,
        *,
        block_length: int,
        batch_size: int = 16,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.block_length, self.batch_size = block_length, batch_size
        self._blocks = {
            name: _cut(read_documents(path), tokenizer, block_length, (limits or {}).get(name))
            for name, path in files.items()
        }

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By term: kind, block length, and sha256 of the scored tokens and bytes."""
        return {
            name: {
                "kind": "bits_per_byte",
                "block_length": self.block_length,
                "data": hashlib.sha256(b.tokens.tobytes() + b.nbytes.tobytes()).hexdigest(),
            }
            for name, b in self._blocks.items()
        }

    @property
    def counts(self) -> dict[str, int]:
        """By term: its number of blocks."""
        return {name: len(b.tokens) for name, b in self._blocks.items()}

    def __call__(self, model: Any, examples: Mapping[str, Sequence[int]] | None = None) -> Scores:
        """Scores in bits per byte, parts in bits and sizes in bytes per block."""
        wanted = dict.fromkeys(self._blocks) if examples is None else examples
        scores = {}
        for name, numbers in wanted.items():
            b, at = self._blocks[name], slice(None) if numbers is None else np.asarray(numbers)
            bits = block_bits(model, b.tokens[at], b.scored[at], self.batch_size)
            scores[name] = Score.of(bits, b.nbytes[at])
        return scores

    def backward(self, model: Any, name: str, examples: Sequence[int], weight: float) -> float:
        """``weight`` times the bits per byte of some blocks; its gradient is added to the model's.

        One batch at a time, so memory is that of one batch and one gradient.
        """
        import torch

        b, at = self._blocks[name], np.asarray(examples)
        scale = weight / (math.log(2.0) * float(b.nbytes[at].sum()))
        device = next(model.parameters()).device
        value = 0.0
        for start in range(0, len(at), self.batch_size):
            rows = at[start : start + self.batch_size]
            tokens = torch.from_numpy(b.tokens[rows]).to(device)
            scored = torch.from_numpy(b.scored[rows]).to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            loss = (nll * scored.flatten()).sum() * scale
            loss.backward()
            value += float(loss.detach())
        return value


def bits_per_byte(
    model: Any, tokenizer: Any, path: str | Path, *, block_length: int, batch_size: int = 16
) -> float:
    """Bits per byte of ``model`` on one file; see `CorpusObjective`."""
    objective = CorpusObjective(
        {"text": path}, tokenizer, block_length=block_length, batch_size=batch_size
    )
    return objective(model)["text"].value


def block_bits(model: Any, tokens: np.ndarray, scored: np.ndarray, batch_size: int) -> np.ndarray:
    """Bits of the scored tokens of each block, float64 [n].

    ``tokens`` is int64 [n, L] and ``scored`` bool [n, L-1], about tokens 1 to L-1.
    Log-probabilities are taken in fp32, whatever the model's dtype, one block at a time so that a
    large vocabulary costs one block of logits and no more, and summed in fp64.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    bits = np.empty(len(tokens))
    with torch.inference_mode():
        for start in range(0, len(tokens), batch_size):
            batch = torch.from_numpy(tokens[start : start + batch_size]).to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for i in range(len(batch)):
                nll = torch.nn.functional.cross_entropy(
                    logits[i, :-1].float(), batch[i, 1:], reduction="none"
                )
                kept = nll.double().cpu().numpy()[scored[start + i]]
                bits[start + i] = kept.sum() / math.log(2.0)
    model.train(was_training)
    return bits


def default_block_length(config: Any) -> int:
    """The model's context, at most 1024 tokens; ``config`` is a Transformers configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    context = getattr(text, "max_position_embeddings", None) or LONGEST_DEFAULT_BLOCK
    return min(int(context), LONGEST_DEFAULT_BLOCK)


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text or jsonl file; empty ones are left out.

    Raises:
        RecipeError: the file is missing, not UTF-8, not jsonl with ``text``, or has no text.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")  # line ends are bytes too: left as they are
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path), todo="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read as UTF-8: {error}", where=str(path)) from error
    documents = [text]
    if path.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                documents.append(_text_field(line, f"{path}, line {number}"))
    documents = [d for d in documents if d]
    if not documents:
        raise RecipeError("holds no text", where=str(path))
    return documents


def _text_field(line: str, where: str) -> str:
    try:
        document = json.loads(line)["text"]
        document.encode()  # a lone surrogate has no bytes to count
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError('expected a JSON object with a text under "text"', where=where) from error
    return document


def _cut(documents: list[str], tokenizer: Any, block_length: int, limit: int | None) -> _Blocks:
    join = tokenizer.eos_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else join
    if first is None:
        raise RecipeError(
            "has neither a BOS nor an EOS token, so the first token of a text has no context",
            where=f"tokenizer {getattr(tokenizer, 'name_or_path', '')}",
            todo="add one to the tokenizer's configuration",
        )
    join = first if join is None else join
    ids: list[Any] = []
    sizes: list[Any] = []
    for i, document in enumerate(documents):
        tokens, nbytes = _tokenise(document, tokenizer)
        ids += [tokens] if i == 0 else [[join], tokens]
        sizes += [nbytes] if i == 0 else [[-1], nbytes]  # -1 marks what is not scored
    stream, stream_bytes = np.concatenate(ids), np.concatenate(sizes)
    width = block_length - 1
    n = math.ceil(len(stream) / width)
    padding = n * width - len(stream)
    stream = np.concatenate([stream, np.full(padding, first)]).reshape(n, width)
    stream_bytes = np.concatenate([stream_bytes, np.full(padding, -1)]).reshape(n, width)
    scored = stream_bytes >= 0
    keep = np.flatnonzero(scored.any(axis=1))[:limit]
    tokens = np.concatenate([np.full((n, 1), first), stream], axis=1).astype(np.int64)
    nbytes = np.maximum(stream_bytes, 0).sum(axis=1).astype(np.int64)
    return _Blocks(tokens[keep], scored[keep], nbytes[keep])


def _tokenise(document: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the UTF-8 bytes each stands for; the bytes sum to those of the document."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        document, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if not len(ids):
        return ids, ids
    code = np.frombuffer(document.encode("utf-32-le"), dtype="<u4")
    per_char = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(per_char)])  # bytes before each character
    if fast:
        ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
        upto = np.maximum.accumulate(before[ends])
    else:
        upto = np.linspace(0, before[-1], len(ids) + 1)[1:].astype(np.int64)
    upto[-1] = before[-1]
    return ids, np.diff(upto, prepend=0)
