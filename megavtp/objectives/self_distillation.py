"""Self-distillation with masked-patch prediction (VTP equation 2; normalised as DINOv2, arXiv 2304.07193).

Shape letters: m images in this micro-batch, L local crops, p masked patches, bn head output size, D trunk width,
K_local prototypes on this rank. Crops are crop-major: all first crops, then all second.
"""

from typing import NamedTuple

from torch import Tensor

from megavtp.config.schema import SelfDistillationConfig
from megavtp.config.sizes import GLOBAL_CROPS
from megavtp.objectives.prototypes import Term, prototype_cross_entropy
from megavtp.parallel.mesh import SINGLE, Mesh


class StudentOutput(NamedTuple):
    global_cls: Tensor  # (2m, bn) head features of the masked global crops
    local_cls: Tensor  # (L*m, bn); L may be 0
    patches: Tensor  # (p, bn) head features of the masked patches
    W: Tensor  # (K_local, bn) prototypes
    backbone_cls: Tensor  # (2m, D) class tokens of the global crops before the head


class TeacherOutput(NamedTuple):
    cls: Tensor  # (2m, bn) head features of the unmasked global crops, in the same order as the student's
    patches: Tensor  # (p, bn) head features of the patches that the student does not see
    W: Tensor  # (K_local, bn)


class TeacherBias(NamedTuple):
    """The biases of ``centering``; class tokens and masked patches are balanced separately."""

    cls: Tensor  # (K_local,)
    patches: Tensor  # (K_local,)


def self_distillation_loss(
    student: StudentOutput, teacher: TeacherOutput, bias: TeacherBias, patch_weights: Tensor,
    config: SelfDistillationConfig, *, teacher_temperature: float, images_total_local: int, mesh: Mesh = SINGLE,
) -> dict[str, Tensor]:
    """Return the unweighted terms of one micro-batch: ``dino_local``, ``dino_global`` and ``ibot``.

    ``patch_weights`` (p,): 1 / number of masked patches in the patch's crop. ``images_total_local``: images of all
    micro-batches of this data-parallel rank; terms of its micro-batches add up to the rank's value, and the mean of
    that over dp is the global loss. ``dino_local`` is absent without local crops, a term of weight 0 is absent. Their
    gradients add up under ``config``'s weights and no others (see ``prototype_cross_entropy``).

    KoLeo seeks neighbours among all images of the step: the caller applies it to ``backbone_cls`` of all micro-batches.
    """
    images = student.global_cls.shape[0] // GLOBAL_CROPS
    local_crops = student.local_cls.shape[0] // images
    terms, divisors = {}, {}
    if config.dino_weight:
        pairs = GLOBAL_CROPS * (GLOBAL_CROPS - 1) + GLOBAL_CROPS * local_crops  # (student, teacher) crops per image
        divisors["dino_local"] = divisors["dino_global"] = pairs * images_total_local
        weight = config.dino_weight / divisors["dino_global"]
        views = teacher.cls.unflatten(0, (GLOBAL_CROPS, images))
        if local_crops:
            local = student.local_cls.unflatten(0, (local_crops, images))
            terms["dino_local"] = Term(local, views, bias.cls, weight=weight)
        # A global crop is compared with the teacher's view of the other one; with its own the task would be trivial.
        terms["dino_global"] = Term(student.global_cls, views.flip(0).flatten(0, 1), bias.cls, weight=weight)
    if config.ibot_weight:
        divisors["ibot"] = GLOBAL_CROPS * images_total_local
        weight = config.ibot_weight / divisors["ibot"]
        terms["ibot"] = Term(student.patches, teacher.patches, bias.patches, patch_weights, weight)
    if not terms:
        return {}
    values = prototype_cross_entropy(
        list(terms.values()), student.W, teacher.W, student_temperature=config.student_temperature,
        teacher_temperature=teacher_temperature, rows_at_once=config.chunk, mesh=mesh,
    )
    return {name: value / divisors[name] for name, value in zip(terms, values)}
