"""Makes the files beside it with the real libraries: weights drawn at random, an input, and the outputs.

    pip install timm==1.0.31 open_clip_torch==3.3.0 && python tests/data/init_from/make.py

Where a model adds what MegaVTP's encoder does not have (absolute positions, a norm before the blocks), the output is
that of its block stack and final norm alone, on given tokens.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
from benchmarks.comparisons.torchvision_kernels import define_missing  # noqa: E402

WIDTH, DEPTH, HEADS, PATCH = 32, 2, 2, 8


def _libraries():
    define_missing()
    import open_clip
    import timm

    return timm, open_clip


def _stir(model: nn.Module) -> nn.Module:
    """Values that make every parameter count."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or "gamma" in name:
            parameter.data += 1
    return model.eval()


def _eva(timm, registers: int, **options) -> nn.Module:
    """A small DINOv3, as timm's vit_small_patch16_dinov3 and its kin set ``Eva`` up."""
    return _stir(timm.models.eva.Eva(
        img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, init_values=1e-5,
        global_pool="token", rope_type="dinov3", rope_temperature=100, rope_rotate_half=True, use_rot_pos_emb=True,
        use_abs_pos_emb=False, use_fc_norm=False, dynamic_img_size=True, num_reg_tokens=registers,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), **options,
    ))


@torch.no_grad()
def make() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Name -> (state dict, inputs and outputs)."""
    timm, open_clip = _libraries()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    made = {}
    for name, options in (
        ("dinov3", {"registers": 0, "qkv_bias": False}),
        ("dinov3_qkvb", {"registers": 0, "qkv_bias": True}),
        ("dinov3_plus", {"registers": 0, "qkv_bias": False, "swiglu_mlp": True, "swiglu_align_to": 8}),
    ):
        model = _eva(timm, **options)
        made[name] = (model.state_dict(), {"images": images, "out": model.forward_features(images)})
    model = _eva(timm, registers=4, qkv_bias=False)
    made["dinov3_registers"] = (model.state_dict(), {})
    model = _stir(timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=3, init_values=1e-5,
        mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=4.0, reg_tokens=1, no_embed_class=True,
    ))
    made["dinov2_giant"] = (model.state_dict(), {"tokens": tokens, "out": model.norm(model.blocks(tokens))})
    model = _stir(open_clip.model.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"image_size": 32, "layers": DEPTH, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": WIDTH, "heads": HEADS, "layers": DEPTH},
    ))
    text = torch.tensor([[62, 5, 6, 63, 0, 0, 0, 0], [62, 9, 8, 7, 6, 5, 4, 63]])
    out = model.visual.ln_post(model.visual.transformer(tokens))
    made["openclip"] = (model.state_dict(), {
        "text": text, "encode_text": model.encode_text(text, normalize=True), "tokens": tokens, "out": out,
        "image_feature": nn.functional.normalize(out[:, 0] @ model.visual.proj, dim=-1),
    })
    return made


if __name__ == "__main__":
    for name, (state, cases) in make().items():
        save_file({k: v.clone().contiguous() for k, v in state.items()}, HERE / f"{name}.safetensors")
        if cases:
            save_file({k: v.clone().contiguous() for k, v in cases.items()}, HERE / f"{name}_cases.safetensors")
