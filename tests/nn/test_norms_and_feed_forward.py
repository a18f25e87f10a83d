import sys
import types

import pytest
import torch
import torch.nn.functional as F

from megavtp.errors import UserError
from megavtp.nn import norms
from megavtp.nn.feed_forward import MLP, SwiGLU, feed_forward, quick_gelu
from megavtp.nn.norms import NORMS, RMSNorm
from megavtp.parallel.mesh import Mesh


def filled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_rms_norm_is_the_formula():
    norm, x = filled(RMSNorm(12)), torch.randn(5, 12)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    assert torch.equal(norm(x), expected)


def test_rms_norm_of_bfloat16_has_float32_statistics():
    norm, x = filled(RMSNorm(64)).bfloat16(), (100 * torch.randn(5, 64)).bfloat16()
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * norm.weight
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind, eps", [("layernorm", 1e-6), ("layernormbf16", 1e-5)])
def test_layer_norm_kinds_differ_in_eps(kind, eps):
    norm, x = filled(NORMS[kind](8)), 1e-3 * torch.randn(4, 8)
    assert torch.equal(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias, eps))


def test_apex_without_its_extension_is_not_used(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiled extension")

    package = types.ModuleType("apex.normalization")
    package.FusedLayerNorm = package.FusedRMSNorm = broken
    package.fused_layer_norm = types.ModuleType("apex.normalization.fused_layer_norm")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", package)
    assert norms.find_apex_norms.__wrapped__() is None
    package.FusedLayerNorm = package.FusedRMSNorm = lambda width: None
    assert norms.find_apex_norms.__wrapped__() is package.fused_layer_norm


def test_apex_kernels_are_called_with_weight_and_eps(monkeypatch):
    """On CUDA they replace the native norms; here a stand-in computes on the CPU."""
    kernels = types.SimpleNamespace(
        fused_rms_norm_affine=lambda x, w, shape, eps: F.rms_norm(x, shape, w, eps),
        fused_layer_norm_affine=lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps),
    )
    x = torch.randn(3, 8)
    layers = [filled(NORMS[kind](8)) for kind in NORMS]
    native = [layer(x) for layer in layers]
    monkeypatch.setattr(norms, "_fused", lambda x, w: kernels)
    assert all(torch.equal(layer(x), expected) for layer, expected in zip(layers, native))


@pytest.mark.parametrize("kind, width, hidden", [
    ("swiglu", 384, 1024), ("swiglu", 768, 2048), ("swiglu", 1024, 2736), ("swiglu", 128, 344),
    ("swiglu128", 64, 256), ("swiglu32", 1024, 2752), ("mlp", 64, 256),
])
def test_hidden_widths(kind, width, hidden):
    with torch.device("meta"):
        layer = feed_forward(kind, width, 4.0, Mesh())
    first = layer.fc1 if kind == "mlp" else layer.w1
    assert first.weight.shape == (hidden, width)


def test_formulas():
    x = torch.randn(3, 8, dtype=torch.float64)
    gated, plain = filled(SwiGLU(8, 16)).double(), filled(MLP(8, 16)).double()
    # One product for w1 and w2 may round otherwise than two.
    torch.testing.assert_close(gated(x), gated.w3(F.silu(gated.w1(x)) * gated.w2(x)), rtol=1e-12, atol=1e-12)
    assert torch.equal(plain(x), plain.fc2(F.gelu(plain.fc1(x))))
    assert torch.equal(quick_gelu(x), x * torch.sigmoid(1.702 * x))


def test_indivisible_width_is_refused():
    with pytest.raises(UserError, match="parallel.tp=3"):
        SwiGLU(8, 16, mesh=Mesh(tp=3))
