"""Every objective on 4 processes, as dp4, tp2 x dp2 and tp4, gives the values and gradients of one process."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from operations import Operations
from torch import Tensor

from megavtp.config.schema import DinoHeadConfig, SelfDistillationConfig
from megavtp.models.dino_head import DinoHead
from megavtp.objectives.centering import sinkhorn_bias, update_center
from megavtp.objectives.contrastive import info_nce, siglip
from megavtp.objectives.koleo import koleo
from megavtp.objectives.prototypes import Term, prototype_cross_entropy
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss
from megavtp.parallel.collectives import all_gather, all_reduce
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.pretraining.monitors import MONITORS, CollapseMonitors

B, D, K, L = 8, 6, 16, 3
ROWS, PROTOTYPES, ROWS_AT_ONCE = 21, 4 * 31, 8  # 31 and its multiples are sizes of nothing else
OWNER = torch.tensor([3, 6, 6, 7, 2, 3, 3, 6, 7, 7, 2])  # image of each masked patch; images 0 and 1 have none


def evaluate(mesh):
    """Global values and gradients, as an engine that averages gradients over dp would have them."""
    g = torch.Generator().manual_seed(11)
    draw = functools.partial(torch.randn, generator=g)
    share = B // mesh.dp
    mine = slice(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
    patches = (OWNER >= mine.start) & (OWNER < mine.stop)
    columns = slice(mesh.tp_rank * K // mesh.tp, (mesh.tp_rank + 1) * K // mesh.tp)

    def crops(n: int) -> Tensor:
        return draw(n, B, D)[:, mine].flatten(0, 1)

    image, text, global_cls, local_cls, teacher_cls = draw(B, D)[mine], draw(B, D)[mine], crops(2), crops(L), crops(2)
    patch, teacher_patch, weights = draw(11, D)[patches], draw(11, D)[patches], torch.rand(11, generator=g)[patches]
    teacher_W, center = draw(K, D)[columns], draw(K)[columns]
    trunk = draw(D, D).requires_grad_()  # what all features come from
    W = draw(K, D)[columns].clone().requires_grad_()
    scale, sigmoid_bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)

    rows = [[teacher_cls[: share // 2], teacher_cls[share // 2 :]], [teacher_patch]]
    bias = TeacherBias(*(sinkhorn_bias(r, teacher_W, 0.07, iterations=3, rows_at_once=3, mesh=mesh) for r in rows))
    normal = [F.normalize(x @ trunk, dim=-1) for x in (image, text)]
    losses = {"infonce": info_nce(*normal, scale, None, mesh), "siglip": siglip(*normal, scale, sigmoid_bias, mesh)}
    student = StudentOutput(global_cls @ trunk, local_cls @ trunk, patch @ trunk, W, global_cls @ trunk)
    terms = self_distillation_loss(
        student, TeacherOutput(teacher_cls, teacher_patch, teacher_W), bias, weights,
        SelfDistillationConfig(chunk=4, ibot_weight=0.7), teacher_temperature=0.07, images_total_local=share, mesh=mesh,
    )
    losses["self_distillation"] = terms["dino_local"] + terms["dino_global"] + 0.7 * terms["ibot"]
    losses["koleo"] = koleo(student.backbone_cls.unflatten(0, (2, share)), mesh)

    def mean(x: Tensor) -> Tensor:
        return all_reduce(x, mesh, "dp") / mesh.dp

    results = {f"{name}/value": mean(loss) for name, loss in (losses | terms).items()}
    monitors = CollapseMonitors(mesh, student_temperature=0.1, teacher_temperature=0.07, rows_at_once=3)
    monitors.add(student, TeacherOutput(teacher_cls, teacher_patch, teacher_W), bias.cls)
    results |= {f"monitors/{name}": mean(value) for name, value in monitors.values().items()}
    for name, loss in losses.items():
        for what, leaf in {"trunk": trunk, "W": W, "scale": scale, "bias": sigmoid_bias}.items():
            grad, = torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
            if grad is not None:
                results[f"{name}/{what}"] = all_gather(mean(grad), mesh, "tp") if what == "W" else mean(grad)
    for kind, part, vector in zip(("cls", "patches"), rows, bias):
        results[f"sinkhorn/{kind}"] = all_gather(vector, mesh, "tp")
        results[f"center/{kind}"] = all_gather(
            update_center(center, part, teacher_W, momentum=0.9, mesh=mesh)(), mesh, "tp"
        )
    return results


def shapes_made(mesh):
    """By the head, the centering and the loss on ROWS views with PROTOTYPES prototypes, forward and backward."""
    student, teacher = (DinoHead(D, DinoHeadConfig(PROTOTYPES, hidden=8, bottleneck=4), mesh) for _ in range(2))
    for parameter in (*student.parameters(), *teacher.parameters()):
        parameter.data.normal_()
    x = torch.randn(ROWS, D, requires_grad=True)
    with Operations() as operations:
        with torch.no_grad():
            targets, target_W = teacher(x)
            bias = sinkhorn_bias([targets], target_W, 0.07, iterations=3, rows_at_once=ROWS_AT_ONCE, mesh=mesh)
        features, W = student(x)
        prototype_cross_entropy(
            [Term(features, targets, bias)], W, target_W, student_temperature=0.1, teacher_temperature=0.07,
            rows_at_once=ROWS_AT_ONCE, mesh=mesh,
        ).sum().backward()
    return operations.all_shapes


def on_rank(rank):
    meshes = {tp: build_mesh(tp, 1) for tp in (1, 2, 4)}
    return {tp: evaluate(mesh) for tp, mesh in meshes.items()}, {tp: shapes_made(meshes[tp]) for tp in (1, 2, 4)}


@pytest.fixture(scope="module")
def everywhere():
    return run_ranks(4, on_rank)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_layout_equals_one_process(everywhere, tp):
    expected = evaluate(SINGLE)
    assert len(expected) == 7 + 2 * 2 + 1 + 2 + 1 + 4 + len(MONITORS)
    for rank in range(4):
        got = everywhere[rank][0][tp]
        assert set(got) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=3e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_no_rank_holds_all_logits(everywhere, tp):
    """Whatever has a dimension over prototypes has it over this rank's alone, for some rows at a time."""
    own = PROTOTYPES // tp
    for _, shapes in everywhere:
        over_prototypes = {shape for shape in shapes[tp] if own in shape}
        assert (ROWS_AT_ONCE, own) in over_prototypes
        # A vector over prototypes may carry the number of rows, too.
        assert max(size for shape in shapes[tp] for size in shape) in (own, own + 1)
        assert all(math.prod(shape) <= ROWS_AT_ONCE * own for shape in over_prototypes)
