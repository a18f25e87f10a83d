"""The pre-training recipe: contrastive, self-distillation and reconstruction as passes over one batch (VTP eq. 3).

Each pass takes its rows of the batch to the device one micro-batch at a time. Indices that select rows or masked
patches are made on the host, so that no step waits for the device to say how many there are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.config.run import has_line
from megavtp.config.share import PassShare, Share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig, contrastive_size
from megavtp.data.batch import Batch, masked_rows
from megavtp.models.latent_noise import LatentNoise, draw_latent_noise
from megavtp.nn.drop_path import DropPlan, draw_drop_plan
from megavtp.objectives.centering import center_bias, sinkhorn_biases, update_center
from megavtp.objectives.contrastive import info_nce, siglip
from megavtp.objectives.koleo import koleo
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss
from megavtp.parallel.collectives import begin_gather_from_dp
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.passes import Pass
from megavtp.parallel.pipeline import Runner, forward
from megavtp.parallel.sharding import Shard
from megavtp.pixels import normalise
from megavtp.pretraining.monitors import MONITORS, CollapseMonitors
from megavtp.training.schedules import linear_warmup

CONTRASTIVE_LOSSES = {"infonce": info_nce, "siglip": siglip}


def _needed(x: Tensor | None) -> Tensor:
    assert x is not None, "a batch has all that an active objective reads"
    return x


class _PretrainingPass(Pass):
    """The base of the passes: their rows of the batch, the device, and the drop-path draws."""

    def __init__(self, config: ResolvedConfig, share: PassShare, mesh: Mesh, device: torch.device):
        self.config = config
        self.settings = getattr(config.objectives, self.name)
        self.weight = self.settings.weight
        self.share = share
        self.mesh = mesh
        self.device = device

    def prepare(self, run: Runner, batch: Batch) -> int:
        self.batch = batch
        return self.share.micro_batches

    def places(self, micro: int) -> range:
        """Return the places of a micro-batch's images in the objective's global batch."""
        rows, first = self.share.rows(micro), self.mesh.dp_rank * self.share.local
        return range(first + rows.start, first + rows.stop)

    def to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda" and not x.is_pinned():  # picked rows of a pinned batch are pageable again
            x = x.pin_memory()  # from pageable memory the copy would wait for the device
        return x.to(self.device, non_blocking=True)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalise pixels and move them to the device; a meta tensor gives a meta tensor."""
        return normalise(x) if x.is_meta else normalise(self.to_device(x))

    def drop_plan(self, micro: int, crops: list[int]) -> DropPlan | None:
        """Draw the stochastic depth of one micro-batch; ``crops`` is the number of crops of an image by crop size.

        The draw is over all crops of the global batch, so it is the same on every layout.
        """
        images = torch.tensor(self.places(micro))
        sizes = [count * self.share.batch for count in crops]
        held = [torch.cat([images + crop * self.share.batch for crop in range(count)]) for count in crops]
        plan = draw_drop_plan(
            seed=self.config.seed, step=self.batch.step, tag=self.name, depth=self.config.model.vision.depth,
            rate=self.settings.drop_path, global_sizes=sizes, local_rows=held,
        )
        return None if plan is None else plan.to(self.device)


class ContrastivePass(_PretrainingPass):
    """Image-text contrast over all pairs of the global batch."""

    name = "contrastive"
    mode = "contrastive"
    over_batch = True
    _texts: Callable[[], Tensor] | None = None  # waits for the texts of all ranks, where their gather has begun

    def prepare(self, run: Runner, batch: Batch) -> int:
        self.images, self.tokens = _needed(batch.images), _needed(batch.tokens)
        return super().prepare(run, batch)

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        rows, images = self.share.rows(micro), self.images if first else self.images.to("meta")
        pixels, size = self.pixels(images[rows]), contrastive_size(self.config)
        if size < pixels.shape[-1]:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return {
            "images": pixels, "tokens": self.to_device(self.tokens[rows]), "drop": self.drop_plan(micro, [1]),
            "on_text": self._begin_texts if self.share.micro_batches == 1 else None,
        }

    def _begin_texts(self, text: Tensor) -> None:
        """Gather the texts of all ranks while the images are encoded. (Of several micro-batches all are gathered
        together, once they have been encoded.)"""
        self._texts = begin_gather_from_dp(text, self.mesh)

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        image, text, scale, bias = outputs
        return [image, text], [scale] if bias is None else [scale, bias]

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        (image, text), bias = rows, shared[1] if len(shared) == 2 else None
        texts, self._texts = self._texts, None
        return {"loss": CONTRASTIVE_LOSSES[self.settings.loss](image, text, shared[0], bias, self.mesh, texts)}


