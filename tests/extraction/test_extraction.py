"""Latents of a data set: what is in the files, the same bytes by any way, what is refused."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from folder_holder import held
from picture_shards import GROUPS, write_shards
from safetensors import safe_open
from safetensors.torch import load_file
from vtp_oracle import DATA

import megavtp
from megavtp.data import folder_lock
from megavtp.data.augment import center_crop
from megavtp.data.decode import decode_image
from megavtp.data.folder_lock import LOCK_FILE
from megavtp.data.shards import open_dataset
from megavtp.errors import UserError
from megavtp.extraction.job import Extraction, ExtractionSettings, shard_size
from megavtp.latents.artifact import LatentStatistics, TokenizerArtifact
from megavtp.latents.folder import LatentFolder
from megavtp.parallel.mesh import build_mesh

TOKENIZER = DATA / "default"
TOOL = Path(__file__).parents[2] / "tools" / "extract_latents.py"
SETTINGS = ExtractionSettings(label="group")
BAD = 140


def extract(data, out, settings=SETTINGS, tokenizer=None, **options):
    tokenizer = tokenizer or megavtp.load_tokenizer(TOKENIZER)
    return Extraction(tokenizer, data, out, settings, **options).run()


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 pictures, one of which cannot be read; extracted into three shards of at most 128."""
    return write_shards(tmp_path_factory.mktemp("data") / "train", [170, 130], bad=(BAD,))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "latents"
    artifact, left_out = extract(data, folder)
    assert left_out == 1 and artifact == TokenizerArtifact.read(folder)
    return folder


def test_every_image_is_there_with_its_mirror_image_and_label(data, whole):
    tokenizer, source = megavtp.load_tokenizer(TOKENIZER), open_dataset(data)
    shards = [load_file(path) for path in sorted(whole.glob("*.safetensors"))]
    assert [len(shard["labels"]) for shard in shards] == [128, 127, 44]
    latents, flips, labels = (torch.cat([s[name] for s in shards]) for name in ("latents", "latents_flip", "labels"))
    kept = [i for i in range(300) if i != BAD]
    names = sorted(GROUPS)
    assert labels.dtype == torch.int64 and labels.tolist() == [names.index(GROUPS[i % 3]) for i in kept]
    for row in (0, 139, 140, 298):
        number = kept[row]
        raw = source.read(*divmod(number, 170))
        image = center_crop(decode_image(raw.image), 64)[None]
        assert torch.allclose(latents[row], tokenizer.encode(image)[0], atol=2e-2)  # RoPE rounds to bfloat16
        assert torch.allclose(flips[row], tokenizer.encode(image.flip(3))[0], atol=2e-2)
        assert (flips[row] - latents[row].flip(2)).abs().max() > 0.05
    flat = latents.double().transpose(0, 1).flatten(1)
    statistics = TokenizerArtifact.read(whole).statistics
    assert np.allclose(statistics.mean, flat.mean(1), rtol=1e-12)
    assert np.allclose(statistics.std, flat.std(1), rtol=1e-12)
    assert statistics.images == 299


def test_the_format_is_lightningdits(whole):
    assert [file.name for file in sorted(whole.iterdir())] == [
        "classes.json", "extraction.json", *(f"latents_rank00_shard{i:03d}.safetensors" for i in range(3)),
        "latents_stats.pt", "visual_tokenizer.json",
    ]
    with safe_open(whole / "latents_rank00_shard001.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"latents", "latents_flip", "labels"}
        assert {name: file.get_tensor(name).dtype for name in file.keys()} == {
            "latents": torch.float32, "latents_flip": torch.float32, "labels": torch.int64
        }
        about = file.metadata()
        assert (about["total_size"], about["dtype"], about["device"]) == ("127", "torch.float32", "cpu")
        assert about["tokenizer"] == megavtp.load_tokenizer(TOKENIZER).artifact.fingerprint
    stored = torch.load(whole / "latents_stats.pt", weights_only=True)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: ((1, 16, 1, 1), torch.float32) for name in ("mean", "std")
    }
    folder = LatentFolder(whole)
    assert folder.shard_counts == [128, 127, 44] and folder.shape == (16, 4, 4) and folder.has_flips
    assert folder.classes == sorted(GROUPS) and folder.num_classes == 3 and folder.caption_width is None
    assert LatentStatistics.read(whole / "latents_stats.pt").mean == pytest.approx(folder.statistics.mean, rel=1e-6)
    own = megavtp.load_tokenizer(TOKENIZER, latents=whole)
    assert own.statistics == folder.statistics


def _extract_rank(rank, data, out):
    torch.set_num_threads(1 + rank)  # as processes on a machine may have
    return extract(data, out, mesh=build_mesh(1, 1))


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_bytes_from_any_number_of_processes(data, whole, tmp_path, world):
    results = run_ranks(world, _extract_rank, str(data), str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)
    assert all(result == (TokenizerArtifact.read(whole), 1) for result in results)


