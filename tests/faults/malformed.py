"""A zoo of files that are not, or only just, safetensors, and of folders that are not models."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GOOD = {"a": F32, "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}


def file_of(header: bytes | dict, data: int = 11, length: int | None = None) -> bytes:
    """A file with this header and so many zeros behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(**changed) -> dict:
    """One tensor, with fields changed; a field of None is left out."""
    made = {**F32, **changed}
    return {"a": {key: value for key, value in made.items() if value is not None}}


def refused() -> Iterator[tuple[str, bytes, str]]:
    """(name, content, words of the message) of files that must be refused."""
    good = file_of(GOOD)
    text = json.dumps(GOOD, separators=(",", ":")).encode()
    for size in range(8):
        yield f"{size} bytes", bytes(range(1, size + 1)), f"{size} bytes, not a safetensors file"
    yield "length 1", struct.pack("<Q", 1) + b"{" * 20, "the header is not JSON"
    for size in (8, 64):
        yield f"{size} zeros", bytes(size), "zeros where the header should be"
    for length in (len(text) + 12, 10**6, 16_000_000):
        yield f"length {length}", file_of(text, 11, length), f"header of {length} bytes in a file"
    for power in (24, 27, 31, 32, 40, 53, 62, 63):
        content = file_of(text, 11, 2**power)
        yield f"length 2^{power}", content, f"header of {2**power} bytes, at most 16000000"
    yield "length -1", file_of(text, 11, 2**64 - 1), "at most 16000000 expected"
    yield "big endian", struct.pack(">Q", len(text)) + text + bytes(11), "at most 16000000"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    yield "lfs", lfs, "a Git LFS pointer, not the file\n  run `git lfs pull`"
    for start, words in {
        b"<!DOCTYPE html>": "HTML page", b"<html lang=en>": "HTML page", b"GGUF\3\0\0\0": "GGUF",
        b"PK\3\4\0\0\0\0": "zip archive", b"\x80\x02}q\0(X\1": "Python pickle",
    }.items():  # fmt: skip
        yield f"impostor {words} {start[:5]!r}", start + b"x" * 200, words
    for cut in (1, 3, 10, 11):
        yield f"cut by {cut}", good[:-cut], f"short by {cut} bytes"
    for extra in (1, 8, 4096):
        yield f"{extra} more", good + bytes(extra), f"{extra} extra bytes at the end"
    for start in (b" ", b"\n", b"\t", b"\xef\xbb\xbf", b"[", b"\0", b'"'):
        yield f"begins {start!r}", file_of(start + text), "the header begins with"
    for end in (b"\n", b"\t", b"\r", b"\0", b"x", b"{}", b"//", b" \0 "):
        yield f"ends {end!r}", file_of(text + end), "not spaces"
    bad_utf8 = {
        "lone byte": b"\xff", "overlong": b"\xc0\xaf", "surrogate": b"\xed\xa0\x80",
        "cut": b"\xe2\x82", "continuation": b"\x80", "beyond": b"\xf4\x90\x80\x80",
    }  # fmt: skip
    for name, bad in bad_utf8.items():
        content = file_of(text.replace(b'"a"', b'"a' + bad + b'"'))
        yield f"utf-8 {name}", content, "the header is not UTF-8 at byte 3"
    for half in (b"\\ud800", b"\\udfff", b"\\ud800\\ud800"):
        content = file_of(text.replace(b'"a"', b'"a' + half + b'"'))
        yield f"half {half!r}", content, "holds half a character"
    yield "half in metadata", file_of(b'{"__metadata__":{"k":"\\ud800"}}', 0), "half a character"
    broken = {
        "open": text[:-1], "comma": text[:-1] + b",}", "no colon": text.replace(b'"a":', b'"a"'),
        "comment": text.replace(b"{", b"{/* */", 1), "quotes": text.replace(b'"a"', b"'a'"),
        "bare": text.replace(b'"a"', b"a"), "raw newline": text.replace(b'"a"', b'"a\n"'),
        "bad escape": text.replace(b'"a"', b'"\\x61"'), "hex": text.replace(b"[2]", b"[0x2]"),
        "plus": text.replace(b"[2]", b"[+2]"), "octal": text.replace(b"[2]", b"[02]"),
        "dot": text.replace(b"[2]", b"[2.]"),
    }  # fmt: skip
    for name, header in broken.items():
        yield f"json {name}", file_of(header), "the header is not JSON"
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        content = file_of(text.replace(b"[2]", b"[" + constant + b"]"))
        yield f"constant {constant!r}", content, f"{constant.decode()} in the header is not JSON"
    for name, header in {
        "deep list": b'{"a":' + b"[" * 5000, "deep object": b'{"a":' * 5000,
        "digits": text.replace(b"[2]", b"[" + b"9" * 5000 + b"]"),
    }.items():  # fmt: skip
        yield f"too much: {name}", file_of(header), "nests too deep or holds a number too large"
    twice = {
        "tensor": b'{"a":%s,"a":%s}', "escaped": b'{"a":%s,"\\u0061":%s}',
        "empty": b'{"":%s,"":%s}',
    }  # fmt: skip
    one = json.dumps(F32, separators=(",", ":")).encode()
    for name, pattern in twice.items():
        yield f"twice {name}", file_of(pattern % (one, one), 8), "stands twice in the header"
    for field in ("dtype", "shape", "data_offsets"):
        value = json.dumps(F32[field])
        header = f'{{"a":{{"{field}":{value},{json.dumps(F32)[1:]}}}'.encode()
        yield f"twice {field}", file_of(header, 8), f"'{field}' stands twice in the header"
    for name, pairs in {"key": '"k":"v","k":"w"', "escape": '"k":"v","\\u006b":"w"'}.items():
        header = f'{{"__metadata__":{{{pairs}}}}}'.encode()
        yield f"twice metadata {name}", file_of(header, 0), "'k' stands twice"
    header = b'{"__metadata__":{},"a":%s,"__metadata__":{}}' % one
    yield "twice metadata", file_of(header, 8), "'__metadata__' stands twice"
    for name, value in {
        "list": "[]", "text": '"x"', "number": "1", "number in it": '{"k":1}', "nested": '{"k":{}}',
        "null in it": '{"k":null}', "true": "true", "false": "false",
        "empty": '""', "zero": "0", "list in it": '{"k":["v"]}',
    }.items():  # fmt: skip
        header = f'{{"__metadata__":{value}}}'.encode()
        yield f"metadata {name}", file_of(header, 0), "__metadata__ is not a map from text to text"
    exactly = "an entry must have exactly dtype, shape and data_offsets"
    for field in ("dtype", "shape", "data_offsets"):
        yield f"without {field}", file_of(entry(**{field: None}), 8), exactly
        yield f"null {field}", file_of(json.dumps({"a": {**F32, field: None}}).encode(), 8), "a: "
    for field in ("strides", "Dtype", "", "offset"):
        yield f"unknown field {field!r}", file_of(entry(**{field: 1}), 8), exactly
    for value in (["F32", [2], [0, 8]], {"F32": None}, "F32", 8, None, True, [], {}):
        yield f"entry {value!r}", file_of({"a": value}, 8), exactly
    for code in ("f32", "float32", "F128", "", "BF16 ", "F6", "I4", "\u0000"):
        yield f"dtype {code!r}", file_of(entry(dtype=code), 8), "unknown dtype"
    for code in (32, None, ["F32"], {}):
        yield f"dtype {code!r}", file_of({"a": {**F32, "dtype": code}}, 8), "unknown dtype"
    whole = "must be a list of whole numbers from 0 to 2^63 - 1"
    for number in ("-1", "-0", "2.0", "2e0", '"2"', "null", "true", "[2]", str(2**63), str(2**64)):
        header = text.replace(b"[2]", f"[{number}]".encode())
        yield f"dim {number}", file_of(header), f"a: shape {whole}"
        header = text.replace(b"[0,8]", f"[0,{number}]".encode())
        yield f"offset {number}", file_of(header), f"a: data_offsets {whole}"
    for value in ("2", '"2"', "{}", "null", "true"):
        header = text.replace(b"[2]", value.encode())
        yield f"shape {value}", file_of(header), "a: shape must be a list"
    for shape in ([2**40, 2**40], [2**62, 2, 2, 2], [2**21] * 3, [2**63 - 1, 2**63 - 1]):
        yield f"shape {shape}", file_of(entry(shape=shape), 8), "is larger than any file"
    for rank in (33, 64, 70):
        yield f"rank {rank}", file_of(entry(shape=[1] * rank), 8), f"rank {rank} (at most 32)"
    for offsets in ([], [0], [0, 8, 8]):
        content = file_of(entry(data_offsets=offsets), 8)
        yield f"offsets {offsets}", content, f"with {len(offsets)} offsets (2 expected)"
    for offsets in ([8, 0], [0, 4], [0, 9], [0, 0], [4, 4]):
        content = file_of(entry(data_offsets=offsets), 8)
        yield f"offsets {offsets}", content, f"data_offsets span {offsets[1] - offsets[0]}"
    for code, bits in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)):
        content = file_of(entry(dtype=code, shape=[3], data_offsets=[0, 2]), 2)
        yield f"half a byte {code}", content, f"takes {3 * bits / 8:g} bytes"
    tail = {"dtype": "U8", "shape": [3]}
    for name, offsets, words in (
        ("gap", [9, 12], "gap of 1 bytes between a and b"),
        ("overlap", [7, 10], "overlap of 1 bytes between a and b"),
        ("same place", [0, 3], "overlap of 3 bytes between b and a"),
        ("inside", [2, 5], "overlap of 6 bytes between a and b"),
        ("far away", [2**62, 2**62 + 3], f"gap of {2**62 - 8} bytes between a and b"),
    ):
        yield name, file_of({"a": F32, "b": {**tail, "data_offsets": offsets}}, 12), words
    first = {"a": {**F32, "data_offsets": [1, 9]}}
    yield "gap at the start", file_of(first, 9), "gap of 1 bytes between the header and a"
    for size in (1025, 65536):
        yield f"name of {size}", file_of({"n" * size: F32}, 8), "a tensor name of more than 1024"
    long = {"\u00e9" * 600: F32}
    yield "name of 1200 in UTF-8", file_of(long, 8), "a tensor name of more than 1024"


