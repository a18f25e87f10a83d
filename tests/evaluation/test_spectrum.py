import math

import pytest
import torch

from megavtp.evaluation.tokenizer.spectrum import Moments, effective_rank, spectrum_metrics
from megavtp.parallel.mesh import SINGLE


def spectrum(latents, batch=4):
    moments = Moments()
    for part in latents.split(batch):
        moments.add(part)
    return moments.spectrum(SINGLE)


def test_spectrum_is_that_of_torchs_covariance_for_any_batch_size():
    latents = torch.randn(10, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    latents = latents * torch.tensor([3.0, 2, 1, 1, 0.1, 0])[:, None, None] + 5  # the mean is no variance
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 6).double()
    want = torch.linalg.eigvalsh(torch.cov(vectors.T)).flip(0)
    for batch in (1, 3, 10):
        torch.testing.assert_close(spectrum(latents, batch), want / want.sum(), atol=1e-12, rtol=0)


def test_vectors_are_maps_of_one_position():
    vectors = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spectrum(vectors), spectrum(vectors[:, :, None, None]))


def test_an_empty_share_of_a_rank_adds_nothing():
    latents = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for part in (latents[:0], latents, latents[:0]):
        moments.add(part)
    assert torch.equal(moments.spectrum(SINGLE), spectrum(latents))


def test_effective_rank_counts_directions():
    assert effective_rank(torch.tensor([1.0, 0, 0])) == 1
    assert effective_rank(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert effective_rank(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)  # an entropy of 1.5 bits
    line = torch.arange(6.0)[:, None] * torch.tensor([1.0, 2, 3])
    metrics = spectrum_metrics(spectrum(line[:, :, None, None]))
    assert metrics["latents/effective_rank"] == pytest.approx(1, abs=1e-6)
    assert metrics["latents/first_component"] == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 0.1, math.nan, math.inf])
def test_latents_without_a_spectrum(value):
    metrics = spectrum_metrics(spectrum(torch.full((5, 3, 2, 2), value)))
    assert all(math.isnan(x) for x in metrics.values())
