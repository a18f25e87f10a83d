"""Captions, names, labels and tables that strangers wrote: what cannot be used is skipped, counted and named."""

import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from tar_builder import encode, picture, sample, smooth, write_tar

from megavtp.config.run import TrainConfig
from megavtp.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectivesConfig,
    ReconstructionConfig,
    SelfDistillationConfig,
)
from megavtp.data.batch import StepDataset
from megavtp.data.captions import load_tokenizer, train_sentencepiece
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.index import build_index
from megavtp.data.loader import EvalDataset
from megavtp.data.maintain import check_dataset, index_dataset
from megavtp.data.new_sample import Skipped
from megavtp.data.sample_text import MAX_TEXT
from megavtp.data.shards import open_dataset
from megavtp.data.sources.images import prepare_images
from megavtp.data.sources.tables import read_table
from megavtp.errors import UserError

HALF = r'{"caption": "half an emoji \ud83d"}'
NESTED = '{"caption": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"


def prepare(source, out, **options):
    return prepare_images(source, out, **({"workers": 1, "quiet": True, "vocab_size": 512} | options))


def test_half_an_emoji_is_left_out_of_an_index(tmp_path):
    for number, meta in enumerate((HALF, NESTED, r'{"caption": "x", "\udc00": 1}', '{"caption": 1e999}')):
        write_tar(tmp_path / f"{number}.tar", sample("half", None, meta=meta.encode()))
    write_tar(tmp_path / "good.tar", [*sample("good"), *sample("mark", None, meta=b'\xef\xbb\xbf{"caption": "c"}')])
    report = index_dataset(tmp_path, vocab_size=300, quiet=True)
    assert report.kept == 2 and report.lines() == [
        "3 x metadata is no JSON object: 0.tar: half, 1.tar: half, 2.tar: half", "1 x no caption: 3.tar: half"
    ]


@pytest.fixture
def old_index(tmp_path):
    """Half an emoji in the caption of a sample that an index counts as good."""
    whole = HALF.replace(r"\ud83d", r"\u0041").encode()
    metas = [whole if i == 3 else b'{"caption": "c"}' for i in range(8)]
    tar = write_tar(tmp_path / "x.tar", [m for i, meta in enumerate(metas) for m in sample(f"k{i}", None, meta=meta)])
    index_dataset(tmp_path, vocab_size=300, quiet=True)
    tar.write_bytes(tar.read_bytes().replace(whole, HALF.encode()))
    return tmp_path


def test_half_an_emoji_in_an_old_index_is_replaced_and_counted(old_index):
    config = Config(
        model=ModelConfig(image_size=32), data=DataConfig(streams=1, shuffle_block=4),
        objectives=ObjectivesConfig(
            reconstruction=ReconstructionConfig(weight=0.0), self_distillation=SelfDistillationConfig(weight=0.0)
        ),
        train=TrainConfig(batch_size=8),
    )
    data, tokenizer = open_dataset(old_index), load_tokenizer("auto", old_index, 8)
    batch = StepDataset(data, tokenizer, config)[0]
    assert batch.bad == ["x/k3: metadata is no JSON object"] and len(batch.tokens) == 8 and "x/k3" not in batch.ids
    assert sum(len(b["caption"]) for b in EvalDataset(data, tokenizer, 32, 8, 10_000).batches(4)) == 7
    assert check_dataset(old_index, workers=1, quiet=True).lines() == [
        f"1 x bad sample: {old_index.name}/x/k3 (metadata is no JSON object)"
    ]


def test_a_tokenizer_takes_any_text(tmp_path):
    tokenizer = train_sentencepiece(["a cat", "half \ud83d"] * 3, tmp_path / "x.model", 300)
    assert tokenizer.encode(["a cat \udcff"]).shape == (1, 77)


def test_names_and_texts_of_a_folder(tmp_path):
    root = tmp_path / "src"
    for name in (b"cat/a.png", b"cat/\xff.png", b"\xe9t\xe9/b.png", b"cat/long.png", b"cat/edge.png"):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture()))
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "long.txt").write_text("x" * (MAX_TEXT + 1))
    (root / "cat" / "edge.txt").write_text("x" * MAX_TEXT)
    info = prepare(root, tmp_path / "out", test_fraction=0)
    assert info["counts"]["train"] == 2 and info["skipped"] == 3
    assert [line.split(":")[0] for line in info["skips"]] == [
        "2 x caption, label or file name is not valid Unicode", f"1 x caption or metadata of more than {MAX_TEXT} bytes"
    ]
    assert json.loads((tmp_path / "out" / "train" / "index.json").read_text())["total"] == 2


