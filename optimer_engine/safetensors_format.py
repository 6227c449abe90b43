"""The safetensors file format, read strictly and written exactly.

A file is `N` (u64, little endian), `N` bytes of JSON header, then the tensors' bytes:

    {"__metadata__": {text: text},
     name: {"dtype": code, "shape": [...], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header, cover the data without gap or overlap, and end at the
file's last byte. The reader here is stricter than the reference library, where the format is: it
refuses duplicate names, unknown fields, other padding than spaces and absurd sizes, so whatever is
accepted here the library accepts too, with the same names, dtypes and shapes. It reads the header
only, in bounded time and memory, and decides before reading how much it will read.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from optimer_engine.errors import CheckpointError, quoted
from optimer_engine.types import DTYPE_OF_CODE, TensorInfo

MAX_HEADER_BYTES = 16_000_000
MAX_CAREFUL_BYTES = 4_000_000
"""Of a header that is not in the plain form that all writers use."""
MAX_METADATA_BYTES = 1_000_000
MAX_TENSORS = 200_000
MAX_RANK = 32
MAX_NAME_BYTES = 1024

_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull`"),
    (b"GGUF", "a GGUF file", "convert it to safetensors first"),
    (b"PK\x03\x04", "a zip archive, probably a PyTorch pickle", "convert it to safetensors first"),
    (b"\x80", "a Python pickle", "convert it to safetensors first"),
    (b"<!DOCTYPE", "an HTML page", "download the file again"),
    (b"<html", "an HTML page", "download the file again"),
    (b"\0\0\0\0\0\0\0\0", "zeros where the header should be", "download the file again"),
)


def read_header(fd: int, path: Path, file: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (offsets absolute in the file) and metadata of the open file `fd`.

    Args:
        path: the file's name for errors.
        file: the file's number in its checkpoint, recorded in each TensorInfo.

    Raises:
        CheckpointError: at the first departure from the format, with the two numbers that disagree.
    """
    size = os.fstat(fd).st_size
    start = os.pread(fd, 32, 0)
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
    if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
        for magic, what, todo in _IMPOSTORS:
            if start.startswith(magic):
                raise CheckpointError(f"this is {what}", where=str(path), todo=todo)
    if size < 8:
        _refuse(path, f"{size} bytes, not a safetensors file (at least 8 expected)")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"header of {length} bytes, at most {MAX_HEADER_BYTES} expected")
    if 8 + length > size:
        _refuse(path, f"header of {length} bytes in a file of {size} bytes")
    raw = os.pread(fd, length, 8)
    header = _decode(raw, path)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "__metadata__ is not a map from text to text")
    if len(header) > MAX_TENSORS:
        _refuse(path, f"{len(header)} tensors, at most {MAX_TENSORS} expected")
    names = list(header)
    tensors = {name: _entry(name, header.pop(name), path, file, 8 + length) for name in names}
    _check_coverage(tensors.values(), path, 8 + length, size)
    return tensors, metadata


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(what, where=str(path), todo="download or save the file again")


class _Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


_METADATA = re.compile(
    rb'\{ *"__metadata__" *: *(\{(?:[^{}"]++|"(?:[^"\\]++|\\.)*+")*+\}) *(?:, *(?=")|(?=\}))',
    re.DOTALL,
)
_BEGINS_WITH_METADATA = re.compile(rb'\{ *"__metadata__"')
_FIELDS = (b'"dtype"', b'"shape"', b'"data_offsets"')
_MINUS_ZERO = re.compile(rb"[\[,:\s]-0")
_entries = msgspec.json.Decoder(dict[str, _Entry])


def _decode(raw: bytes, path: Path) -> dict[str, Any]:
    """The header: name to entry, and "__metadata__" to a dict.

    A fast decoder lets the last of two equal keys win. It is trusted only with text in which no key
    can hide: without escapes, and with every field's name exactly once per entry. Any doubt, and
    any error, goes to the careful decoder, which is the rule.
    """
    if not raw.startswith(b"{"):
        _refuse(path, f"the header begins with {raw[:1]!r}, not with '{{'")
    found = _METADATA.match(raw, 0, MAX_METADATA_BYTES)
    if not found and len(raw) > MAX_METADATA_BYTES and _BEGINS_WITH_METADATA.match(raw):
        _refuse(path, f"__metadata__ of more than {MAX_METADATA_BYTES} bytes, or damaged")
    text = b"{" + raw[found.end() :] if found else raw
    _check_amount(text, path)
    hidden = b"\\" in text or b"__metadata__" in text
    hidden |= b"-0" in text and _MINUS_ZERO.search(text) is not None
    problem = "a name stands twice, or is spelled with escapes"
    if not hidden and not text[text.rfind(b"}") + 1 :].strip(b" "):
        try:
            header: dict[str, Any] = dict(_entries.decode(text))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            problem = quoted(error)[:200]
        else:
            if all(text.count(name) == len(header) for name in _FIELDS):
                if found:
                    header["__metadata__"] = _decode_carefully(found[1], path)
                return header
    if len(raw) > MAX_CAREFUL_BYTES:
        _refuse(path, f"the header of {len(raw)} bytes is not in the usual form: {problem}")
    return _decode_carefully(raw, path)


