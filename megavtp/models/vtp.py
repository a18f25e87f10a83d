"""The joint model: one trunk, trained by contrast with text, self-distillation and reconstruction (arXiv 2512.13687).

Letters: b images, c global crops, N patches, D width, E embedding width, K prototypes, m masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.schema import ModelConfig
from megavtp.config.sizes import feature_width
from megavtp.models.dino_head import DinoHead
from megavtp.models.pixel_decoder import PixelDecoder
from megavtp.models.text_encoder import TextEncoder
from megavtp.models.vision_encoder import VisionEncoder
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
from megavtp.nn.drop_path import DropPlan
from megavtp.nn.split import share
from megavtp.parallel.layers import RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh

OBJECTIVES = frozenset({"contrastive", "self_distillation", "reconstruction"})
DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


class Teacher(nn.Module):
    """Moving average of the student's trunk and head; never trained by gradient."""

    def __init__(self, trunk: VisionEncoder, dino_head: DinoHead):
        super().__init__()
        self.trunk = trunk
        self.dino_head = dino_head
        self.requires_grad_(False)


class VTP(nn.Module):
    """All towers that the chosen objectives need. ``forward(mode, ...)`` is the only entry, as sharding engines
    hook the root module's forward.

    Parameters come uninitialised: use ``models.build.build_vtp``.

    Args:
        config: with resolved sizes (no None among widths, depths and heads).
        mesh: tensor-parallel layout.
        objectives: subset of ``OBJECTIVES``; the trunk is always there.
        recompute: what the trained towers' blocks make again in the backward pass, see ``nn.block``.
        attention: kernel choice, see ``nn.attention_kernels``.
        max_scale: ceiling of the contrastive temperature, as a factor on the cosine similarities.
        compute_dtype: of the matrix products (autocast); parameters stay float32.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh = SINGLE, *, objectives: AbstractSet[str] = OBJECTIVES,
        recompute: Recompute = "none", attention: Kernel = "auto", max_scale: float = 100.0,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        assert objectives <= OBJECTIVES, objectives
        self.config, self.mesh, self.objectives = config, mesh, frozenset(objectives)
        self.max_logit_scale = math.log(max_scale)
        self.compute_dtype = compute_dtype
        options: dict[str, Any] = {"recompute": recompute, "attention": attention}
        self.trunk = VisionEncoder(config, mesh, **options)
        width = feature_width(config)
        if "contrastive" in objectives:
            share(width, mesh, "the width of the contrastive image feature")
            self.visual_proj = RowParallelLinear(
                width, config.text.width, bias=False, mesh=mesh, input_is_parallel=False
            )
            self.text = TextEncoder(config.text, mesh, **options)
            # Of shape (1,), not (): ZeRO-3 cannot partition a parameter without dimensions.
            self.logit_scale = nn.Parameter(torch.empty(1))
            self.logit_bias = nn.Parameter(torch.empty(1)) if config.init_logit_bias is not None else None
        if "self_distillation" in objectives:
            self.dino_head = DinoHead(width, config.dino_head, mesh)
            self.teacher = Teacher(
                VisionEncoder(config, mesh, attention=attention), DinoHead(width, config.dino_head, mesh)
            )
        if "reconstruction" in objectives:
            self.pixel_decoder = PixelDecoder(config, mesh, **options)
        elif config.bottleneck_reconstruction_only and self.trunk.feature_bottleneck is not None:
            # Nothing reads it: as a trained parameter it would decay under some ZeRO stages and not under others.
            self.trunk.feature_bottleneck.requires_grad_(False)

    def forward(self, mode: str, **inputs: Any) -> Any:
        """Run one of the methods below by name: contrastive, teacher, student, reconstruction, encode, decode,
        encode_image, encode_text, features."""
        with self._precision():
            return getattr(self, f"_{mode}")(**inputs)

    def _precision(self) -> AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        # A forward reads each weight once. The cache of cast weights would only keep a 16-bit copy of the whole model
        # until its end, also of what ZeRO-3 or recomputation has released.
        return torch.autocast(self.trunk.cls_token.device.type, dtype=self.compute_dtype, cache_enabled=False)

    # Training passes

    def _contrastive(
        self, images: Tensor, tokens: Tensor, drop: DropPlan | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """images (b, 3, H, W) and tokens (b, L) -> unit features (b, E) of both in float32, scale (), bias () or None.

        The ceiling of the scale is straight-through: the value is clamped, the gradient is not, so a parameter at
        the ceiling can come down again, and gradients of parts of a batch still add up to the whole's.
        """
        image_features, text_features = self._encode_image(images, drop), self._encode_text(tokens)
        log_scale = self.logit_scale.float().squeeze(0)
        log_scale = log_scale + (log_scale.clamp(max=self.max_logit_scale) - log_scale).detach()
        bias = None if self.logit_bias is None else self.logit_bias.float().squeeze(0)
        return image_features, text_features, log_scale.exp(), bias

    @torch.no_grad()
    def _teacher(self, global_crops: Tensor, masked_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's targets, from unmasked crops.

        global_crops (c * b, 3, H, W), crop-major; masked_rows (m,): masked patches as indices into (c * b * N).
        Returns unit head features of the class tokens (c * b, bottleneck; in the order of the crops, not swapped)
        and of the masked patches (m, bottleneck), and prototypes (K / tp, bottleneck).
        """
        (tokens,) = self.teacher.trunk([global_crops])
        cls, masked = self._wide(self.teacher.trunk, tokens[:, 0]), self._pick(self.teacher.trunk, tokens, masked_rows)
        features, prototypes = self.teacher.dino_head(torch.cat([cls, masked]))
        cls, masked = features.split([len(cls), len(masked)])
        return cls, masked, prototypes

    def _student(
        self, global_crops: Tensor, masks: Tensor, masked_rows: Tensor, local_crops: Tensor | None = None,
        drop: DropPlan | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The student's side: masked global crops and local crops, one packed pass.

        masks (c * b, N) bool; ``drop`` has a segment for the global crops and, if there are any, one for the local
        crops. Returns unit head features of the global class tokens, the local class tokens and the masked patches,
        the prototypes, and the global class tokens before the head (c * b, D), which KoLeo reads.
        """
        crops, crop_masks = [global_crops], [masks]
        if local_crops is not None and len(local_crops):
            crops, crop_masks = [global_crops, local_crops], [masks, None]
        tokens = self.trunk(crops, crop_masks, drop)
        inputs = [self._wide(self.trunk, t[:, 0]) for t in tokens]
        inputs.append(self._pick(self.trunk, tokens[0], masked_rows))
        features, prototypes = self.dino_head(torch.cat(inputs))
        global_cls, *local, masked = features.split([len(x) for x in inputs])
        local_cls = local[0] if local else features[:0]
        return global_cls, local_cls, masked, prototypes, inputs[0]

    def _reconstruction(self, images: Tensor, drop: DropPlan | None = None) -> Tensor:
        """images (b, 3, H, W), normalised -> their reconstruction, same shape and space."""
        return self.pixel_decoder(self._encode(images, drop))

    # Parts, for evaluation

    def _encode(self, images: Tensor, drop: DropPlan | None = None) -> Tensor:
        """Latents (b, bottleneck, H / patch, W / patch)."""
        (tokens,) = self.trunk([images], drop=drop)
        rows, columns = (size // self.config.patch_size for size in images.shape[-2:])
        return self.trunk.bottleneck(tokens[:, 1:]).transpose(1, 2).unflatten(2, (rows, columns))

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in normalised space from latents."""
        return self.pixel_decoder(latents)

    def _encode_image(self, images: Tensor, drop: DropPlan | None = None) -> Tensor:
        """Unit image features (b, E), float32."""
        (tokens,) = self.trunk([images], drop=drop)
        tokens = self._wide(self.trunk, tokens if self.config.vision.clip_feature == "pooled" else tokens[:, :1])
        feature = tokens[:, 1:].mean(1) if self.config.vision.clip_feature == "pooled" else tokens[:, 0]
        return F.normalize(self.visual_proj(feature).float(), dim=-1)

    def _encode_text(self, tokens: Tensor) -> Tensor:
        """Unit text features (b, E), float32."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def _features(self, images: Tensor, layers: Sequence[int] | None = None) -> Any:
        """Class token (b, D) and patch tokens (b, N, D) after the final norm, before the bottleneck; with ``layers``
        (block indices) a list of such pairs, the norm applied to each."""
        if layers is None:
            (tokens,) = self.trunk([images])
            return tokens[:, 0], tokens[:, 1:]
        return [(tokens[:, 0], tokens[:, 1:]) for (tokens,) in self.trunk([images], layers=layers)]

    def _wide(self, trunk: VisionEncoder, features: Tensor) -> Tensor:
        """What the contrastive and self-distillation objectives read: full width, or the bottleneck if it is shared."""
        return features if self.config.bottleneck_reconstruction_only else trunk.bottleneck(features)

    def _pick(self, trunk: VisionEncoder, tokens: Tensor, patch_rows: Tensor) -> Tensor:
        patches = tokens.shape[1] - 1
        # Index the packed tokens, class tokens included: no copy of all the patches.
        rows = patch_rows + torch.div(patch_rows, patches, rounding_mode="floor") + 1
        return self._wide(trunk, tokens.flatten(0, 1).index_select(0, rows))

    # Teacher

    def teacher_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(teacher, student) parameters, always in the same order."""
        return [(self.get_parameter(f"teacher.{name}"), student) for name, student in self._distilled()]

    def start_teacher(self) -> None:
        """Make the teacher a copy of the student."""
        with torch.no_grad():
            for teacher, student in self.teacher_pairs():
                teacher.copy_(student)

    def _distilled(self) -> Iterator[tuple[str, nn.Parameter]]:
        for tower in ("trunk", "dino_head"):
            yield from getattr(self, tower).named_parameters(prefix=tower)