def test_rows_that_make_no_sense_are_skipped(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture()))
    os.mkfifo(tmp_path / "pipe.png")
    rows = [
        '{"image": "a.png", "caption": "good", "label": 3}', r'{"image": "a.png", "caption": "half \ud83d"}',
        r'{"image": "\udcff.png", "caption": "x"}', r'{"image": "a.png", "caption": "x", "label": "\ud83d"}',
        NESTED, "[1]", "{", '{"caption": "x"}', '{"image": "a.png", "caption": 1e999}',
        '{"image": ["a.png"], "caption": "x"}', '{"image": "a.png", "caption": "x", "label": 1.5}',
        r'{"image": "a\u0000.png", "caption": "x"}', '{"image": "pipe.png", "caption": "x"}',
        '{"image": "a.png", "caption": ""}', '{"image": "a.png", "caption": "' + "x" * (MAX_TEXT + 1) + '"}',
        '{"image": "' + "x" * 5000 + '", "caption": "x"}', '{"image": "a.png", "caption": true}',
    ]
    (tmp_path / "t.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"image": "a.png", "caption": "\xff"}')
    info = prepare(tmp_path / "t.jsonl", tmp_path / "out", test_fraction=0)
    assert info["counts"]["train"] == 1 and info["skipped"] == len(rows) and info["labels"] == {"label": ["3"]}
    assert info["skips"][0].startswith("7 x no JSON object: t.jsonl line 2, t.jsonl line 3, t.jsonl line 4")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_long_field_costs_its_row_alone(tmp_path, ending):
    (tmp_path / "a.png").write_bytes(encode(picture()))
    captions = ["first", "y" * 200_000, "x" * (MAX_TEXT + 1), "last"]
    between = {"csv": ",", "tsv": "\t"}[ending]
    rows = [between.join(row) for row in [("image", "caption"), *(("a.png", caption) for caption in captions)]]
    (tmp_path / f"t.{ending}").write_text("\n".join([*rows, between, 'a.png\0' + between + "nul"]) + "\n")
    info = prepare(tmp_path / f"t.{ending}", tmp_path / "out", test_fraction=0)
    assert info["counts"]["train"] == 3 and info["skipped"] == 3
    assert sorted(info["skips"]) == [
        f"1 x field larger than field limit ({MAX_TEXT}): t.{ending} line 4",
        f"1 x file not readable: {tmp_path}/a.png? (no such file)", f"1 x no image: t.{ending} line 6",
    ]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, left out, repeated or put in."""
    data = bytearray(data)
    odd = [b"\0", b"\xff", b'"', b"\n", b"\\ud83d", b"[" * 300, b"1e999", b",", b"\t", b"/../", b"9" * 30]
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + rng.choice((1, 1, 8, 512))] = rng.randbytes(rng.choice((0, 1, 8, 512)))
            case 1:
                data[at:at] = rng.choice(odd)
            case 2:
                data[at : at + 12] = rng.choice(odd)
            case 3:
                data[at:at] = data[at - rng.randrange(600) : at]
    return bytes(data)


def forge(tar: bytes, headers: list[int], rng: random.Random) -> bytes:
    """The tar with one changed header that has the right checksum."""
    at = rng.choice(headers)
    field = rng.choice(((0, 100), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500), (386, 512)))
    header = bytearray(tar[at : at + 512])
    for _ in range(rng.randint(1, 3)):
        header[rng.randrange(*field)] = rng.choice((*b"\0 /.79LKxgS12", 0x80, 0xFF))
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return tar[:at] + header + tar[at + 512 :]


def test_damaged_tars_are_refused_or_skipped(tmp_path):
    """Every sample of an index is read or named as bad; nothing else comes out of 150 damaged tars."""
    rng = random.Random(0)
    members = [
        *sample("a", meta=b'{"label": "x", "n": 1}'), *sample("b", None, meta=b'{"caption": "c"}'), *sample("c" * 200),
        *sample("d", image=encode(smooth(), "JPEG")),
    ]
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    used = whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 1536]
    headers = [at for at in range(0, len(used), 512) if used[at + 257 : at + 262] == b"ustar"]
    kept = refused = 0
    for _ in range(150):
        (tmp_path / "x.tar").write_bytes(mutate(used, rng) if rng.random() < 0.5 else forge(used, headers, rng))
        try:
            build_index(tmp_path)
        except UserError:
            refused += 1
            continue
        data = open_dataset(tmp_path)
        for row in range(len(data)):
            kept += 1
            try:
                read = data.read(0, row)
                (read.caption + read.key + read.id + json.dumps(read.meta, ensure_ascii=False)).encode()
                decode_image(read.image, 1_000_000)
            except BadSample:
                pass
    assert kept > 150 and refused > 0


@pytest.mark.parametrize("ending, lines", [
    ("csv", ["image,caption,label", *[f'a.png,"a cat, no {i}",cat' for i in range(6)]]),
    ("jsonl", [json.dumps({"image": "a.png", "caption": f"a cat, no {i}", "label": i}) for i in range(6)]),
])  # fmt: skip
def test_damaged_tables_are_refused_or_skipped(tmp_path, ending, lines):
    rng = random.Random(ending)
    path = Path(tmp_path / f"t.{ending}")
    good = skipped = refused = 0
    for _ in range(100):
        path.write_bytes(mutate("\n".join(lines).encode(), rng))
        try:
            rows = list(read_table(path))
        except UserError:
            refused += 1
            continue
        skipped += sum(isinstance(row, Skipped) for row in rows)
        good += sum(not isinstance(row, Skipped) for row in rows)
    assert good > 100 and skipped + refused > 20


def test_damaged_tables_are_prepared_or_refused(tmp_path):
    rng = random.Random(0)
    (tmp_path / "a.png").write_bytes(encode(picture()))
    rows = "\n".join(json.dumps({"image": "a.png", "caption": f"a cat, no {i}", "label": f"{i}"}) for i in range(6))
    made = 0
    for number in range(20):
        (tmp_path / "t.jsonl").write_bytes(mutate(rows.encode(), rng))
        try:
            info = prepare(tmp_path / "t.jsonl", tmp_path / f"out{number}", test_fraction=0)
        except UserError:
            continue
        made += 1
        assert len(open_dataset(tmp_path / f"out{number}" / "train")) == info["counts"]["train"]
    assert made > 5
