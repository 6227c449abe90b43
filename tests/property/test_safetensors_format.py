"""The header reader: what it accepts the reference library accepts, with the same meaning."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimer_engine.errors import CheckpointError
from optimer_engine.safetensors_format import place, read_header
from optimer_engine.types import DType, TensorInfo


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def read(content: bytes, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, path, 0)
    finally:
        os.close(fd)


names = st.text(min_size=1, max_size=20).filter(
    lambda s: s != "__metadata__" and s.isprintable() and len(s.encode("utf-8", "replace")) < 100
)
dtypes = st.sampled_from([d for d in DType if d.bits >= 8])
tensors = st.dictionaries(
    names, st.tuples(dtypes, st.lists(st.integers(0, 5), max_size=4)), max_size=8
)


@settings(max_examples=100, deadline=None)
@given(tensors, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_what_is_placed_reads_back_here_and_in_the_library(tmp_path_factory, wanted, metadata):
    infos = []
    for name, (dtype, shape) in wanted.items():
        elems = 1
        for dim in shape:
            elems *= dim
        infos.append(TensorInfo(name, dtype, tuple(shape), 0, 0, elems * dtype.itemsize))
    header, placed = place(infos, metadata, 0)
    assert len(header) % 8 == 0
    content = header + bytes(sum(info.nbytes for info in infos))
    got, got_metadata = read(content, tmp_path_factory.mktemp("f"))
    assert got == {info.name: info for info in placed}
    assert got_metadata == metadata
    library = dict(safetensors.deserialize(content))
    assert {n: (e["dtype"], tuple(e["shape"]), len(e["data"])) for n, e in library.items()} == {
        n: (i.dtype.code, i.shape, i.nbytes) for n, i in got.items()
    }


VALID = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}  # fmt: skip

pieces = st.sampled_from(
    [
        b'"dtype"',
        b'"F32"',
        b'"U8"',
        b"[2]",
        b"[0,8]",
        b"8",
        b"11",
        b"-1",
        b"1e3",
        b"null",
        b"{}",
        b"[]",
        b",",
        b":",
        b" ",
        b"\n",
        b'"a"',
        b'"b"',
        b'"__metadata__"',
        b"18446744073709551616",
        b"NaN",
        b"\xff",
        b'"\\ud800"',
        b"0",
        b'"x":1,',
        b"}",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 200), st.integers(0, 12), pieces, st.integers(0, 14))
@example(1, 0, b'"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', 11)
@example(22, 1, b"-0", 3)
@example(1, 0, b'"__metadata__":{"k":"v"} ', 11)
@example(1, 0, b'"__metadata__":{"k":"v","k":"v"},', 11)
def test_a_damaged_header_is_refused_or_means_the_same_to_the_library(
    tmp_path_factory, at, cut, piece, size
):
    header = json.dumps(VALID, separators=(",", ":")).encode()
    at %= len(header) + 1
    content = file_of(header[:at] + piece + header[at + cut :], bytes(size))
    try:
        ours, _ = read(content, tmp_path_factory.mktemp("f"))
    except CheckpointError:
        return
    library = dict(safetensors.deserialize(content))
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in library.items()} == {
        n: (i.dtype.code, i.shape) for n, i in ours.items()
    }


def entry(**changes):
    return json.dumps({"a": {**VALID["a"], **changes}}).encode()


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        (b' {"a":{}}', 0, "begins with b' '"),
        (b"{}\t", 0, "not spaces"),
        (b"{}{}", 0, "not spaces"),
        (b"\xef\xbb\xbf{}", 0, "begins with"),
        (b'{"a":\xff}', 0, "not UTF-8 at byte 5"),
        (b'{"a":', 0, "not JSON"),
        (b'{"a":NaN}', 0, "NaN"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 0, "deep"),
        (b'{"a":1,"a":2}', 0, "'a' stands twice"),
        (b'{"\\u0061":1,"a":2}', 0, "'a' stands twice"),
        (b'{"__metadata__":{"k":1}}', 0, "__metadata__"),
        (b'{"__metadata__":{"k":"1","k":"2"}}', 0, "'k' stands twice"),
        (b'{"a":["F32",[2],[0,8]]}', 8, "exactly dtype, shape and data_offsets"),
        (entry(strides=[1]), 8, "exactly dtype, shape and data_offsets"),
        (entry(dtype="F33"), 8, "unknown dtype 'F33'"),
        (entry(dtype={"F32": None}), 8, "unknown dtype"),
        (entry(shape=[-2]), 8, "shape must be"),
        (entry(shape=[2.0]), 8, "shape must be"),
        (entry(shape=[True, 2]), 8, "shape must be"),
        (entry(shape=[0, 2**63]), 8, "shape must be"),
        (entry(shape=[2**40, 2**40]), 8, "larger than any file"),
        (entry(shape=[1] * 33 + [2]), 8, "rank 34"),
        (entry(data_offsets=[8, 0]), 8, "data_offsets span -8"),
        (entry(data_offsets=[0, 4]), 4, "F32 [2] takes 8 bytes, data_offsets span 4"),
        (entry(data_offsets=[4, 12]), 12, "gap of 4 bytes"),
        (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), 2, "takes 1.5 bytes"),
        (entry(), 7, "short by 1 bytes"),
        (entry(), 9, "1 extra bytes"),
    ],
)
def test_departures_from_the_format_are_named(tmp_path, header, size, words):
    with pytest.raises(CheckpointError) as caught:
        read(file_of(header, bytes(size)), tmp_path)
    assert words in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_an_overlap_names_both_tensors(tmp_path):
    both = {**VALID, "b": {"dtype": "U8", "shape": [4], "data_offsets": [7, 11]}}
    with pytest.raises(CheckpointError, match="overlap of 1 bytes between a and b"):
        read(file_of(json.dumps(both).encode(), bytes(11)), tmp_path)


def test_the_size_of_a_header_is_judged_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000))
        file.truncate(99_000_008)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(CheckpointError, match="header of 99000000 bytes, at most 16000000"):
        read_header(fd, path, 0)
    os.close(fd)


def test_names_are_escaped_in_messages(tmp_path):
    evil = json.dumps({"\x1b[31m\n\u202e": {**VALID["a"], "dtype": "?"}}).encode()
    with pytest.raises(CheckpointError) as caught:
        read(file_of(evil, bytes(8)), tmp_path)
    assert str(caught.value).isascii()
    assert "\x1b" not in str(caught.value)