class SelfDistillationPass(_PretrainingPass):
    """DINO across views, iBOT on masked patches, KoLeo; the EMA teacher goes first over the whole share.

    Attributes:
        centers: with softmax centering, the running mean logits of this rank's prototypes by name.
    """

    name = "self_distillation"
    mode = "student"
    state_shard = Shard(0)  # the centres are cut like the prototypes

    def __init__(self, config: ResolvedConfig, share: PassShare, mesh: Mesh, device: torch.device):
        super().__init__(config, share, mesh, device)
        self.term_weights = {
            "dino_local": self.settings.dino_weight, "dino_global": self.settings.dino_weight,
            "ibot": self.settings.ibot_weight, "koleo": self.settings.koleo_weight,
        }
        self.over_batch = self.settings.koleo_weight > 0
        prototypes = config.model.dino_head.prototypes // mesh.tp
        self.centers: dict[str, Tensor] = {}
        if self.settings.centering == "softmax":
            self.centers = {name: torch.zeros(prototypes, device=device) for name in ("cls", "patches")}
        self._next_centers: dict[str, Callable[[], Tensor]] = {}  # those of the next step, which wait for the ranks

    def prepare(self, run: Runner, batch: Batch) -> int:
        count = super().prepare(run, batch)
        s = self.settings
        self.temperature = linear_warmup(
            batch.step, round(s.teacher_temperature_warmup * self.config.train.steps), s.teacher_temperature_start,
            s.teacher_temperature,
        )
        self.monitor_names = MONITORS if s.dino_weight and has_line(self.config, batch.step + 1) else ()
        self._collapse = CollapseMonitors(self.mesh, s.student_temperature, self.temperature, s.chunk)
        self.global_crops, self.local_crops = _needed(batch.global_crops), _needed(batch.local_crops)
        masks = [_needed(batch.masks)[:, self.share.rows(micro)] for micro in range(count)]  # (2, m, patches) each
        rows_and_weights = [masked_rows(mask) for mask in masks]
        self._masked_rows, self._patch_weights = (
            [self.to_device(x) for x in column] for column in zip(*rows_and_weights)
        )
        self._masks = [self.to_device(mask.flatten(0, 1)) for mask in masks]
        self.teacher = [TeacherOutput(*out) for out in forward(run, "teacher", self._teacher_inputs, count)]
        if self.teacher:  # on the last pipeline rank
            with torch.no_grad():
                self.bias = self._teacher_bias()
        return count

    def state(self) -> dict[str, Tensor]:
        return {f"center/{name}": center for name, center in self.centers.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.centers = {name: state[f"center/{name}"] for name in self.centers}

    def _teacher_inputs(self, micro: int, first: bool) -> dict[str, Any]:
        return {"global_crops": self._crops(self.global_crops, micro, first), "masked_rows": self._masked_rows[micro]}

    def _teacher_bias(self) -> TeacherBias:
        """Compute the centering of this step's targets, over the class tokens and the masked patches of all ranks."""
        W, s = self.teacher[0].W, self.settings
        features = {name: [getattr(out, name) for out in self.teacher] for name in ("cls", "patches")}
        if s.centering == "sinkhorn":
            return TeacherBias(*sinkhorn_biases(
                list(features.values()), W, self.temperature, iterations=s.sinkhorn_iterations,
                rows_at_once=s.chunk, mesh=self.mesh,
            ))
        self._next_centers = {
            name: update_center(self.centers[name], features[name], W, momentum=s.center_momentum, mesh=self.mesh)
            for name in features
        }
        return TeacherBias(**{name: center_bias(self.centers[name], self.temperature) for name in features})

    def _crops(self, crops: Tensor, micro: int, first: bool) -> Tensor:
        crops = crops if first else crops.to("meta")
        return self.pixels(crops[:, self.share.rows(micro)].flatten(0, 1))

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        local_crops = self.local_crops
        crops = [len(self.global_crops)] + [len(local_crops)] * (len(local_crops) > 0)
        return {
            "global_crops": self._crops(self.global_crops, micro, first),
            "local_crops": self._crops(local_crops, micro, first) if len(local_crops) else None,
            "masks": self._masks[micro], "masked_rows": self._masked_rows[micro],
            "drop": self.drop_plan(micro, crops),
        }

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        self.centers |= {name: following() for name, following in self._next_centers.items()}
        self._next_centers = {}
        student = StudentOutput(*outputs)
        if self.monitor_names:
            self._collapse.add(student, self.teacher[micro], self.bias.cls)
        return self_distillation_loss(
            student, self.teacher[micro], self.bias, self._patch_weights[micro], self.settings,
            teacher_temperature=self.temperature, images_total_local=self.share.local, mesh=self.mesh,
        )

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        return list(StudentOutput(*outputs).backbone_cls.chunk(GLOBAL_CROPS)), []  # one row tensor per global crop

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        return {"koleo": koleo(torch.stack(rows), self.mesh)}

    def monitors(self) -> dict[str, Tensor]:
        values = self._collapse.values()
        del self._collapse  # it keeps a matrix of the trunk's width
        return values


class ReconstructionPass(_PretrainingPass):
    """Reconstruction of the pixels from the bottleneck latents: L1 and, if asked for, LPIPS."""

    name = "reconstruction"
    mode = "reconstruction"

    def __init__(
        self, config: ResolvedConfig, share: PassShare, mesh: Mesh, device: torch.device,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    ):
        super().__init__(config, share, mesh, device)
        self.term_weights = {"l1": self.settings.l1_weight, "perceptual": self.settings.perceptual_weight}
        self.perceptual = perceptual
        self._last: tuple[int, Tensor] | None = None  # the last micro-batch on the device, and its images

    def prepare(self, run: Runner, batch: Batch) -> int:
        self.images, self.rec_rows = _needed(batch.images), _needed(batch.rec_rows)
        self._last = None
        return super().prepare(run, batch)

    def device_images(self, micro: int) -> Tensor:
        if self._last is None or self._last[0] != micro:
            self._last = micro, self.pixels(self.images[self.rec_rows[self.share.rows(micro)]])
        return self._last[1]

    def meta_images(self) -> Tensor:
        return torch.empty((self.share.micro_batch, *self.images.shape[1:]), device="meta")

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        images = self.device_images(micro) if first else self.meta_images()
        return {"images": images, "drop": self.drop_plan(micro, [1]), "noise": self.noise(micro)}

    def noise(self, micro: int) -> LatentNoise | None:
        if self.settings.latent_noise == 0:
            return None
        model = self.config.model
        side = model.image_size // model.patch_size
        noise = draw_latent_noise(
            seed=self.config.seed, step=self.batch.step, images=self.places(micro),
            shape=(model.bottleneck, side, side), strength=self.settings.latent_noise,
            share=self.settings.latent_noise_share,
        )
        return LatentNoise(self.to_device(noise.unit), self.to_device(noise.strength))

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        target = self.device_images(micro)
        return reconstruction_terms(outputs, target, self.perceptual, images_total_local=self.share.local)


def build_passes(
    config: ResolvedConfig, share: Share, mesh: Mesh, device: torch.device,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[Pass]:
    """Make the passes of the objectives that are on, in the order in which a step runs them."""
    passes: list[Pass] = []
    if part := share.passes.get("contrastive"):
        passes.append(ContrastivePass(config, part, mesh, device))
    if part := share.passes.get("self_distillation"):
        passes.append(SelfDistillationPass(config, part, mesh, device))
    if part := share.passes.get("reconstruction"):
        passes.append(ReconstructionPass(config, part, mesh, device, perceptual))
    return passes
