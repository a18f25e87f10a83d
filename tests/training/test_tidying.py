"""A run that goes on renames no checkpoint that another rank still reads."""

from unittest.mock import MagicMock

import pytest
import torch

from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.schema import Config
from megavtp.parallel.mesh import SINGLE
from megavtp.training.trainer import Trainer


@pytest.mark.parametrize("changed", [[], ["data.root"]])
def test_a_checkpoint_is_tidied_only_when_all_ranks_have_read_it(changed, tmp_path, monkeypatch):
    stored = CheckpointStore(tmp_path / "checkpoints", keep_last=5)
    stored.save(4, {"x": torch.zeros(1)}, {})
    stored.wait()
    done: list[str] = []
    monkeypatch.setattr("megavtp.training.state.load", lambda *_: done.append("read") or 4)
    monkeypatch.setattr("megavtp.training.state.changed_keys", lambda *_: changed)
    monkeypatch.setattr("megavtp.training.trainer.all_gather_object", lambda _: done.append("waited for all"))
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.recipe, trainer.telemetry = Config(output_dir=str(tmp_path)), MagicMock(), MagicMock()
    trainer.engine, trainer.passes, trainer.data_digest = MagicMock(), [], None
    trainer.engine.mesh = SINGLE
    trainer.store = MagicMock(tidy=lambda _: done.append("tidied"))
    assert trainer.resume() == 4
    assert done == ["read", "waited for all", "tidied"]
