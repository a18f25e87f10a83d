"""The joint model trains one trunk by contrast with text, self-distillation and reconstruction (arXiv 2512.13687).

Letters: b images, c global crops, N patches, D width, E embedding width, K prototypes, m masked patches.
"""

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavtp.config.sizes import ResolvedModel, feature_width
from megavtp.errors import UserError
from megavtp.models.cuts import tower_cuts
from megavtp.models.dino_head import DinoHead
from megavtp.models.latent_noise import LatentNoise
from megavtp.models.pixel_decoder import PixelDecoder
from megavtp.models.text_encoder import TextEncoder
from megavtp.models.vision_encoder import VisionEncoder
from megavtp.nn.attention_kernels import Kernel
from megavtp.nn.block import Recompute
from megavtp.nn.drop_path import DropPlan
from megavtp.nn.precision import computing_in
from megavtp.parallel.layers import RowParallelLinear
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.parallel.striping import ActivationSpec, Stripe

OBJECTIVES = frozenset({"contrastive", "self_distillation", "reconstruction"})
DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
Result = Tensor | tuple[Tensor, ...]  # of a leg: at the tower's end a tensor, before it the activations
Leg = Callable[..., Any]  # a method (chunk, activations, **inputs) that runs one chunk of one tower


class Teacher(nn.Module):
    """The moving average of the student's trunk and head; no gradient trains it."""

    def __init__(self, trunk: VisionEncoder, dino_head: DinoHead | None):
        super().__init__()
        self.trunk = trunk
        self.dino_head = dino_head
        self.requires_grad_(False)


