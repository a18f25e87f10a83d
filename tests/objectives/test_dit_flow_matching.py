"""Flow matching against the official transport's path, loss and gradients."""

import pytest
import torch
from dit_oracle import official_dit, stored

from megavtp.dit.flow_matching import flow_matching_terms, straight_path

CASES = ("lognorm_cos", "lognorm_mu-0.5_sigma1.25")


@pytest.mark.parametrize("case", CASES)
def test_path_and_loss_of_the_official_transport(case):
    data, model = stored("transport"), official_dit()
    own = {name.removeprefix(f"{case}/"): value for name, value in data.items() if name.startswith(f"{case}/")}
    points, target = straight_path(data["x1"], own["x0"], own["t"])
    torch.testing.assert_close(points, own["xt"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target, own["ut"], rtol=0, atol=0)
    with torch.no_grad():
        velocity = model(points, own["t"], data["y"])
    torch.testing.assert_close(velocity, own["pred"], rtol=1e-5, atol=1e-5)
    terms = flow_matching_terms(velocity, target, samples_total_local=len(velocity))
    expected = {"mse": own["loss"].mean(), "cosine": own["cos_loss"].mean()}
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(terms.values()), own["total"], rtol=1e-5, atol=1e-6)


def test_gradients_of_the_official_loss():
    data, model, expected = stored("transport"), official_dit(), stored("gradients")
    points, target = straight_path(data["x1"], data["lognorm_cos/x0"], data["lognorm_cos/t"])
    velocity = model(points, data["lognorm_cos/t"], data["y"])
    sum(flow_matching_terms(velocity, target, samples_total_local=len(velocity)).values()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if name in expected}
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale + 1e-8, name


def test_micro_batches_add_up_and_16_bit_outputs_count_in_float32():
    target = torch.randn(6, 4, 2, 2)
    velocity = torch.randn(6, 4, 2, 2).bfloat16()
    whole = flow_matching_terms(velocity, target, samples_total_local=6)
    parts = [flow_matching_terms(v, t, samples_total_local=6) for v, t in zip(velocity.split(2), target.split(2))]
    for name, value in whole.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(sum(part[name] for part in parts), value)
