"""The losses of self-distillation beside lightly's: from features to the gradients by them and by the prototypes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.comparisons.comparison import Pair, Setting
from benchmarks.prototypes import unit_inputs
from benchmarks.side_by_side import difference
from megavtp.config.schema import SelfDistillationConfig
from megavtp.config.sizes import GLOBAL_CROPS
from megavtp.objectives.centering import center_bias, update_center
from megavtp.objectives.self_distillation import TeacherBias, self_distillation_loss

TEMPERATURE, LOCAL_CROPS = 0.07, 8
SETTINGS = SelfDistillationConfig(centering="softmax")  # lightly has no Sinkhorn-Knopp


@contextmanager
def self_distillation(setting: Setting) -> Iterator[Pair]:
    from lightly.loss import DINOLoss, IBOTPatchLoss

    images, masked, prototypes = setting.size((2, 3, 64), (4, 30, 65_536), (64, 60, 65_536))
    crops = GLOBAL_CROPS * images
    student, teacher = unit_inputs(images, crops * masked, prototypes, setting.device, setting.dtype)
    mask = torch.zeros(crops, 1, 4 * masked, dtype=torch.bool, device=setting.device)
    mask[..., :masked] = True
    weights = torch.full((crops * masked,), 1 / masked, device=setting.device)
    inputs = [student.global_cls, student.local_cls, student.patches, student.W]
    centers = {name: torch.zeros(prototypes, device=setting.device) for name in ("cls", "patches")}

    def by_us() -> list[Tensor]:
        bias = TeacherBias(*(center_bias(center, TEMPERATURE) for center in centers.values()))
        for name in centers:
            following = update_center(
                centers[name], [getattr(teacher, name)], teacher.W, momentum=SETTINGS.center_momentum
            )
            centers[name] = following()
        terms = self_distillation_loss(
            student, teacher, bias, weights, SETTINGS, teacher_temperature=TEMPERATURE, images_total_local=images
        )
        loss = torch.stack(list(terms.values())).sum()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    options = dict(teacher_temp=TEMPERATURE, student_temp=SETTINGS.student_temperature, output_dim=prototypes)
    dino, ibot = DINOLoss(**options).to(setting.device), IBOTPatchLoss(**options).to(setting.device)

    def by_lightly() -> list[Tensor]:
        with torch.no_grad(), setting.autocast():
            wanted, wanted_patches = ((x @ teacher.W.T).float() for x in (teacher.cls, teacher.patches))
        with setting.autocast():
            got, got_local, got_patches = ((x @ student.W.T).float() for x in inputs[:3])
        loss = dino(list(wanted.chunk(2)), [*got.chunk(2), *got_local.chunk(LOCAL_CROPS)], teacher_temp=TEMPERATURE)
        loss = loss + ibot(wanted_patches, got_patches, mask, teacher_temp=TEMPERATURE)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    yield Pair(
        f"DINO and iBOT losses of {images} images, {len(weights)} masked patches, {prototypes:,} prototypes, centering "
        "by a running mean, forward and backward",
        by_us, by_lightly, difference(by_us(), by_lightly()),
    )
