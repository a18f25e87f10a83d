"""Cross-entropy between the prototype distributions of teacher and student, without ever holding all logits.

65,536 prototypes for some ten thousand crops and masked patches would need gigabytes of float32 logits for the
student, as much for the teacher and again for the gradient. So value and gradient are computed together, some
rows at a time, from the head's features; prototypes are cut over tensor-parallel ranks.

Shape letters: s student views, v teacher views, n samples, d feature size, K_local prototypes on this rank.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavtp.parallel.collectives import all_gather, all_reduce, copy_to_tp
from megavtp.parallel.mesh import SINGLE, Mesh


def prototype_cross_entropy(
    student: Tensor, student_W: Tensor, teacher: Tensor, teacher_W: Tensor, *,
    student_temperature: float, teacher_temperature: float, teacher_bias: Tensor, row_weights: Tensor | None = None,
    rows_at_once: int = 1024, mesh: Mesh = SINGLE,
) -> Tensor:
    """Compute sum_i w_i sum_s sum_v CE(softmax(teacher_vi W_t^T / T_t + b), softmax(student_si W_s^T / T_s)).

    student (s, n, d) or (n, d); teacher (v, n, d) or (n, d): every student view of a sample meets every teacher view
    of it. student_W, teacher_W (K_local, d); b = teacher_bias (K_local,) from Sinkhorn or centering; w = row_weights
    (n,), None means ones. n may be 0. ``rows_at_once``: how many rows' logits exist at one time.

    Products run in the features' dtype with float32 results, softmax in float32 (float64 for float64). The teacher
    side gets no gradient. Returns a scalar, equal on all tp ranks; the gradient of the student's features is summed
    over tp, that of student_W is this rank's own.
    """
    student = copy_to_tp(student if student.dim() == 3 else student.unsqueeze(0), mesh)
    teacher = teacher if teacher.dim() == 3 else teacher.unsqueeze(0)
    grads = (torch.is_grad_enabled() and student.requires_grad, torch.is_grad_enabled() and student_W.requires_grad)
    with torch.autocast(student.device.type, enabled=False):
        return _PrototypeCrossEntropy.apply(
            student, student_W, teacher.detach(), teacher_W.detach(), student_temperature, teacher_temperature,
            teacher_bias.detach(), row_weights, rows_at_once, mesh, grads,
        )


def prototype_logits(features: Tensor, W: Tensor, temperature: float) -> Tensor:
    """Compute features W^T / temperature, (n, d) and (K_local, d) -> (n, K_local), float32 or wider, a new tensor."""
    return matmul_wide(features, W.to(features.dtype).T).div_(temperature)


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b of one dtype with a result of at least float32: 16-bit logits / 0.04 would be coarse."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)  # this returns the accumulator without rounding or an extra pass
    return (a @ b).to(_wide(a.dtype))


def row_logsumexp(logits: Tensor, mesh: Mesh) -> Tensor:
    """Return log sum exp over all prototypes, also those of other tp ranks: (n, K_local) -> (n, 1)."""
    local = logits.logsumexp(-1)
    # A gather of n numbers per peer and a second logsumexp replace a max- and a sum-reduction.
    return all_gather(local.unsqueeze(0), mesh, "tp").logsumexp(0).unsqueeze(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Its gradient is computed in forward, while the rows' logits exist, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx, student, student_W, teacher, teacher_W, student_T, teacher_T, bias, weights, rows_at_once, mesh, grads
    ):
        (s, n, d), v = student.shape, teacher.shape[0]
        wide = _wide(student.dtype)
        value = torch.zeros((), dtype=wide, device=student.device)
        grad_student = torch.empty_like(student, dtype=wide) if grads[0] else None
        grad_W = torch.zeros_like(student_W, dtype=wide) if grads[1] else None
        W = student_W.to(student.dtype)
        teacher_W = teacher_W.to(teacher.dtype)
        step = max(1, rows_at_once // max(s, v))
        for start in range(0, n, step):
            part = slice(start, start + step)
            target = _target(teacher[:, part], teacher_W, teacher_T, bias, mesh).to(wide)
            rows = student[:, part].reshape(-1, d)
            log_p = prototype_logits(rows, W, student_T)
            log_p = log_p.sub_(row_logsumexp(log_p, mesh)).view(s, -1, log_p.shape[-1])
            row_losses = (log_p * target).sum(-1)  # (s, step)
            w = None if weights is None else weights[part].to(wide)
            value -= (row_losses if w is None else row_losses * w).sum()
            if not any(grads):
                continue
            slope = log_p.exp_().mul_(v).sub_(target)  # gradient by student logits / T
            slope = (slope.div_(student_T) if w is None else slope.mul_((w / student_T).unsqueeze(-1))).flatten(0, 1)
            slope = slope.to(student.dtype)
            if grad_student is not None:
                grad_student[:, part] = matmul_wide(slope, W).view(s, -1, d)
            if grad_W is not None:
                grad_W += matmul_wide(slope.T, rows)
        ctx.save_for_backward(grad_student, grad_W)
        ctx.dtypes = student.dtype, student_W.dtype
        return all_reduce(value, mesh, "tp")

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        scaled = [None if g is None else (g * upstream).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes)]
        return *scaled, *(None,) * 9


def _target(teacher: Tensor, W: Tensor, temperature: float, bias: Tensor, mesh: Mesh) -> Tensor:
    """Return the probabilities of teacher views (v, n, d), summed over the views: (n, K_local)."""
    v, n, d = teacher.shape
    p = prototype_logits(teacher.reshape(-1, d), W, temperature).add_(bias)
    p = p.sub_(row_logsumexp(p, mesh)).exp_()
    return p if v == 1 else p.view(v, n, -1).sum(0)
