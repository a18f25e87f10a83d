import pytest
import torch
from vtp_oracle import plain_rope, stored

from megavtp.errors import UserError
from megavtp.nn.rope import AxialRope, rotate


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tables_equal_the_official_ones_bit_for_bit(dtype):
    oracle = stored("rope")
    rope = AxialRope(64, dtype)
    assert torch.equal(rope.periods, oracle[f"{dtype}/periods"])
    for rows, columns in ((3, 5), (14, 14)):
        cos, sin = rope.tables(rows, columns)
        assert torch.equal(cos, oracle[f"{dtype}/separate/{rows}x{columns}/cos"])
        assert torch.equal(sin, oracle[f"{dtype}/separate/{rows}x{columns}/sin"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rotation_equals_pairwise_formula_and_leaves_the_prefix(dtype):
    rope = AxialRope(16, dtype)
    x = torch.randn(2, 7, 3, 16)
    y = rotate(x, rope.tables(2, 3, prefix=1))
    expected = plain_rope(x.transpose(1, 2), rope.periods, 2, 3, 1).transpose(1, 2)
    assert y.dtype == x.dtype
    assert torch.equal(y, expected)
    assert torch.equal(y[:, 0], x[:, 0].to(rope.dtype).float())


def test_float32_rotation_keeps_length_and_depends_on_distance_only():
    rope = AxialRope(16, "float32")
    q, k = torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16)
    table = rope.tables(1, 9)
    q, k = rotate(q, table)[0, :, 0], rotate(k, table)[0, :, 0]
    assert torch.allclose(q.norm(dim=-1), q.norm(dim=-1)[:1].expand(9))
    products = q @ k.T
    assert torch.allclose(products.diagonal(2), products[0, 2].expand(7), atol=1e-4)


def test_periods_stay_bfloat16_when_the_model_is_cast():
    before = AxialRope(64).periods.clone()
    for cast in (lambda m: m.float(), lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.bfloat16()):
        rope = cast(AxialRope(64))
        assert rope.periods.dtype == torch.bfloat16
        assert torch.equal(rope.periods, before)
        assert torch.equal(rope.tables(2, 2)[0], AxialRope(64).tables(2, 2)[0])


def test_tables_follow_loaded_periods():
    rope = AxialRope(16)
    old = rope.tables(2, 2)[0]
    rope.load_state_dict({"periods": rope.periods * 2})
    assert not torch.equal(rope.tables(2, 2)[0], old)


def test_tables_made_in_inference_mode_serve_training():
    rope = AxialRope(16, "float32")
    with torch.inference_mode():
        rope.tables(2, 2)
    x = torch.randn(1, 4, 1, 16, requires_grad=True)
    rotate(x, rope.tables(2, 2)).sum().backward()
    assert x.grad.isfinite().all()


def test_cache_is_bounded():
    rope = AxialRope(16)
    for rows in range(1, 40):
        rope.tables(rows, 1)
    assert len(rope._cache) == rope.CACHED_GRIDS


def test_odd_head_dimension_is_refused():
    with pytest.raises(UserError, match="head dimension"):
        AxialRope(18)
