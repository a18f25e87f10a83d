"""Colour operations against closed forms, and against torchvision where it can be imported."""

import colorsys
import math

import pytest
import torch
from torch import Tensor

from benchmarks.comparisons.torchvision_kernels import define_missing
from megavtp.data import photometric


@pytest.fixture(scope="module")
def functional():
    """torchvision's functionals."""
    define_missing()
    try:
        from torchvision.transforms import _functional_tensor
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return _functional_tensor


def picture(height: int = 37, width: int = 50, seed: int = 0) -> Tensor:
    """Smooth colours plus grey, black, white and saturated pixels: (3, h, w) in 0..255."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(3, height, width, generator=rng) * 255
    x[:, 0, :4] = torch.tensor([0.0, 255.0, 128.0, 7.0])
    x[:, 1, :3] = torch.eye(3) * 255
    return x


@pytest.mark.parametrize(
    "ours, theirs, value",
    [
        (photometric.brightness, "adjust_brightness", 0.6),
        (photometric.brightness, "adjust_brightness", 1.4),
        (photometric.contrast, "adjust_contrast", 0.6),
        (photometric.contrast, "adjust_contrast", 1.4),
        (photometric.saturation, "adjust_saturation", 0.8),
        (photometric.saturation, "adjust_saturation", 1.2),
        (photometric.hue, "adjust_hue", -0.1),
        (photometric.hue, "adjust_hue", 0.07),
        (photometric.hue, "adjust_hue", 0.0),
    ],
)
def test_jitter_equals_torchvision(functional, ours, theirs, value):
    x = picture()
    expected = getattr(functional, theirs)(x / 255, value) * 255
    torch.testing.assert_close(ours(x.clone(), value), expected, atol=2e-3, rtol=1e-4)


def test_grey_and_solarize_equal_torchvision(functional):
    x = picture()
    torch.testing.assert_close(photometric.grayscale(x), functional.rgb_to_grayscale(x, 3), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(photometric.solarize(x), functional.solarize(x / 255, 128 / 255) * 255)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(functional, sigma):
    x = picture()
    expected = functional.gaussian_blur(x, [9, 9], [sigma, sigma])
    torch.testing.assert_close(photometric.gaussian_blur(x, sigma), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.0, 0.05, 0.3])
def test_hue_equals_the_standard_librarys_hsv(shift):
    x = picture(6, 6)
    out = photometric.hue(x.clone(), shift)
    for i in range(6):
        for j in range(6):
            h, s, v = colorsys.rgb_to_hsv(*(x[:, i, j] / 255).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v)) * 255
            torch.testing.assert_close(out[:, i, j], expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (5, 3), (12, 12)])
def test_blur_keeps_flat_images_and_the_shape_of_small_ones(shape):
    flat = torch.full((3, *shape), 77.0)
    torch.testing.assert_close(photometric.gaussian_blur(flat, 1.3), flat)


def test_blur_spreads_a_point_as_a_gaussian():
    x = torch.zeros(3, 21, 21)
    x[:, 10, 10] = 1
    out = photometric.gaussian_blur(x, 1.0)
    assert out[0].sum() == pytest.approx(1, abs=1e-6)
    assert out[0, 10, 12] / out[0, 10, 10] == pytest.approx(math.exp(-2), rel=1e-5)
    assert out[0, 12, 12] / out[0, 10, 10] == pytest.approx(math.exp(-4), rel=1e-5)


def test_neutral_factors_change_nothing():
    x = picture()
    for operation in (photometric.brightness, photometric.contrast, photometric.saturation):
        torch.testing.assert_close(operation(x.clone(), 1.0), x)
    torch.testing.assert_close(photometric.hue(x.clone(), 0.0), x, atol=1e-3, rtol=1e-5)


def test_grey_pixels_stay_grey_under_hue_and_saturation():
    x = torch.linspace(0, 255, 48).view(1, 4, 12).expand(3, -1, -1).clone()
    torch.testing.assert_close(photometric.hue(x.clone(), 0.3), x)
    torch.testing.assert_close(photometric.saturation(x.clone(), 1.2), x, atol=0.05, rtol=1e-3)


def test_values_stay_in_range():
    for seed in range(5):
        x = picture(seed=seed)
        for operation, value in [
            (photometric.brightness, 1.4), (photometric.contrast, 1.4), (photometric.saturation, 1.2),
            (photometric.hue, 0.1), (photometric.gaussian_blur, 2.0),
        ]:  # fmt: skip
            out = operation(x.clone(), value)
            assert out.min() >= -1e-3 and out.max() <= 255 + 1e-3
