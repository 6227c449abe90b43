"""From documents to blocks: tokenise and pack once, map ever after.

Documents are joined into one stream, each followed by the EOS token (and preceded by BOS where the
tokenizer itself puts one), and the stream is cut into blocks of `block_size`. Padding each document
to a block instead would keep documents apart at the price of computing on padding; here attention
may cross from one document into the next, as is usual in pre-training.

One carry runs through the whole stream. Packing inside `datasets.map` would drop the rest of every
batch of documents; here only the last `block_size - 1` tokens at most of a whole dataset are left
out, and the report counts them.

The blocks are written to a `.npy` file of uint16 or uint32, keyed by a hash of everything they
depend on; a resumed run finds them there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from optimer_engine.durable import replace_file
from optimer_engine.errors import RecipeError
from optimer_engine.progress import QUIET_S
from optimer_engine.train.corpus import Corpus, read_documents
from optimer_engine.train.resume import fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PackedInfo(msgspec.Struct, frozen=True):
    """What packing found; kept beside the token file.

    Attributes:
        documents: documents with text; `empty_documents` had none and were left out.
        text_bytes: their size in UTF-8.
        tokens: length of the stream, EOS and BOS included.
        blocks, block_size: tokens used are their product.
        tail_tokens: tokens at the end of the stream that do not fill a block, left out.
        largest_token: the largest token number found.
    """

    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    blocks: int
    block_size: int
    tail_tokens: int
    largest_token: int

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes that a token stands for."""
        return self.text_bytes / self.tokens


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    folder: Path,
    *,
    max_blocks: int,
    progress: bool = False,
) -> tuple[np.ndarray, PackedInfo]:
    """Tokenise and pack a corpus, or find it packed already.

    Local files are packed whole. A Hub dataset is read only until `max_blocks` blocks are full: it
    may be larger than any disk.

    Args:
        corpus: from `find`.
        tokenizer: must have an EOS token.
        block_size: tokens in a block.
        folder: where token files are kept; made if absent.
        max_blocks: blocks that the run will use of this dataset.
        progress: show a bar on stderr.

    Returns:
        The blocks, memory-mapped, of shape (blocks, block_size), uint16 or uint32; and their facts.

    Raises:
        RecipeError: as `read_documents`, or not enough text for one block.
    """
    limit = max_blocks if corpus.kind == "hub" and not corpus.files else None
    key = fingerprint_of(corpus.fingerprint, _tokenizer_fingerprint(tokenizer), block_size, limit)
    path = folder / f"{corpus.config.name}-{key[:16]}.npy"
    facts = path.with_suffix(".json")
    if not facts.is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        info = _write_blocks(corpus, tokenizer, block_size, path, limit, progress)
        replace_file(facts, msgspec.json.format(msgspec.json.encode(info)))
    return np.load(path, mmap_mode="r"), msgspec.json.decode(facts.read_bytes(), type=PackedInfo)


def cut_blocks(documents: Iterable[list[int]], block_size: int) -> Iterator[np.ndarray]:
    """Join token lists into one stream and cut it, with one carry from beginning to end.

    Yields:
        int64 arrays of shape (n, block_size), and last the tail, of shape (less than block_size,),
        which may be empty. Joined they are the stream, no token lost or repeated.
    """
    carry: list[int] = []
    for document in documents:
        carry += document
        n_full = len(carry) // block_size
        if n_full:
            full, carry = carry[: n_full * block_size], carry[n_full * block_size :]
            yield np.array(full, dtype=np.int64).reshape(n_full, block_size)
    yield np.array(carry, dtype=np.int64)


def _write_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    path: Path,
    limit: int | None,
    progress: bool,
) -> PackedInfo:
    from tqdm import tqdm

    before = _tokens_before(tokenizer)
    documents = empty = text_bytes = tokens = blocks = tail = largest = 0

    def encoded() -> Iterator[list[int]]:
        nonlocal documents, empty, text_bytes, tokens
        bar = tqdm(
            desc=f"tokenising {corpus.config.name}",
            unit="B", unit_scale=True, delay=QUIET_S, disable=not progress,
        )  # fmt: skip
        with bar:
            for texts in read_documents(corpus):
                full = [text for text in texts if text.strip()]
                empty += len(texts) - len(full)
                if not full:
                    continue
                ids = tokenizer(
                    full, add_special_tokens=False, return_attention_mask=False, verbose=False
                )["input_ids"]
                for text, document in zip(full, ids, strict=True):
                    documents += 1
                    size = len(text.encode("utf-8", "surrogatepass"))
                    text_bytes += size
                    bar.update(size)
                    tokens += len(before) + len(document) + 1
                    yield [*before, *document, tokenizer.eos_token_id]

    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (0, block_size)}
        # NumPy leaves room in the header for the first axis to grow, so it is rewritten in place.
        np.lib.format.write_array_header_1_0(file, header)
        data_at = file.tell()
        for array in cut_blocks(encoded(), block_size):
            if array.ndim == 1:
                tail = len(array)
                continue
            array = array[: None if limit is None else limit - blocks]
            file.write(array.astype(dtype).tobytes())
            largest = max(largest, int(array.max()))
            blocks += len(array)
            if blocks == limit:
                tail = tokens - blocks * block_size
                break
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (blocks, block_size)})
        assert file.tell() == data_at
        file.flush()
        os.fsync(file.fileno())
    if not blocks:
        partial.unlink()
        raise RecipeError(
            f"{tokens} tokens in {documents} documents, fewer than one block of {block_size}",
            where=f"dataset {corpus.config.name!r}",
            todo="give it more text or make block_size smaller",
        )
    partial.replace(path)
    return PackedInfo(documents, empty, text_bytes, tokens, blocks, block_size, tail, largest)


def _tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS where the tokenizer itself begins texts with it, else nothing."""
    begun = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and begun == [bos] else []


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint_of(
        type(tokenizer).__name__, rules, tokenizer.eos_token_id, _tokens_before(tokenizer)
    )