def accepted() -> Iterator[tuple[str, bytes]]:
    """Files at the edge of the format, inside."""
    text = json.dumps(GOOD, separators=(",", ":")).encode()
    yield "plain", file_of(GOOD)
    yield "empty", file_of(b"{}", 0)
    yield "no tensors", file_of({"__metadata__": {"format": "pt"}}, 0)
    for spaces in (1, 7, 8, 500):
        yield f"{spaces} spaces", file_of(text + b" " * spaces)
    yield "spaces inside", file_of(json.dumps(GOOD, indent=3).encode())
    yield "tabs inside", file_of(json.dumps(GOOD, indent="\t").encode())
    yield "scalar", file_of(entry(shape=[], data_offsets=[0, 4]), 4)
    for shape in ([0], [0, 2**40], [3, 0, 5], [0] * 32):
        yield f"nothing {shape}", file_of(entry(shape=shape, data_offsets=[0, 0]), 0)
    middle = {**GOOD, "z": {"dtype": "I64", "shape": [0], "data_offsets": [8, 8]}}
    yield "nothing between two", file_of(middle)
    yield "reversed", file_of(dict(reversed(GOOD.items())))
    fields = {"a": dict(reversed(F32.items()))}
    yield "fields reversed", file_of(fields, 8)
    yield "rank 32", file_of(entry(shape=[1] * 31 + [2]), 8)
    yield "null metadata", file_of(b'{"__metadata__":null,' + text[1:])
    for at, header in (
        ("first", {"__metadata__": {"k": "v"}, **GOOD}),
        ("last", {**GOOD, "__metadata__": {"k": "v"}}),
    ):
        yield f"metadata {at}", file_of(header)
    for value in ("{[]}", 'a "quoted" {brace}', "back\\slash", "\u202e\x1b[31m", "", "-0", "\n"):
        yield f"metadata {value!r}", file_of({"__metadata__": {"k": value, value: "k"}, **GOOD})
    for name in ("", "dtype", "shape", "a b", "\u65e5\u672c", "..", "/etc/passwd", "a\x00b", "-0"):
        yield f"name {name!r}", file_of({name: F32}, 8)
    yield "name of 1024", file_of({"n" * 1024: F32}, 8)
    yield "escaped name", file_of(text.replace(b'"a"', b'"\\u0041"'))
    yield "pair", file_of(text.replace(b'"a"', b'"\\ud83d\\ude00"'))
    for code, bits in (
        ("BOOL", 8), ("U8", 8), ("I8", 8), ("F8_E5M2", 8), ("F8_E4M3", 8), ("I16", 16),
        ("U16", 16), ("F16", 16), ("BF16", 16), ("I32", 32), ("U32", 32), ("F64", 64),
        ("I64", 64), ("U64", 64), ("F8_E8M0", 8), ("C64", 64), ("F4", 4),
    ):  # fmt: skip
        size = 4 * bits // 8
        yield f"dtype {code}", file_of(entry(dtype=code, shape=[4], data_offsets=[0, size]), size)


