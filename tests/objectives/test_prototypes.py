import math

import pytest
import torch
from operations import Operations

from megavtp.objectives.prototypes import Term, prototype_cross_entropy


def problem(s=3, v=2, n=7, d=5, k=11, dtype=torch.float64, magnitude=1.0):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(magnitude).to(dtype)

    student, student_W = draw(s, n, d).requires_grad_(), draw(k, d).requires_grad_()
    bias, weights = torch.randn(k, generator=g, dtype=dtype), torch.rand(n, generator=g, dtype=dtype)
    return student, student_W, draw(v, n, d), draw(k, d), bias, weights


def fused(student, student_W, teacher, teacher_W, bias, weights, rows_at_once=4):
    (value,) = prototype_cross_entropy(
        [Term(student, teacher, bias, weights)], student_W, teacher_W, student_temperature=0.1,
        teacher_temperature=0.04, rows_at_once=rows_at_once,
    )
    return value


def plain(student, student_W, teacher, teacher_W, bias, weights):
    """With all logits at once, in float64."""
    student, student_W, teacher, teacher_W, bias = (
        x.double() for x in (student, student_W, teacher, teacher_W, bias)
    )
    log_p = (student @ student_W.T / 0.1).log_softmax(-1)
    target = (teacher @ teacher_W.T / 0.04 + bias).softmax(-1)
    weights = torch.ones(student.shape[1]) if weights is None else weights
    return -torch.einsum("snk,vnk,n->", log_p, target, weights.double())


def value_and_grads(loss, *inputs, **more):
    value = loss(*inputs, **more)
    return value, *torch.autograd.grad(value, inputs[:2])


@pytest.mark.parametrize("s,v", [(1, 1), (3, 2), (1, 2), (4, 1)])
@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_plain_formula_at_any_number_of_rows_at_once(s, v, rows_at_once, weighted):
    inputs = problem(s, v)
    if not weighted:
        inputs = *inputs[:5], None
    for got, want in zip(value_and_grads(fused, *inputs, rows_at_once=rows_at_once), value_and_grads(plain, *inputs)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck_with_upstream_gradient():
    student, student_W, *rest = problem(s=2, n=3, d=3, k=5)
    assert torch.autograd.gradcheck(lambda x, w: fused(x, w, *rest).square() / 100, (student, student_W))


def test_single_view_may_come_without_its_dimension():
    student, student_W, teacher, *rest = problem(1, 1)
    assert torch.equal(fused(student, student_W, teacher, *rest), fused(student[0], student_W, teacher[0], *rest))


def test_backward_twice_gives_the_same():
    inputs = problem()
    value = fused(*inputs)
    first = torch.autograd.grad(value, inputs[:2], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(value, inputs[:2])))


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_wanted_gradient_is_computed(frozen):
    inputs = problem()
    want = torch.autograd.grad(fused(*inputs), inputs[:2])[1 - frozen]
    inputs[frozen].requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(fused(*inputs), inputs[1 - frozen])[0], want)
    with torch.no_grad():
        assert not fused(*inputs).requires_grad


@pytest.mark.parametrize("magnitude", [10.0, 100.0])
def test_huge_logits_in_float32_stay_finite_and_right(magnitude):
    inputs = problem(dtype=torch.float32, magnitude=magnitude)
    got, want = value_and_grads(fused, *inputs), value_and_grads(plain, *inputs)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=0)


def test_no_rows_give_zero_and_zero_gradients():
    inputs = problem(1, 1, n=0)
    value, *grads = value_and_grads(fused, *inputs)
    assert value.item() == 0
    assert [g.shape for g in grads] == [x.shape for x in inputs[:2]] and not any(g.any() for g in grads)


def test_half_precision_features_with_float32_prototypes_under_autocast():
    student, student_W, teacher, teacher_W, bias, weights = problem(d=32, k=64, dtype=torch.float32, magnitude=0.2)
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, grad, grad_W = value_and_grads(fused, half, student_W, teacher.bfloat16(), teacher_W, bias, weights)
        exact = fused(student, student_W, teacher, teacher_W, bias, weights)
    assert (value.dtype, grad.dtype, grad_W.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    want, want_grad, want_grad_W = value_and_grads(plain, student, student_W, teacher, teacher_W, bias, weights)
    torch.testing.assert_close(exact.double(), want, rtol=1e-5, atol=0)  # autocast does not lower float32 inputs
    assert abs(value.item() / want.item() - 1) < 0.01
    for got, expected in ((grad, want_grad), (grad_W, want_grad_W)):
        assert torch.cosine_similarity(got.double().flatten(), expected.double().flatten(), 0) > 0.99


def test_never_makes_more_than_the_logits_of_some_rows():
    s, n, d, k, rows_at_once = 2, 64, 4, 128, 16
    inputs = problem(s, 2, n, d, k, torch.float32)
    with Operations() as operations:
        value_and_grads(fused, *inputs, rows_at_once=rows_at_once)
    assert max(map(math.prod, operations.all_shapes)) == rows_at_once * k < s * n * k


def test_terms_together_equal_terms_alone_and_share_a_gradient_under_their_weights():
    student, student_W, teacher, teacher_W, bias, weights = problem()
    one = Term(student, teacher, bias, weights, weight=0.5)
    two = Term(student[0, :4], teacher[0, :4], bias.flip(0), weight=3.0)
    setting = {"student_temperature": 0.1, "teacher_temperature": 0.04, "rows_at_once": 4}
    alone = [prototype_cross_entropy([term], student_W, teacher_W, **setting)[0] for term in (one, two)]
    together = prototype_cross_entropy([one, two], student_W, teacher_W, **setting)
    torch.testing.assert_close(together, torch.stack(alone))
    wanted = torch.autograd.grad(0.5 * alone[0] + 3.0 * alone[1], (student, student_W), retain_graph=True)
    for factor in (1.0, 1e-3):
        loss = factor * (0.5 * together[0] + 3.0 * together[1])
        got = torch.autograd.grad(loss, (student, student_W), retain_graph=True)
        torch.testing.assert_close(got, tuple(factor * g for g in wanted))
    of_student, of_W = torch.autograd.grad(together.sum(), (student, student_W))
    torch.testing.assert_close(of_student, torch.autograd.grad(sum(alone), student)[0])
    assert of_W.isnan().all()  # other weights than were promised: no step may be taken with it
