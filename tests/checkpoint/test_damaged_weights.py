"""Weights of others that were damaged at random: a refusal in one line, or exactly the tensors that the bytes say."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from latent_folder import artifact, random_shard
from safetensors.torch import load_file, save, save_file
from test_format_init_from import DATA as INIT_DATA
from test_format_init_from import config_for
from torch import Tensor
from vtp_oracle import TINY

from megavtp.checkpoint.formats.hf_vtp import EXPORTED, load_folder, official_name, save_folder
from megavtp.checkpoint.formats.initial import read_initial
from megavtp.data.decode import BadSample
from megavtp.dit.config import DiTModelConfig
from megavtp.dit.lightningdit import read_lightningdit
from megavtp.dit.model.build import build_dit
from megavtp.dit.model.positions import POSITIONS
from megavtp.errors import UserError
from megavtp.latents.folder import LatentFolder
from megavtp.models.build import build_vtp
from megavtp.models.vtp import OBJECTIVES

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "BOOL": 1, "F8_E5M2": 1, "C64": 8}
NO_DTYPES = ("F4", "X", "", None, 3)
NUMBERS = (0, 1, 2, 3, 7, 64, -1, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 64, 1.5, None, "1", True, [1])


def split(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited_header(content: bytes, draw: random.Random) -> bytes:
    """One to three changes of names, dtypes, shapes and offsets; a few of them make another whole file."""
    header, data = split(content)
    names = sorted(header.keys() - {"__metadata__"})
    chosen = draw.sample(names, min(len(names), 2 * draw.choice((1, 1, 2, 3))))
    for name, other in zip(chosen[::2], chosen[1::2]):
        entry, number = header[name], draw.choice(NUMBERS)
        header[name] = draw.choice((
            {**entry, "dtype": draw.choice((*DTYPES, *NO_DTYPES))}, {**entry, "shape": entry["shape"][::-1]},
            {**entry, "shape": [*entry["shape"], number]}, {**entry, "shape": [number, *entry["shape"][1:]]},
            {**entry, "data_offsets": [entry["data_offsets"][0], number]}, {**entry, "data_offsets": [number]},
            {**entry, "shape": [1 << 40, 0], "data_offsets": [0, 0]}, {**entry, "shape": number}, {"shape": []}, number,
        ))
        if draw.random() < 0.2:
            header[name], header[other] = header[other], header[name]
        if draw.random() < 0.1:
            header[draw.choice((f"{name}.x", "", "trunk.blocks.9.x", "blocks.999.y"))] = header.pop(name)
    return joined(header, data)


def retyped(content: bytes, draw: random.Random) -> bytes:
    """A whole file in which one tensor is of another dtype or shape, or two have changed places."""
    header, data = split(content)
    metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
    blocks = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    name, other = draw.sample(sorted(header), 2)
    kind, shape = draw.randrange(3), header[name]["shape"]
    if kind == 0:
        dtype = draw.choice(sorted(DTYPES))
        length = DTYPES[dtype] * (len(blocks[name]) // DTYPES[header[name]["dtype"]])
        header[name]["dtype"], blocks[name] = dtype, (2 * blocks[name])[:length]
    elif kind == 1:
        header[name]["shape"] = draw.choice(([*shape, 1], shape[::-1], [1, *shape]))
    elif header[name]["shape"] == header[other]["shape"]:
        blocks[name], blocks[other] = blocks[other], blocks[name]
    at = 0
    for each, entry in header.items():
        entry["data_offsets"] = [at, at := at + len(blocks[each])]
    return joined(metadata | header, b"".join(blocks[each] for each in header))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """``content`` with some bits flipped, cut, longer, with junk in it, or with another header."""
    has_header = content[8:9] == b"{"
    head = 8 + struct.unpack("<Q", content[:8])[0] if has_header else 4096
    kind = draw.randrange(10 if has_header else 6)
    if kind < 3:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(head if draw.random() < 0.7 else len(content))
            changed[place] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 3:
        return content[: draw.choice((draw.randrange(20), draw.randrange(len(content)), len(content) - 1))]
    if kind == 4:
        return content + draw.randbytes(draw.choice((1, 8, 100)))
    if kind == 5:
        at = draw.randrange(head)
        return content[:at] + draw.randbytes(8) + content[at + draw.choice((0, 8)) :]
    return (edited_header if kind < 8 else retyped)(content, draw)


class Released:
    """The released VTP folder."""

    def __init__(self, folder: Path):
        config = replace(
            TINY, bottleneck=8, vision=replace(TINY.vision, width=32, depth=1, heads=2),
            text=replace(TINY.text, width=32, depth=1, heads=2, vocab_size=64, context_length=8),
            decoder=replace(TINY.decoder, width=32, depth=1, heads=2),
        )
        save_folder(folder, config, build_vtp(config, objectives=frozenset(EXPORTED)).state_dict())
        self.file = folder / "model.safetensors"
        self.content = self.file.read_bytes()

    def check(self) -> None:
        config, tensors = load_folder(self.file.parent)
        raw = load_file(self.file)
        assert raw.keys() == {official_name(name, config) for name in tensors}
        for name, tensor in tensors.items():
            theirs = raw[official_name(name, config)]
            theirs = theirs.t() if name == "text.projection.weight" else theirs
            assert_same(tensor, theirs.reshape(1) if name == "logit_scale" else theirs)


class LightningDiT:
    """Its checkpoint, ``.pt``, or the averaged weights alone as safetensors."""

    def __init__(self, folder: Path, suffix: str):
        config = DiTModelConfig(width=16, depth=1, heads=2, latent_size=4, latent_channels=4, num_classes=5)
        self.file, state = folder / f"0000007.{suffix}", build_dit(config).state_dict()
        if suffix == "pt":
            torch.save({"model": {f"module.{name}": t.clone() for name, t in state.items()}, "ema": state}, self.file)
        else:
            save_file(state, self.file)
        self.content = self.file.read_bytes()

    def check(self) -> None:
        found = read_lightningdit(self.file)
        is_safetensors = self.file.suffix == ".safetensors"
        raw = load_file(self.file) if is_safetensors else torch.load(self.file, "cpu", weights_only=True, mmap=True)
        raw = raw if raw.keys() & {"model", "ema"} else {"ema": raw}
        for part, own in (("model", found.weights), ("ema", found.average)):
            theirs = raw.get(part, raw[min(raw.keys() & {"model", "ema"})])
            theirs = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
            assert theirs.keys() == own.keys() | set(POSITIONS)
            for name, tensor in own.items():
                assert_same(tensor, theirs[name])


class Initial:
    """Where a run starts; names and layouts differ from the file's, so only forms are compared."""

    def __init__(self, folder: Path, name: str):
        self.file, self.name = folder / f"{name}.safetensors", name
        self.content = (INIT_DATA / f"{name}.safetensors").read_bytes()
        self.expected = read_initial(str(INIT_DATA / f"{name}.safetensors"), config_for(name), OBJECTIVES)[0]

    def check(self) -> None:
        tensors = read_initial(str(self.file), config_for(self.name), OBJECTIVES)[0]
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (torch.float32, self.expected[name].shape)


