"""The FLOP model against torch's own counter on the real model, and against known figures."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavtp.config.schema import (
    Config,
    DecoderConfig,
    DinoHeadConfig,
    ModelConfig,
    ObjectivesConfig,
    ReconstructionConfig,
    TextConfig,
    VisionConfig,
)
from megavtp.config.sizes import resolve_model
from megavtp.models.dino_head import DinoHead
from megavtp.models.vtp import VTP
from megavtp.planning import flops
from megavtp.planning.devices import device_peak_tflops

TINY = ModelConfig(
    image_size=64, patch_size=16, bottleneck=8,
    vision=VisionConfig(width=48, depth=3, heads=3), decoder=DecoderConfig(width=32, depth=2, heads=2),
    text=TextConfig(width=40, depth=2, heads=2, context_length=9, vocab_size=50),
    dino_head=DinoHeadConfig(prototypes=70, hidden=24, bottleneck=16),
)
ALL = frozenset({"contrastive", "self_distillation", "reconstruction"})


def counted(function, *args, **kwargs) -> float:
    # The counter knows attention as matrix products, not the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*args, **kwargs)
    return counter.get_total_flops()


def test_transformer_of_plain_torch_layers():
    tokens, width, hidden = 10, 32, 48
    qkv, proj, x = torch.randn(96, 32), torch.randn(32, 32), torch.randn(1, tokens, width)
    up, gate, down = torch.randn(hidden, 32), torch.randn(hidden, 32), torch.randn(32, hidden)

    def block():
        q, k, v = F.linear(x, qkv).view(1, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
        y = F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), proj)
        return F.linear(F.silu(F.linear(y, up)) * F.linear(y, gate), down)

    assert flops.transformer_flops(tokens, width, 3, hidden, gated=True) == 3 * counted(block)


@pytest.mark.parametrize("change", [{}, {"vision": VisionConfig(width=48, depth=3, heads=3, ffn="mlp", mlp_ratio=3.0)}])
def test_towers_of_the_real_model(change):
    config = replace(TINY, **change)
    model = VTP(config, objectives=ALL)
    images, local = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)
    tokens = torch.randint(0, 50, (2, 9))
    for batch in (images, local):
        assert 2 * flops.vision_flops(config, batch.shape[-1]) == counted(model, "features", images=batch)
    visual_projection = 2 * 48 * 40
    assert 2 * flops.text_flops(config) == counted(model, "encode_text", tokens=tokens)
    pair = flops.vision_flops(config, 64) + visual_projection + flops.text_flops(config)
    assert 2 * pair == counted(model, "contrastive", images=images, tokens=tokens)
    latents = torch.randn(2, 8, 4, 4)
    assert 2 * flops.decoder_flops(config, 64) == counted(model, "decode", latents=latents)


def test_head_with_its_logits():
    head, x = DinoHead(48, TINY.dino_head), torch.randn(5, 48)

    def logits():
        features, prototypes = head(x)
        return features @ prototypes.T

    assert 5 * flops.dino_head_flops(TINY.dino_head, 48) == counted(logits)


def vgg16() -> nn.Sequential:
    layers, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.Conv2d(384, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1),
    )


@pytest.mark.parametrize("kind, network", [("lpips-vgg", vgg16), ("lpips-alex", alexnet)])
@pytest.mark.parametrize("size", [128, 256])
def test_perceptual_networks(kind, network, size):
    with torch.device("meta"):
        assert flops.perceptual_flops(kind, size) == counted(network(), torch.empty(1, 3, size, size))


def large(depth: int = 4) -> Config:
    """VTP-L with the 4-layer decoder of the paper's studies."""
    return Config(model=resolve_model(ModelConfig(size="l", decoder=DecoderConfig(depth=depth))))


def test_known_figures_of_the_large_model():
    model = large().model
    assert flops.vision_flops(model, 256) == pytest.approx(162e9, rel=5e-3)
    assert flops.vision_flops(model, 96) == pytest.approx(22.5e9, rel=5e-3)
    assert flops.text_flops(model) == pytest.approx(13.3e9, rel=5e-3)
    assert flops.decoder_flops(model, 256) == pytest.approx(26.8e9, rel=2e-2)  # known without the two projections
    assert flops.perceptual_flops("lpips-vgg", 256) == pytest.approx(40.1e9, rel=5e-3)


