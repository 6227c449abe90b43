"""From documents to blocks: tokenise and pack once, map ever after.

Documents are joined into one stream, each followed by the EOS token (and preceded by BOS where the
tokenizer itself puts one), and the stream is cut into blocks of `block_size`. Padding each document
to a block instead would keep documents apart at the price of computing on padding. Attention
crosses from one document into the next, as is usual in pre-training, unless `separate_documents`
is set.

One carry runs through the whole stream. Packing inside `datasets.map` would drop the rest of every
batch of documents; here only the last `block_size - 1` tokens at most of a whole dataset are left
out, and the report counts them.

A held-out share is carved out first, document by document: a document is held out if the hash of
its text falls into the share. So the choice depends on neither order nor seed, copies of a document
stay on one side, and every run on this text, alone or in a mixture, holds out the same.

The blocks are written to a `.npy` file of uint16 or uint32, keyed by a hash of everything they
depend on; a resumed run finds them there, and so does any run that shares the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash

from optimer_engine.durable import replace_file
from optimer_engine.errors import RecipeError
from optimer_engine.lock import locked
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
        heldout: the same of the documents held out, which are not counted above.
    """

    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    blocks: int
    block_size: int
    tail_tokens: int
    largest_token: int
    heldout: PackedInfo | None = None

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes that a token stands for."""
        return self.text_bytes / self.tokens


class Packed(msgspec.Struct, frozen=True):
    """A packed dataset.

    Attributes:
        path: of the blocks, an array of shape (blocks, block_size), uint16 or uint32.
        info: what packing found.
    """

    path: Path
    info: PackedInfo

    @property
    def blocks(self) -> np.ndarray:
        """The blocks, memory-mapped."""
        return np.load(self.path, mmap_mode="r")

    @property
    def heldout_blocks(self) -> np.ndarray:
        """Those of the documents held out."""
        return np.load(_heldout(self.path), mmap_mode="r")

    @property
    def heldout_text(self) -> Path:
        """The documents held out, a `.jsonl` file with a field `text`."""
        return _heldout(self.path).with_suffix(".jsonl")


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    folder: Path,
    *,
    max_blocks: int,
    heldout: float = 0.0,
    progress: bool = False,
) -> Packed:
    """Tokenise and pack a corpus, or find it packed already.

    Local files are packed whole. A Hub dataset is read only until `max_blocks` blocks are full: it
    may be larger than any disk.

    Args:
        corpus: from `find`.
        tokenizer: must have an EOS token.
        block_size: tokens in a block.
        folder: where token files are kept; made if absent. Processes may share it.
        max_blocks: blocks that the run will use of this dataset.
        heldout: share of the documents to hold out.
        progress: show a bar on stderr.

    Raises:
        RecipeError: as `read_documents`, or not enough text for one block.
        OutputError: `folder` cannot be locked.
    """
    limit = max_blocks if corpus.kind == "hub" and not corpus.files else None
    parts = (corpus.fingerprint, _tokenizer_fingerprint(tokenizer), block_size, limit)
    key = fingerprint_of(*parts, *([heldout] if heldout else []))
    path = folder / f"{corpus.config.name}-{key[:16]}.npy"
    facts = path.with_suffix(".json")
    if not facts.is_file():  # written last
        with locked(folder, wait=True, name=f".{path.stem}.lock"):
            if not facts.is_file():
                info = _write(corpus, tokenizer, block_size, path, limit, heldout, progress)
                replace_file(facts, msgspec.json.format(msgspec.json.encode(info)))
    return Packed(path, msgspec.json.decode(facts.read_bytes(), type=PackedInfo))


class Cutter:
    """Joins token lists into one stream and cuts it, with one carry from beginning to end.

    Attributes:
        carry: tokens that do not fill a block yet; fewer than `block_size` after each `push`.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.carry: list[int] = []

    def push(self, document: list[int]) -> np.ndarray:
        """Add a document; the blocks it completes, int64 of shape (n, block_size), n may be 0.

        All that was returned and the carry, joined, are the stream: no token lost or repeated.
        """
        self.carry += document
        n_full = len(self.carry) // self.block_size * self.block_size
        full, self.carry = self.carry[:n_full], self.carry[n_full:]
        return np.array(full, dtype=np.int64).reshape(-1, self.block_size)


