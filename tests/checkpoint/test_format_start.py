"""Training that starts from a converted checkpoint: as initial weights, and as the checkpoint to go on from."""

import shutil

import pytest
import torch
from launched import events, steps_done, succeed

from megavtp.checkpoint.store import open_checkpoint
from megavtp.conversion import convert

pytestmark = pytest.mark.timeout(600)


def weights(folder):
    with open_checkpoint(folder) as checkpoint:
        return {n: checkpoint.tensor(n).clone() for n in checkpoint.names if n.startswith("model/")}


def close(one, other):
    """But for a step with a learning rate of next to nothing."""
    return torch.allclose(one, other, rtol=1e-6, atol=1e-20)


def test_converted_checkpoints_train_on(recipe, tmp_path):
    start = lambda name, *more: succeed(  # noqa: E731
        ["--config", recipe, f"output_dir={tmp_path / name}", "train.steps=1",
         "model.rope_dtype=bfloat16", *more], 1, tmp_path,
    )
    still = (
        "train.optimizer.lr=1e-30", "train.optimizer.weight_decay=0", "objectives.self_distillation.teacher_momentum=1"
    )
    start("first", "train.optimizer.lr=0.01")
    trained = tmp_path / "first/checkpoints/latest"
    convert(trained, "hf-vtp", tmp_path / "hf")
    convert(trained, "native", tmp_path / "native")

    start("from_hf", f"model.init_from={tmp_path / 'hf'}", *still)
    told = "\n".join(event["note"] for event in events(tmp_path / "from_hf", "initial_weights"))
    assert "trunk" in told and "drawn anew, at least in part: dino_head" in told
    before, after = weights(trained), weights(tmp_path / "from_hf/checkpoints/latest")
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith("model/teacher.trunk."):  # begins as a copy of the student, not as what was there
            assert close(after[name], after[name.replace("teacher.", "")]), name
        elif "dino_head" not in name:
            assert close(after[name], before[name]), name

    (tmp_path / "on/checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "native", tmp_path / "on/checkpoints/step-00000000")
    start("on", *still)
    assert [event["step"] for event in events(tmp_path / "on", "resumed")] == [0]
    assert sorted(steps_done(tmp_path / "on")) == [1]
    after = weights(tmp_path / "on/checkpoints/latest")
    assert all(close(after[name], before[name]) for name in before)
