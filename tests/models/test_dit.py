"""The DiT against the official LightningDiT: outputs, keys, sizes, initial values, and its conditions."""

from dataclasses import replace

import pytest
import torch
from dit_oracle import OFFICIAL, official_dit, plain_dit, stored, stored_json

from megavtp.dit.config import DiTModelConfig, resolve_dit
from megavtp.dit.model.build import build_averaged_dit, build_dit
from megavtp.dit.model.embed import time_frequencies
from megavtp.dit.model.model import DiT
from megavtp.errors import UserError
from megavtp.models.fitting import load_whole
from megavtp.parallel.mesh import SINGLE

SIZES = {"B": "b", "L": "l", "XL": "xl", "1p0B": "1p0b", "1p6B": "1p6b"}


def on_meta(**settings) -> DiT:
    with torch.device("meta"):
        return DiT(resolve_dit(DiTModelConfig(latent_size=16, num_classes=1000, **settings)))


def random_dit(config: DiTModelConfig, seed: int = 0, **options) -> DiT:
    """With no parameter at zero, as it would be after training."""
    model = build_dit(config, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def test_outputs_of_the_official_model():
    model, data = official_dit(), stored("model")
    x, t, y = (data[f"in/{name}"] for name in "xty")
    torch.testing.assert_close(model(x, t, y), data["out/eval"], rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)  # the official class draws the dropped labels itself, by this call
    dropped = torch.rand(len(y)) < 0.1
    assert dropped.any()
    none = torch.where(dropped, model.no_condition(len(y)), y)
    torch.testing.assert_close(model(x, t, none), data["out/train_seed3"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(time_frequencies(t), data["out/t_freq"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.t_embedder(t), data["out/t_embed"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_normalised_queries_and_keys():
    """No official output has them: the plain model, which gives the official ones without, stands in."""
    data = stored("model")
    x, t, y = (data[f"in/{name}"] for name in "xty")
    plain = plain_dit(stored("state"), x, t, y, resolve_dit(OFFICIAL))
    torch.testing.assert_close(plain, data["out/eval"], rtol=1e-5, atol=1e-5)
    config = replace(OFFICIAL, qk_norm=True)
    model = random_dit(config)
    for block in model.blocks.values():  # so small that the norm's epsilon shows; its weights show its place
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            parameter[: 2 * config.width] *= 1e-2
        for norm in (block.attn.q_norm, block.attn.k_norm):
            norm.weight.copy_(1 + torch.rand(norm.weight.shape, generator=torch.Generator().manual_seed(2)))
    plain = plain_dit(model.state_dict(), x, t, y, resolve_dit(config))
    torch.testing.assert_close(model(x, t, y), plain, rtol=1e-5, atol=1e-5)


def test_state_dict_has_the_official_keys_and_shapes():
    found = {name: list(tensor.shape) for name, tensor in on_meta(size="xl", latent_channels=64).state_dict().items()}
    assert found == stored_json("xl_shapes")


@pytest.mark.parametrize("name", stored_json("sizes"))
def test_parameter_counts(name):
    all_of_them, trainable = stored_json("sizes")[name]
    model, channels = name.removeprefix("LightningDiT-").split(" in")
    size, patch = model.split("/")
    dit = on_meta(size=SIZES[size], patch_size=int(patch), latent_channels=int(channels))
    counted = sum(parameter.numel() for parameter in dit.parameters())
    assert (counted + dit.pos_embed.numel(), counted) == (all_of_them, trainable)


def test_fixed_positions_are_the_official_ones():
    state, own = stored("state"), build_dit(OFFICIAL).state_dict()
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        assert torch.equal(own[name], state[name]), name


def test_initial_values():
    model = build_dit(replace(OFFICIAL, patch_size=2, qk_norm=True), seed=1)
    named = dict(model.named_parameters())
    assert all((p == 0).all() for n, p in named.items() if "adaLN" in n or "final_layer.linear" in n or ".bias" in n)
    assert all((p == 1).all() for n, p in named.items() if "norm" in n)
    for name, bound in {"blocks.0.attn.qkv.weight": 6 / (144 + 432), "x_embedder.proj.weight": 6 / (144 + 32)}.items():
        assert 0.95 * bound**0.5 < named[name].abs().max() <= bound**0.5
    for name in ("t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight"):
        assert named[name].std().item() == pytest.approx(0.02, rel=0.1)
    x = torch.randn(2, 8, 4, 4)
    assert (model(x, torch.rand(2), torch.tensor([1, 2])) == 0).all()
    again = dict(build_dit(replace(OFFICIAL, patch_size=2, qk_norm=True), seed=1).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in named.items())


@torch.no_grad()
def test_patches_are_put_back_where_they_came_from():
    model = random_dit(replace(OFFICIAL, patch_size=2))
    tokens, channels = torch.zeros(1, 4, 144), 8
    model.final_layer.linear.weight.zero_()
    model.final_layer.linear.bias.copy_(torch.arange(4.0 * channels))
    latents = model._velocity(tokens, torch.zeros(1, 144))
    expected = torch.arange(4.0 * channels).view(2, 2, channels)  # row and column in the patch, channel
    for row in range(4):
        for column in range(4):
            assert torch.equal(latents[0, :, row, column], expected[row % 2, column % 2])
    # And a token reads the patch that it writes: moving the input by a patch moves no other embedding.
    x = torch.zeros(1, channels, 4, 4)
    x[0, :, 2:, :2] = 1.0
    changed = (model.x_embedder(x) - model.x_embedder(torch.zeros_like(x))).abs().sum(-1)[0]
    assert (changed > 0).tolist() == [False, False, True, False]


@torch.no_grad()
def test_caption_condition():
    config = replace(OFFICIAL, condition="caption", num_classes=None, caption_width=12, qk_norm=True)
    model = random_dit(config)
    x, t = torch.randn(3, 8, 4, 4), torch.rand(3)
    captions = torch.nn.functional.normalize(torch.randn(3, 12), dim=-1)
    captions[2] = 0
    out = model(x, t, captions)
    assert not torch.allclose(out[:2], model(x, t, captions.roll(1, 0))[:2])
    torch.testing.assert_close(model(x, t, model.no_condition(3))[2], out[2])
    torch.testing.assert_close(model(x[1:], t[1:], captions[1:]), out[1:])  # samples do not see each other


def test_recomputation_changes_nothing():
    results = []
    for recompute in ("none", "selective", "full"):
        model = random_dit(OFFICIAL)
        model.recompute = recompute
        x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(5))
        model(x, torch.tensor([0.2, 0.7]), torch.tensor([3, 10])).square().mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(other[name], gradient) for other in results[1:] for name, gradient in results[0].items())
    assert all(g.abs().max() > 0 for g in results[0].values())


def test_average_starts_as_a_copy_and_does_not_train():
    model = build_averaged_dit(OFFICIAL, seed=2)
    pairs = model.averaged()
    assert len(pairs) == sum(p.requires_grad for p in model.parameters())
    assert all(torch.equal(average, trained) and not average.requires_grad for average, trained in pairs)
    inputs = {"x": torch.randn(1, 8, 4, 4), "t": torch.rand(1), "y": torch.tensor([3])}
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.add_(0.1)
    assert not torch.equal(model("velocity", **inputs), model("average", **inputs))


def test_errors():
    model = build_dit(OFFICIAL)
    with pytest.raises(UserError, match=r"latents of shape \(8, 2, 2\) do not fit"):
        model(torch.zeros(1, 8, 2, 2), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    state = stored("state")
    state["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"][:3]
    state["extra"] = state.pop("final_layer.linear.bias")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError) as raised:
        load_whole(model, state, SINGLE, before)
    faults = ("unexpected extra", "missing final_layer.linear.bias", "blocks.0.norm1.weight has shape [3], not [144]")
    for part in faults:
        assert part in str(raised.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
