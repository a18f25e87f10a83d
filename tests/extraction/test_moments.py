"""One pass over the data gives what two passes in float64 give."""

from functools import reduce

import numpy as np
import pytest
import torch

from megavtp.errors import UserError
from megavtp.extraction.moments import Moments, channel_moments


def moments(latents):
    return Moments.of(latents.shape, channel_moments(latents))


@pytest.fixture
def latents():
    """Channels whose mean is far larger than their deviation: sums of squares in one precision would cancel."""
    draw = torch.randn(50, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = torch.tensor([0, 1e-3, 1.0, 100.0, -1e4, 3e5], dtype=torch.float64)[:, None, None]
    return (draw + offsets).float()


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_equal_to_two_passes(latents, batch):
    found = reduce(Moments.joined, map(moments, latents.split(batch))).statistics()
    flat = latents.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(6, -1)
    assert np.allclose(found.mean, flat.mean(1), rtol=1e-13, atol=1e-15)
    assert np.allclose(found.std, flat.std(1, ddof=1), rtol=1e-11, atol=0)
    assert found.images == 50


def test_json_keeps_every_bit(latents):
    whole = moments(latents)
    again = Moments.load(whole.dump(), len(whole.mean), "x")
    assert (again.images, again.count) == (50, 800)
    assert np.array_equal(again.mean, whole.mean) and np.array_equal(again.squares, whole.squares)


def test_a_channel_that_never_changes():
    with pytest.raises(UserError, match="channel 1 has the std 0"):
        moments(torch.stack([torch.randn(5, 2, 2), torch.ones(5, 2, 2)], 1)).statistics()
