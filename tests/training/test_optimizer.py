"""Parameter groups, and an optimizer that counts its updates by group, as apex's FusedAdam does, across a resume."""

import sys
from types import ModuleType

import pytest
import torch
from distributed import run_ranks
from torch import nn

from megavtp.config.run import OptimizerConfig
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import SINGLE
from megavtp.training.optimizer import build_optimizer, find_apex_adam, parameter_groups


class GroupCountingAdam(torch.optim.Optimizer):
    """AdamW without weight decay whose step count is in the group."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                first = state["exp_avg"].lerp_(p.grad, 0.1) / (1 - 0.9 ** group["step"])
                second = state["exp_avg_sq"].lerp_(p.grad.square(), 0.05) / (1 - 0.95 ** group["step"])
                p.sub_(group["lr"] * first / (second.sqrt() + 1e-8))


def make():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    groups = [{"params": [p]} for p in module.parameters()]
    return Engine(module, GroupCountingAdam(groups), SINGLE, zero_stage=0, clip_grad=0.0)


def train(engine, first, last):
    for step in range(first, last):
        engine.begin_step()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x).square().mean())
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


def resumed_and_not(rank):
    expected = train(make(), 0, 5)
    first = make()
    train(first, 0, 2)
    state = {name: tensor.clone() for name, tensor in first.export(lambda number: True).items()}
    second = make()
    second.load(state.__getitem__, first.optimizer_steps)
    return first.optimizer_steps, expected, train(second, 2, 5)


def test_updates_counted_by_group_go_on_after_a_resume():
    ((steps, expected, got),) = run_ranks(1, resumed_and_not)
    assert steps == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_groups():
    shapes = {
        "trunk.a.weight": (2, 3), "trunk.norm.weight": (3,), "text.projection.weight": (2, 2), "logit_scale": (1,),
        "visual_proj.weight": (2, 2), "pixel_decoder.proj_in.bias": (2,), "dino_head.mlp.0.weight": (2, 2),
        "dino_head.last_layer.weight_v": (2, 2), "dino_head.last_layer.weight_g": (2, 1), "trunk.cls_token": (1, 1, 3),
    }
    matrices = {name for name in shapes if name.endswith((".weight", "weight_v"))} - {"trunk.norm.weight"}
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    named["teacher.trunk.a.weight"] = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    groups = parameter_groups(named.items(), OptimizerConfig(weight_decay=0.3, lr_scale={"decoder": 0.5}))
    of = {name: g for g in groups for name, p in named.items() if any(p is q for q in g["params"])}
    assert set(of) == set(shapes)
    assert {name for name, g in of.items() if g["weight_decay"] == 0.3} == matrices
    assert {name for name, g in of.items() if g["tower"] == "text"} == {"text.projection.weight", "logit_scale"}
    assert {name for name, g in of.items() if g["prototypes"]} == {
        "dino_head.last_layer.weight_v", "dino_head.last_layer.weight_g"
    }
    assert [g["lr_scale"] for g in groups if g["tower"] == "decoder"] == [0.5]
    assert isinstance(build_optimizer(named.items(), OptimizerConfig()), torch.optim.AdamW)


def test_the_logit_scale_comes_down_from_its_ceiling_at_once():
    scale, other = nn.Parameter(torch.full((1,), 4.0)), nn.Parameter(torch.full((1,), 4.0))
    optimizer = build_optimizer(
        {"logit_scale": scale, "logit_bias": other}.items(), OptimizerConfig(lr=0.1, betas=(0.0, 0.9)),
        max_logit_scale=4.5,
    )
    found = []
    for gradient in [-1.0] * 20 + [1.0]:  # pushed up for long, then down
        scale.grad, other.grad = torch.full((1,), gradient), torch.full((1,), gradient)
        optimizer.step()
        found.append(scale.item())
    assert found[5:20] == [4.5] * 15 and found[20] < 4.45
    assert other.item() > 5.5  # only that one


@pytest.mark.parametrize("available", [True, False])
def test_apex_is_used_only_with_its_kernels(monkeypatch, available):
    assert find_apex_adam() is None  # not installed, or another package of that name
    optimizers, apply = ModuleType("apex.optimizers"), ModuleType("apex.multi_tensor_apply")
    optimizers.FusedAdam = GroupCountingAdam
    apply.multi_tensor_applier = type("Applier", (), {"available": available})
    for module in (ModuleType("apex"), optimizers, apply):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert find_apex_adam() is (GroupCountingAdam if available else None)
