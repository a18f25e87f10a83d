"""Thousands of damaged and forged checkpoints: each is refused in one line, or is exactly what was saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from json_mutations import damaged, edited, one_line, put
from vtp_oracle import TINY

from megavtp.checkpoint.formats.convert import write_native
from megavtp.checkpoint.formats.vtp_source import build_tokenizer, open_vtp
from megavtp.checkpoint.kind import FACTS
from megavtp.checkpoint.reading import digest_of
from megavtp.checkpoint.store import CheckpointStore, open_checkpoint
from megavtp.config.schema import Config
from megavtp.dit.checkpoint import AVERAGE, load_dit
from megavtp.dit.config import DiTConfig, DiTModelConfig
from megavtp.dit.model.build import build_dit
from megavtp.errors import UserError
from megavtp.latents.artifact import TokenizerArtifact
from megavtp.models.build import build_vtp
from megavtp.training import state

META = {"config": {"seed": 3, "lr": 1e-3}, "optimizer_steps": 10, "version": "1", "note": [None, True, "ä"]}


def saved_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    return {
        "model/w": draw(3, 4), "exp_avg/w": draw(3, 4), "model/half": draw(5).bfloat16(), "model/scalar": draw(),
        "center/dino": draw(6), "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of two writers."""
    tensors = list(saved_tensors().items())
    stores = [CheckpointStore(tmp_path, 1, run_token="run") for _ in range(2)]
    for writer in (1, 0):
        stores[writer].save(10, dict(tensors[writer::2]), META if writer == 0 else None, writer, 2)
    for store in stores:
        store.wait()
    return tmp_path / "step-00000010"


def forged(text: bytes) -> bytes:
    """With the digest that belongs to the content, if it is still JSON with one."""
    try:
        index = json.loads(text)
        return json.dumps({**index, "digest": digest_of(index)}).encode()
    except (ValueError, TypeError, RecursionError):
        return text


def test_mutated_checkpoints(saved):
    draw, tensors = random.Random(1), saved_tensors()
    whole = {path: path.read_bytes() for path in saved.iterdir()}
    index = saved / "checkpoint.json"
    accepted = 0
    for number in range(3000):
        path = draw.choice(list(whole)) if number % 3 == 0 else index
        data = (damaged if number % 3 == 0 else edited)(whole[path], draw)
        has_forged_digest = path == index and number % 3 == 2
        put(path, forged(data) if has_forged_digest else data)
        try:
            with open_checkpoint(saved, "sizes" if number % 2 else True) as checkpoint:
                read = {name: checkpoint.tensor(name) for name in checkpoint.names}
                # With the hashes compared, nothing but the meta data can differ, and that only with a forged digest.
                if number % 2 == 0:
                    assert read.keys() == tensors.keys() and checkpoint.step == 10, number
                    assert has_forged_digest or checkpoint.meta == META, number
                for name, tensor in read.items() if path == index or number % 2 == 0 else ():
                    assert tensor.dtype == tensors[name].dtype == checkpoint.dtype(name), number
                    assert tensor.shape == checkpoint.shape(name) and torch.equal(tensor, tensors[name]), number
                accepted += 1
        except UserError as error:
            assert one_line(error), number
        put(path, whole[path])
    assert 50 < accepted < 1500


def rewrite(folder: Path, change) -> None:
    index = json.loads((folder / "checkpoint.json").read_bytes())
    change(index)
    (folder / "checkpoint.json").write_text(json.dumps({**index, "digest": digest_of(index)}))


