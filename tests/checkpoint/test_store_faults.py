"""The checkpoint store under faults: kills at every step of a write, damaged files, full disks, missing writers."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from megavtp.checkpoint import reading, tensor_file
from megavtp.checkpoint import store as store_module
from megavtp.checkpoint.store import CheckpointStore, find_latest, open_checkpoint
from megavtp.errors import UserError


def state(step: int, rows: int = 64) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((rows, 8), float(step)), "exp_avg/w": torch.full((rows, 8), -step).bfloat16()}


def save(root, step, **options):
    store = CheckpointStore(root, **{"keep_last": 2, **options})
    store.save(step, state(step), {"step": step})
    store.wait()


def in_child(function) -> int:
    """Run ``function`` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def good_step(root) -> int:
    """The step of the newest good checkpoint, whose content must be that step's."""
    with open_checkpoint(find_latest(root)) as checkpoint:
        for name, tensor in state(checkpoint.step).items():
            assert torch.equal(checkpoint.tensor(name)[:64], tensor)
        return checkpoint.step


SYSTEM_CALLS = ("mkdir", "open", "fsync", "replace", "rename", "unlink", "symlink", "listdir", "rmdir")


def die_at(count: int) -> None:
    """Kill this process like ``kill -9`` just before its ``count``-th call to the file system."""
    left = [count]

    def killing(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        setattr(os, name, killing(getattr(os, name)))


@pytest.mark.parametrize("step", [30, 20])  # a new step; a step that exists and has to be replaced
def test_a_kill_at_any_point_of_a_save_leaves_a_good_checkpoint(tmp_path, step):
    killed = 0
    for count in range(1, 200):
        root = tmp_path / str(count)
        for earlier in (10, 20):
            save(root, earlier)
        status = in_child(lambda: (die_at(count), save(root, step)))  # noqa: B023
        assert good_step(root) in (20, step)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        newest = f"step-{good_step(root):08d}"
        CheckpointStore(root, 2).tidy(find_latest(root))  # the next run tidies up
        left = {p.name for p in root.iterdir()}
        assert os.readlink(root / "latest") == newest and newest in left and len(left) <= 3, left
        assert not [name for name in left if "." in name], left
        save(root, 40)  # and goes on
        assert good_step(root) == 40
        left = {p.name for p in root.iterdir()}
        assert "step-00000040" in left and not [name for name in left if "." in name], left
        shutil.rmtree(root)
    assert killed >= 12 and good_step(root) == step


def test_a_kill_at_a_random_moment_leaves_a_good_checkpoint(tmp_path):
    save(tmp_path, 1)

    def endless():
        store = CheckpointStore(tmp_path, 2)
        for step in range(good_step(tmp_path) + 1, 10_000):
            store.save(step, state(step, rows=20_000), {})

    rng = random.Random(0)
    last, kills, longest = 1, 0, 0.15
    while kills < 8 or last == 1:
        pid = os.fork()
        if pid == 0:
            endless()
            os._exit(0)
        time.sleep(rng.uniform(0.02, longest))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert good_step(tmp_path) >= last
        last = good_step(tmp_path)
        kills += 1
        longest *= 2 if last == 1 else 1  # a slow machine saves nothing in that time


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


DAMAGES = {
    "bit in the data": (lambda p: flip_bit(p / "tensors-00000.safetensors", -3), "SHA-256 differs"),
    "bit in the header": (lambda p: flip_bit(p / "tensors-00000.safetensors", 20), "SHA-256 differs"),
    "truncated": (lambda p: truncate(p / "tensors-00000.safetensors"), "bytes instead of"),
    "part missing": (lambda p: (p / "tensors-00000.safetensors").unlink(), "missing"),
    "index missing": (lambda p: (p / "checkpoint.json").unlink(), "not a complete checkpoint"),
    "index truncated": (lambda p: truncate(p / "checkpoint.json"), "not JSON"),
    "index changed": (
        lambda p: (p / "checkpoint.json").write_text(
            (p / "checkpoint.json").read_text().replace('"meta": {"step": 20}', '"meta": {"step": 21}')),
        "does not match its digest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_resume_falls_back(tmp_path, caplog, damage):
    for step in (10, 20):
        save(tmp_path, step)
    harm, message = DAMAGES[damage]
    harm(tmp_path / "step-00000020")
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / "step-00000020")
    assert "step-00000020" in str(caught.value) and "\n" not in str(caught.value)
    assert good_step(tmp_path) == 10
    assert message in caplog.text
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.step == 10
    save(tmp_path, 20)  # the run that went back reaches the step again
    assert good_step(tmp_path) == 20


def test_sizes_only_reads_no_hashes(tmp_path):
    save(tmp_path, 10)
    flip_bit(tmp_path / "step-00000010" / "tensors-00000.safetensors", -3)
    open_checkpoint(tmp_path / "latest", verify="sizes").close()
    truncate(tmp_path / "step-00000010" / "tensors-00000.safetensors")
    with pytest.raises(UserError, match="bytes instead of"):
        open_checkpoint(tmp_path / "latest", verify="sizes")


def rewrite_index(root, **changes):
    path = root / "step-00000010" / "checkpoint.json"
    index = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**index, "digest": reading.digest_of(index)}))


