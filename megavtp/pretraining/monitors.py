"""Signs that self-distillation collapses: numbers about the class tokens of a step that enter no loss.

A teacher whose answer does not depend on the picture is easily learnt, so in the loss a collapse can look like success.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.config.schema import Config
from megavtp.config.sizes import GLOBAL_CROPS
from megavtp.evaluation.tokenizer.spectrum import Moments, effective_rank
from megavtp.objectives.prototypes import prototype_logits, row_logsumexp
from megavtp.objectives.self_distillation import StudentOutput, TeacherOutput
from megavtp.parallel.collectives import all_reduce
from megavtp.parallel.mesh import Mesh
from megavtp.training.watch import Watch

MONITORS = ("teacher_entropy", "teacher_student_kl", "feature_rank")
_FIRST_STEPS, _FIRST_SHARE = 200, 0.1  # of the run, in which the head has yet to learn: no collapse is told


class CollapseMonitors:
    """Adds up the micro-batches of one step. Of K_local prototypes on this rank and a trunk of width D it keeps
    K_local + D^2 numbers."""

    def __init__(self, mesh: Mesh, student_temperature: float, teacher_temperature: float, rows_at_once: int):
        self.mesh, self.rows_at_once = mesh, rows_at_once
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self._sums: Tensor | float = 0.0  # (K_local + 1,): the assignments of all crops, and the divergence
        self._crops = 0
        self._moments = Moments()

    @torch.no_grad()
    def add(self, student: StudentOutput, teacher: TeacherOutput, bias: Tensor) -> None:
        """Add a micro-batch; ``bias`` (K_local,) balances the teacher's assignments of class tokens."""
        # As in the loss, a crop is compared with the teacher's view of the other one.
        views = teacher.cls.unflatten(0, (GLOBAL_CROPS, -1)).flip(0).flatten(0, 1)
        with torch.autocast(views.device.type, enabled=False):
            for view, crop in zip(views.split(self.rows_at_once), student.global_cls.split(self.rows_at_once)):
                logits = prototype_logits(view, teacher.W, self.teacher_temperature)
                assigned = (logits - row_logsumexp(logits, self.mesh)).exp_().sum(0)
                target = logits.add_(bias)
                target.sub_(row_logsumexp(target, self.mesh))
                answer = prototype_logits(crop, student.W, self.student_temperature)
                answer.sub_(row_logsumexp(answer, self.mesh))
                divergence = F.kl_div(answer, target, reduction="sum", log_target=True)
                self._sums = self._sums + torch.cat([assigned, divergence.view(1)])
        self._crops += views.shape[0]
        self._moments.add(student.backbone_cls)

    def values(self) -> dict[str, Tensor]:
        """Return the ``MONITORS`` over all data-parallel ranks in a collective call, which waits for the device.

        - ``teacher_entropy``: the entropy of the mean over all crops of softmax(teacher's logits / temperature), as a
          share of that of a uniform one. Centering comes after it: Sinkhorn-Knopp would make any teacher uniform.
        - ``teacher_student_kl``: KL(target || student) in nats, the mean over the pairs of global crops; the loss
          without the entropy of the target, which no student can learn away.
        - ``feature_rank``: the effective rank of the student's class tokens before the head; 0 if they do not vary.
        """
        assert isinstance(self._sums, Tensor), "no micro-batch was added"
        means = all_reduce(self._sums, self.mesh, "dp") / (self._crops * self.mesh.dp)
        uniform = math.log((len(means) - 1) * self.mesh.tp)
        local = torch.stack([torch.special.entr(means[:-1]).sum() / uniform, means[-1]])
        rank = means.new_tensor(effective_rank(self._moments.spectrum(self.mesh))).nan_to_num(0.0)
        return dict(zip(MONITORS, (*all_reduce(local, self.mesh, "tp"), rank)))


def collapse_watches(config: Config) -> list[Watch]:
    """Return the watches over the monitors, none for a run without them.

    A collapse passes these levels within tens of steps, and a healthy run stays far from them (docs/metrics.md).
    """
    settings, train = config.objectives.self_distillation, config.train
    if not settings.weight or not settings.dino_weight:
        return []
    after = max(_FIRST_STEPS, round(_FIRST_SHARE * train.steps), train.optimizer.warmup_steps)
    return [
        Watch(
            "self_distillation/teacher_entropy", 0.1, after,
            "the teacher gives nearly all pictures the same prototype (entropy of its mean assignment {value} of 1), "
            "so what it teaches does not depend on the picture",
            "try objectives.self_distillation.centering=sinkhorn, a higher teacher_temperature_start beside it, or a "
            "lower train.optimizer.lr",
        ),
        Watch(
            "self_distillation/teacher_student_kl", 0.02, after,
            "teacher and student agree on nearly every crop (KL {value} nats), so nothing is left to learn: their "
            "answers hardly depend on the picture",
            "try a lower objectives.self_distillation.teacher_temperature, a teacher_momentum nearer to 1 beside it, "
            "or a lower train.optimizer.lr",
        ),
        Watch(
            "self_distillation/feature_rank", 2.0, after,
            "the class tokens of all pictures lie nearly on one line (effective rank {value}), so they tell hardly "
            "more than one thing about a picture",
            "try a lower train.optimizer.lr, or a larger objectives.self_distillation.koleo_weight or weight of the "
            "contrastive objective",
        ),
    ]
