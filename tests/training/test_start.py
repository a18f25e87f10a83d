"""What a run records of itself when it starts."""

import json
import subprocess
import sys

from megavtp import __version__
from megavtp.launch.doctor.machine import source_hash
from megavtp.parallel.mesh import SINGLE
from megavtp.training import start


def test_the_command_the_layout_the_machine_and_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launchers/pretrain.py", "--local_rank=0", "--config", "a b.yaml", "seed=1"])
    found = start.start_record(SINGLE)
    assert found["command"] == "launchers/pretrain.py --config 'a b.yaml' seed=1"
    layout = {"launcher": "none", "processes": 1, "machines": 1, "tp": 1, "pp": 1, "dp": 1}
    assert found["layout"] == layout
    assert found["machine"]["cores"] > 0 and found["machine"]["memory_gib"] > 0 and found["machine"]["device"]
    versions = found["versions"]
    assert versions["megavtp"] == __version__ and versions["source"] == source_hash() and versions["torch"]
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout_and_marked_if_files_differ(monkeypatch, tmp_path):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(start, "_ROOT", tmp_path)
    start.commit.cache_clear()
    assert start.commit() is None  # no checkout
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "v1")
    start.commit.cache_clear()
    assert start.commit() == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("b")
    start.commit.cache_clear()
    assert start.commit() == git("rev-parse", "HEAD")[:12] + "-dirty"
    start.commit.cache_clear()
