import errno
import json
import math
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
from tar_builder import encode, picture, sample, smooth, write_tar

from megavtp.data.captions import load_tokenizer
from megavtp.data.decode import decode_image
from megavtp.data.maintain import check_dataset, index_dataset
from megavtp.data.shards import open_dataset
from megavtp.data.sources.images import _load, folder_entries, prepare_images
from megavtp.data.sources.tables import Entry, read_table
from megavtp.data.workers import ordered_map
from megavtp.data.write import staged_folder
from megavtp.errors import UserError


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for label in ("red_apple", "banana"):
        (root / label).mkdir(parents=True)
        for i in range(6):
            (root / label / f"{i}.jpg").write_bytes(encode(smooth(), "JPEG", quality=80 + i))
    (root / "banana" / "0.txt").write_text(" three\nripe bananas ")
    return root


def read_all(folder):
    data = open_dataset(folder)
    return [data.read(shard, row) for shard, count in enumerate(data.shard_counts) for row in range(count)]


def prepare(source, out, **options):
    return prepare_images(source, out, **({"workers": 1, "quiet": True, "vocab_size": 512} | options))


def test_class_folders_end_to_end(photos, tmp_path):
    info = prepare(photos, tmp_path / "out", test_fraction=0.25, shard_size=4)
    assert info["counts"] == {"train": 9, "test": 3} and info["labels"] == {"label": ["banana", "red apple"]}
    train, test = read_all(tmp_path / "out" / "train"), read_all(tmp_path / "out" / "test")
    assert open_dataset(tmp_path / "out" / "train").shard_counts == (4, 4, 1)
    originals = {path.read_bytes() for path in photos.rglob("*.jpg")}
    assert {s.image for s in train + test} <= originals
    assert {s.caption for s in train + test} == {"red apple", "banana", "three ripe bananas"}
    assert len({s.key for s in train + test}) == 12
    labels = [s.meta["label"] for s in train]
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True)
    tokenizer = load_tokenizer("auto", tmp_path / "out", 12)
    assert tokenizer.vocab_size == info["caption_vocab_size"]
    prepare(photos, tmp_path / "same", test_fraction=0.25, shard_size=4)
    prepare(photos, tmp_path / "other", test_fraction=0.25, shard_size=4, seed=1)
    tars = [(tmp_path / name / "train" / "shard-000000.tar").read_bytes() for name in ("out", "same", "other")]
    assert tars[0] == tars[1] != tars[2]


