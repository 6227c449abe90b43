"""Random damage to what the program reads; `python -m tests.faults.fuzz --help` for long runs.

Five readers: headers, indexes, configurations, recipes, journals. Whatever comes in, a reader
returns or raises its own error. What the header reader accepts, the safetensors library must accept
with the same names, dtypes and shapes; what the journal reader believes, somebody must have
written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import safetensors

from optimer_engine import journal, model_folder, planner, recipe, strict_yaml
from optimer_engine.errors import CheckpointError, OptimerError, RecipeError
from optimer_engine.safetensors_format import read_header
from tests.faults import malformed

TENSORS = {**malformed.GOOD, "c": {"dtype": "I64", "shape": [0], "data_offsets": [8, 8]}}
HEADERS = [
    json.dumps(header, separators=separators).encode()
    for header in (TENSORS, {"__metadata__": {"format": "pt"}, **TENSORS}, malformed.GOOD)
    for separators in ((",", ":"), (", ", ": "))
]
JSON_PIECES = [
    b'"dtype"', b'"F32"', b'"U8"', b'"shape"', b'"data_offsets"', b"[2]", b"[0,8]", b"8", b"11",
    b"-1", b"1e3", b"null", b"true", b"{}", b"[]", b",", b":", b" ", b"\n", b"\t", b'"a"', b'"b"',
    b'"__metadata__"', b'"__metadata__":{"k":"v"},', b"18446744073709551616", b"NaN", b"\xff",
    b'"\\ud800"', b'"\\u0061"', b"0", b'"x":1,', b"}", b"{", b"]", b"[", b'"', b"\\", b"-0", b"8.0",
    b"2.", b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"k":"v",', b'"dtype":"F32",',
    b"\x00", "\u00e9".encode(), b"\xed\xa0\x80", b"\\n", b'\\"',
]  # fmt: skip
INDEXES = [malformed.index_of(a="m1.safetensors", b="m2.safetensors")]
NAMES = [
    b"../", b"/etc/passwd", b"m1.safetensors", b"\\\\", b"\\u0000", b"\\ud800", b".",
    b'"weight_map":',
]  # fmt: skip
RECIPE = b"""base: org/base
sources:
  - {name: ja, model: runs/ja, weight: 0.4, parameters: {density: 0.5}}
  - name: math
    model: org/math@main
    weight: 1e-3
method: ties
out_dtype: bfloat16
max_shard_size: 5GB
"""
YAML_PIECES = [
    b"*a", b"&a ", b"!!python/object:os.system ", b"- ", b": ", b"? ", b"|\n", b">-\n", b"{", b"}",
    b"[", b"]", b",", b"\n", b"  ", b"\t", b"#", b"'", b'"', b".inf", b".nan", b"1e999", b"0x10",
    b"012", b"no", b"~", b"---\n", b"...\n", b"%YAML 1.1\n", b"<<: ", b"base: x\n", b"\xff",
    b"\x00", b"\xe2\x80\xa8", b"[" * 20, b"name: ja", b"weight: -0",
    b"12345678901234567890", b"!!float ",
]  # fmt: skip


def mutated(rng: random.Random, content: bytes, pieces: list[bytes]) -> bytes:
    """One to four small edits."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(8)
        cut = rng.choice((0, 0, 1, 2, 5, 8, 20))
        if kind < 5:
            content = content[:at] + rng.choice(pieces) + content[at + cut :]
        elif kind == 5:
            content = content[:at] + content[at + cut :]
        elif kind == 6 and at < len(content):
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        else:
            other = rng.randrange(len(content) + 1)
            content = content[:at] + content[other : other + cut * 3] + content[at:]
    return content


