import math

import pytest
import torch
import torch.nn.functional as F

from megavtp.evaluation.tokenizer.reconstruction import flat_psnr, psnr, ssim


def images(n=2, size=20, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_known_noise():
    x = images() * 0.8 + 0.1
    sign = torch.where(images(seed=1) > 0.5, 1.0, -1.0)
    got = psnr(x + sign * torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), x)
    torch.testing.assert_close(got, torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert psnr(x, x).tolist() == [100.0, 100.0]
    assert psnr(torch.full_like(x, math.nan), x).isnan().all()


def test_flat_psnr_is_the_variance():
    x = images()
    want = -10 * torch.log10(x.var((2, 3), correction=0).mean(1))
    torch.testing.assert_close(flat_psnr(x), want, atol=1e-4, rtol=0)


def slow_ssim(x, y):
    """Wang et al. 2004, window by window in float64, with reflected borders."""
    x, y = (F.pad(z[None], (5, 5, 5, 5), mode="reflect")[0] for z in (x, y))
    g = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    w = torch.outer(g, g) / torch.outer(g, g).sum()
    values = []
    for top in range(x.shape[1] - 10):
        for left in range(x.shape[2] - 10):
            for c in range(3):
                a, b = (z[c, top : top + 11, left : left + 11].double() for z in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                values.append(
                    (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
                )
    return torch.stack(values).mean().item()


def test_ssim_equals_the_definition():
    x = images(3, 16)
    y = torch.stack([(x[0] + 0.2 * images(1, 16, 5)[0]).clamp(0, 1), x[1], torch.zeros(3, 16, 16)])
    assert ssim(y, x).tolist() == pytest.approx([slow_ssim(a, b) for a, b in zip(y, x)], abs=2e-5)
    assert ssim(x, x).tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_ssim_equals_torchmetrics():
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as reference
    except Exception as error:  # it also stops at a torchvision that does not match torch
        pytest.skip(f"torchmetrics does not import: {error!r}")
    x, y = images(2, 40), images(2, 40, 1)
    y[0] = 0.9 * x[0] + 0.1 * y[0]
    torch.testing.assert_close(ssim(y, x), reference(y, x, data_range=1.0, reduction="none"), atol=1e-5, rtol=0)
