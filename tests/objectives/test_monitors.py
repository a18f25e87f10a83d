"""The monitors of collapse: plain torch's numbers, extremes that a collapse has, and no trace in the training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from tiny_run import Outcome, reference, tiny_config
from torch import Tensor

from megavtp.config.load import load_config
from megavtp.config.schema import Config
from megavtp.objectives.self_distillation import StudentOutput, TeacherOutput
from megavtp.parallel.mesh import SINGLE
from megavtp.pretraining.monitors import MONITORS, CollapseMonitors, collapse_watches
from megavtp.training.watch import PATIENCE, Watches

B, D, N, K = 6, 5, 8, 32  # images, trunk width, width of the head's features, prototypes
T_STUDENT, T_TEACHER = 0.1, 0.05
DEMO = Path(__file__).parents[2] / "configs" / "demo" / "vtp_emoji.yaml"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(teacher_cls: Tensor, student_cls: Tensor, tokens: Tensor, images: slice = slice(None)) -> tuple:
    """Some of the images as a micro-batch; crops are crop-major."""
    def pick(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, B))[:, images].flatten(0, 1)

    none, student_W, teacher_W = draw(0, 0, N), draw(1, K, N), draw(2, K, N)
    return (
        StudentOutput(pick(student_cls), none, none, student_W, pick(tokens)),
        TeacherOutput(pick(teacher_cls), none, teacher_W),
    )


def measured(*features: Tensor, bias: Tensor, parts: tuple[slice, ...] = (slice(None),), rows: int = 3) -> dict:
    monitors = CollapseMonitors(SINGLE, T_STUDENT, T_TEACHER, rows)
    for images in parts:
        monitors.add(*outputs(*features, images), bias)
    return {name: float(value) for name, value in monitors.values().items()}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_numbers_are_plain_torchs_for_any_micro_batches(rows):
    features = [F.normalize(draw(seed, 2 * B, width), dim=-1) for seed, width in ((3, N), (4, N), (5, D))]
    teacher_cls, student_cls, tokens = features
    bias = draw(6, K)
    student, teacher = outputs(*features)
    logits = (teacher_cls @ teacher.W.T / T_TEACHER).double()
    other = logits.roll(B, 0)  # the teacher's view of the other crop of the same image
    log_q = (student_cls @ student.W.T / T_STUDENT).double().log_softmax(-1)
    p = (other + bias).softmax(-1)
    variances = torch.linalg.eigvalsh(torch.cov(tokens.double().T))
    shares = variances / variances.sum()
    expected = {
        "teacher_entropy": torch.distributions.Categorical(logits.softmax(-1).mean(0)).entropy() / math.log(K),
        "teacher_student_kl": (p * (p.log() - log_q)).sum(-1).mean(),
        "feature_rank": (-(shares * shares.log()).sum()).exp(),
    }
    for parts in ((slice(None),), (slice(0, 2), slice(2, 5), slice(5, 6))):
        found = measured(*features, bias=bias, parts=parts, rows=rows)
        assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_what_a_collapse_looks_like():
    same = draw(3, 1, N).expand(2 * B, N)
    one = measured(1000 * same, same, draw(5, 1, D).expand(2 * B, D), bias=torch.zeros(K))
    assert one["teacher_entropy"] == pytest.approx(0, abs=1e-6) and one["feature_rank"] == 0
    none = torch.zeros(2 * B, N)  # both give a uniform answer
    tokens = torch.linspace(-1, 1, 2 * B)[:, None] * draw(5, 1, D)
    uniform = measured(none, none, tokens, bias=torch.zeros(K))
    assert uniform["teacher_entropy"] == pytest.approx(1)
    assert uniform["teacher_student_kl"] == pytest.approx(0, abs=1e-6)
    assert uniform["feature_rank"] == pytest.approx(1, abs=1e-4)


def test_adding_a_micro_batch_does_not_wait_for_the_device():
    monitors = CollapseMonitors(SINGLE, T_STUDENT, T_TEACHER, 3)
    with Operations() as operations:
        monitors.add(*outputs(draw(3, 2 * B, N), draw(4, 2 * B, N), draw(5, 2 * B, D)), torch.zeros(K))
    assert not operations.host_reads and not operations.calls["nonzero"]


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 2}, {"micro_batch": 2, "koleo_weight": 0.0}])
def test_training_is_the_same_bit_for_bit_with_monitors(settings):
    def run(log_every: int) -> Outcome:
        objectives = {"self_distillation": settings, "reconstruction": {"weight": 0.0}}
        return reference(tiny_config({
            "objectives": objectives, "telemetry": {"log_every": log_every}, "train": {"steps": 3},
        }))

    names = {f"self_distillation/{name}" for name in MONITORS}
    always, last = run(1), run(100)
    assert [names & step.keys() for step in last.terms] == [set(), set(), names]
    for step, other in zip(always.terms, last.terms):
        assert names < step.keys() and all(map(math.isfinite, step.values()))
        assert other == {name: step[name] for name in other}
    assert always.norms == last.norms
    assert all(torch.equal(weight, last.weights[name]) for name, weight in always.weights.items())


def warned(config: Config, levels: dict[str, float], lines: range) -> list[tuple[int, str]]:
    """The steps at which terms with these values in every line are told."""
    watches = Watches(collapse_watches(config))
    terms = {f"self_distillation/{name}": value for name, value in levels.items()}
    return [(step, warning["message"]) for step in lines for warning in watches.due(step, terms)]


def test_the_demonstrations_levels_warn_if_they_are_a_collapses():
    """Values of the demonstration's recipe: at its start, after 80 steps, without centering, with blunt targets."""
    config = load_config(DEMO, Config)
    lines = range(10, 901, 10)
    start, healthy, one_prototype, blunt = (
        dict(zip(MONITORS, values)) for values in (
            (0.44, 1.60, 6.5), (0.89, 1.84, 17.7), (0.0, 0.0057, 20.2), (1.0, 0.0108, 23.6)
        )
    )
    assert warned(config, start, lines) == warned(config, healthy, lines) == []
    at = 200 + 10 * PATIENCE
    told = warned(config, one_prototype, lines)
    assert [step for step, _ in told] == [at, at] and "the same prototype (entropy of its mean assignment 0 of 1)" in (
        told[0][1]
    )
    (only,) = warned(config, blunt, lines)
    assert only[0] == at and "KL 0.011 nats" in only[1]
    for watch in collapse_watches(config):  # a progress line cuts longer ones off
        assert max(len(watch.message), len(watch.remedy)) < 195


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"dino_weight": 0.0}])
def test_without_the_terms_of_class_tokens_nothing_is_watched(settings):
    config = tiny_config({"objectives": {"self_distillation": settings}, "train": {"steps": 1}})
    assert collapse_watches(config) == []
    if settings.get("weight") is None:
        assert not any(name.endswith(MONITORS) for name in reference(config).terms[0])