def test_decoding_processes_change_nothing(data, whole, tmp_path):
    extract(data, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(whole)


def _killed(data, out, shards):
    torch.set_num_threads(1)
    seen = []

    def kill(shard):
        seen.append(shard)
        if len(seen) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    extract(data, out, on_shard=kill)


@pytest.mark.parametrize("shards", [1, 3])
def test_killed_and_started_again(data, whole, tmp_path, shards):
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(target=_killed, args=(data, out, shards))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match="visual_tokenizer.json is missing"):
        LatentFolder(out)
    left = set(contents(out))
    assert {"extraction.json", "latents_rank00_shard000.safetensors"} <= left < {*contents(whole), LOCK_FILE}
    # what a kill in the midst of writing leaves, and what a failing disk does
    (out / "latents_rank00_shard001.safetensors.partial").write_bytes(b"half")
    made_before = (out / "latents_rank00_shard000.safetensors").stat().st_mtime_ns
    if shards == 3:
        last = out / "latents_rank00_shard002.safetensors"
        last.write_bytes(last.read_bytes()[:-100])
        (out / "latents_rank00_shard001.safetensors").unlink()
    written = []
    extract(data, out, on_shard=written.append)
    assert contents(out) == contents(whole) and 0 not in written
    assert (out / "latents_rank00_shard000.safetensors").stat().st_mtime_ns == made_before


def test_only_one_extraction_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
    data, out = write_shards(tmp_path / "train", [6]), tmp_path / "out"
    out.mkdir()
    with held(out) as pid:
        with pytest.raises(UserError, match=f"out is in use by another run .*pid {pid}.*choose another --out"):
            extract(data, out)
    assert [path.name for path in out.iterdir()] == [LOCK_FILE]  # its process was killed
    extract(data, out)
    assert (out / "visual_tokenizer.json").exists() and not (out / LOCK_FILE).exists()