class Header:
    """The header reader, against the library."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "header"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)

    def close(self) -> None:
        os.close(self.fd)

    def __call__(self, rng: random.Random) -> bool:
        header = mutated(rng, rng.choice(HEADERS), JSON_PIECES)
        if rng.random() < 0.2:
            header += b" " * rng.randrange(9)
        length = len(header) if rng.random() < 0.98 else rng.getrandbits(rng.choice((8, 32, 64)))
        content = struct.pack("<Q", length) + header + bytes(rng.choice((11, 11, 11, 11, 8, 3)))
        return self.check(content)

    def check(self, content: bytes) -> bool:
        """Whether it was accepted."""
        os.ftruncate(self.fd, len(content))
        os.pwrite(self.fd, content, 0)
        try:
            tensors, metadata = read_header(self.fd, self.path, 0)
        except CheckpointError:
            return False
        assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
        library = dict(safetensors.deserialize(content))
        theirs = {n: (e["dtype"], tuple(e["shape"]), len(e["data"])) for n, e in library.items()}
        assert theirs == {n: (i.dtype.code, i.shape, i.nbytes) for n, i in tensors.items()}
        return True


class Index:
    """The reader of an index, in a folder with two shards."""

    def __init__(self, folder: Path) -> None:
        for name in ("m1.safetensors", "m2.safetensors"):
            (folder / name).touch()
        self.path = folder / malformed.INDEX

    def __call__(self, rng: random.Random) -> bool:
        self.path.write_bytes(mutated(rng, rng.choice(INDEXES), JSON_PIECES + NAMES))
        try:
            weight_map, _ = model_folder.read_weight_map(self.path)
        except CheckpointError as error:
            assert str(error).isascii()
            return False
        assert set(weight_map.values()) <= {"m1.safetensors", "m2.safetensors"}
        return True


KEYS = (
    "num_hidden_layers", "n_layer", "model_type", "architectures", "text_config", "torch_dtype",
    "dtype", "vocab_size", "tie_word_embeddings", "quantization_config", "rope_theta", "auto_map",
    "layer_types", "max_window_layers", "num_nextn_predict_layers", "vision_config", "hidden_size",
)  # fmt: skip
ADAPTER_KEYS = (
    "peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "modules_to_save", "bias", "base_model_name_or_path", "target_modules",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, 2, -1, 3, 2**63, 10**30, 0.5, 1e308, "", "x", "llama", "LORA", "(a+)+",
    "\u202e\x1b[31m", "[", [], [1], [None], ["x"], {}, {"": 0}, {"x": None}, {".*": "x"}, [[]],
    {"quant_method": 1}, {"weight_block_size": ["x", 0]}, {"q_proj": 4}, {"[": 1}, {".*": {}},
)  # fmt: skip


class Config:
    """Planning a merge of a base, a model and an adapter whose configurations say anything."""

    def __init__(self, folder: Path) -> None:
        f32 = {"dtype": "F32", "shape": [4, 4]}
        names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)]
        names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        model = {n: {**f32, "data_offsets": [64 * i, 64 * i + 64]} for i, n in enumerate(names)}
        stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        factors = {f"{stem}{f}.weight": {**f32, "data_offsets": [64 * i, 64 * i + 64]}
                   for i, f in enumerate("AB")}  # fmt: skip
        self.folders = {name: folder / name for name in ("base", "model", "adapter")}
        for name, made in self.folders.items():
            made.mkdir()
            stem, tensors = ("adapter_model", factors) if name == "adapter" else ("model", model)
            data = malformed.file_of(tensors, 64 * len(tensors))
            (made / f"{stem}.safetensors").write_bytes(data)
        base, other, adapter = map(str, self.folders.values())
        sources = [{"name": "m", "model": other}, {"name": "a", "model": adapter}]
        part = {"model": other, "layer_range": [0, 2], "parameters": {"weight": 1}}
        self.recipes = [
            {"base": base, "sources": sources, "out_dtype": "float16", "rows": "common"},
            {"merge_method": "linear", "dtype": "float32", "base_model": base,
             "slices": [{"sources": [part, {**part, "model": f"{base}+{adapter}"}]}]},
            {"merge_method": "ties", "base_model": base, "tokenizer_source": "union",
             "models": [{"model": other, "parameters": {"weight": 1, "density": 0.5}}]},
        ]  # fmt: skip

    def __call__(self, rng: random.Random) -> bool:
        for name, folder in self.folders.items():
            config = {"r": 4, "lora_alpha": 8, "peft_type": "LORA"} if name == "adapter" else {}
            keys = ADAPTER_KEYS if name == "adapter" else KEYS
            for _ in range(rng.choice((0, 0, 1, 2))):
                config[rng.choice(keys)] = rng.choice(VALUES)
            if rng.random() < 0.2:
                config["text_config"] = {rng.choice(keys): rng.choice(VALUES)}
            path = "adapter_config.json" if name == "adapter" else "config.json"
            (folder / path).write_text(json.dumps(config))
            vocab = {"model": rng.choice(({"vocab": {"a": 0, "b": 1}}, *VALUES))}
            tokenizer = folder / "tokenizer.json"
            tokenizer.unlink(missing_ok=True)
            if rng.random() < 0.5:
                tokenizer.write_text(json.dumps(vocab))
        try:
            planner.plan(rng.choice(self.recipes), threads=1).close()
        except OptimerError as error:
            assert "\x1b" not in str(error)
            return False
        return True


class Recipe:
    """The recipe reader."""

    def __init__(self, folder: Path) -> None:
        pass

    def __call__(self, rng: random.Random) -> bool:
        raw = mutated(rng, RECIPE, YAML_PIECES)
        try:
            text = raw.decode()
        except UnicodeDecodeError:  # said by `read_yaml`
            return False
        try:
            data = strict_yaml.parse(text, "recipe")
            _check_plain(data, strict_yaml.MAX_DEPTH)
            recipe.decode(data, recipe.Recipe, "recipe")
        except RecipeError:
            return False
        return True


def _check_plain(data: object, depth: int) -> None:
    assert depth >= 0
    if isinstance(data, dict):
        for key, value in data.items():
            assert key is None or isinstance(key, str | int | float | bool)
            _check_plain(value, depth - 1)
    elif isinstance(data, list):
        for value in data:
            _check_plain(value, depth - 1)
    else:
        assert data is None or isinstance(data, str | bool | int) or math.isfinite(data)


class JournalLines:
    """The journal reader: damaged bytes, and lines with a right checksum that make no sense."""

    def __init__(self, folder: Path) -> None:
        claims = [{"file": n, "begin": n, "end": n + 9, "xxh3_128": "0" * 32} for n in range(3)]
        self.lines = [json.dumps(line).encode() for line in ({"run": 1}, *claims)]
        self.content = b"".join(map(_sealed, self.lines))
        self.written = [json.loads(line) for line in self.lines]

    def __call__(self, rng: random.Random) -> bool:
        if rng.random() < 0.3:
            lines = [mutated(rng, line, JSON_PIECES).replace(b"\n", b"") for line in self.lines]
            content = b"".join(map(_sealed, lines))
            found = [line for _, line in journal._whole_lines(content)]
        else:
            content = mutated(rng, self.content, [*JSON_PIECES, *map(_sealed, self.lines)])
            found = [line for _, line in journal._whole_lines(content)]
            assert all(line in self.written for line in found)
        for line in found:
            journal._claim(line)
        return bool(found)


def _sealed(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


TARGETS: dict[str, Any] = {
    "header": Header, "index": Index, "config": Config, "recipe": Recipe, "journal": JournalLines,
}  # fmt: skip


def run(name: str, count: float, seed: int, seconds: float = math.inf) -> tuple[int, int]:
    """(executions, accepted); every thousand begin with a seed of their own, told on failure."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        target = TARGETS[name](Path(folder))
        done = accepted = 0
        started = time.monotonic()
        while done < count and time.monotonic() - started < seconds:
            batch = f"{seed}-{done}"
            rng = random.Random(batch)
            for _ in range(int(min(1000, count - done))):
                try:
                    accepted += target(rng)
                except Exception as error:
                    raise AssertionError(f"{name}, batch {batch}: {error!r}") from error
                done += 1
        if hasattr(target, "close"):
            target.close()
    return done, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=float, default=math.inf)
    parser.add_argument("--seconds", type=float, default=60.0, help="inf for no limit")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    done, accepted = run(asked.target, asked.count, asked.seed, asked.seconds)
    print(f"{asked.target}: {done:,} executions, {accepted:,} accepted, nothing found")


if __name__ == "__main__":
    main()
