"""tokenizer.json as data: tokens taken out, appended, and the whole confirmed and written.

The union of several tokenizers keeps the first one, with its merges, normaliser and numbers, and
appends what the others have as added tokens. The `tokenizers` library is asked at the end whether
it numbers the result alike.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_engine.errors import CheckpointError, MissingExtraError, RecipeError, quoted
from optimer_engine.mergekit.templates import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
"""Every file beside the weights that a tokenizer may consist of."""

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
          "special": False}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json.

    Attributes:
        folder: where it lies.
        data: its content.
        ids: token to number, ordinary and added ones.
        limit: tokens with numbers from here on have no row in the model.
    """

    folder: Path
    data: dict[str, Any]
    ids: dict[str, int]
    limit: int

    @classmethod
    def read(
        cls, folder: Path, rows: int | None, known: dict[bytes, TokenizerFile] | None = None
    ) -> TokenizerFile:
        """From a folder; `rows` is the model's vocab_size where its config tells.

        Args:
            known: by digest, those read before, whose data is shared.

        Raises:
            CheckpointError: when there is none, or it is not as it must be.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                "no tokenizer.json, which aligning vocabularies needs",
                where=str(folder),
                todo="write it with Transformers: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...)",
            )
        digest = hashlib.sha256(path.read_bytes()).digest()
        same = (known or {}).get(digest)
        if same is not None:
            return cls(folder, same.data, same.ids, len(same.ids) if rows is None else rows)
        data = read_json(path)
        try:
            ids = token_numbers(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"is not a tokenizer as the tokenizers library writes it: {error}", where=str(path)
            ) from error
        found = cls(folder, data, ids, len(ids) if rows is None else rows)
        if known is not None:
            known[digest] = found
        return found

    @property
    def added(self) -> list[dict[str, Any]]:
        """Added tokens by number."""
        return sorted(self.data.get("added_tokens") or [], key=lambda entry: entry["id"])


def token_numbers(data: dict[str, Any]) -> dict[str, int]:
    """Token to number, ordinary and added ones."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], numbered as they stand
        ids = {token: number for number, (token, _) in enumerate(vocabulary)}
    else:
        ids = {str(token): int(number) for token, number in vocabulary.items()}
    ids.update({entry["content"]: entry["id"] for entry in data.get("added_tokens") or []})
    if ids and min(ids.values()) < 0:
        raise ValueError("a negative token number")
    return ids


def plain_token(token: str) -> dict[str, Any]:
    """The entry of an added token that is not special."""
    return {"content": token, **_PLAIN}


def stripped(tokenizer: TokenizerFile) -> dict[str, Any]:
    """The data without the tokens for which the model has no row.

    Raises:
        RecipeError: for another kind than BPE, whose tokens have scores.
    """
    beyond = {token for token, number in tokenizer.ids.items() if number >= tokenizer.limit}
    if not beyond:
        return tokenizer.data
    model = tokenizer.data["model"]
    if model.get("type") != "BPE":
        raise RecipeError(
            f"{len(beyond)} tokens have no row in the model, and tokens can only be taken out of a"
            f" BPE tokenizer, not {model.get('type')}",
            where=str(tokenizer.folder),
        )

    def kept(merge: Any) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return beyond.isdisjoint((*parts, "".join(parts)))

    return {
        **tokenizer.data,
        "added_tokens": [e for e in tokenizer.added if e["id"] < tokenizer.limit],
        "model": {
            **model,
            "vocab": {t: n for t, n in model["vocab"].items() if t not in beyond},
            "merges": [merge for merge in model.get("merges", ()) if kept(merge)],
        },
    }


def union(
    data: dict[str, Any], tokenizers: list[TokenizerFile], warnings: list[str]
) -> dict[str, Any]:
    """The base's tokenizer with the tokens of all: ordinary ones first, then added ones.

    Args:
        data: the base's, stripped; `tokenizers` has it first.
        warnings: takes what was noticed.
    """
    ordinary: dict[str, None] = {}
    added: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for tokenizer in tokenizers:
        if id(tokenizer.ids) in seen:
            continue
        seen.add(id(tokenizer.ids))
        entries = {entry["content"]: entry for entry in tokenizer.added}
        in_order = sorted(tokenizer.ids.items(), key=lambda item: item[1])
        ordinary.update(
            (token, None)
            for token, number in in_order
            if number < tokenizer.limit and token not in entries
        )
        for token, entry in entries.items():
            if entry["id"] >= tokenizer.limit:
                continue
            first = added.setdefault(token, entry)
            if {**first, "id": 0} != {**entry, "id": 0}:
                warnings.append(
                    f"token {quoted(token)} is added with different settings; the first model's"
                    " hold"
                )
    known = token_numbers(data)
    fresh = [plain_token(token) for token in ordinary if token not in known and token not in added]
    return with_tokens(data, fresh + list(added.values()))


def with_tokens(data: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """With more added tokens, numbered on from the last; those it has already stay as they are."""
    ids = token_numbers(data)
    have = {entry["content"] for entry in data.get("added_tokens") or []}
    following = max(ids.values(), default=-1) + 1
    new = []
    for entry in entries:
        token = entry["content"]
        if token in have or (token in ids and entry == plain_token(token)):
            continue
        have.add(token)
        if token not in ids:
            ids[token], following = following, following + 1
        new.append({"id": ids[token], **{k: v for k, v in entry.items() if k != "id"}})
    if not new:
        return data
    everything = [*(data.get("added_tokens") or []), *new]
    return {**data, "added_tokens": sorted(everything, key=lambda entry: entry["id"])}


def written_files(folder: Path, data: dict[str, Any]) -> dict[str, bytes]:
    """Every tokenizer file of `folder` with tokenizer.json replaced by `data`.

    Raises:
        RecipeError: when the tokenizers library reads `data` otherwise.
        MissingExtraError: when it is not installed.
    """
    found = {name: (folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    original = read_json(folder / "tokenizer.json")
    if original == data:
        return {name: path.read_bytes() for name, path in found.items()}
    _confirm(data, folder)
    files = {
        name: path.read_bytes()
        for name, path in found.items()
        if name in ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
    }
    files["tokenizer.json"] = dump_json(data)
    settings = copy.deepcopy(read_json(folder / "tokenizer_config.json"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
            for entry in data.get("added_tokens") or []
        }
    files["tokenizer_config.json"] = dump_json(settings)
    return files


def dump_json(data: dict[str, Any]) -> bytes:
    """As Transformers writes it."""
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _confirm(data: dict[str, Any], folder: Path) -> None:
    """Have the tokenizers library read what will be written, and number the tokens the same."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise MissingExtraError(
            "tokenizers is not installed", todo="pip install tokenizers"
        ) from None
    try:
        read = Library.from_str(json.dumps(data, ensure_ascii=False)).get_vocab()
    except Exception as error:
        raise RecipeError(
            f"the tokenizers do not fit together: {error}", where=str(folder)
        ) from error
    wanted = token_numbers(data)
    if read != wanted:
        wrong = sorted(t for t in read.keys() | wanted.keys() if read.get(t) != wanted.get(t))
        raise RecipeError(
            f"the tokenizers library numbers {len(wrong)} tokens otherwise, first"
            f" {quoted(wrong[0])!r}: {read.get(wrong[0])} for {wanted.get(wrong[0])}",
            where=str(folder),
            todo="save the base's tokenizer again with Transformers, so that its numbers are dense",
        )