def test_a_finished_folder_is_left_alone(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    written = []
    artifact, left_out = extract(data, tmp_path / "out", on_shard=written.append)
    assert (written, left_out) == ([], 0) and contents(tmp_path / "out") == contents(whole)
    assert artifact == TokenizerArtifact.read(whole)


class Words:
    """A caption tokenizer of the stored model's sizes."""

    vocab_size = 512

    def encode(self, captions):
        rows = torch.zeros(len(captions), 16, dtype=torch.long)
        for row, caption in zip(rows, captions):
            text = torch.tensor([1 + ord(c) for c in caption[:14]])
            row[: len(text)], row[len(text)] = text, 511
        return rows


def test_captions_and_no_mirror_images(data, tmp_path, monkeypatch):
    tokenizer = megavtp.load_tokenizer(TOKENIZER)
    monkeypatch.setitem(vars(tokenizer), "captions", Words())
    extract(data, tmp_path / "out", ExtractionSettings(captions=True, flip=False, batch_size=100), tokenizer)
    folder = LatentFolder(tmp_path / "out")
    assert not folder.has_flips and folder.classes is None and folder.num_classes == 1
    assert folder.shard_counts == [199, 100]
    expected = tokenizer.encode_text(["caption 0", "caption 299"])
    for place, feature in (((0, 0), expected[0]), ((1, 99), expected[1])):
        assert torch.allclose(folder.read(*place, False).caption, feature, atol=1e-4)


def test_numbers_are_labels(data, tmp_path):
    extract(data, tmp_path / "out", ExtractionSettings(label="number", flip=False))
    labels = load_file(tmp_path / "out" / "latents_rank00_shard000.safetensors")["labels"]
    assert labels[:6].tolist() == [0, 7, 14, 0, 7, 14] and not (tmp_path / "out" / "classes.json").exists()
    assert LatentFolder(tmp_path / "out").num_classes == 15


def test_statistics_that_the_tokenizer_carries_are_kept(data, tmp_path):
    tokenizer = megavtp.load_tokenizer(TOKENIZER)
    carried = LatentStatistics((0.25,) * 16, (2.0,) * 16)
    tokenizer.artifact = replace(tokenizer.artifact, statistics=carried)
    artifact, _ = extract(data, tmp_path / "out", replace(SETTINGS, flip=False), tokenizer)
    assert artifact.statistics == carried == LatentFolder(tmp_path / "out").statistics


def test_a_shard_whose_images_are_all_bad(tmp_path):
    data = write_shards(tmp_path / "train", [150], bad=tuple(range(128, 150)))
    artifact, left_out = extract(data, tmp_path / "out", replace(SETTINGS, flip=False))
    assert left_out == 22 and LatentFolder(tmp_path / "out").shard_counts == [128]
    written = []
    extract(data, tmp_path / "out", replace(SETTINGS, flip=False), on_shard=written.append)
    assert written == []
    with pytest.raises(UserError, match="21 samples cannot be read, last: shard-000000/00148: cannot decode"):
        extract(data, tmp_path / "other", max_bad=20)
    data = write_shards(tmp_path / "all_bad", [3], bad=(0, 1, 2))
    with pytest.raises(UserError, match="not one image of the data set can be read"):
        extract(data, tmp_path / "nothing")


def test_labels_that_are_refused(tmp_path):
    mixed = write_shards(
        tmp_path / "mixed", [4], meta=lambda i: {
            "class": "a" if i % 2 else 3, "some": "x" if i else "", "far": 10 ** (18 * i), "part": i / 2
        }
    )
    for label, text in (
        ("class", "some of its values are names, some numbers"),
        ("some", r"--label some: 1 of 4 samples .*first: shard-000000/00000: ''\); keys of theirs: class, some"),
        ("none", r"--label none: 4 of 4 samples .*keys of theirs: class, some"),
        ("far", r"--label far: 3 of 4 .* number from 0 to 99999 \(first: shard-000000/00001: 1000000000000000000\)"),
        ("part", r"--label part: 4 of 4 .*first: shard-000000/00000: 0.0\)"),
    ):
        with pytest.raises(UserError, match=text):
            extract(mixed, tmp_path / "out", ExtractionSettings(label=label))


def test_mixes_are_refused(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = megavtp.load_tokenizer(TOKENIZER)
    other.artifact = replace(other.artifact, fingerprint="0" * 64)
    with_others = megavtp.load_tokenizer(TOKENIZER)
    with_others.artifact = replace(with_others.artifact, statistics=LatentStatistics((0.0,) * 16, (1.0,) * 16))
    elsewhere = write_shards(tmp_path / "train", [130])
    for tokenizer, source, settings, text in (
        (other, data, SETTINGS, "was begun with another tokenizer; "),
        (with_others, data, SETTINGS, "different latent statistics"),
        (None, elsewhere, SETTINGS, "was begun with another data; "),
        (None, data, replace(SETTINGS, flip=False, label=None), "was begun with another flip and label; "),
    ):
        with pytest.raises(UserError, match=text):
            extract(source, tmp_path / "out", settings, tokenizer)
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="was not made by an extraction"):  # before the labels of all data are read
        extract(data, tmp_path / "full", ExtractionSettings(label="none"))
    (out := tmp_path / "damaged").mkdir()
    (out / "extraction.json").write_text("{")
    with pytest.raises(UserError, match="is damaged or of another kind .not JSON"):
        extract(data, out)


def test_latents_that_are_not_finite(data, tmp_path, monkeypatch):
    tokenizer = megavtp.load_tokenizer(TOKENIZER)
    monkeypatch.setattr(tokenizer, "encode", lambda images: torch.full((len(images), 16, 4, 4), float("nan")))
    with pytest.raises(UserError, match="not finite of the samples 0 to 127; use --precision fp32"):
        extract(data, tmp_path / "out", tokenizer=tokenizer)


def test_size_of_shards():
    assert [shard_size(n, 32) for n in (1, 10_000, 1_281_167, 10**9)] == [128, 128, 2528, 4096]
    assert shard_size(1000, 50) == 150 and shard_size(1000, 1000) == 1000


def tool(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_path(str(TOOL), run_name="__main__")
    return end.value.code, capsys.readouterr()


def test_the_tool(data, whole, tmp_path, monkeypatch, capsys):
    given = ["--tokenizer", TOKENIZER, "--data", data.parent, "--out", tmp_path / "out", "--device", "cpu"]
    status, said = tool(monkeypatch, capsys, *given, "--label", "group")
    assert status == 0 and "300 samples in 3 shards; left out now: 1" in said.out
    assert contents(tmp_path / "out") == contents(whole)
    assert json.loads((tmp_path / "out" / "extraction.json").read_text())["label"] == "group"
    assert "note: " not in said.out
    status, said = tool(monkeypatch, capsys, *given, "--split", "test")
    assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_the_tool_takes_a_folder_of_shards_itself(tmp_path, monkeypatch, capsys):
    """And tells that without a key of classes there are none."""
    data = write_shards(tmp_path / "shards", [3])
    given = ["--tokenizer", TOKENIZER, "--data", data, "--out", tmp_path / "out", "--device", "cpu"]
    status, said = tool(monkeypatch, capsys, *given)
    assert status == 0 and "3 samples in 1 shards" in said.out
    assert "note: without --label all images are of class 0" in said.out
    status, said = tool(monkeypatch, capsys, *given, "--split", "test")
    assert status == 2 and f"{data} has no test split, only train" in said.err