class BlockFile:
    """A `.npy` file of blocks that grows while documents come, named when it is complete.

    Args:
        path: of the complete file.
        dtype: uint16 or uint32.
        block_size: tokens in a block.
        limit: blocks after which the rest is left out.
    """

    def __init__(self, path: Path, dtype: np.dtype, block_size: int, limit: int | None) -> None:
        self.path, self.dtype, self.limit = path, dtype, limit
        self._cutter = Cutter(block_size)
        self.documents = self.text_bytes = self.tokens = self.blocks = self.largest = 0
        self._partial = path.with_suffix(".partial")
        self._file = self._partial.open("wb")
        self._write_header()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.blocks >= self.limit

    def add(self, tokens: list[int], text_bytes: int) -> None:
        """One document."""
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += len(tokens)
        array = self._cutter.push(tokens)
        array = array[: None if self.limit is None else self.limit - self.blocks]
        if len(array):
            self._file.write(array.astype(self.dtype).tobytes())
            self.largest = max(self.largest, int(array.max()))
            self.blocks += len(array)

    def finish(self, what: str, todo: str) -> PackedInfo:
        """Complete the file.

        Raises:
            RecipeError: not one block was filled; `what` names the dataset.
        """
        if not self.blocks:
            raise RecipeError(
                f"{self.tokens} tokens in {self.documents} documents, fewer than one block of"
                f" {self._cutter.block_size}",
                where=what,
                todo=todo,
            )
        data_at = self._file.tell() - self.blocks * self._cutter.block_size * self.dtype.itemsize
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == data_at
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)
        tail = self.tokens - self.blocks * self._cutter.block_size
        return PackedInfo(
            self.documents, 0, self.text_bytes, self.tokens, self.blocks,
            self._cutter.block_size, tail, self.largest,
        )  # fmt: skip

    def abandon(self) -> None:
        """Remove what is not complete."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow, so it is rewritten in place.
        shape = (self.blocks, self._cutter.block_size)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    path: Path,
    limit: int | None,
    share: float,
    progress: bool,
) -> PackedInfo:
    from tqdm import tqdm

    before, eos = _tokens_before(tokenizer), tokenizer.eos_token_id
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    kept = BlockFile(path, dtype, block_size, limit)
    apart = BlockFile(_heldout(path), dtype, block_size, None) if share else None
    texts_apart = _heldout(path).with_suffix(".jsonl")
    partial = texts_apart.with_suffix(".jsonl.partial")
    bar = tqdm(
        desc=f"tokenising {corpus.config.name}",
        unit="B", unit_scale=True, delay=QUIET_S, disable=not progress,
    )  # fmt: skip
    empty = 0
    try:
        with bar, partial.open("wb") if share else open(os.devnull, "wb") as written:  # noqa: PTH123
            for texts in read_documents(corpus):
                full = [text for text in texts if text.strip()]
                empty += len(texts) - len(full)
                ids = _token_lists(tokenizer, full)
                for text, document in zip(full, ids, strict=True):
                    raw = text.encode("utf-8", "surrogatepass")
                    held_out = apart is not None and is_held_out(raw, share)
                    if apart is not None and held_out:
                        target = apart
                        written.write(msgspec.json.encode({"text": _printable(text)}) + b"\n")
                    else:
                        target = kept
                    target.add([*before, *document, eos], len(raw))
                    bar.update(len(raw))
                    if kept.full:
                        break
                if kept.full:
                    break
        where = f"dataset {corpus.config.name!r}"
        info = kept.finish(where, "give it more text or make block_size smaller")
        info = msgspec.structs.replace(info, empty_documents=empty)
        if apart is not None:
            todo = "raise heldout, give it more text, or set sample_by to a smaller unit"
            info = msgspec.structs.replace(info, heldout=apart.finish(f"{where}, held out", todo))
            partial.replace(texts_apart)
    finally:
        kept.abandon()
        if apart is not None:
            apart.abandon()
        partial.unlink(missing_ok=True)
    return info


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document of this text belongs to the held-out share."""
    return xxhash.xxh3_64_intdigest(text) < share * 2**64


def _heldout(path: Path) -> Path:
    return path.with_name(f"{path.stem}-heldout.npy")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _token_lists(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


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