def bombs() -> Iterator[tuple[str, bytes, str]]:
    """Headers just under the limit of size that would unfold into far more."""
    size = 15_900_000
    nothing = b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = b",".join(b'"%d%s' % (n, nothing) for n in range(size // 59))
    yield "tensors", b"{" + many + b"}", "tensors, at most 200000 expected"
    keys = b",".join(b'"%d":""' % n for n in range(1_250_000))
    yield "metadata", b'{"__metadata__":{' + keys + b"}}", "__metadata__ of more than 1000000 bytes"
    late = b'{"a' + nothing + b',"__metadata__":{' + keys + b"}}"
    yield "metadata at the end", late, "times ':' in the header"
    start = b'{"a":{"dtype":"U8","shape":['
    yield "dims", start + b"1," * (size // 2 - 60) + b'1],"data_offsets":[0,1]}}', "times ','"
    yield "digits", start + b"1" * size + b'],"data_offsets":[0,1]}}', "not in the usual form"
    yield "lists", b'{"a":' + b"[" * size, "times '['"
    yield "objects", b'{"a":' * (size // 5), "times ':'"
    yield "a name", b'{"' + b"a" * (size - 100) + nothing + b"}", "more than 1024 bytes"
    yield "escapes", b'{"' + b"\\u0061" * (size // 6 - 20) + nothing + b"}", "usual form"


def index_of(**weight_map) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


INDEX = "model.safetensors.index.json"


def folders() -> Iterator[tuple[str, dict, str]]:
    """(name, what to put into the folder, words) of folders that must be refused.

    A value is the content of a file, a `Path` to link to, or a function that makes the file.
    """
    w = file_of(entry(), 8)
    v = file_of({"v": F32}, 8)
    shard = {"m1.safetensors": w}
    plain = "not a plain file name"
    for name in (
        "../m1.safetensors", "/etc/passwd", "sub/m1.safetensors", "..\\m1.safetensors", "", ".",
        "..", "https://host/m1.safetensors", "./m1.safetensors", "C:\\m1.safetensors",
        "\\\\host\\share", "m1.safetensors/", "m1\x00.safetensors", "m1\n.safetensors", "n" * 300,
        "\u202em1",
    ):  # fmt: skip
        yield f"shard {ascii(name)[:40]}", {**shard, INDEX: index_of(a=name)}, plain
    for value in (None, 1, 1.5, True, [], {}, ["m1.safetensors"]):
        yield f"shard {value!r}", {**shard, INDEX: index_of(a=value)}, plain
    missing = {INDEX: index_of(a="m1.safetensors")}
    yield "shard absent", missing, "shard m1.safetensors is missing"
    gone = {**missing, "m1.safetensors": Path("nowhere")}
    yield "shard dangling", gone, "m1.safetensors is missing (a link to nowhere)"
    loop = {**missing, "m1.safetensors": Path("m1.safetensors")}
    yield "shard loop", loop, "m1.safetensors is missing (a link to m1.safetensors)"
    yield "shard folder", {**missing, "m1.safetensors": Path.mkdir}, "is not a regular file"
    yield "shard fifo", {**missing, "m1.safetensors": os.mkfifo}, "is not a regular file"
    device = {**missing, "m1.safetensors": Path("/dev/zero")}
    yield "shard device", device, "is not a regular file"
    yield "single fifo", {"model.safetensors": os.mkfifo}, "is not a regular file"
    yield "single device", {"model.safetensors": Path("/dev/null")}, "is not a regular file"
    yield "single dangling", {"model.safetensors": Path("nowhere")}, "No such file or directory"
    yield "single loop", {"model.safetensors": Path("model.safetensors")}, "symbolic links"
    for name, content in (
        ("empty", b""),
        ("zeros", bytes(64)),
        ("pointer", b"version https://git-lfs"),
    ):
        yield f"shard {name}", {**missing, "m1.safetensors": content}, "m1.safetensors: "
    two = {**shard, "m2.safetensors": v}
    yield (
        "listed, absent",
        {**shard, INDEX: index_of(a="m1.safetensors", x="m1.safetensors")},
        ("x lies nowhere, listed in m1.safetensors"),
    )
    yield (
        "elsewhere",
        {**two, INDEX: index_of(a="m2.safetensors", v="m1.safetensors")},
        ("a lies in m1.safetensors, listed in m2.safetensors"),
    )
    yield (
        "unlisted tensor",
        {"m1.safetensors": file_of(GOOD), INDEX: index_of(a="m1.safetensors")},
        ("b lies in m1.safetensors, listed nowhere"),
    )
    both = {"m1.safetensors": w, "m2.safetensors": w}
    yield (
        "in two",
        {**both, INDEX: index_of(a="m1.safetensors", v="m2.safetensors")},
        ("a lies here and in m1.safetensors"),
    )
    for name, content, words in (
        ("empty", b"", "not readable JSON"), ("broken", b"{", "not readable JSON"),
        ("list", b"[]", "is not a JSON object"), ("null", b"null", "is not a JSON object"),
        ("no map", b"{}", "no weight_map"), ("empty map", b'{"weight_map": {}}', "no weight_map"),
        ("list map", b'{"weight_map": ["a"]}', "no weight_map"),
        ("twice", b'{"weight_map": {"a": "m1", "a": "m1"}}', "stands twice"),
        ("twice map", b'{"weight_map": {}, "weight_map": {}}', "stands twice"),
        ("deep", b'{"weight_map":' + b"[" * 50_000, "not readable JSON"),
        ("nan", b'{"metadata": {"total_size": NaN}, "weight_map": {"a": "m1.safetensors"}}', "NaN"),
        ("not utf-8", b'{"weight_map": {"\xff": "m1.safetensors"}}', "not readable JSON"),
        ("bom", b'\xef\xbb\xbf{"weight_map": {"a": "m1.safetensors"}}', "not readable JSON"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("many", b'{"weight_map": {' + b'"a":"b",' * 500_000, "at most 400000 expected"),
    ):  # fmt: skip
        yield f"index {name}", {**shard, INDEX: content}, words
    yield "index fifo", {**shard, INDEX: os.mkfifo}, "is not a regular file"
    yield "index folder", {**shard, INDEX: Path.mkdir}, "is not a regular file"
    yield "index dangling", {**shard, INDEX: Path("nowhere")}, "not readable JSON"
    yield (
        "both",
        {"model.safetensors": w, **shard, INDEX: index_of(a="m1.safetensors")},
        "holds both",
    )
    yield "nothing", {}, "no model.safetensors"
    for name in ("pytorch_model.bin", "consolidated.00.pt", "adapter_model.bin"):
        yield f"only {name}", {name: b"\x80"}, "run `optimer convert`"
    single = {"model.safetensors": w}
    for name, content, words in (
        ("absent", None, "config.json is missing"), ("empty", b"", "not readable JSON"),
        ("list", b"[]", "is not a JSON object"), ("twice", b'{"a": 1, "a": 2}', "stands twice"),
        ("deep", b'{"a":' * 50_000, "not readable JSON"), ("nan", b'{"a": NaN}', "NaN"),
        ("digits", b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        ("fifo", os.mkfifo, "is not a regular file"), ("folder", Path.mkdir, "not a regular file"),
        ("layers", b'{"num_hidden_layers": 3}', "num_hidden_layers 3, the files hold 1 layers"),
        ("inner", b'{"text_config": {"num_hidden_layers": 2}}', "the files hold 1 layers"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):  # fmt: skip
        layered = {"model.safetensors": file_of({"model.layers.0.w": F32}, 8)}
        yield f"config {name}", {**single, **layered, "config.json": content}, words


def build(folder: Path, files: dict) -> Path:
    folder.mkdir()
    for name, content in {"config.json": b"{}", **files}.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            content(path)
    return folder
