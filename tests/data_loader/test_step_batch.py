"""A batch is a function of (seed, step): the same on every layout, whatever else is switched on."""

import pytest
import torch
from loader_fakes import LengthTokenizer, MemoryDataset, small_config

from megavtp.data.batch import Batch, StepDataset, masked_rows
from megavtp.errors import UserError

BROKEN = {(1, row) for row in (0, 3, 4, 9, 14)} | {(0, 2)}


def make(config, dataset=None, rank=0, dp=1):
    dataset = MemoryDataset() if dataset is None else dataset
    return StepDataset(dataset, LengthTokenizer(), config, rank, dp)


def join(parts: list[Batch]) -> dict:
    """What one process would have, from the ranks' shares in order."""
    share = len(parts[0].ids)
    return {
        "ids": sum((p.ids for p in parts), []),
        "bad": sum((p.bad for p in parts), []),
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in ("positions", "images", "tokens")},
        **{name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("global_crops", "local_crops", "masks")},
        **{
            name: torch.cat([getattr(p, name) + rank * share for rank, p in enumerate(parts)])
            for name in ("ssl_rows", "rec_rows")
        },
    }


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


def fields_of(batch: Batch) -> dict:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


@pytest.mark.parametrize("broken", [set(), BROKEN])
@pytest.mark.parametrize("dp", [2, 4])
def test_the_ranks_batches_make_up_the_batch_of_one_process(dp, broken):
    config = small_config()
    for step in (0, 7):
        whole = make(config, MemoryDataset(broken=broken))[step]
        parts = [make(config, MemoryDataset(broken=broken), rank, dp)[step] for rank in range(dp)]
        assert_same(join([whole]), join(parts))


def test_shapes_types_and_subsets():
    batch = make(small_config())[3]
    assert batch.step == 3 and len(batch.ids) == 16 and batch.bad == []
    assert batch.images.shape == (16, 3, 32, 32) and batch.tokens.shape == (16, 8)
    assert batch.global_crops.shape == (2, 8, 3, 32, 32) and batch.local_crops.shape == (2, 8, 3, 16, 16)
    for pixels in (batch.images, batch.global_crops, batch.local_crops):
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert batch.ssl_rows.shape == (8,) and batch.rec_rows.shape == (4,) and batch.masks.shape == (2, 8, 16)
    assert batch.masks.dtype == torch.bool and not batch.masks.all(-1).any()
    assert (batch.masks.any(-1)).sum() <= 8  # half of the 16 global crops
    names = [f"sample {int(name.split('/')[1])} of shard {int(name[6:12])}" for name in batch.ids]
    assert torch.equal(batch.tokens, LengthTokenizer().encode(names))


def test_a_step_does_not_depend_on_what_was_asked_before():
    config = small_config()
    walked = make(config)
    batches = [walked[step] for step in range(6)]
    assert_same(fields_of(batches[5]), fields_of(make(config)[5]))
    assert_same(fields_of(batches[2]), fields_of(walked[2]))


def test_steps_and_seeds_differ():
    a, b, c = make(small_config())[0], make(small_config())[1], make(small_config(seed=1))[0]
    assert a.ids != b.ids and a.ids != c.ids
    assert not torch.equal(a.masks, b.masks) and not torch.equal(a.masks, c.masks)


def test_one_epoch_shows_each_sample_once():
    dataset = make(small_config())  # 40 samples in 4 streams: 16 a step, so five steps are two epochs
    names = [name for step in range(5) for name in dataset[step].ids]
    assert {names.count(name) for name in set(names)} == {2} and len(set(names)) == 40


def test_crops_of_a_sample_that_comes_again_are_fresh():
    dataset = make(small_config(batch=40, ssl_batch=4))  # an epoch a step
    first, second = dataset[0], dataset[1]
    again = second.ids.index(first.ids[0])
    assert not torch.equal(first.images[0], second.images[again])


ALL = dict(contrastive=1.0, ssl=1.0, rec=0.1)
SSL_FIELDS = ("ssl_rows", "global_crops", "local_crops", "masks")