def test_known_training_costs_of_the_large_model():
    config = large()
    config = replace(config, objectives=replace(
        config.objectives,
        self_distillation=replace(config.objectives.self_distillation, drop_path=0.0, ibot_weight=0.0, batch=1),
        reconstruction=replace(config.objectives.reconstruction, batch=1),
    ), train=replace(config.train, batch_size=1),
        data=replace(config.data, augment=replace(config.data.augment, global_size=256)))
    step = {name: value / 1e12 for name, value in flops.flops_per_step(config).items()}
    heads = (3 * 10 + 2) * flops.dino_head_flops(config.model.dino_head, 1024) / 1e12
    assert step["contrastive"] == pytest.approx(0.53, rel=1e-2)
    assert step["self_distillation"] - heads == pytest.approx(1.83, rel=1e-2)
    assert step["reconstruction"] == pytest.approx(0.69, rel=1e-2)
    assert step["total"] == pytest.approx(sum(value for name, value in step.items() if name != "total"))


def test_step_follows_batches_switches_and_drop_path():
    config = large()
    base = flops.flops_per_step(config)
    doubled = flops.flops_per_step(replace(config, train=replace(config.train, batch_size=2 * 16_384)))
    assert doubled["contrastive"] == 2 * base["contrastive"] and doubled["reconstruction"] == base["reconstruction"]
    off = ObjectivesConfig(reconstruction=ReconstructionConfig(weight=0.0))
    assert flops.flops_per_step(replace(config, objectives=off))["reconstruction"] == 0
    half = replace(config.objectives.contrastive, drop_path=0.5)
    dropped = flops.flops_per_step(replace(config, objectives=replace(config.objectives, contrastive=half)))
    per_image = flops.vision_flops(config.model, 256) - flops.vision_flops(config.model, 256, 0.5)
    assert base["contrastive"] - dropped["contrastive"] == pytest.approx(3 * 16_384 * per_image)
    small = replace(config.objectives.contrastive, image_size=128)
    reduced = flops.flops_per_step(replace(config, objectives=replace(config.objectives, contrastive=small)))
    per_image = flops.vision_flops(config.model, 256) - flops.vision_flops(config.model, 128)
    assert base["contrastive"] - reduced["contrastive"] == pytest.approx(3 * 16_384 * per_image)
    assert reduced["reconstruction"] == base["reconstruction"]


@pytest.mark.parametrize("bottleneck_only", [True, False])
def test_self_distillation_of_the_real_model(bottleneck_only):
    """Student and teacher forwards of one image at the expected number of masked patches."""
    model = replace(TINY, bottleneck_reconstruction_only=bottleneck_only)
    config = Config(model=model)
    config = replace(
        config,
        data=replace(config.data, augment=replace(config.data.augment, global_size=64, local_size=32, local_crops=3)),
        objectives=replace(config.objectives, self_distillation=replace(
            config.objectives.self_distillation, batch=1, drop_path=0.0, mask_ratio=(0.25, 0.75))),
    )
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, :8] = True  # half of one of two crops: the expectation
    rows = masks.flatten().nonzero().squeeze(1)
    net = VTP(model, objectives=ALL)
    crops, local = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)

    def logits(mode, **inputs):
        *features, prototypes, _ = (*net(mode, **inputs), None) if mode == "teacher" else net(mode, **inputs)
        return [x @ prototypes.T for x in features]

    student = counted(logits, "student", global_crops=crops, local_crops=local, masks=masks, masked_rows=rows)
    teacher = counted(logits, "teacher", global_crops=crops, masked_rows=rows)
    assert flops.flops_per_step(config)["self_distillation"] == pytest.approx(3 * student + teacher)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5),
    ("NVIDIA H200", 989.4), ("NVIDIA H20", 148), ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121), ("NVIDIA B200", 2250),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA RTX 6000 Ada Generation", 364.25), ("NVIDIA RTX A6000", 154.8),
    ("AMD Instinct MI300X", 1307.4), ("Tesla V100-SXM2-16GB", None), ("cpu", None),
])
def test_peak_of_known_devices(name, peak):
    assert device_peak_tflops(name, "bf16") == peak
    assert device_peak_tflops(name, "fp32") is None
