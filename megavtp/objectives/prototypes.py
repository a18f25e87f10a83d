"""Cross-entropy between the prototype distributions of teacher and student, without ever holding all logits.

65,536 prototypes for some ten thousand crops and masked patches would need gigabytes of float32 logits for the
student, as much for the teacher and again for the gradient. So value and gradient are computed together, some
rows at a time, from the head's features; prototypes are cut over tensor-parallel ranks.

Shape letters: s student views, v teacher views, n samples, d feature size, K_local prototypes on this rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavtp.parallel.collectives import all_gather, all_reduce, copy_to_tp
from megavtp.parallel.mesh import SINGLE, Mesh


class Term(NamedTuple):
    """Views of some samples: every student view of a sample meets every teacher view of it."""

    student: Tensor  # (s, n, d) features, or (n, d); n may be 0
    teacher: Tensor  # (v, n, d), or (n, d)
    teacher_bias: Tensor  # (K_local,) from Sinkhorn or centering
    row_weights: Tensor | None = None  # (n,); None means ones
    weight: float = 1.0  # of this term in the loss, not 0


def prototype_cross_entropy(
    terms: Sequence[Term], student_W: Tensor, teacher_W: Tensor, *, student_temperature: float,
    teacher_temperature: float, rows_at_once: int = 1024, mesh: Mesh = SINGLE,
) -> Tensor:
    """Compute sum_i w_i sum_s sum_v CE(softmax(teacher_vi W_t^T / T_t + b), softmax(student_si W_s^T / T_s)) per term.

    student_W, teacher_W (K_local, d); b and w are the term's bias and row weights. ``rows_at_once``: how many rows'
    logits exist at one time. Products run in the features' dtype with float32 results, softmax in float32 (float64
    for float64). Returns the terms without their weights, (len(terms),), equal on all tp ranks.

    All terms add to one gradient of student_W, which is this rank's own: it is right for a loss that is a multiple of
    sum_k weight_k term_k, and NaN for any other. The gradient of a student's features is summed over tp. The teacher
    side gets none.
    """
    terms = [t._replace(student=_with_views(t.student), teacher=_with_views(t.teacher).detach()) for t in terms]
    students = [copy_to_tp(term.student, mesh) for term in terms]
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (student_W, *students)]
    with torch.autocast(student_W.device.type, enabled=False):
        return _PrototypeCrossEntropy.apply(
            terms, teacher_W.detach(), (student_temperature, teacher_temperature), rows_at_once, mesh, wanted,
            student_W, *students,
        )


def prototype_logits(features: Tensor, W: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Compute features W^T / temperature, (n, d) and (K_local, d) -> (n, K_local), float32 or wider; ``out`` takes
    it."""
    W = W.to(features.dtype).T
    if out is None:
        out = features.new_empty(len(features), W.shape[1], dtype=_wide(features.dtype))
    if out.dtype == features.dtype:
        return torch.addmm(out, features, W, beta=0, alpha=1 / temperature, out=out)  # with beta 0 it is not read
    return torch.div(matmul_wide(features, W), temperature, out=out)  # 16-bit logits / 0.04 would be coarse


def row_logsumexp(logits: Tensor, mesh: Mesh) -> Tensor:
    """Return log sum exp over all prototypes, also those of other tp ranks: (n, K_local) -> (n, 1)."""
    return _join(logits.logsumexp(-1, keepdim=True), mesh)


def row_softmax(logits: Tensor, mesh: Mesh, out: Tensor) -> Tensor:
    """Write the softmax over all prototypes, also those of other tp ranks, to ``out``, both (n, K_local).

    Returns ``row_logsumexp(logits, mesh)``: a row's largest logit and the probability of it tell as much.
    """
    torch.softmax(logits, -1, out=out)
    local = logits.amax(-1, keepdim=True) - out.amax(-1, keepdim=True).log_()
    if mesh.tp == 1:
        return local
    joined = _join(local, mesh)
    out.mul_((local - joined).exp_())
    return joined


def _join(local: Tensor, mesh: Mesh) -> Tensor:
    # A gather of n numbers per peer and a second logsumexp replace a max- and a sum-reduction.
    return all_gather(local.unsqueeze(0), mesh, "tp").logsumexp(0)