class Latents:
    """One shard of a folder."""

    def __init__(self, folder: Path):
        artifact(4).write(folder)
        self.file = folder / "latents_rank00_shard000.safetensors"
        self.content = save(random_shard(9, (4, 4, 4), 0, captions=6))

    def check(self) -> None:
        folder, raw = LatentFolder(self.file.parent), load_file(self.file)
        for row in range(folder.shard_counts[0]):
            try:
                sample = folder.read(0, row, flip=False)
            except BadSample:
                assert not all(raw[name][row].isfinite().all() for name in raw.keys() & {"latents", "captions"})
            else:
                assert_same(sample.latents, raw["latents"][row])
                assert sample.label == raw["labels"][row]


def assert_same(own: Tensor, theirs: Tensor) -> None:
    """To the bit, also where a number is none."""
    theirs = theirs.to(own.dtype)
    assert own.shape == theirs.shape
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (own, theirs)))


@pytest.mark.parametrize("source, rounds", [
    (Released, 250), (partial(LightningDiT, suffix="safetensors"), 200), (partial(LightningDiT, suffix="pt"), 150),
    (partial(Initial, name="openclip"), 120), (partial(Initial, name="dinov3_plus"), 80), (Latents, 200),
], ids=["released", "lightningdit", "lightningdit_pt", "openclip", "timm", "latents"])
def test_damaged_at_random(source, rounds, tmp_path):
    source, outcomes = source(tmp_path), Counter()
    for seed in range(rounds):
        source.file.write_bytes(damaged(source.content, random.Random(seed)))
        try:
            source.check()
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"damage number {seed} of {source.file.name}") from error
    assert min(outcomes["read"], outcomes["refused"]) > rounds / 20, outcomes  # both do occur
