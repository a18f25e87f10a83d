"""Micro-batches change nothing: terms and gradients of a pass equal those of the whole batch at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operations import Operations
from tiny_run import PlainRunner, build_model, data_of, merged, passes_of, tiny_config
from torch import Tensor

from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import Pass, execute

SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "SigLIP": {"objectives": {"contrastive": {"loss": "siglip"}}, "model": {"init_logit_bias": -2.0}},
    "softmax centering": {"objectives": {"self_distillation": {"centering": "softmax"}}},
    "heavy KoLeo": {"objectives": {"self_distillation": {"koleo_weight": 10.0}}},
    "drop path in all": {"objectives": {"contrastive": {"drop_path": 0.4}, "reconstruction": {"drop_path": 0.4}}},
    "noisy latents": {"objectives": {"reconstruction": {"latent_noise": 0.5}}},
    "scale at its ceiling": {"objectives": {"contrastive": {"max_scale": 2.0}}},
    "one local crop": {"data": {"augment": {"local_crops": 1}}},
}
BATCHES = {"contrastive": 16, "self_distillation": 8, "reconstruction": 8}
MICRO_BATCHES = (1, 2, 4)


def gradients(settings: dict, micro_batches: int) -> dict[str, tuple[dict[str, float], dict[str, Tensor], dict]]:
    """Per objective: terms, gradients and the centres afterwards, over two steps."""
    sizes = {name: {"micro_batch": size // micro_batches} for name, size in BATCHES.items()}
    config = tiny_config(merged(settings, {"objectives": sizes}))
    model, data = build_model(config, SINGLE), data_of(config, SINGLE)
    runner = PlainRunner(model, torch.optim.SGD(model.parameters()), 0.0)
    found = {}
    for objective in passes_of(config, SINGLE):
        assert objective.prepare(runner, data(0)) == micro_batches
        model.zero_grad()
        objective = next(p for p in passes_of(config, SINGLE) if p.name == objective.name)  # no state from `prepare`
        terms = [execute(objective, runner, data(step)) for step in range(2)]
        terms = {f"{step} {name}": float(value) for step, values in enumerate(terms) for name, value in values.items()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[objective.name] = (terms, grads, getattr(objective, "centers", {}))
    return found


@pytest.mark.parametrize("case", SETTINGS)
def test_micro_batches_equal_one_batch(case: str) -> None:
    whole, *split = (gradients(SETTINGS[case], count) for count in MICRO_BATCHES)
    for parts in split:
        assert parts.keys() == whole.keys() == BATCHES.keys()
        for objective, (terms, grads, centers) in whole.items():
            assert parts[objective][0] == pytest.approx(terms, rel=2e-6)
            assert parts[objective][1].keys() == grads.keys()
            for name, expected in grads.items():
                largest = expected.abs().max().clamp(min=1e-3)
                assert (parts[objective][1][name] - expected).abs().max() <= 1e-5 * largest, (objective, name)
            for name, center in centers.items():
                assert torch.allclose(parts[objective][2][name], center, atol=1e-6), name
    centers = whole["self_distillation"][2]
    assert bool(centers) == (case == "softmax centering")
    assert all(center.abs().max() > 1e-3 for center in centers.values())


class Toy(Pass):
    """A local and two whole-batch terms of y = w x + c, in ``count`` micro-batches; notes what is asked of it."""

    name, mode, weight, over_batch = "toy", "mode", 3.0, True
    term_weights = {"spread": 0.5}

    def __init__(self, count: int, over_batch: bool = True):
        self.count, self.over_batch, self.asked = count, over_batch, []

    def prepare(self, run: Any, batch: Tensor) -> int:
        self.batch = batch.chunk(self.count)
        return self.count

    def inputs(self, micro: int, first: bool = True) -> dict[str, Tensor]:
        self.asked.append(("inputs", micro, torch.is_grad_enabled()))
        return {"x": self.batch[micro]}

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        return {"square": outputs[0].square().sum()}

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [outputs[0], outputs[0] * 2], [outputs[1]]

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        return {"spread": rows[0].var() * shared[0], "product": (rows[0].mean() * rows[1].mean()).sin()}


class Line:
    """The runner of the toy pass."""

    mesh = SINGLE

    def __init__(self) -> None:
        self.w, self.c = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, 0.25))
        self.backwards = 0

    def __call__(self, mode: str, x: Tensor) -> tuple[Tensor, Tensor]:
        assert mode == "mode"
        return self.w * x + self.c, self.c.exp()

    def backward(self, loss: Tensor) -> None:
        self.backwards += 1
        loss.backward()


@pytest.mark.parametrize("count", [1, 2, 3, 4])  # 7 rows: the last micro-batch may be smaller
def test_execute_against_autograd(count: int) -> None:
    batch = torch.linspace(-1, 2, 7, dtype=torch.float64)
    objective, run = Toy(count), Line()
    terms = execute(objective, run, batch)
    plain = Line()
    outputs = plain("mode", batch)
    local = objective.local_terms(outputs, 0)
    whole = objective.global_terms(*objective.global_inputs(outputs))
    expected = {f"toy/{name}": value for name, value in {**local, **whole}.items()}
    (3.0 * (local["square"] + 0.5 * whole["spread"] + whole["product"])).backward()
    assert terms.keys() == expected.keys()
    assert all(not value.requires_grad for value in terms.values())
    for name, value in expected.items():
        assert torch.allclose(terms[name], value.detach(), rtol=1e-12), name
    assert float(run.w.grad) == pytest.approx(float(plain.w.grad), rel=1e-12)
    assert float(run.c.grad) == pytest.approx(float(plain.c.grad), rel=1e-12)


def test_forwards_and_backwards_are_no_more_than_needed() -> None:
    """The first forward of all, without graph, only where a term spans micro-batches."""
    second = [("inputs", micro, True) for micro in range(2)]
    for over_batch, count, asked in (
        (True, 2, [("inputs", 0, False), ("inputs", 1, False), *second]), (True, 1, second[:1]), (False, 2, second),
    ):  # fmt: skip
        objective, run = Toy(count, over_batch), Line()
        terms = execute(objective, run, torch.ones(4, dtype=torch.float64))
        assert objective.asked == asked and run.backwards == count
        assert terms.keys() == {"toy/square"} | ({"toy/spread", "toy/product"} if over_batch else set())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["square", "spread", "product"])
def test_a_term_that_is_not_finite_shows_in_every_gradient(count: int, name: str, monkeypatch) -> None:
    """Though it weighs nothing, and its own gradient is finite; and the host need not look."""
    objective, run = Toy(count), Line()
    kind = "local_terms" if name == "square" else "global_terms"
    plain = getattr(objective, kind)

    def spoilt(*arguments: Any) -> dict[str, Tensor]:
        return {key: x + torch.nan if key == name else x for key, x in plain(*arguments).items()}

    monkeypatch.setattr(objective, kind, spoilt)
    monkeypatch.setattr(objective, "term_weights", {name: 0.0})
    with Operations() as operations:
        terms = execute(objective, run, torch.ones(4, dtype=torch.float64))
    assert not operations.host_reads
    assert [key for key, value in terms.items() if not value.isfinite()] == [f"toy/{name}"]
    assert run.w.grad.isnan() and run.c.grad.isnan()
