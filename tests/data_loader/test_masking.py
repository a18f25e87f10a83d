import numpy as np
import pytest

from megavtp.data.masking import block_mask, mask_counts
from megavtp.data.randomness import generator


@pytest.mark.parametrize("height, width", [(14, 14), (16, 16), (2, 2), (1, 8), (5, 3)])
def test_every_target_is_reached_exactly(height, width):
    for count in range(height * width):
        for seed in range(3):
            mask = block_mask(generator(seed, count), height, width, count)
            assert mask.shape == (height, width) and mask.dtype == bool and mask.sum() == count


def test_masks_come_in_blocks_and_cover_the_grid_evenly():
    masks = np.stack([block_mask(generator(0, i), 14, 14, 60) for i in range(600)])
    same_as_right_neighbour = (masks[:, :, 1:] == masks[:, :, :-1]).mean()
    scattered = (60 / 196) ** 2 + (136 / 196) ** 2  # what independent patches would give
    assert same_as_right_neighbour > scattered + 0.2
    rate = masks.mean(0)
    assert 0.02 < rate.min() and rate.max() < 0.6  # few rectangles reach a corner
    assert np.abs(rate - rate[::-1]).max() < 0.08 and np.abs(rate - rate.T).max() < 0.08  # no side is preferred


@pytest.mark.parametrize("probability, masked", [(0.0, 0), (0.5, 32), (0.3, 19), (1.0, 64)])
def test_the_number_of_masked_crops_is_exact(probability, masked):
    counts = mask_counts(0, 3, 64, 196, probability, (0.1, 0.5))
    assert counts.shape == (64,) and (counts > 0).sum() == masked


def test_ratios_are_stratified():
    counts = mask_counts(0, 0, 200, 10_000, 0.5, (0.1, 0.5))
    ratios = np.sort(counts[counts > 0]) / 10_000
    strata = 0.1 + 0.4 * np.arange(101) / 100
    assert (ratios >= strata[:-1] - 1e-4).all() and (ratios <= strata[1:]).all()


def test_never_all_patches_and_none_is_allowed():
    assert (mask_counts(0, 0, 8, 4, 1.0, (1.0, 1.0)) == 3).all()
    assert (mask_counts(0, 0, 8, 196, 1.0, (0.0, 0.0)) == 0).all()
    assert (mask_counts(0, 0, 8, 1, 1.0, (0.5, 1.0)) == 0).all()  # one patch must stay visible


def test_the_plan_is_a_function_of_seed_and_step():
    draw = lambda seed, step: tuple(mask_counts(seed, step, 32, 196, 0.5, (0.1, 0.5)))  # noqa: E731
    assert draw(0, 1) == draw(0, 1)
    assert len({draw(0, 1), draw(0, 2), draw(1, 1)}) == 3
    chosen = np.array([np.array(draw(0, step)) > 0 for step in range(300)]).mean(0)
    assert chosen.min() > 0.35 and chosen.max() < 0.65
