import torch

from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.pixels import normalise


def squared(x, y):
    return (x - y).square().mean((1, 2, 3))


def test_terms_of_micro_batches_add_up():
    prediction, target = torch.randn(2, 5, 3, 4, 4).unbind()
    whole = reconstruction_terms(prediction, target, squared, images_total_local=5)
    parts = [
        reconstruction_terms(prediction[s], target[s], squared, images_total_local=5)
        for s in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    torch.testing.assert_close(whole["l1"], (prediction - target).abs().mean())
    assert set(whole) == {"l1", "perceptual"}
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_perceptual_sees_minus_one_to_one_unclamped_with_gradient_for_the_prediction_only():
    black_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    prediction = (normalise(black_white) * 3).requires_grad_()
    target = normalise(black_white).requires_grad_()
    seen = {}

    def perceptual(x, y):
        seen.update(x=x, y=y)
        return squared(x, y)

    terms = reconstruction_terms(prediction, target, perceptual, images_total_local=2)
    torch.testing.assert_close(seen["y"], torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert seen["x"].min() < -1 and seen["x"].max() > 1 and not seen["y"].requires_grad
    sum(terms.values()).backward()
    assert prediction.grad.ne(0).all() and target.grad is None


def test_without_perceptual_and_in_half_precision():
    x = torch.randn(2, 3, 4, 4).bfloat16()
    terms = reconstruction_terms(x, torch.zeros_like(x), images_total_local=2)
    assert set(terms) == {"l1"} and terms["l1"].dtype == torch.float32
    torch.testing.assert_close(terms["l1"], x.float().abs().mean())