def test_other_libraries_read_our_shards(photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    prepare(photos, tmp_path / "out", test_fraction=0)
    url = str(tmp_path / "out" / "train" / "shard-000000.tar")
    got = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt", "json"))
    ours = read_all(tmp_path / "out" / "train")
    assert [(text, meta) for _, text, meta in got] == [(s.caption, s.meta) for s in ours]
    assert got[0][0].shape == (48, 64, 3) and not (tmp_path / "out" / "test").exists()


def test_worker_processes_keep_the_order():
    assert list(ordered_map(math.sqrt, range(100), 2, "roots", True)) == [math.sqrt(i) for i in range(100)]
    job = partial(_load, size=0, max_pixels=100)
    assert pickle.loads(pickle.dumps(job))((0, Entry(Path("none.png"), "x"))).reason == "file not readable"


def test_bad_files_are_skipped_named_and_bounded(photos, tmp_path):
    (photos / "banana" / "cut.jpg").write_bytes(encode(smooth(), "JPEG")[:500])
    (photos / "banana" / "text.png").write_bytes(b"words")
    (photos / "loose.png").write_bytes(encode(picture()))
    (photos / "banana" / "large.png").write_bytes(encode(picture(200, 200)))
    info = prepare(photos, tmp_path / "out", test_fraction=0, max_pixels=10_000)
    assert info["counts"]["train"] == 12 and info["skipped"] == 4
    assert "loose.png" in info["skips"][1] and "cut.jpg" in info["skips"][0]
    with pytest.raises(UserError, match="more than 3 bad samples.*--max-bad"):
        prepare(photos, tmp_path / "strict", max_pixels=10_000, max_bad=3)
    assert not list(tmp_path.glob("strict*"))


def test_sizes_and_formats(tmp_path):
    root = tmp_path / "src" / "thing"
    root.mkdir(parents=True)
    small, large = picture(20, 30, 1), picture(120, 60, 2)
    (root / "small.png").write_bytes(encode(small))
    (root / "large.webp").write_bytes(encode(large, "WEBP"))
    (root / "large.jpeg").write_bytes(encode(large, "JPEG"))
    (root / "anim.gif").write_bytes(encode(small, "GIF"))
    prepare(root.parent, tmp_path / "out", size=40, test_fraction=0)
    got = {s.meta["source"]: s.image for s in read_all(tmp_path / "out" / "train")}
    assert got["small.png"] == (root / "small.png").read_bytes()  # never enlarged
    assert {name: tuple(decode_image(data).shape[1:]) for name, data in got.items()} == {
        "small.png": (30, 20), "large.webp": (40, 80), "large.jpeg": (40, 80), "anim.gif": (30, 20),
    }
    assert got["large.jpeg"][:2] == b"\xff\xd8" and got["anim.gif"][1:4] == b"PNG"


def test_tables(photos, tmp_path):
    image = photos / "banana" / "1.jpg"
    tables = {
        "a.csv": f'image,caption,label\nphotos/banana/0.jpg,"one, two",fruit\n{image},three,fruit\n',
        "b.tsv": f"filepath\ttitle\nphotos/banana/0.jpg\tone, two\n{image}\tthree\n",
        "c.csv": f"filepath\ttitle\nphotos/banana/0.jpg\tone, two\n{image}\tthree\n",
        "d.jsonl": f'{{"path": "photos/banana/0.jpg", "text": "one, two"}}\n\n{{"path": "{image}", "text": "three"}}\n',
    }
    for name, content in tables.items():
        (tmp_path / name).write_text(content)
        rows = list(read_table(tmp_path / name))
        assert [row.caption for row in rows] == ["one, two", "three"], name
        assert rows[0].path.read_bytes() and rows[1].path == image
    (tmp_path / "e.csv").write_text(tables["a.csv"] + "photos/none.jpg,missing,\nphotos/banana/2.jpg,,\n")
    info = prepare(tmp_path / "e.csv", tmp_path / "out", test_fraction=0)
    assert info["counts"]["train"] == 2 and info["skipped"] == 2 and info["labels"] == {"label": ["fruit"]}


def test_tables_that_make_no_sense(tmp_path):
    wrong = {
        "a.csv": ("picture,caption\nx,y\n", "no column of image"),
        "b.csv": ("image,words\nx,y\n", "no column of caption"),
        "c.jsonl": ("{}x\n", "line 1"), "d.jsonl": ("[1]\n", "line 1"), "e.txt": ("x", "neither a folder"),
        "f.csv": ("image,caption\npipe:curl x,y\n", "not a local path"),
        "g.csv": ("image,caption\nhttp://example.org/x.png,y\n", "not a local path"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / name, tmp_path / "out")
    (tmp_path / "h.csv").write_bytes(b"image,caption\n\xff\xfe,x\n")
    with pytest.raises(UserError, match="UTF-8"):
        prepare(tmp_path / "h.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_usable(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match="no usable image with a caption; the source is empty"):
        prepare(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "a.png").write_bytes(encode(picture()))
    with pytest.raises(UserError, match="no usable image with a caption; 1 x no caption"):
        prepare(tmp_path / "src", tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        prepare(tmp_path / "none", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_one_image_is_trained_on(tmp_path):
    (tmp_path / "src" / "cat").mkdir(parents=True)
    (tmp_path / "src" / "cat" / "a.png").write_bytes(encode(picture()))
    assert prepare(tmp_path / "src", tmp_path / "out", test_fraction=0.9)["counts"] == {"train": 1, "test": 0}
    assert len(list(folder_entries(tmp_path / "src"))) == 1


def test_an_existing_folder_is_safe(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    before = (tmp_path / "out" / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        prepare(photos, tmp_path / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("today")
    with pytest.raises(UserError, match="not replaced"):
        prepare(photos, tmp_path / "notes", overwrite=True)
    for inside in (tmp_path / "out", tmp_path / "out" / "train"):
        with pytest.raises(UserError, match="lies in --out"):
            prepare(inside, tmp_path / "out", overwrite=True)
    own, left = tmp_path / "mine.partial" / "diary.txt", tmp_path / "other.partial" / "train"
    own.parent.mkdir()
    own.write_text("today")
    with pytest.raises(UserError, match="mine.partial is in the way"):
        prepare(photos, tmp_path / "mine")
    assert own.read_text() == "today"
    shutil.rmtree(own.parent)
    left.mkdir(parents=True)
    prepare(photos, tmp_path / "other")
    assert not left.exists()
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "half").write_text("made")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "dataset.json").read_bytes() == before and not list(tmp_path.glob("*.partial"))
    with pytest.raises(UserError, match="No space left.*make room"), staged_folder(tmp_path / "new", False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    prepare(photos, tmp_path / "out", overwrite=True, seed=3)
    assert (tmp_path / "out" / "dataset.json").read_bytes() != before


def test_index_and_check(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "x.tar", [m for i in range(count) for m in sample(f"k{i}", f"thing {i}")])
    write_tar(tmp_path / "train" / "y.tar", sample("bad", image=b"\x89PNG broken"))
    assert index_dataset(tmp_path, vocab_size=512, quiet=True).kept == 5
    assert load_tokenizer("auto", tmp_path, 8).vocab_size <= 512
    report = check_dataset(tmp_path, workers=1, quiet=True)
    assert (report.kept, report.skipped) == (4, 1) and "train/y/bad (cannot decode" in report.lines()[0]
    assert json.loads((tmp_path / "train" / "index.json").read_bytes())["total"] == 4
    shutil.rmtree(tmp_path / "test")
    assert index_dataset(tmp_path / "train", quiet=True).kept == 4
    with pytest.raises(UserError, match="not a folder"):
        check_dataset(tmp_path / "none")