@pytest.mark.parametrize("change, message", [
    (lambda i: i["tensors"]["model/w"].update(shape=[4, 3]), "tells something else of its tensor 'model/w'"),
    (lambda i: i["tensors"]["model/w"].update(dtype="bfloat16"), "tells something else of its tensor 'model/w'"),
    (lambda i: i["tensors"]["model/w"].update(dtype="load"), "tensors.model/w.dtype"),
    (lambda i: i["tensors"]["model/w"].update(shape=[-1, -12]), "tensors.model/w.shape.0"),
    (lambda i: i["tensors"].pop("model/w"), "tells something else of its tensor 'model/w'"),
    (lambda i: i["tensors"].update(more=i["tensors"]["model/w"]), "tells something else of its tensor 'more'"),
    (lambda i: i.update(step=11), "is of step 11, the folder's name says another"),
    (lambda i: i.update(step=True), "step: Input should be a valid integer"),
    (lambda i: i.update(meta=[]), "meta: "),
    (lambda i: i["files"]["tensors-00000.safetensors"].update(size=None), "files.tensors-00000.safetensors.size"),
])
def test_a_forged_index(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(saved)
    assert one_line(error.value)


def test_nested_too_deeply(saved):
    (saved / "checkpoint.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="recursion limit"):
        open_checkpoint(saved)


class Engine:
    """What ``state.load`` needs of an engine: the names and shapes of one parameter, and that it reads all of it."""

    mesh = SimpleNamespace(tp=1, tp_rank=0)

    def logical_shapes(self):
        return {"w": (3, 4)}

    def load(self, tensor, steps):
        assert tensor("model/w").shape == tensor("exp_avg/w").shape == (3, 4) and steps >= 0


DISTILLATION = SimpleNamespace(
    state=lambda: {"center/dino": torch.zeros(6)}, state_shard=None, load_state=lambda tensors: None
)


def test_what_training_reads_of_a_forged_checkpoint(saved):
    draw, whole = random.Random(2), json.loads((saved / "checkpoint.json").read_bytes())
    read = 0
    for number in range(300):
        meta = edited(json.dumps(whole["meta"]), draw).decode(errors="replace")
        index = json.dumps({**whole, "meta": "<meta>"}).replace('"<meta>"', meta)
        put(saved / "checkpoint.json", forged(index.encode()))
        try:
            with open_checkpoint(saved, "sizes") as checkpoint:
                assert state.load(checkpoint, Engine(), [DISTILLATION]) == 10
                state.changed_keys(checkpoint, Config(), state.decides_samples)
                read += 1
        except UserError as error:
            assert one_line(error), number
    assert read > 100


@pytest.mark.parametrize("name, tensor", [
    ("exp_avg/w", torch.zeros(4, 4)), ("model/w", torch.zeros(12)), ("center/dino", torch.zeros(7)),
])
def test_moments_and_centers_of_other_shapes_are_named(tmp_path, name, tensor):
    store = CheckpointStore(tmp_path, 1)
    store.save(10, {**saved_tensors(), name: tensor}, META)
    store.wait()
    with open_checkpoint(tmp_path / "latest") as checkpoint, pytest.raises(UserError, match=f"{name} has shape"):
        state.load(checkpoint, Engine(), [DISTILLATION])


def set_in(index: dict, key: str, value) -> None:
    *path, last = f"meta.{key}".split(".")
    for name in path:
        index = index[name]
    index[last] = value


HUGE = [
    ("config.model.vision.depth", 10**9), ("config.model.vision.width", 10**18), ("config.model.image_size", 96_000),
    ("config.model.vision.mlp_ratio", 1e300), ("config.model.text.vocab_size", 10**12),
    ("config.model.vision.depth", 60), ("config.model.text.vocab_size", None), ("config.model.vision.heads", "x"),
    ("config.model.bottleneck", 60_000), ("config.evaluation.batch_size", -1), ("config", None), ("config", [1]),
]


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "vtp"
    model = build_vtp(TINY, objectives={"contrastive", "reconstruction"})
    write_native(folder, 0, {f"model/{n}": p.detach() for n, p in model.named_parameters()}, Config(model=TINY))
    return folder


@pytest.mark.parametrize("key, value", HUGE)
def test_a_tokenizer_of_absurd_sizes_takes_no_memory(native, key, value):
    whole = (native / "checkpoint.json").read_bytes()
    rewrite(native, lambda index: set_in(index, key, value))
    with pytest.raises(UserError) as error:
        open_vtp(native)
    assert one_line(error.value)
    (native / "checkpoint.json").write_bytes(whole)
    assert build_tokenizer(open_vtp(native), "cpu").config.vision.depth == 3


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "dit"
    config = DiTModelConfig(width=16, depth=1, heads=2, latent_size=2, latent_channels=4, num_classes=3)
    facts = {"visual_tokenizer": TokenizerArtifact("f" * 64, 32, 16, 4).to_dict(), "classes": ["cat", "dog", "fish"]}
    tensors = {AVERAGE + name: p.detach() for name, p in build_dit(config).named_parameters()}
    write_native(folder, 0, tensors, DiTConfig(model=config), {FACTS: facts})
    return folder


def test_forged_dits(dit):
    draw, whole = random.Random(3), json.loads((dit / "checkpoint.json").read_bytes())
    meta = json.dumps({"dit": whole["meta"]["dit"], "config": {"model": whole["meta"]["config"]["model"]}})
    loaded = 0
    for number in range(250):
        changed = edited(meta, draw).decode(errors="replace")
        index = json.dumps({**whole, "meta": "<meta>"}).replace('"<meta>"', changed)
        put(dit / "checkpoint.json", forged(index.encode()))
        try:
            loaded += bool(load_dit(dit).class_name(2)) + 1
        except UserError as error:
            assert one_line(error), number
    assert loaded > 20
    for key, value in (("depth", 10**9), ("width", 10**18), ("latent_size", 96_000), ("num_classes", 10**12)):
        put(dit / "checkpoint.json", json.dumps(whole))
        rewrite(dit, lambda index: set_in(index, f"config.model.{key}", value))  # noqa: B023
        with pytest.raises(UserError, match=f"model.{key}"):
            load_dit(dit)
