"""Packing folders: every bit comes back, files that lie are refused, modes keep their word."""

from __future__ import annotations

import json
import struct
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimer_engine import vectors
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OptimerError,
    RecipeError,
)
from optimer_engine.packing import pack, unpack
from tests.conftest import nearby, random_tensors

SPECIAL = torch.tensor(
    [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3e38, 1.0]
)


def adversarial(dtype, seed):
    """Random bits of any meaning in large tensors, specials in small ones."""
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    noise = torch.from_numpy(rng.integers(0, 256, 70_001 * size, np.uint8)).view(dtype)
    return {
        "model.layers.0.noise": noise.reshape(1, -1),
        "model.layers.0.special": SPECIAL.roll(seed).to(dtype),
        "model.scale": SPECIAL[seed % 9].to(dtype),
        "model.unused": torch.empty((0, 3), dtype=dtype),
        "model.positions": torch.arange(7),
    }


def bits(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return {
        name: (
            t.dtype,
            tuple(t.shape),
            t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exact_restores_every_bit_of_adversarial_checkpoints(tmp_path, write_checkpoint, dtype):
    base = write_checkpoint("base", adversarial(dtype, 1))
    trained = write_checkpoint("trained", adversarial(dtype, 2))
    pack(base, trained, tmp_path / "vector", threads=2)
    unpack(base, tmp_path / "vector", tmp_path / "back", threads=2)
    assert bits(tmp_path / "back") == bits(trained)


def test_exact_restores_a_trained_checkpoint_of_another_dtype_in_several_files(
    tmp_path, write_checkpoint
):
    tensors = random_tensors(0)
    base = write_checkpoint("base", tensors, files=3)
    wide = nearby({name: t.float() for name, t in tensors.items()}, 1)
    trained = write_checkpoint("trained", wide, {"dtype": "float32"}, files=2)
    pack(base, trained, tmp_path / "vector", max_shard_size=6000, metadata={"dataset": "ja"})
    assert len(list((tmp_path / "vector").glob("*.safetensors"))) > 1
    unpack(base, tmp_path / "vector", tmp_path / "back", max_shard_size=5000)
    assert bits(tmp_path / "back") == bits(trained)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float32"
    with Checkpoint.open(base) as opened, Checkpoint.open(tmp_path / "vector") as vector:
        assert vector.metadata["dataset"] == "ja"
        assert vector.metadata["vector_format"] == "1"
        assert vector.base_fingerprint == opened.fingerprint


def pool(write_checkpoint, scale=0.002, dtype=torch.bfloat16, rows=300):
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.layers.0.mlp.weight": torch.randn(rows, 401, generator=generator) * 0.02,
        "model.layers.0.norm.weight": 1 + torch.randn(401, generator=generator) * 0.02,
    }
    base = {name: t.to(dtype) for name, t in base.items()}
    trained = nearby(base, 5, scale)
    return write_checkpoint("base", base), write_checkpoint("trained", trained), base, trained


def read(folder, base, start=0, stop=None):
    """name -> elements start..stop as fp32 deltas, read as the engine reads them."""
    found = {}
    with Checkpoint.open(folder) as checkpoint, Checkpoint.open(base) as against:
        packed = vectors.open(checkpoint)
        packed.check_base(against)
        for name, operand in packed.tensors.items():
            flat = against.view(name).reshape(-1)
            end = flat.size if stop is None else min(stop, flat.size)
            part = np.ascontiguousarray(flat[start:end])
            buffer = np.full((end - start) * 8 + 8, 0x77, np.uint8)
            tile = operand.read(start, end, buffer, part).copy()
            values = as_float(tile)
            found[name] = values if operand.is_delta else values - as_float(part)
    return found


def as_float(tile):
    return (tile.astype(np.uint32) << 16).view(np.float32) if tile.dtype == np.uint16 else tile


@pytest.mark.parametrize(
    ("mode", "limit"),
    [("exact", 0), ("float32", 0), ("bf16", 2**-8), ("int8", 0.006), ("int4", 0.12)],
)
def test_each_mode_keeps_the_delta_within_its_error(tmp_path, write_checkpoint, mode, limit):
    base, trained, before, after = pool(write_checkpoint)
    report = pack(base, trained, tmp_path / "vector", mode=mode)
    got = read(tmp_path / "vector", base)
    for name, tensor in after.items():
        delta = (tensor.float() - before[name].float()).reshape(-1).numpy()
        error = np.linalg.norm(got[name] - delta) / np.linalg.norm(delta)
        assert error <= limit, (name, error)
        ranged = read(tmp_path / "vector", base, 77, 1031)[name]
        assert np.array_equal(ranged, got[name][77:1031])
    size = sum(t.numel() * 2 for t in before.values())
    most = {"exact": 0.6, "float32": 2.0, "bf16": 1.0, "int8": 0.53, "int4": 0.28}[mode]
    assert report.bytes_written <= most * size + 1000


def test_a_low_rank_is_found_and_a_tolerance_kept(tmp_path, write_checkpoint):
    generator = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(200, 150, generator=generator)}
    thin = [torch.randn(shape, generator=generator) for shape in ((200, 6), (6, 150))]
    delta = thin[0] @ thin[1] * 0.01
    frozen = {"f.weight": torch.ones(64, 64)}
    folders = [
        write_checkpoint("base", base | frozen),
        write_checkpoint("trained", {"w.weight": base["w.weight"] + delta} | frozen),
    ]
    pack(*folders, tmp_path / "ranked", mode="lowrank", rank=8)
    pack(*folders, tmp_path / "close", mode="lowrank", tolerance=0.01)
    for name, limit in (("ranked", 0.01), ("close", 0.01)):
        got = read(tmp_path / name, folders[0])["w.weight"]
        error = np.linalg.norm(got - delta.reshape(-1).numpy()) / torch.linalg.norm(delta)
        assert error <= limit, (name, error)
    with Checkpoint.open(tmp_path / "close") as checkpoint:
        assert checkpoint.tensors["w.weight::a"].shape[0] <= 8
        assert "w.weight::stream" not in checkpoint.tensors
        assert vectors.open(checkpoint).tensors["f.weight"].read_bytes_per_elem == 0
    noise = {"w.weight": base["w.weight"] + torch.randn(200, 150, generator=generator) * 0.01}
    full = write_checkpoint("full", noise | frozen)
    pack(folders[0], full, tmp_path / "hopeless", mode="lowrank", tolerance=0.1)
    with Checkpoint.open(tmp_path / "hopeless") as checkpoint:
        assert "w.weight::stream" in checkpoint.tensors


def test_an_adapter_keeps_its_own_factors(tmp_path, write_checkpoint):
    base = write_checkpoint("base", {"q.weight": torch.randn(40, 33), "f.weight": torch.ones(5)})
    a, b = torch.randn(3, 33), torch.randn(40, 3)
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = "base_model.model.q"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pack(base, folder, tmp_path / "vector", mode="lowrank")
    got = read(tmp_path / "vector", base)
    np.testing.assert_allclose(got["q.weight"].reshape(40, 33), 2 * (b @ a).numpy(), rtol=1e-5)
    assert not got["f.weight"].any()
    with Checkpoint.open(tmp_path / "vector") as checkpoint:
        stored = checkpoint.view("q.weight::a")
        assert np.array_equal(stored, a.numpy())


def test_a_vector_can_be_packed_again_in_another_mode(tmp_path, write_checkpoint):
    base, trained, *_ = pool(write_checkpoint)
    pack(base, trained, tmp_path / "exact")
    pack(base, tmp_path / "exact", tmp_path / "again", mode="int8")
    pack(base, trained, tmp_path / "direct", mode="int8")
    once, twice = (read(tmp_path / name, base) for name in ("direct", "again"))
    assert all(np.array_equal(once[name], twice[name]) for name in once)
    with pytest.raises(RecipeError, match="keeps no trained bits"):
        pack(base, tmp_path / "again", tmp_path / "no", mode="exact")
    assert not (tmp_path / "no").exists()


def test_the_library_reads_every_part_and_threads_do_not_change_a_byte(tmp_path, write_checkpoint):
    base, trained, *_ = pool(write_checkpoint, rows=2000)
    for threads in (1, 4):
        pack(base, trained, tmp_path / f"v{threads}", mode="exact", threads=threads)
        pack(base, trained, tmp_path / f"q{threads}", mode="int4", threads=threads)
    for kind in "vq":
        one, four = ((tmp_path / f"{kind}{n}/vector.safetensors").read_bytes() for n in (1, 4))
        assert one == four
        with safe_open(tmp_path / f"{kind}1/vector.safetensors", "pt") as file:
            assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118


def test_threads_may_read_one_vector_at_once(tmp_path, write_checkpoint):
    base, trained, _, after = pool(write_checkpoint, rows=1000)
    pack(base, trained, tmp_path / "vector")
    name = "model.layers.0.mlp.weight"
    want = after[name].reshape(-1).view(torch.int16).numpy().view(np.uint16)
    wrong = []
    with Checkpoint.open(tmp_path / "vector") as checkpoint, Checkpoint.open(base) as against:
        operand = vectors.open(checkpoint).tensors[name]
        flat = against.view(name).reshape(-1)

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(50):
                start, stop = sorted(rng.integers(0, flat.size + 1, 2))
                buffer = np.zeros((stop - start) * 2, np.uint8)
                got = operand.read(start, stop, buffer, np.ascontiguousarray(flat[start:stop]))
                if not np.array_equal(got, want[start:stop]):
                    wrong.append((start, stop))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_cannot_be_packed_leaves_nothing_behind(tmp_path, write_checkpoint):
    base, trained, before, after = pool(write_checkpoint)
    out = tmp_path / "out"
    bad = {name: t.clone() for name, t in after.items()}
    bad["model.layers.0.mlp.weight"][3, 3] = float("nan")
    damaged = write_checkpoint("damaged", bad)
    with pytest.raises(NonFiniteError, match=r"mlp.weight.*first at element 1206"):
        pack(base, damaged, out, mode="int8")
    other = write_checkpoint("other", {"w": torch.ones(3)})
    with pytest.raises(MismatchError, match=r"lacks model\.layers"):
        pack(base, other, out)
    ints = write_checkpoint("ints", before | {"ids": torch.arange(3)})
    moved = write_checkpoint("moved", after | {"ids": torch.arange(3) + 1})
    with pytest.raises(MismatchError, match="ids is I64 and differs"):
        pack(ints, moved, out)
    for settings in (
        {"mode": "int7"},
        {"rank": 3},
        {"mode": "lowrank"},
        {"mode": "lowrank", "tolerance": 1e-4},
    ):
        with pytest.raises(RecipeError):
            pack(base, trained, out, **settings)
    with pytest.raises(RecipeError, match="lies in or around"):
        pack(base, trained, base / "vector")
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    pack(base, trained, out, mode="int8")
    with pytest.raises(RecipeError, match="not an empty folder"):
        pack(base, trained, out)
    with pytest.raises(RecipeError, match="does not keep every bit"):
        unpack(base, out, tmp_path / "back")
    stranger = write_checkpoint("stranger", nearby(before, 9))
    with pytest.raises(MismatchError, match="was taken from"):
        unpack(stranger, out, tmp_path / "back")


def edit_header(path, change):
    """Rewrite the header of a file as `change(header)` leaves it; the data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def describe(key, text):
    return lambda h: h["__metadata__"].__setitem__(f"tensor:{key}", text)


def reshape(part, dtype, shape):
    return lambda h: h[part].update(dtype=dtype, shape=shape)


def rename(old, new):
    return lambda h: {new if name == old else name: entry for name, entry in h.items()}


W, Q = "w.weight", "q.weight"
HEADERS = {
    "unknown mode": describe(W, "magic 130x70"),
    "empty description": describe(W, ""),
    "no shape": describe(W, "exact BF16 BF16"),
    "shape of letters": describe(W, "exact BF16 BF16 axb"),
    "negative shape": describe(W, "exact BF16 BF16 -130x-70"),
    "leading zeros": describe(W, "exact BF16 BF16 0130x70"),
    "huge shape": describe(W, "exact BF16 BF16 999999999999999999x9999999999"),
    "more elements": describe(W, "exact BF16 BF16 130000x70"),
    "fewer elements": describe(W, "exact BF16 BF16 1x70"),
    "no elements": describe(W, "exact BF16 BF16 0"),
    "integers": describe(W, "exact I64 BF16 130x70"),
    "unknown dtype": describe(W, "exact BF17 BF16 130x70"),
    "another mode's parts": describe(W, "int8 130x70"),
    "two spaces": describe(W, "exact  BF16 BF16 130x70"),
    "extra word": describe(W, "exact BF16 BF16 130x70 x"),
    "no such tensor": describe("v.weight", "exact BF16 BF16 130x70"),
    "wider trained dtype": describe(W, "exact F8_E4M3 BF16 130x70"),
    "int4 for int8": describe(Q, "int4 130x70"),
    "quantised too large": describe(Q, "int8 1300x70"),
    "low rank of one dimension": describe(Q, "lowrank 1.0 9100"),
    "scale that is no number": describe(Q, "lowrank nan 130x70"),
    "stream of wider words": reshape(f"{W}::stream", "I8", None),
    "index of other words": reshape(f"{W}::index", "I64", None),
    "scales of other words": reshape(f"{Q}::scale", "F16", None),
    "renamed stream": rename(f"{W}::stream", f"{W}::steam"),
    "renamed scales": rename(f"{Q}::scale", "z"),
    "later version": lambda h: h["__metadata__"].__setitem__("vector_format", "2"),
}


@pytest.fixture
def hostile(tmp_path, write_checkpoint):
    """A folder with an exact and an int8 tensor, and its base."""
    base = {W: torch.randn(130, 700).bfloat16(), Q: torch.randn(130, 70).bfloat16()}
    folder = write_checkpoint("base", base)
    trained = write_checkpoint("trained", nearby(base, 1))
    pack(folder, trained, tmp_path / "exact")
    pack(folder, trained, tmp_path / "int8", mode="int8")
    parts = load_file(tmp_path / "exact/vector.safetensors")
    parts = {name: part for name, part in parts.items() if name.startswith(W)}
    parts |= {
        name: part
        for name, part in load_file(tmp_path / "int8/vector.safetensors").items()
        if name.startswith(Q)
    }
    with Checkpoint.open(tmp_path / "exact") as checkpoint:
        metadata = dict(checkpoint.metadata)
    metadata[f"tensor:{Q}"] = "int8 130x70"
    out = tmp_path / "vector"
    out.mkdir()
    save_file(parts, out / "vector.safetensors", metadata)
    read(out, folder)
    return out, folder, parts, metadata


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused_when_opened(hostile, case):
    folder, base, *_ = hostile

    def change(header):
        kept = {n: dict(e) for n, e in header.items()}
        changed = HEADERS[case](kept) or kept
        for name, entry in changed.items():
            if name in header and entry.get("shape", 0) is None:
                entry["shape"] = header[name]["shape"]
        return changed

    edit_header(folder / "vector.safetensors", change)
    with pytest.raises(CheckpointError) as caught:
        read(folder, base)
    assert str(folder) in str(caught.value)


def at(place, value):
    def change(index):
        index[place] = value
        return index

    return change


INDEXES = {
    "not from 0": at(0, 8),
    "negative": at(1, -8),
    "huge": at(1, 2**62),
    "falling": lambda index: index[[0, 2, 1, 3]],
    "not in eights": at(1, 40_001),
    "chunk too small": at(1, 8),
    "end beyond the stream": lambda index: index + np.array([0, 0, 0, 8]),
    "end before the stream's": lambda index: index - np.array([0, 0, 0, 8]),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies_is_refused(hostile, case):
    folder, _, parts, metadata = hostile
    index = parts[f"{W}::index"].view(torch.int64).numpy().copy()
    assert index.size == 4
    parts[f"{W}::index"] = torch.from_numpy(INDEXES[case](index)).view(torch.uint64)
    save_file(parts, folder / "vector.safetensors", metadata)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=r"w\.weight"):
        vectors.open(checkpoint)


def test_an_index_that_is_shifted_is_found_when_it_is_read(hostile):
    folder, base, parts, metadata = hostile
    index = parts[f"{W}::index"].view(torch.int64).numpy() + np.array([0, 8, 8, 0])
    parts[f"{W}::index"] = torch.from_numpy(index).view(torch.uint64)
    save_file(parts, folder / "vector.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"w\.weight: block 31 is damaged"):
        read(folder, base)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6, 7])
def test_a_damaged_block_is_named(hostile, place):
    folder, base, parts, metadata = hostile
    stream = parts[f"{W}::stream"]
    begin = int(parts[f"{W}::index"].view(torch.int64)[1])
    stream[begin + place] = 0xFF
    save_file(parts, folder / "vector.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"w.weight: block 3\d is damaged"):
        read(folder, base)


def test_a_file_cut_while_it_is_open_is_an_error(hostile):
    folder, base, *_ = hostile
    with Checkpoint.open(folder) as checkpoint, Checkpoint.open(base) as against:
        operand = vectors.open(checkpoint).tensors[W]
        with (folder / "vector.safetensors").open("r+b") as file:
            file.truncate(2000)
        flat = np.ascontiguousarray(against.view(W).reshape(-1))
        with pytest.raises(CheckpointError, match="ended at byte"):
            operand.read(0, flat.size, np.zeros(flat.nbytes, np.uint8), flat)


def test_an_exact_tensor_is_not_read_without_its_base(hostile):
    folder, *_ = hostile
    with Checkpoint.open(folder) as checkpoint:
        operand = vectors.open(checkpoint).tensors[W]
        buffer = np.zeros(2000, np.uint8)
        for given in (None, np.zeros(9, np.uint16), np.zeros(20, np.uint16)[::2]):
            with pytest.raises(MismatchError, match="10 elements of BF16"):
                operand.read(0, 10, buffer, given)


def test_random_damage_to_a_whole_file_is_an_error_or_harmless(hostile):
    folder, base, *_ = hostile
    good = (folder / "vector.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad) if rng.random() < 0.5 else 900, 3):
            bad[at] = rng.integers(0, 256)
        (folder / "vector.safetensors").write_bytes(bad)
        try:
            read(folder, base)
        except OptimerError:
            continue
