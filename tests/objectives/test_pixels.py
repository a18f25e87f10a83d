import torch

from megavtp.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalise, normalise, to_uint8


def test_every_byte_survives_the_round_trip():
    image = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    assert torch.equal(to_uint8(normalise(image)), image)
    assert torch.equal(to_uint8(normalise(image, torch.float64)), image)


def test_normalise_is_the_imagenet_formula():
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    normal = normalise(image, torch.float64)
    for channel in range(3):
        expected = (image[channel].double() / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(normal[channel], expected)
    torch.testing.assert_close(denormalise(normal), image.double() / 255)


def test_out_of_range_is_clamped_only_for_display():
    image = torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert denormalise(image).min() < 0 and denormalise(image).max() > 1
    assert to_uint8(image).flatten(1).tolist() == [[0] * 3, [255] * 3]
