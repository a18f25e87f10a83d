"""Switching an objective off leaves the data, and the other objectives' terms and gradients, bit for bit alone."""

from __future__ import annotations

import pytest
import torch
from tiny_run import PlainRunner, build_model, data_of, passes_of, tiny_config

from megavtp.config.schema import Config
from megavtp.parallel.mesh import SINGLE
from megavtp.parallel.passes import execute
from megavtp.training.optimizer import build_optimizer

OBJECTIVES = ("contrastive", "self_distillation", "reconstruction")
FIELDS = {  # what each objective reads of a batch
    "contrastive": ("images", "tokens"),
    "self_distillation": ("ssl_rows", "global_crops", "local_crops", "masks"),
    "reconstruction": ("rec_rows",),
}


def config_without(*off: str) -> Config:
    drop_path = {name: {"drop_path": 0.2} for name in OBJECTIVES}  # draws of one must not shift those of another
    return tiny_config({"objectives": {name: drop_path[name] | ({"weight": 0} if name in off else {})
                                       for name in OBJECTIVES}})


def first_step(config: Config) -> dict[str, tuple[dict, dict]]:
    """Objective -> (loss terms, gradients) of its own pass, on the initial weights and the first batch."""
    model = build_model(config, SINGLE)
    runner = PlainRunner(model, build_optimizer(model.named_parameters(), config.train.optimizer), 0.0)
    batch, found = data_of(config, SINGLE)(0), {}
    for objective in passes_of(config, SINGLE):
        runner.begin_step()
        terms = execute(objective, runner, batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert gradients
        found[objective.name] = terms, gradients
    return found


@pytest.fixture(scope="module")
def all_on():
    return first_step(config_without())


@pytest.mark.parametrize("off", [(name,) for name in OBJECTIVES] + [("contrastive", "reconstruction")])
def test_terms_and_gradients_of_the_others(off, all_on):
    found = first_step(config_without(*off))
    assert set(found) == set(OBJECTIVES) - set(off)
    for name, (terms, gradients) in found.items():
        expected_terms, expected = all_on[name]
        assert terms.keys() == expected_terms.keys() and gradients.keys() == expected.keys()
        assert all(torch.equal(terms[term], expected_terms[term]) for term in terms)
        assert all(torch.equal(gradients[parameter], expected[parameter]) for parameter in gradients)


@pytest.mark.parametrize("off", OBJECTIVES)
def test_data_seen(off):
    whole, less = data_of(config_without(), SINGLE), data_of(config_without(off), SINGLE)
    for step in (0, 5):
        expected, got = whole(step), less(step)
        read = torch.tensor([name != "" for name in got.ids])
        assert all(got.ids[i] == expected.ids[i] for i in range(len(got.ids)) if read[i])
        for name in set(OBJECTIVES) - {off}:
            for field in FIELDS[name]:
                assert torch.equal(getattr(got, field), getattr(expected, field)), (name, field)
        if off == "contrastive":  # the pictures that are left are the reconstructed ones
            rows = got.rec_rows
            assert torch.equal(got.images[rows], expected.images[rows]) and got.tokens is None
        if off == "self_distillation":
            assert got.global_crops is None