class VTP(nn.Module):
    """All towers that the chosen objectives need. ``forward(mode, ...)`` is the only entry, as sharding engines
    hook the root module's forward.

    Under pipeline parallelism a rank holds its chunks of every tower, under their names in the whole model: the
    embeddings are on the first rank, the layers after the blocks on the last.

    Parameters are uninitialised: use ``models.build.build_vtp``.

    Args:
        config: the resolved model.
        mesh: tensor- and pipeline-parallel layout.
        objectives: subset of ``OBJECTIVES``; the trunk is always there.
        recompute: what the trained towers' blocks recompute in the backward pass, see ``nn.block``.
        attention: kernel choice, see ``nn.attention_kernels``.
        max_scale: ceiling of the contrastive temperature, as a factor on the cosine similarities.
        compute_dtype: dtype of the matrix products (autocast); parameters stay float32.
        frozen_encoder: the trunk is not trained.
    """

    def __init__(
        self, config: ResolvedModel, mesh: Mesh = SINGLE, *, objectives: AbstractSet[str] = OBJECTIVES,
        recompute: Recompute = "none", attention: Kernel = "auto", max_scale: float = 100.0,
        compute_dtype: torch.dtype = torch.float32, frozen_encoder: bool = False,
    ):
        super().__init__()
        assert objectives <= OBJECTIVES, objectives
        self.config, self.mesh, self.objectives = config, mesh, frozenset(objectives)
        self.max_logit_scale = math.log(max_scale)
        self.compute_dtype = compute_dtype
        cuts = tower_cuts(config, objectives, mesh.chunks)
        stripes = {tower: Stripe(chunks, mesh.pp, mesh.pp_rank) for tower, chunks in cuts.items()}
        options: dict[str, Any] = {"recompute": recompute, "attention": attention}
        self.trunk = VisionEncoder(config, mesh, stripe=stripes["trunk"], **options)
        if "contrastive" in objectives:
            self.text = TextEncoder(config.text, mesh, stripe=stripes["text"], **options)
            if mesh.is_last_stage:
                self._add_contrastive_head()
        if "self_distillation" in objectives:
            self.dino_head = teacher_head = None
            if mesh.is_last_stage:
                self.dino_head = DinoHead(feature_width(config), config.dino_head, mesh)
                teacher_head = DinoHead(feature_width(config), config.dino_head, mesh)
            self.teacher = Teacher(
                VisionEncoder(config, mesh, stripe=stripes["trunk"], attention=attention), teacher_head
            )
        if "reconstruction" in objectives:
            self.pixel_decoder = PixelDecoder(config, mesh, stripe=stripes["pixel_decoder"], **options)
        elif config.bottleneck_reconstruction_only and self.trunk.feature_bottleneck is not None:
            # Nothing reads it: as a trained parameter it would decay under some ZeRO stages and not under others.
            self.trunk.feature_bottleneck.requires_grad_(False)
        if frozen_encoder:
            self.trunk.requires_grad_(False)

    def _add_contrastive_head(self) -> None:
        width = feature_width(self.config)
        self.mesh.tp_part(width, "the width of the contrastive image feature")
        self.visual_proj = RowParallelLinear(
            width, self.config.text.width, bias=False, mesh=self.mesh, input_is_parallel=False
        )
        # Its shape is (1,), not (): ZeRO-3 cannot partition a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1)) if self.config.init_logit_bias is not None else None

    def forward(self, mode: str, stage: int | None = None, activations: Sequence[Tensor] = (), **inputs: Any) -> Any:
        """Run the pass ``mode``: contrastive, teacher, student, reconstruction, encode, decode, encode_image,
        encode_text or features; the methods of those names say what goes in and comes out.

        With ``stage``, run only that stage of the pass, which this rank must hold. ``activations`` is what the previous
        stage returned; a stage after the first reads only the shape of the pixels in ``inputs``.
        """
        with self.precision():
            if stage is not None:
                leg, chunk = divmod(stage, self.mesh.chunks)
                result = self._ROUTES[mode][leg](self, chunk, activations, **inputs)
                return (result,) if self._ends(chunk) and leg + 1 < self.legs(mode) else result
            for run_leg in self._ROUTES[mode]:
                result = run_leg(self, None, activations, **inputs)
                activations = (result,)
            return result

    def legs(self, mode: str) -> int:
        """Count the towers that the pass goes through one after another; each has one stage per chunk."""
        return len(self._ROUTES[mode])

    def activation_specs(self, mode: str, stage: int, **inputs: Any) -> list[ActivationSpec]:
        """Give shape and dtype of each tensor that enters ``stage`` > 0 of a pass with such inputs (shapes suffice)."""
        leg, chunk = divmod(stage, self.mesh.chunks)
        if self._ROUTES[mode][leg] in self._DECODING:
            latents = self._latent_shape(**inputs)
            if chunk == 0:
                bottleneck = self.config.bottleneck != self.config.vision.width
                return [(latents, self.compute_dtype if bottleneck else torch.float32)]
            return [((latents[0] * latents[2] * latents[3], self.config.decoder.width), torch.float32)]
        # The residual streams stay in float32, whatever the compute.
        specs: list[ActivationSpec] = []
        if crops := [inputs[n] for n in ("images", "global_crops", "local_crops") if inputs.get(n) is not None]:
            patch = self.config.patch_size
            tokens = sum(len(x) * (1 + x.shape[-2] // patch * (x.shape[-1] // patch)) for x in crops)
            specs.append(((tokens, self.config.vision.width), torch.float32))
        if "tokens" in inputs:
            specs.append(((inputs["tokens"].numel(), self.config.text.width), torch.float32))
        return specs

    def _latent_shape(self, images: Tensor | None = None, latents: Tensor | None = None, **_: Any) -> tuple[int, ...]:
        if latents is not None:
            return tuple(latents.shape)
        assert images is not None, "a decoder is given latents, or the images that they were encoded from"
        rows, columns = (size // self.config.patch_size for size in images.shape[-2:])
        return len(images), self.config.bottleneck, rows, columns

    def precision(self) -> AbstractContextManager[object]:
        return computing_in(self.compute_dtype, self.trunk.rope_embed.periods.device)

    # Legs. Each runs one chunk of a tower (None: all of it) and returns the activations for the next, or at the tower's
    # end its result. Activations go by position: ZeRO-3 sees from positional tensors when a module's backward is over.

    def _contrast(
        self, chunk: int | None, activations: Sequence[Tensor], images: Tensor, tokens: Tensor,
        drop: DropPlan | None = None, on_text: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Map images (b, 3, H, W) and tokens (b, L) to unit features (b, E) of both, scale (), and bias () or None.

        The texts go first: ``on_text`` is called with their features before the images are encoded.

        The optimizer keeps the scale's parameter below its ceiling; only weights from elsewhere can exceed it. The
        clamp is straight-through: it limits the value but not the gradient, so a parameter at the ceiling can come down
        again, and the gradients of parts of a batch still add up to the whole batch's.
        """
        text = self.text(tokens, chunk, *activations[1:])
        if self._ends(chunk):
            text = F.normalize(text.float(), dim=-1)
            if on_text is not None:
                on_text(text)
        image = self._run_trunk(chunk, activations[:1], [images], drop=drop)
        if not self._ends(chunk):
            return image, text
        log_scale = self.logit_scale.float().squeeze(0)
        log_scale = log_scale + (log_scale.clamp(max=self.max_logit_scale) - log_scale).detach()
        bias = None if self.logit_bias is None else self.logit_bias.float().squeeze(0)
        return self._image_feature(image[0]), text, log_scale.exp(), bias

    @torch.no_grad()
    def _teach(
        self, chunk: int | None, activations: Sequence[Tensor], global_crops: Tensor, masked_rows: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the teacher's targets from unmasked crops.

        global_crops (c * b, 3, H, W) are crop-major; masked_rows (m,) index the masked patches in (c * b * N).
        Returns unit head features of the class tokens (c * b, bottleneck; in the order of the crops, not swapped)
        and of the masked patches (m, bottleneck), and prototypes (K / tp, bottleneck).
        """
        trunk = self.teacher.trunk
        tokens = self._run_trunk(chunk, activations, [global_crops], trunk=trunk)
        if not self._ends(chunk):
            return (tokens,)
        assert self.teacher.dino_head is not None  # it is on the last stage
        cls, masked = self._wide(trunk, tokens[0][:, 0]), self._pick(trunk, tokens[0], masked_rows)
        features, prototypes = self.teacher.dino_head(torch.cat([cls, masked]))
        cls, masked = features.split([len(cls), len(masked)])
        return cls, masked, prototypes

    def _study(
        self, chunk: int | None, activations: Sequence[Tensor], global_crops: Tensor, masks: Tensor,
        masked_rows: Tensor, local_crops: Tensor | None = None, drop: DropPlan | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the student on masked global crops and on local crops in one packed pass.

        masks are (c * b, N) bool; ``drop`` has a segment for the global crops and, if there are any, one for the local
        crops. Returns unit head features of the global class tokens, the local class tokens and the masked patches,
        the prototypes, and the global class tokens before the head (c * b, D), which KoLeo reads.
        """
        crops: list[Tensor] = [global_crops]
        crop_masks: list[Tensor | None] = [masks]
        if local_crops is not None and len(local_crops):
            crops, crop_masks = [*crops, local_crops], [*crop_masks, None]
        tokens = self._run_trunk(chunk, activations, crops, crop_masks, drop)
        if not self._ends(chunk):
            return (tokens,)
        assert self.dino_head is not None  # it is on the last stage
        inputs = [self._wide(self.trunk, t[:, 0]) for t in tokens]
        inputs.append(self._pick(self.trunk, tokens[0], masked_rows))
        features, prototypes = self.dino_head(torch.cat(inputs))
        global_cls, *local, masked = features.split([len(x) for x in inputs])
        local_cls = local[0] if local else features[:0]
        return global_cls, local_cls, masked, prototypes, inputs[0]

    def _encode(
        self, chunk: int | None, activations: Sequence[Tensor], images: Tensor, drop: DropPlan | None = None,
        noise: LatentNoise | None = None,
    ) -> Result:
        """Encode normalised images (b, 3, H, W) to latents (b, bottleneck, H / patch, W / patch)."""
        tokens = self._run_trunk(chunk, activations, [images], drop=drop)
        if not self._ends(chunk):
            return (tokens,)
        shape = self._latent_shape(images)
        return self.trunk.bottleneck(tokens[0][:, 1:]).transpose(1, 2).unflatten(2, shape[2:])

    def _decode(
        self, chunk: int | None, activations: Sequence[Tensor], latents: Tensor | None = None,
        images: Tensor | None = None, drop: DropPlan | None = None, noise: LatentNoise | None = None,
        decoder: PixelDecoder | None = None, with_head_input: bool = False,
    ) -> Result:
        """Decode latents to images (b, 3, H, W), normalised as the encoder's input; ``noise`` is added to them first.

        The latents are given, or the previous leg has just encoded them from ``images``. For ``with_head_input`` see
        ``PixelDecoder``.
        """
        if chunk:
            latents, x = torch.empty(self._latent_shape(images, latents), device="meta"), activations[0]
        else:
            latents, x = activations[0] if activations else latents, None
            if latents is not None and noise is not None:
                latents = noise.add(latents)
        x = (decoder or self.pixel_decoder)(latents, chunk, x, with_head_input)
        return x if self._ends(chunk) else (x,)

    def _embed_image(self, chunk: int | None, activations: Sequence[Tensor], images: Tensor) -> Result:
        """Return unit image features (b, E) in float32."""
        tokens = self._run_trunk(chunk, activations, [images])
        return self._image_feature(tokens[0]) if self._ends(chunk) else (tokens,)

    def _embed_text(self, chunk: int | None, activations: Sequence[Tensor], tokens: Tensor) -> Result:
        """Return unit text features (b, E) in float32."""
        x = self.text(tokens, chunk, *activations)
        return F.normalize(x.float(), dim=-1) if self._ends(chunk) else (x,)

    def _features(
        self, chunk: int | None, activations: Sequence[Tensor], images: Tensor, layers: Sequence[int] | None = None
    ) -> Any:
        """Return class token (b, D) and patch tokens (b, N, D) after the final norm, before the bottleneck; with
        ``layers`` (block indices) a list of such pairs, each of them normalised."""
        if layers is not None:
            if chunk is not None:
                raise UserError("features of inner layers need the whole encoder on one rank: set parallel.pp=1")
            return [(tokens[:, 0], tokens[:, 1:]) for (tokens,) in self.trunk([images], layers=layers)]
        tokens = self._run_trunk(chunk, activations, [images])
        return (tokens[0][:, 0], tokens[0][:, 1:]) if self._ends(chunk) else (tokens,)

    def _run_trunk(
        self, chunk: int | None, activations: Sequence[Tensor], crops: list[Tensor],
        masks: Sequence[Tensor | None] | None = None, drop: DropPlan | None = None, trunk: VisionEncoder | None = None,
    ) -> Any:
        return (trunk or self.trunk)(crops, masks, drop, None, True, chunk, *activations)

    def _ends(self, chunk: int | None) -> bool:
        return chunk is None or chunk == self.mesh.chunks - 1

    def _image_feature(self, tokens: Tensor) -> Tensor:
        pooled = self.config.vision.clip_feature == "pooled"
        tokens = self._wide(self.trunk, tokens if pooled else tokens[:, :1])
        feature = tokens[:, 1:].mean(1) if pooled else tokens[:, 0]
        return F.normalize(self.visual_proj(feature).float(), dim=-1)

    def _wide(self, trunk: VisionEncoder, features: Tensor) -> Tensor:
        """Return what the contrastive and self-distillation objectives read: full width, or a shared bottleneck."""
        return features if self.config.bottleneck_reconstruction_only else trunk.bottleneck(features)

    def _pick(self, trunk: VisionEncoder, tokens: Tensor, patch_rows: Tensor) -> Tensor:
        patches = tokens.shape[1] - 1
        # Indexing the packed tokens, class tokens included, avoids a copy of all patches.
        rows = patch_rows + torch.div(patch_rows, patches, rounding_mode="floor") + 1
        return self._wide(trunk, tokens.flatten(0, 1).index_select(0, rows))

    # Mode -> its legs: the towers that a pass goes through one after another.
    _ROUTES: ClassVar[dict[str, tuple[Leg, ...]]] = {
        "contrastive": (_contrast,), "teacher": (_teach,), "student": (_study,),
        "reconstruction": (_encode, _decode), "encode": (_encode,), "decode": (_decode,),
        "encode_image": (_embed_image,), "encode_text": (_embed_text,), "features": (_features,),
    }

    _DECODING: ClassVar[frozenset[Leg]] = frozenset({_decode})  # the legs that run through a pixel decoder

    # Teacher

    def averaged(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pair the parameters of an average (the teacher's) with the trained ones, always in the same order."""
        if "self_distillation" not in self.objectives:
            return []
        return [(teacher, self.get_parameter(name)) for name, teacher in self.teacher.named_parameters()]

    def start_averages(self) -> None:
        """Make every average a copy of what it follows."""
        with torch.no_grad():
            for average, trained in self.averaged():
                average.copy_(trained)
