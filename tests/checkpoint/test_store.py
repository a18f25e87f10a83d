"""The checkpoint store: what is written is what is read, whole and by all writers."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from megavtp.checkpoint import store as store_module
from megavtp.checkpoint.formats.vtp_source import open_vtp
from megavtp.checkpoint.reading import is_checkpoint
from megavtp.checkpoint.store import CheckpointStore, find_latest, open_checkpoint
from megavtp.checkpoint.tensor_file import DTYPE_NAMES, write_tensors
from megavtp.conversion import detect
from megavtp.errors import UserError


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model/trunk.blocks.0.attn.qkv.weight": torch.randn(12, 4, generator=g),
        "model/logit_scale": torch.randn((), generator=g),
        "exp_avg/x": torch.randn(5, generator=g).bfloat16(),
        "teacher.y": torch.randn(3, 3, generator=g).half(),
        "steps": torch.randint(0, 1 << 40, (7,), generator=g),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
    }


def save(root, step, tensors=None, keep_last=3, meta=None, **options):
    store = CheckpointStore(root, keep_last, **options)
    store.save(step, some_tensors(step) if tensors is None else tensors, {"note": step} if meta is None else meta)
    store.wait()


def test_latest_is_the_newest_that_verifies_wherever_the_link_leads(tmp_path, caplog):
    for step in (10, 20, 30):
        save(tmp_path, step)
    latest = tmp_path / "latest"
    for leads_to in ("step-00000020", "step-00000010", None):
        latest.unlink()
        if leads_to:
            latest.symlink_to(leads_to)
        with open_checkpoint(latest) as checkpoint:
            assert checkpoint.step == 30 and checkpoint.path == tmp_path / "step-00000030"
        assert is_checkpoint(latest) and detect(latest) == "native"
        with pytest.raises(UserError, match="step-00000030 is no tokenizer's checkpoint"):
            open_vtp(latest)
    (tmp_path / "step-00000030" / "tensors-00000.safetensors").unlink()
    assert not caplog.records
    with open_checkpoint(latest) as checkpoint:
        assert checkpoint.step == 20 and "checkpoint skipped: " in caplog.text and "step-00000030" in caplog.text
    assert not is_checkpoint(tmp_path / "other") and not is_checkpoint(tmp_path / "none" / "latest")


def test_round_trip_is_bit_equal(tmp_path):
    meta = {"config": {"lr": 1e-3, "sizes": [1, 2]}, "text": "ä\n", "none": None, "tiny": 5e-324}
    tensors = some_tensors()
    save(tmp_path, 100, tensors, meta=meta)
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.step == 100 and checkpoint.meta == meta
        assert checkpoint.names == sorted(tensors) and "steps" in checkpoint.names
        for name, tensor in tensors.items():
            read = checkpoint.tensor(name)
            assert read.dtype == tensor.dtype == checkpoint.dtype(name)
            assert checkpoint.shape(name) == tuple(tensor.shape) and torch.equal(read, tensor)
        with pytest.raises(UserError, match="no tensor 'other'"):
            checkpoint.tensor("other")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000100"]
    assert sorted(os.listdir(tmp_path / "latest")) == ["checkpoint.json", "tensors-00000.safetensors"]
    assert os.readlink(tmp_path / "latest") == "step-00000100"


def test_tensor_file_is_what_the_safetensors_library_reads(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    size, _ = write_tensors(tmp_path / "x.safetensors", tensors)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_keep_last_prunes_the_oldest(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        store.save(step, some_tensors(step), {})
    store.wait()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000020", "step-00000030"]
    assert find_latest(tmp_path).name == os.readlink(tmp_path / "latest") == "step-00000030"


def test_a_checkpoint_that_is_being_read_is_not_pruned(tmp_path):
    save(tmp_path, 1)
    with open_checkpoint(tmp_path / "step-00000001", verify="sizes") as checkpoint:
        save(tmp_path, 2, keep_last=1)
        assert torch.equal(checkpoint.tensor("steps"), some_tensors(1)["steps"])
        assert (tmp_path / "step-00000001").is_dir()
    save(tmp_path, 3, keep_last=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]


def test_save_returns_early_and_later_changes_do_not_reach_the_file(tmp_path, monkeypatch):
    go_on = threading.Event()

    def slow(path, tensors):
        assert go_on.wait(20)
        return write_tensors(path, tensors)

    monkeypatch.setattr(store_module, "write_tensors", slow)
    tensors, meta = some_tensors(), {"position": [1]}
    store = CheckpointStore(tmp_path, 3)
    store.save(5, tensors, meta)
    assert find_latest(tmp_path) is None
    for tensor in tensors.values():
        tensor.zero_()
    meta["position"][0] = 2
    go_on.set()
    store.wait()
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.meta == {"position": [1]}
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in some_tensors().items())


def test_copy_false_writes_the_callers_memory(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(store_module, "write_tensors", lambda path, t: seen.update(t) or write_tensors(path, t))
    tensors = {"a": torch.ones(4)}
    store = CheckpointStore(tmp_path, 1)
    store.save(1, tensors, {}, copy=False)
    store.wait()
    assert seen["a"].data_ptr() == tensors["a"].data_ptr()


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    running = []

    def checked(path, tensors):
        running.append(path)
        assert len(running) == 1
        time.sleep(0.05)
        running.pop()
        return write_tensors(path, tensors)

    monkeypatch.setattr(store_module, "write_tensors", checked)
    store = CheckpointStore(tmp_path, 5)
    for step in range(1, 5):
        store.save(step, some_tensors(), {})
    store.wait()
    assert len(list(tmp_path.glob("step-*"))) == 4


def test_writers_share_one_checkpoint(tmp_path):
    tensors = some_tensors()
    names = sorted(tensors)
    stores = [CheckpointStore(tmp_path, 3, run_token="run", part_timeout=20) for _ in range(3)]
    for step in (1, 2):
        for writer in (0, 2, 1):  # the first has to wait for the others; the last writer has nothing to write
            part = {name: tensors[name] for name in names[writer::2]} if writer < 2 else {}
            stores[writer].save(step, part, {} if writer == 0 else None, writer, 3)
    for store in stores:
        store.wait()
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.step == 2 and checkpoint.names == names
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "latest" / "checkpoint.json").read_text())
    assert sorted(index["files"]) == ["tensors-00000.safetensors", "tensors-00001.safetensors"]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, {"a": torch.zeros(2)})
    save(tmp_path, 7, {"a": torch.ones(2)}, keep_last=1)
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.tensor("a").tolist() == [1, 1]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]


def test_going_back_sets_the_later_checkpoints_aside(tmp_path, caplog):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert "kept aside" in caplog.text
    assert find_latest(tmp_path).name == "step-00000015"
    assert len(list(tmp_path.glob("step-00000020.superseded-*/checkpoint.json"))) == 1
