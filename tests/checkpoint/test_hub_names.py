"""A model's name on a hub, where a path is wanted, is told apart from a path that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import ROOT

import megavtp
from megavtp.data.files import refuse_hub_id
from megavtp.errors import UserError
from megavtp.evaluation.tokenizer.checkpoint import open_model

NAME = "MiniMaxAI/VTP-Large-f16d64"
SAYS = f"{NAME} is no folder here.*nothing is downloaded, fetch its folder yourself"


@pytest.mark.parametrize("read", [megavtp.load_tokenizer, lambda name: open_model(name, torch.device("cpu"))])
def test_readers(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=SAYS):
        read(NAME)


def test_the_conversion(tmp_path):
    command = [sys.executable, ROOT / "tools/convert_checkpoint.py", "--from", NAME, "--to", "native", "--out", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nothing is downloaded" in done.stderr and "Traceback" not in done.stderr


def test_which_paths_are_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (f"hf-hub:{NAME}", f"https://huggingface.co/{NAME}"):
        with pytest.raises(UserError, match="nothing is downloaded"):
            refuse_hub_id(name)
    (tmp_path / "runs").mkdir()
    for path in ("vtp-hf", "runs/vtp", "runs/vtp/checkpoints/latest", "/weights/vtp", "./weights/vtp"):
        assert refuse_hub_id(path) == Path(path)  # whatever reads it says what is missing