def _with_views(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.unsqueeze(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b of one dtype with a result of at least float32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)  # this returns the accumulator without rounding or an extra pass
    return (a @ b).to(_wide(a.dtype))


class _Prototypes(NamedTuple):
    """Both sides' prototypes in the features' dtype, their temperatures, and memory for three matrices of logits."""

    student_W: Tensor
    teacher_W: Tensor
    student_T: float
    teacher_T: float
    mesh: Mesh
    room: list[Tensor]  # each (rows, K_local); a CPU's first touch of new memory takes longer than a softmax


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Its gradient is computed in forward, while the rows' logits exist, and only scaled in backward."""

    @staticmethod
    def forward(ctx, terms, teacher_W, temperatures, rows_at_once, mesh, wanted, student_W, *students):
        dtype = students[0].dtype
        grad_W = torch.zeros_like(student_W, dtype=_wide(dtype)) if wanted[0] else None
        grads = [torch.empty_like(x, dtype=_wide(dtype)) if want else None for x, want in zip(students, wanted[1:])]
        views = [max(len(term.student), len(term.teacher)) for term in terms]
        steps = [max(1, rows_at_once // v) for v in views]
        rows = max(v * min(step, x.shape[1]) for v, step, x in zip(views, steps, students))
        room = [student_W.new_empty(rows, len(student_W), dtype=_wide(dtype)) for _ in range(3)]
        student_T, teacher_T = temperatures
        prototypes = _Prototypes(student_W.to(dtype), teacher_W.to(dtype), student_T, teacher_T, mesh, room)
        values = [
            _one_term(term, student, prototypes, step, grad, grad_W)
            for term, student, step, grad in zip(terms, students, steps, grads)
        ]
        ctx.save_for_backward(grad_W, *grads)
        ctx.dtypes = student_W.dtype, *(x.dtype for x in students)
        ctx.weights = [term.weight for term in terms]
        return torch.stack(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        factors = torch.stack([factor / weight for factor, weight in zip(upstream, ctx.weights)])
        # One gradient cannot follow several factors. NaN is what a step that must not be taken has.
        alike = torch.isclose(factors, factors[0], rtol=1e-4, atol=0.0).all()
        scales = torch.where(alike, factors[0], torch.nan), *upstream
        scaled = [None if g is None else (g * x).to(t) for g, x, t in zip(ctx.saved_tensors, scales, ctx.dtypes)]
        return *(None,) * 6, *scaled


def _one_term(
    term: Term, student: Tensor, prototypes: _Prototypes, step: int, grad_student: Tensor | None, grad_W: Tensor | None
) -> Tensor:
    """Return a term's value and, for ``step`` samples at a time, write its student's gradient and add to that of W."""
    student_W, teacher_W, student_T, teacher_T, mesh, room = prototypes
    (s, n, d), v = student.shape, len(term.teacher)
    weights = room[0].new_ones(n) if term.row_weights is None else term.row_weights.to(room[0].dtype)
    normaliser, agreement = room[0].new_zeros(()), room[0].new_zeros(())
    for start in range(0, n, step):
        part = slice(start, start + step)
        teachers, students = (x[:, part].reshape(-1, d) for x in (term.teacher, student))
        w = weights[part].repeat(s).unsqueeze(-1)
        target, logits = room[0][: len(teachers)], room[1][: len(teachers)]
        prototype_logits(teachers, teacher_W, teacher_T, out=logits).add_(term.teacher_bias)
        row_softmax(logits, mesh, out=target)
        target, *others = target.view(v, -1, target.shape[-1])
        for other in others:
            target += other  # all probabilities of the views that a student meets
        logits, p = room[1][: len(students)], room[2][: len(students)]
        prototype_logits(students, student_W, student_T, out=logits)
        by_view = p.view(s, -1, p.shape[-1])
        products = torch.mul(logits.view_as(by_view), target, out=by_view).sum(-1)
        agreement += (products.view_as(w) * w).sum()
        normaliser += (row_softmax(logits, mesh, out=p) * w).sum()
        if grad_student is None and grad_W is None:
            continue
        slope = by_view.sub_(target, alpha=1 / v).view_as(p).to(student.dtype)
        w = w * (v / student_T)  # a row's factors are multiplied into the small matrices
        if grad_student is not None:
            grad_student[:, part] = (matmul_wide(slope, student_W) * w).view(s, -1, d)
        if grad_W is not None:
            rows = (students * (w * term.weight)).to(student.dtype)
            if rows.dtype == grad_W.dtype:
                grad_W.addmm_(slope.T, rows)
            else:
                grad_W += matmul_wide(slope.T, rows)
    return v * normaliser - all_reduce(agreement, mesh, "tp")
