"""``objectives.contrastive.image_size``: that objective alone sees smaller images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from distributed import run_ranks
from layouts import Cell, differences, run_cell
from test_objective_off import first_step
from tiny_run import build_model, data_of, passes_of, reference, tiny_config

from megavtp.objectives.contrastive import info_nce
from megavtp.parallel.mesh import SINGLE
from megavtp.pixels import normalise

SMALL = {"objectives": {"contrastive": {"image_size": 16}}}


def test_it_is_the_loss_of_reduced_images_and_leaves_the_others_alone():
    config = tiny_config(SMALL)
    whole, small = first_step(tiny_config()), first_step(config)
    model, batch = build_model(config, SINGLE), data_of(config, SINGLE)(0)
    assert batch.images.shape[-1] == 32
    images = F.interpolate(normalise(batch.images), 16, mode="bilinear", antialias=True)
    image, text, scale, _ = model("contrastive", images=images, tokens=batch.tokens)
    loss, of_whole = (found["contrastive"][0]["contrastive/loss"] for found in (small, whole))
    assert torch.allclose(loss, info_nce(image, text, scale), rtol=1e-6)
    assert not torch.allclose(loss, of_whole, rtol=1e-3)
    for name in ("self_distillation", "reconstruction"):
        for got, expected in zip(small[name], whole[name]):
            assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_the_size_of_the_model_changes_nothing():
    config = tiny_config({"objectives": {"contrastive": {"image_size": 32}}})
    (objective,) = (p for p in passes_of(config, SINGLE) if p.name == "contrastive")
    batch = data_of(config, SINGLE)(0)
    objective.prepare(None, batch)
    assert torch.equal(objective.inputs(0)["images"], normalise(batch.images))
    assert objective.inputs(0, first=False)["images"].is_meta


CELL = Cell(tp=2, pp=2, micro_batches=2)


def _on_ranks(rank: int):
    return run_cell(CELL.config(SMALL))


def test_layout():
    found = differences(run_ranks(4, _on_ranks)[0], reference(CELL.plain_config(SMALL)))
    assert found.exact, found
