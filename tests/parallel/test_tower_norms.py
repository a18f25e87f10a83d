"""The gradient norms that a step reports, in total and by tower, are exact on every ZeRO stage and for any size."""

import pytest
import torch
from distributed import run_ranks
from tiny_run import FakeData, FakeTokenizer, build_engine, build_model, passes_of, tiny_config

from megavtp.data.batch import StepDataset
from megavtp.parallel.gradient_norm import ROW, square
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.parallel.passes import execute
from megavtp.training.optimizer import tower_of

# Sub-groups smaller than a parameter group: stage 3 then has several norms for one group.
SMALL_SUB_GROUPS = {"zero_optimization": {"sub_group_size": 2000}}


class _Plain:
    def __init__(self, model):
        self.model, self.mesh = model, SINGLE

    def __call__(self, mode, **inputs):
        return self.model(mode, **inputs)

    def backward(self, loss):
        loss.backward()


def batch_of(config, mesh):
    return StepDataset(FakeData(), FakeTokenizer(), config, mesh.dp_rank, mesh.dp)[0]


def plain_norms() -> dict[str, float]:
    config = tiny_config()
    model, batch = build_model(config, SINGLE), batch_of(config, SINGLE)
    for objective in passes_of(config, SINGLE):
        execute(objective, _Plain(model), batch)
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients.setdefault(tower_of(name), []).append(parameter.grad.flatten())
    return {tower: float(torch.cat(parts).norm()) for tower, parts in gradients.items()}


def step_norms(rank: int, tp: int) -> list[tuple[dict[str, float], float]]:
    found = []
    for stage in range(4):
        config = tiny_config({"parallel": {"tp": tp, "zero_stage": stage}, "deepspeed": SMALL_SUB_GROUPS}, 2)
        mesh = build_mesh(tp, 1)
        engine, _ = build_engine(config, mesh)
        engine.begin_step()
        for objective in passes_of(config, mesh):
            execute(objective, engine, batch_of(config, mesh))
        result = engine.step()
        found.append(({tower: float(norm) for tower, norm in result.tower_norms.items()}, float(result.grad_norm)))
        engine.close()
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_norms_by_tower(tp):
    expected = plain_norms()
    for ranks in zip(*run_ranks(2, step_norms, tp)):
        for towers, whole in ranks:
            assert towers == pytest.approx(expected, rel=1e-5)
            assert sum(norm**2 for norm in towers.values()) ** 0.5 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("sizes", [(1,), (0, 7), (ROW,), (3 * ROW + 5, 2, ROW - 1), (0,)])
def test_square(sizes):
    tensors = [torch.randn(size) for size in sizes]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert float(square(tensors)) == pytest.approx(float(exact), rel=1e-6)


def test_the_square_of_a_large_gradient_is_exact():
    """Of 20 million elements torch's own norm is wrong in the third digit on a CPU."""
    gradient = torch.randn(1024, 20_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = float(gradient.double().square().sum())
    assert float(square([gradient])) == pytest.approx(exact, rel=2e-6)
    assert float(square([gradient.t()])) == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_square_that_is_not_finite_says_so(bad):
    gradient = torch.ones(2 * ROW + 1)
    gradient[ROW] = bad
    assert not square([gradient, torch.ones(3)]).isfinite()
