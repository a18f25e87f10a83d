import pytest
import torch
from vtp_oracle import stored

from megavtp.config.schema import DinoHeadConfig
from megavtp.errors import UserError
from megavtp.models.dino_head import DinoHead
from megavtp.parallel.mesh import Mesh


def test_weight_normalised_head_equals_the_official_one():
    head = DinoHead(32, DinoHeadConfig(prototypes=40, hidden=24, bottleneck=12, layers=3))
    state = {name[3:]: t for name, t in stored("dino_head_state").items() if name.startswith("wn/")}
    head.load_state_dict(state, strict=True)
    io = stored("dino_head_io")
    features, prototypes = head(io["wn/x"])
    assert torch.allclose(features, io["wn/no_last_layer"], atol=1e-6)
    assert torch.allclose(features @ prototypes.T, io["wn/out"], atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_depth_has_the_official_keys(layers):
    head = DinoHead(32, DinoHeadConfig(prototypes=40, hidden=24, bottleneck=12, layers=layers))
    names = {name for name in head.state_dict() if name.endswith("weight")}
    assert names == {f"mlp.{2 * i}.weight" for i in range(layers)}
    assert head.mlp[-1].weight.shape[0] == 12


def test_no_rows_is_allowed():
    head = DinoHead(8, DinoHeadConfig(prototypes=6, hidden=4, bottleneck=3))
    assert head(torch.zeros(0, 8))[0].shape == (0, 3)


def test_indivisible_prototypes_are_refused():
    with pytest.raises(UserError, match="prototypes"):
        DinoHead(8, DinoHeadConfig(prototypes=7, hidden=4, bottleneck=4), Mesh(tp=2))