@pytest.mark.parametrize("off", ["contrastive", "ssl", "rec"])
def test_switching_an_objective_off_leaves_what_the_others_see(off):
    full, less = make(small_config())[4], make(small_config(**(ALL | {off: 0})))[4]
    gone = {"contrastive": ("tokens",), "ssl": SSL_FIELDS, "rec": ("rec_rows",)}[off]
    for name, value in fields_of(full).items():
        other = getattr(less, name)
        if name in gone:
            assert other is None, name
        elif off == "contrastive" and name in ("images", "ids"):
            continue
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name
    if off == "contrastive":
        assert torch.equal(full.images[full.rec_rows], less.images[less.rec_rows])
        used = set(full.ssl_rows.tolist()) | set(full.rec_rows.tolist())
        assert less.ids == [name if row in used else "" for row, name in enumerate(full.ids)]


def test_only_self_distillation_makes_no_plain_view():
    batch = make(small_config(contrastive=0, rec=0))[0]
    assert batch.images is None and batch.tokens is None and batch.global_crops is not None


def test_only_contrastive_needs_no_divisible_subsets():
    batch = make(small_config(ssl=0, rec=0, ssl_batch=3, rec_batch=5))[0]
    assert all(getattr(batch, name) is None for name in (*SSL_FIELDS, "rec_rows")) and batch.images.shape[0] == 16


def test_no_local_crops():
    config = small_config()
    object.__setattr__(config.data.augment, "local_crops", 0)
    assert make(config)[0].local_crops.shape == (0, 8, 3, 16, 16)


def test_a_broken_sample_is_replaced_and_named():
    clean = make(small_config())[0]
    position = 5
    shard, row = int(clean.ids[position][6:12]), int(clean.ids[position].split("/")[1])
    for kind, reason in [("broken", "cannot decode"), ("unreadable", "short read")]:
        mended = make(small_config(), MemoryDataset(**{kind: {(shard, row)}}))[0]
        assert len(mended.bad) == 1 and reason in mended.bad[0] and str(row) in mended.bad[0]
        assert mended.ids[position] != clean.ids[position]
        assert mended.ids[:position] + mended.ids[position + 1 :] == clean.ids[:position] + clean.ids[position + 1 :]
        others = [i for i in range(16) if i != position]
        assert torch.equal(mended.images[others], clean.images[others])
        assert torch.equal(mended.masks, clean.masks)


def test_a_data_set_of_broken_samples_ends_in_one_line():
    dataset = MemoryDataset(broken={(s, r) for s, n in enumerate((11, 23, 6)) for r in range(n)})
    with pytest.raises(UserError, match="all broken, last: shard-.*prepare_data.py check"):
        make(small_config(), dataset)[0]


def test_an_oversized_image_is_bad():
    assert len(make(small_config(max_pixels=500))[0].bad) > 0


def test_masked_rows_and_weights_equal_the_plain_reference():
    masks = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[0, 1] = False
    rows, weights = masked_rows(masks)
    expected = [
        (i * 9 + j, 1 / int(crop.sum())) for i, crop in enumerate(masks.flatten(0, 1)) for j in range(9) if crop[j]
    ]
    assert rows.tolist() == [r for r, _ in expected]
    torch.testing.assert_close(weights, torch.tensor([w for _, w in expected]))
    assert weights.sum() == pytest.approx(9, abs=1e-5)  # one for each crop that has a mask


def test_no_masks_at_all():
    rows, weights = masked_rows(torch.zeros(2, 3, 4, dtype=torch.bool))
    assert rows.shape == weights.shape == (0,) and rows.dtype == torch.int64


def test_pixels_do_not_depend_on_the_callers_threads():
    dataset, threads = make(small_config()), torch.get_num_threads()
    one = dataset[1]
    try:
        torch.set_num_threads(2)
        two = dataset[1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert_same(fields_of(one), fields_of(two))


@pytest.mark.parametrize(
    "config, dp, words",
    [
        (small_config(batch=18), 1, "train.batch_size=18"),
        (small_config(ssl_batch=6), 1, "ssl batch=6"),
        (small_config(rec_batch=32), 1, "rec batch=32"),
        (small_config(), 3, "data-parallel size 3"),
        (small_config(streams=64, batch=64, ssl_batch=64, rec_batch=64), 1, "data.streams=64"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(config, dp, words):
    with pytest.raises(UserError, match=words):
        make(config, dp=dp)
