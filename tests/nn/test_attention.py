import importlib
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

from megavtp.errors import UserError
from megavtp.nn import attention_kernels
from megavtp.nn.attention import Attention
from megavtp.nn.attention_kernels import adapt_torch_varlen, attend, find_varlen, sequence_offsets
from megavtp.nn.rope import AxialRope

SEGMENTS = ((2, 5), (0, 4), (3, 2))


def loop_reference(q, k, v, offsets, causal):
    """Softmax attention sequence by sequence, written out."""
    out = torch.empty_like(v)
    for start, end in zip(offsets, offsets[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end])
    return out


def tokens(segments, heads=2, dim=8):
    return [torch.randn(sum(b * n for b, n in segments), heads, dim) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_equals_the_loop(causal):
    q, k, v = tokens(SEGMENTS)
    expected = loop_reference(q, k, v, [0, 5, 10, 12, 14, 16], causal)
    assert torch.allclose(attend(q, k, v, SEGMENTS, causal), expected, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_on_a_cpu_are_computed_in_float32(autocast):
    q, k, v = (x.bfloat16() for x in tokens(SEGMENTS))
    expected = attend(q.float(), k.float(), v.float(), SEGMENTS).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(attend(q, k, v, SEGMENTS), expected)


def test_offsets():
    assert sequence_offsets(((2, 5), (3, 2)), torch.device("cpu")).tolist() == [0, 5, 10, 12, 14, 16]


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_path_gets_offsets_and_longest(monkeypatch, causal):
    def kernel(q, k, v, offsets, longest, is_causal):
        assert offsets.dtype == torch.int32 and longest == 5
        return loop_reference(q, k, v, offsets.tolist(), is_causal)

    q, k, v = tokens(SEGMENTS)
    expected = attend(q, k, v, SEGMENTS, causal, "sdpa")
    monkeypatch.setattr(attention_kernels, "_varlen_of", lambda q: kernel)
    assert torch.allclose(attend(q, k, v, SEGMENTS, causal, "auto"), expected, atol=1e-6)
    assert torch.allclose(attend(q, k, v, SEGMENTS, causal, "flash"), expected, atol=1e-6)
    assert torch.equal(attend(q, k, v, SEGMENTS, causal, "sdpa"), expected)
    q, k, v = (x[:10] for x in (q, k, v))
    assert torch.equal(attend(q, k, v, ((2, 5),), causal, "auto"), attend(q, k, v, ((2, 5),), causal, "sdpa"))


def test_both_signatures_of_torch_varlen():
    def by_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return is_causal

    def by_window(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return window_size

    assert [adapt_torch_varlen(by_flag)(*"qkvc", 5, causal) for causal in (False, True)] == [False, True]
    assert [adapt_torch_varlen(by_window)(*"qkvc", 5, causal) for causal in (False, True)] == [(-1, -1), (-1, 0)]
    assert adapt_torch_varlen(lambda q, k, v: q) is None


FLASH = {  # what may be found as a package
    "whole": "def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=False): return q, 'found', max_q",
    "stale": "raise ImportError('_C.so: undefined symbol: _ZN3c104cuda\\nand more')",
    "partial": "import flash_attn_3_cuda",
    "empty": "",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a package where it is imported from; without code it is a folder, as flash-attn-4 leaves."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def put(name, code):
        (tmp_path / name).mkdir()
        if code is not None:
            (tmp_path / name / "__init__.py").write_text(FLASH[code])
        importlib.invalidate_caches()

    yield put
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


def test_flash_attention_3_is_for_hopper_and_gives_only_the_output(install, caplog):
    install("flash_attn_interface", "whole")
    install("flash_attn", "whole")
    kernels = {hopper: find_varlen.__wrapped__(hopper) for hopper in (True, False)}
    assert [kernels[hopper](*"qkvo", 5, True) for hopper in (True, False)] == ["q", "q"]
    modules = [inspect.getclosurevars(kernels[hopper]).nonlocals["function"].__module__ for hopper in (True, False)]
    assert modules == ["flash_attn_interface", "flash_attn"] and not caplog.text


@pytest.mark.parametrize("code, reason", [
    ("stale", "_C.so: undefined symbol: _ZN3c104cuda"), ("partial", "No module named 'flash_attn_3_cuda'"),
    ("empty", "has no attribute 'flash_attn_varlen_func'"), (None, "has no attribute 'flash_attn_varlen_func'"),
])
def test_a_stale_or_partial_install_falls_back_and_one_line_says_so(install, caplog, code, reason):
    install("flash_attn", "whole")
    install("flash_attn_interface", code)
    kernel = find_varlen.__wrapped__(hopper=True)
    assert inspect.getclosurevars(kernel).nonlocals["function"].__module__ == "flash_attn"
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("flash_attn_interface is installed, but cannot be used (") and reason in line
    assert "\n" not in line


def test_nothing_is_said_of_what_is_not_installed(caplog):
    assert attention_kernels.import_flash("no_such_module") is None and not caplog.text


def test_without_any_kernel_flash_is_refused(install, monkeypatch):
    install("flash_attn", "empty")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert find_varlen.__wrapped__(hopper=True) is None
    monkeypatch.setattr(attention_kernels, "find_varlen", lambda hopper: None)
    with pytest.raises(UserError, match="parallel.attention"):
        Attention(8, 2, kernel="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("library", ["flash_attn_interface", "flash_attn", "torch"])
def test_cuda_varlen_equals_sdpa(monkeypatch, library, causal):
    if library == "flash_attn_interface" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention 3 is for Hopper GPUs")
    kernel = attention_kernels.import_torch() if library == "torch" else attention_kernels.import_flash(library)
    if kernel is None:
        pytest.skip(f"{library} has no variable-length attention here")
    monkeypatch.setattr(attention_kernels, "_varlen_of", lambda q: kernel)
    q, k, v = (x.cuda().bfloat16().requires_grad_() for x in tokens(SEGMENTS, dim=64))
    results = []
    for kernel in ("auto", "sdpa"):
        out = attend(q, k, v, SEGMENTS, causal, kernel)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for a, b in zip(*results):
        assert torch.allclose(a.float(), b.float(), atol=3e-2)


def make_attention(**options):
    attention = Attention(16, 2, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3)
    return attention


@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_crops_equal_one_crop_size_at_a_time(qk_norm):
    attention, rope = make_attention(qk_norm=qk_norm), AxialRope(8, "float32")
    x = torch.randn(16, 16)
    tables = [rope.tables(2, 2, 1), rope.tables(1, 1, 1)]
    packed = attention(x, ((2, 5), (3, 2)), tables)
    apart = torch.cat([attention(x[:10], ((2, 5),), tables[:1]), attention(x[10:], ((3, 2),), tables[1:])])
    assert torch.allclose(packed, apart, atol=1e-6)


def test_attention_module_is_the_formula():
    attention, x = make_attention(qk_norm=True), torch.randn(4, 16)
    q, k, v = (attention.qkv(x)[:, 16 * i : 16 * (i + 1)].unflatten(1, (2, 8)) for i in range(3))
    q, k = (
        t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-5) * n.weight
        for t, n in ((q, attention.q_norm), (k, attention.k_norm))
    )
    expected = attention.proj(loop_reference(q, k, v, [0, 4], False).flatten(1))
    assert torch.allclose(attention(x, ((1, 4),)), expected, atol=1e-5)


def test_no_sequences_at_all_gives_zero_gradients():
    attention = make_attention(qk_norm=True)
    out = attention(torch.zeros(0, 16), ((0, 5),))
    out.sum().backward()
    assert out.shape == (0, 16)
    assert all(F.l1_loss(p.grad, torch.zeros_like(p)) == 0 for p in attention.parameters())


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(UserError, match="not a multiple of heads"):
        Attention(16, 3)
