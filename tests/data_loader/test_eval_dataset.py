import logging

import pytest
import torch
from loader_fakes import LengthTokenizer, MemoryDataset

from megavtp.data.augment import center_crop
from megavtp.data.decode import decode_image
from megavtp.data.loader import EvalDataset


def make(dataset=None, max_samples=1000):
    return EvalDataset(MemoryDataset() if dataset is None else dataset, LengthTokenizer(), 16, max_samples, 10_000)


def flat(batches):
    return [(int(i), c) for batch in batches for i, c in zip(batch["index"], batch["caption"], strict=True)]


def test_every_sample_once_in_order():
    batches = list(make().batches(7))
    assert [len(batch["caption"]) for batch in batches] == [7, 7, 7, 7, 7, 5]
    rows = flat(batches)
    assert [i for i, _ in rows] == list(range(40))
    assert rows[0][1] == "sample 0 of shard 0" and rows[39][1] == "sample 5 of shard 2"
    assert batches[0]["image"].shape == (7, 3, 16, 16) and batches[0]["image"].dtype == torch.uint8
    assert batches[0]["tokens"].shape == (7, 8) and batches[3]["meta"][0] == {"shard": 1}


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_readers_share_the_samples(world):
    whole = flat(make(max_samples=9).batches(4))
    parts = [row for rank in range(world) for row in flat(make(max_samples=9).batches(4, rank, world))]
    assert sorted(parts) == whole and len(whole) == 9


def test_a_part_is_spread_over_the_whole_set():
    data = make(max_samples=8)
    assert len(data) == 8
    assert [caption for _, caption in flat(data.batches(3))] == [
        "sample 0 of shard 0", "sample 5 of shard 0", "sample 10 of shard 0", "sample 4 of shard 1",
        "sample 9 of shard 1", "sample 14 of shard 1", "sample 19 of shard 1", "sample 1 of shard 2",
    ]  # fmt: skip


def test_images_are_cropped_to_the_centre():
    source = decode_image(MemoryDataset().read(0, 1).image, 10_000)
    assert torch.equal(next(make().batches(2))["image"][1], center_crop(source, 16))


def test_broken_samples_are_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING, logger="megavtp.data.loader"):
        rows = flat(make(MemoryDataset(broken={(0, 1)}, unreadable={(0, 3)})).batches(4))
    assert [i for i, _ in rows] == [0, 2, *range(4, 40)]
    assert len(caplog.messages) == 2 and "shard-000000/1" in caplog.messages[0]


def test_empty():
    assert list(make(MemoryDataset(())).batches(4)) == []
    assert list(make(max_samples=0).batches(4)) == []
