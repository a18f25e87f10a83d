import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from tar_builder import encode, picture, sample, write_tar

from megavtp.cli import run
from megavtp.data.captions import load_tokenizer
from megavtp.data.maintain import index_dataset
from megavtp.data.shards import split_folder
from megavtp.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the tool in this process (a new one takes seconds to import torch): status, stdout, stderr."""
    def run_tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run_tool


def fail(error):
    raise error


@pytest.mark.parametrize("main, status", [
    (lambda: None, 0), (lambda: 1, 1), (lambda: fail(UserError("name the thing")), 2),
    (lambda: fail(KeyboardInterrupt()), 130),
])
def test_run_ends_with_a_status(main, status, capsys):
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status
    assert capsys.readouterr().err == {0: "", 1: "", 2: "error: name the thing\n", 130: "interrupted\n"}[status]


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


def test_images_check_and_errors(tmp_path, call):
    (tmp_path / "src" / "blue_car").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "src" / "blue_car" / f"{i}.png").write_bytes(encode(picture(seed=i)))
    made = ("images", "--from", tmp_path / "src", "--out", tmp_path / "out", "--test-fraction", 0, "--workers", 1)
    status, out, err = call(*made)
    assert (status, err) == (0, "") and "train 3, test 0 samples; skipped 0" in out
    assert call(*made) == (
        2, "", f"error: {tmp_path / 'out'} exists; choose another --out, or replace it with --overwrite\n"
    )
    assert call("check", tmp_path / "out", "--workers", 1)[0] == 0
    shard = tmp_path / "out" / "train" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 20] = bytes(20)
    shard.write_bytes(data)
    status, out, _ = call("check", tmp_path / "out", "--workers", 1)
    assert status == 1 and out.startswith("2 good samples, 1 problems\n  1 x bad sample: train/shard-0")
    status, out, err = call("index", tmp_path / "out", "--vocab-size", 300)
    assert (status, out) == (2, "") and "captions.model exists" in err and "--overwrite" in err
    status, out, _ = call("index", tmp_path / "out", "--vocab-size", 300, "--overwrite")
    assert (status, out) == (0, "3 good samples, 0 problems\n")


def test_a_folder_of_shards_is_a_data_set_to_all(tmp_path, call):
    """Indexed, checked and trained on under one name, and nothing beside it is touched."""
    flat = tmp_path / "flat"
    flat.mkdir()
    write_tar(flat / "a.tar", [m for i in range(3) for m in sample(f"k{i}", f"thing {i}")])
    (tmp_path / "captions.model").write_bytes(b"of another data set")
    assert call("index", flat, "--vocab-size", 300)[:2] == (0, "3 good samples, 0 problems\n")
    assert (tmp_path / "captions.model").read_bytes() == b"of another data set"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.model", "flat"]
    assert call("check", flat, "--workers", 1)[:2] == (0, "3 good samples, 0 problems\n")
    assert split_folder(flat, "train") == flat and load_tokenizer("auto", flat, 8).vocab_size <= 300
    with pytest.raises(UserError, match="has no test split, only train"):
        split_folder(flat, "test")
    (flat / "train").mkdir()
    shutil.move(flat / "a.tar", flat / "train" / "a.tar")
    write_tar(flat / "stray.tar", sample("stray"))
    assert call("index", flat)[:2] == (0, "3 good samples, 0 problems\n")  # as training, which reads train/
    assert split_folder(flat, "train") == flat / "train"


def test_a_name_that_nothing_can_encode_is_refused(tmp_path, call):
    source = tmp_path / os.fsdecode(b"pictures-\xff")
    (source / "cat").mkdir(parents=True)
    status, out, err = call("images", "--from", source, "--out", tmp_path / "out", "--workers", 1)
    assert (status, out) == (2, "") and "holds bytes that are no UTF-8 text" in err and err.count("\n") == 1
    assert str(UserError(f"{source} is odd")) == f"{tmp_path}/pictures-? is odd"


def test_any_name_can_be_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda: print("half \ud83d"))
    assert ended.value.code == 0 and capsys.readouterr().out == "half \\ud83d\n"


def test_an_index_gives_up_on_too_many_bad_samples(tmp_path, call):
    for name in "ab":  # two shards of one good and one bad sample
        write_tar(tmp_path / f"{name}.tar", [*sample(name), (f"{name}-2.txt", b"a caption without an image")])
    assert call("index", tmp_path, "--max-bad", 2)[:2] == (0, "2 good samples, 2 problems\n  2 x no image: "
                                                           "a.tar: a-2, b.tar: b-2\n")
    (tmp_path / "index.json").unlink()
    status, _, err = call("index", tmp_path, "--max-bad", 1)
    assert status == 2 and err.startswith("error: more than 1 bad samples (allow more with --max-bad): 2 x no image")
    assert not (tmp_path / "index.json").exists()


def test_the_bar_of_an_index_counts_shards(tmp_path, monkeypatch, capsys):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", sample(name))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    index_dataset(tmp_path)
    assert "3/3" in capsys.readouterr().err
