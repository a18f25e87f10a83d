"""Against values and gradients of the DINOv2 losses (tests/data/dinov2_losses/oracle.json says what is stored)."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megavtp.config.schema import SelfDistillationConfig
from megavtp.objectives.centering import center_bias, sinkhorn_bias, update_center
from megavtp.objectives.koleo import koleo
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss

DATA = Path(__file__).parents[1] / "data" / "dinov2_losses"
B, K = 6, 64
EYE = torch.eye(K)  # with the identity as prototypes, features are the stored logits
CONFIG = SelfDistillationConfig(chunk=8)


@pytest.fixture(scope="module")
def stored():
    return load_file(DATA / "in.safetensors"), load_file(DATA / "out.safetensors")


def outputs(inputs):
    student = StudentOutput(
        *(inputs[name].clone().requires_grad_() for name in
          ("student_global_logits", "student_local_logits", "student_patch_logits")),
        EYE, inputs["cls_features"].clone().requires_grad_(),
    )
    unswapped = inputs["teacher_cls_logits"].unflatten(0, (2, B)).flip(0).flatten(0, 1)
    teacher = TeacherOutput(unswapped, inputs["teacher_patch_logits"], EYE)
    masks = inputs["masks"]
    weights = (1 / masks.sum(-1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]
    return student, teacher, weights


@pytest.mark.parametrize("kind", ["sinkhorn_knopp", "centering"])
def test_terms_and_gradients_equal_dinov2(stored, kind):
    inputs, expected = stored
    centers = torch.zeros(2, K)
    for step, temperature in enumerate((0.04, 0.07)):
        student, teacher, weights = outputs(inputs)
        if kind == "centering":
            bias = TeacherBias(*center_bias(centers, temperature))
            centers = torch.stack([update_center(c, [t], EYE, momentum=0.9)() for c, t in zip(centers, teacher)])
        else:
            biases = [sinkhorn_bias([t], EYE, temperature, iterations=3, rows_at_once=5) for t in teacher[:2]]
            bias = TeacherBias(*biases)
        for name, b in zip(("cls", "patch"), bias):
            target = (inputs[f"teacher_{name}_logits"] / temperature + b).softmax(-1)
            torch.testing.assert_close(target, expected[f"{kind}/round{step}/teacher_{name}"], rtol=1e-4, atol=1e-7)
        terms = self_distillation_loss(
            student, teacher, bias, weights, CONFIG, teacher_temperature=temperature, images_total_local=B
        ) | {"koleo": koleo(student.backbone_cls.unflatten(0, (2, B)))}
        for name, value in terms.items():
            torch.testing.assert_close(value, expected[f"{kind}/round{step}/{name}"], rtol=1e-6, atol=1e-6)
        total = terms["dino_local"] + terms["dino_global"] + terms["ibot"] + 0.1 * terms["koleo"]
        leaves = student.global_cls, student.local_cls, student.patches, student.backbone_cls
        names = "student_global", "student_local", "student_patch", "cls_features"
        for name, grad in zip(names, torch.autograd.grad(total, leaves)):
            torch.testing.assert_close(grad, expected[f"{kind}/round{step}/grad_{name}"], rtol=1e-5, atol=1e-6)


def call(student, teacher, weights, config=CONFIG, total=B):
    bias = TeacherBias(torch.zeros(K), torch.zeros(K))
    return self_distillation_loss(
        student, teacher, bias, weights, config, teacher_temperature=0.07, images_total_local=total
    )


def test_micro_batches_add_up(stored):
    inputs, _ = stored
    student, teacher, weights = outputs(inputs)
    whole = call(student, teacher, weights)
    owner = torch.arange(2 * B).unsqueeze(-1).expand_as(inputs["masks"])[inputs["masks"]] % B  # a patch's image
    parts = []
    for images in (slice(0, 2), slice(2, 5), slice(5, 6)):
        take = lambda x: x.unflatten(0, (-1, B))[:, images].flatten(0, 1)  # noqa: B023, E731
        mine = (owner >= images.start) & (owner < images.stop)
        part = StudentOutput(
            take(student.global_cls), take(student.local_cls), student.patches[mine], EYE, take(student.backbone_cls)
        )
        parts.append(call(part, TeacherOutput(take(teacher.cls), teacher.patches[mine], EYE), weights[mine]))
    for name in ("dino_local", "dino_global", "ibot"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


def test_no_masked_patch_and_no_local_crop(stored):
    student, teacher, weights = outputs(stored[0])
    empty = torch.zeros(0, K)
    terms = call(student._replace(patches=empty.clone().requires_grad_()), teacher._replace(patches=empty), weights[:0])
    assert terms["ibot"].item() == 0
    without_local = call(student._replace(local_cls=empty), teacher, weights)
    assert "dino_local" not in without_local
    torch.testing.assert_close(without_local["dino_global"], terms["dino_global"] * (2 + 2 * 4) / 2)


def test_one_image(stored):
    student, teacher, weights = outputs(stored[0])
    one = student._replace(
        global_cls=student.global_cls[:2], local_cls=student.local_cls[:4], backbone_cls=student.backbone_cls[:2]
    )
    terms = call(one, teacher._replace(cls=teacher.cls[:2]), weights, total=1)
    sum(terms.values()).backward()
    assert all(x.grad.isfinite().all() for x in (student.global_cls, student.local_cls))


@pytest.mark.parametrize("off", ["dino", "ibot"])
def test_a_term_of_weight_zero_is_absent_and_leaves_the_others(stored, off):
    arguments = outputs(stored[0])
    terms = call(*arguments, dataclasses.replace(CONFIG, **{f"{off}_weight": 0.0}))
    everything = call(*arguments)
    assert {name for name in everything if not name.startswith(off)} == set(terms)
    assert all(torch.equal(everything[name], value) for name, value in terms.items())
