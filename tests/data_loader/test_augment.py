"""Crops, views and evaluation views: properties, limits, and the official centre crop's pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megavtp.data.augment import center_crop, crop_box, random_view, resize
from megavtp.data.randomness import generator

CENTER_CROP = Path(__file__).parent.parent / "data" / "center_crop"
ALWAYS = dict(flip=1.0, color_jitter=1.0, grayscale=1.0, blur=1.0, solarize=1.0)
NEVER = dict(flip=0.0, color_jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (3, h, w), in the strides of a decoder's output."""
    x = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return x.permute(2, 0, 1)


def load(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (900, 2), (3, 3), (16, 40), (144, 144), (375, 500)])
@pytest.mark.parametrize("options", [ALWAYS, NEVER])
def test_any_image_gives_a_view(shape, options):
    image = picture(*shape)
    before = image.clone()
    for seed in range(4):
        plain = random_view(image, 32, (0.9, 1.0), generator(seed), flip=0.5)
        crop = random_view(image, 24, (0.05, 0.32), generator(seed), **options)
        assert plain.shape == (3, 32, 32) and crop.shape == (3, 24, 24)
        assert plain.dtype == crop.dtype == torch.uint8
    assert torch.equal(image, before)


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("height, width", [(144, 144), (375, 500), (800, 300)])
def test_boxes_have_the_asked_area_and_aspect_and_lie_inside(scale, height, width):
    areas, tops = [], []
    for seed in range(300):
        top, left, h, w = crop_box(height, width, scale, generator(seed).random(22))
        assert 0 <= top <= height - h and 0 <= left <= width - w
        assert 3 / 4 - 0.02 < w / h < 4 / 3 + 0.02
        areas.append(h * w / (height * width))
        tops.append(top / max(1, height - h))
    if height <= 500:  # a long image often has no box of a large area: it then gets the central one
        assert scale[0] - 0.01 < min(areas) and max(areas) < scale[1] + 0.01
        assert np.mean(areas) == pytest.approx(np.mean(scale), abs=0.12)  # large boxes fit less often
    if scale[1] < 0.5:
        assert np.mean(tops) == pytest.approx(0.5, abs=0.08)
        assert min(tops) < 0.02 and max(tops) > 0.98


@pytest.mark.parametrize(
    "height, width, box",
    [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13)), (1, 1, (0, 0, 1, 1)), (1, 9, (0, 4, 1, 1))],
)
def test_elongated_images_fall_back_to_the_centre(height, width, box):
    assert crop_box(height, width, (1.0, 1.0), generator(0).random(22)) == box


def test_flip_mirrors_the_same_crop():
    image = picture(40, 60)
    straight = random_view(image, 24, (0.3, 0.6), generator(1), **NEVER)
    mirrored = random_view(image, 24, (0.3, 0.6), generator(1), **(NEVER | {"flip": 1.0}))
    assert torch.equal(straight.flip(2), mirrored)


def test_one_changed_probability_leaves_the_other_draws_alone():
    image = picture(40, 60)
    for seed in range(10):
        a, b = generator(seed), generator(seed)
        grey = random_view(image, 24, (0.3, 0.6), a, **(NEVER | {"grayscale": 1.0}))
        plain = random_view(image, 24, (0.3, 0.6), b, **NEVER)
        luma = (plain.float() * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(0)
        assert (grey.float() - luma).abs().max() <= 0.51
        assert a.random() == b.random()  # the same number of draws was taken


def test_probabilities_are_met():
    image = picture(24, 24)
    image[0] = 255  # never grey by chance
    n = 400
    grey = sum(
        torch.equal(view[0], view[1])
        for view in (random_view(image, 8, (1, 1), generator(i), **(NEVER | {"grayscale": 0.2})) for i in range(n))
    )
    assert 0.13 < grey / n < 0.27
    flipped = [random_view(image, 8, (1, 1), generator(i), flip=0.5) for i in range(n)]
    straight = random_view(image, 8, (1, 1), generator(0), flip=0.0)
    assert 0.4 < sum(torch.equal(view, straight) for view in flipped) / n < 0.6


def test_the_plain_view_jitters_and_greys_when_asked():
    image = picture(24, 24)
    image[0] = 255  # never grey by chance
    plain = [random_view(image, 8, (0.5, 1), generator(i), flip=0.5) for i in range(50)]
    changed = [random_view(image, 8, (0.5, 1), generator(i), flip=0.5, color_jitter=0.5) for i in range(50)]
    assert 10 < sum(torch.equal(a, b) for a, b in zip(plain, changed, strict=True)) < 40  # the others' crop stays
    grey = [random_view(image, 8, (0.5, 1), generator(i), flip=0.5, grayscale=1.0) for i in range(50)]
    assert all(torch.equal(view[0], view[1]) and torch.equal(view[1], view[2]) for view in grey)


def test_jitter_order_and_strength_vary():
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    views = [random_view(image, 8, (1, 1), generator(i), **(NEVER | {"color_jitter": 1.0})) for i in range(300)]
    levels = torch.stack(views).float().mean((1, 2, 3)) / 100
    assert levels.min() < 0.65 and levels.max() > 1.35 and 0.59 < levels.min() and levels.max() < 1.41


@pytest.mark.parametrize("shape, size", [((144, 144), 96), ((375, 500), 224), ((20, 31), 64), ((9, 300), 16)])
def test_resize_is_pillows_antialiased_bicubic_within_rounding(shape, size):
    image = picture(*shape)
    ours = resize(image, size, size).int()
    theirs = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC))
    difference = (ours - torch.from_numpy(theirs).permute(2, 0, 1).int()).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.1


def test_memory_format_does_not_change_pixels():
    image = picture(50, 70)
    for size in (24, 96):
        a = random_view(image, size, (0.3, 1.0), generator(0), **ALWAYS)
        b = random_view(image.contiguous(), size, (0.3, 1.0), generator(0), **ALWAYS)
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["40x55_to64", "64x64_to64", "97x210_to64"])
def test_center_crop_equals_the_official_pictures(name):
    out = center_crop(load(CENTER_CROP / f"{name}_in.png"), 64)
    assert torch.equal(out, load(CENTER_CROP / f"{name}_out.png"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (64, 3), (31, 33), (257, 140)])
def test_center_crop_of_any_shape(shape):
    assert center_crop(picture(*shape), 16).shape == (3, 16, 16)