def _check_amount(text: bytes, path: Path) -> None:
    """Refuse a header whose decoded form would be out of all proportion, without decoding it."""
    if len(text) < 100_000:
        return
    tensors = text.count(b'"dtype"')
    if tensors > MAX_TENSORS:
        _refuse(path, f"{tensors} tensors, at most {MAX_TENSORS} expected")
    for mark, per_tensor, spare in ((b":", 4, 20_000), (b",", 16, 50_000), (b"[", 2, 1_000)):
        count, most = text.count(mark), per_tensor * tensors + spare
        if count > most:
            _refuse(
                path,
                f"{count} times {mark.decode()!r} in the header, at most {most} expected for"
                f" {tensors} tensors",
            )


def _decode_carefully(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                _refuse(path, f"{quoted(name)!r} stands twice in the header")
            found[name] = value
        for text in (*found, *found.values()):
            if isinstance(text, str) and not _is_unicode(text):
                _refuse(path, f"{quoted(text)!r} in the header holds half a character")
        return found

    def natural(digits: str) -> int:
        return int(digits) if digits[0] != "-" else -1  # Python reads -0 as 0; the format does not

    def no_constant(constant: str) -> NoReturn:
        _refuse(path, f"{constant} in the header is not JSON")

    try:
        text = raw.decode("utf-8")
        decoder = json.JSONDecoder(
            object_pairs_hook=unique, parse_constant=no_constant, parse_int=natural
        )
        header, end = decoder.raw_decode(text)
    except UnicodeDecodeError as error:
        _refuse(path, f"the header is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        _refuse(path, f"the header is not JSON: {error.msg} at character {error.pos}")
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        _refuse(path, "the header nests too deep or holds a number too large")
    if text[end:].strip(" "):
        _refuse(path, f"after the header's last brace stands {text[end:][:20]!r}, not spaces")
    return header


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(name: str, entry: Any, path: Path, file: int, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME_BYTES // 4 and len(name.encode()) > MAX_NAME_BYTES:
        _refuse(path, f"a tensor name of more than {MAX_NAME_BYTES} bytes")
    if isinstance(entry, _Entry):
        code, shape, offsets = entry.dtype, entry.shape, entry.data_offsets
    elif isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    else:
        _refuse(path, f"{quoted(name)}: an entry must have exactly dtype, shape and data_offsets")
    dtype = DTYPE_OF_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        _refuse(path, f"{quoted(name)}: unknown dtype {quoted(code)!r}")
    for numbers, label in ((shape, "shape"), (offsets, "data_offsets")):
        if not isinstance(numbers, list):
            _refuse(path, f"{quoted(name)}: {label} must be a list")
        for number in numbers:
            if type(number) is not int or not 0 <= number < 2**63:
                _refuse(
                    path,
                    f"{quoted(name)}: {label} must be a list of whole numbers from 0 to 2^63 - 1",
                )
    if len(shape) > MAX_RANK or len(offsets) != 2:
        _refuse(
            path,
            f"{quoted(name)}: rank {len(shape)} (at most {MAX_RANK}) with {len(offsets)} offsets"
            " (2 expected)",
        )
    bits = dtype.bits
    for dim in shape:
        bits *= dim
        if bits >= 2**66:
            _refuse(path, f"{quoted(name)}: shape {shape[:8]} is larger than any file")
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        _refuse(
            path,
            f"{quoted(name)}: {dtype.code} {shape} takes {bits / 8:g} bytes, data_offsets span"
            f" {end - begin}",
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _check_coverage(tensors: Iterable[TensorInfo], path: Path, start: int, size: int) -> None:
    expected, before = start, "the header"
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset != expected:
            kind = "gap" if info.offset > expected else "overlap"
            _refuse(
                path,
                f"{kind} of {abs(info.offset - expected)} bytes between {quoted(before)} and"
                f" {quoted(info.name)}",
            )
        expected, before = info.offset + info.nbytes, info.name
    if expected > size:
        _refuse(path, f"short by {expected - size} bytes: {size} found, {expected} expected")
    if expected < size:
        _refuse(
            path, f"{size - expected} extra bytes at the end: {size} found, {expected} expected"
        )


def place(
    tensors: Iterable[TensorInfo], metadata: dict[str, str], file: int
) -> tuple[bytes, list[TensorInfo]]:
    """Lay tensors out in one file as the reference writer does: widest dtype first, then by name.

    Args:
        tensors: names, dtypes and shapes; their file and offset are ignored.

    Returns:
        The file's first bytes (length and header, padded with spaces to 8 bytes) and the tensors
        in file order with their absolute offsets.
    """
    ordered = sorted(tensors, key=lambda t: (-t.dtype.bits, t.name))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for info in ordered:
        offsets = [end, end + info.nbytes]
        end += info.nbytes
        entries[info.name] = {
            "dtype": info.dtype.code,
            "shape": list(info.shape),
            "data_offsets": offsets,
        }
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = [
        TensorInfo(
            t.name, t.dtype, t.shape, file, start + entries[t.name]["data_offsets"][0], t.nbytes
        )
        for t in ordered
    ]
    return struct.pack("<Q", len(text)) + text, placed