def test_foreign_folders_are_refused(tmp_path):
    assert find_latest(tmp_path / "nothing") is None and find_latest(tmp_path) is None
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "latest")
    save(tmp_path, 10)
    with pytest.raises(UserError, match="name one of the checkpoints in it, such as .*step-00000010"):
        open_checkpoint(tmp_path)
    rewrite_index(tmp_path, version=2)
    with pytest.raises(UserError, match="format version 2, this MegaVTP reads 1"):
        open_checkpoint(tmp_path / "latest")
    rewrite_index(tmp_path, version=1, format="other")
    with pytest.raises(UserError, match="format: Input should be 'megavtp-checkpoint'"):
        open_checkpoint(tmp_path / "latest")


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "secret").write_bytes(b"x")
    rewrite_index(tmp_path, files={"../secret": {"size": 1, "sha256": "?"}})
    with pytest.raises(UserError, match="unexpected file"):
        open_checkpoint(tmp_path / "latest")
    rewrite_index(tmp_path, files={}, tensors={"a": {"file": "../secret", "shape": [1], "dtype": "float32"}})
    with pytest.raises(UserError, match="unexpected file '../secret'"):
        open_checkpoint(tmp_path / "latest")


@pytest.mark.parametrize("place", ["tensors", "index"])
def test_a_full_disk_surfaces_and_frees_its_space(tmp_path, monkeypatch, place):
    save(tmp_path, 10)
    store = CheckpointStore(tmp_path, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    store.save(20, state(20), {})
    with pytest.raises(UserError, match="step-00000020.partial.*No space left on device.*free disk space"):
        store.wait()
    assert not list(tmp_path.glob("*.partial-*/tensors*"))
    store.wait()  # told once
    monkeypatch.undo()
    assert good_step(tmp_path) == 10
    store.save(20, state(20), {})
    store.wait()
    assert good_step(tmp_path) == 20 and not list(tmp_path.glob("*.partial-*"))


def test_the_next_save_raises_the_error_of_the_one_before(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file", 2)
    store.save(1, state(1), {})
    with pytest.raises(UserError, match="could not be written"):
        store.save(2, state(2), {})


def test_a_missing_writer_is_named(tmp_path):
    store = CheckpointStore(tmp_path, 2, run_token="run", part_timeout=0.1)
    store.save(1, state(1), {}, 0, 3)
    with pytest.raises(UserError, match=r"no part from writer\(s\) 1, 2 within 0.1 s"):
        store.wait()
    assert find_latest(tmp_path) is None


def test_another_writers_error_ends_the_waiting(tmp_path, monkeypatch):
    stores = [CheckpointStore(tmp_path, 2, run_token="run", part_timeout=60) for _ in range(2)]
    original = store_module.write_tensors

    def broken(path, tensors):
        if path.name == "tensors-00001.safetensors":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return original(path, tensors)

    monkeypatch.setattr(store_module, "write_tensors", broken)
    stores[1].save(1, {"b": torch.ones(1)}, None, 1, 2)
    stores[0].save(1, {"a": torch.ones(1)}, {}, 0, 2)
    for store in stores:
        with pytest.raises(UserError, match="Disk quota exceeded"):
            store.wait()


def test_parts_of_a_crashed_attempt_are_not_mixed_in(tmp_path):
    dead = CheckpointStore(tmp_path, 2, run_token="dead", part_timeout=20)
    dead.save(1, {"b": torch.zeros(1)}, None, 1, 2)
    dead.wait()
    stores = [CheckpointStore(tmp_path, 2, run_token="new", part_timeout=20) for _ in range(2)]
    stores[0].save(1, {"a": torch.ones(1)}, {}, 0, 2)
    time.sleep(0.1)
    assert find_latest(tmp_path) is None  # the dead run's part does not complete it
    stores[1].save(1, {"b": torch.ones(1)}, None, 1, 2)
    for store in stores:
        store.wait()
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.tensor("b").item() == 1
    assert not list(tmp_path.glob("*.partial-*"))


def test_unfinished_saves_are_logged_when_they_are_newer(tmp_path, caplog):
    save(tmp_path, 10)
    (tmp_path / "step-00000020.partial-x-1").mkdir()
    (tmp_path / "step-00000005.partial-x-1").mkdir()
    assert good_step(tmp_path) == 10
    assert "step-00000020.partial-x-1: its writing was interrupted" in caplog.text
    assert "step-00000005" not in caplog.text


def test_writers_in_two_processes_and_one_of_them_killed(tmp_path):
    def writer(rank):
        store = CheckpointStore(tmp_path, 2, run_token="run", part_timeout=2)
        store.save(10, {f"w{rank}": torch.full((4,), 10.0)}, {} if rank == 0 else None, rank, 2)
        store.wait()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        store.save(20, {f"w{rank}": torch.full((4,), 20.0)}, {} if rank == 0 else None, rank, 2)
        try:
            store.wait()
        except UserError:
            os._exit(3)

    pid = os.fork()
    if pid == 0:
        writer(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(in_child(lambda: writer(0))) == 3  # named, not waited for for ever
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with open_checkpoint(find_latest(tmp_path)) as checkpoint:
        assert checkpoint.step == 10 and checkpoint.names == ["w0", "w1"]
