"""Which class the nearest real pictures name, for drawn and for real ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megavtp.errors import UserError
from megavtp.evaluation.generation.recognition import vote

NAMES = ["flags", "food", "objects"]


def plain_vote(query, bank, ids):
    """The class with the most weight among the 20 that are nearest by their angle."""
    cosines = F.normalize(bank, dim=-1) @ F.normalize(query, dim=-1)
    near = sorted(range(len(bank)), key=lambda row: -cosines[row])[:20]
    weight = dict.fromkeys(range(len(NAMES)), 0.0)
    for row in near:
        weight[int(ids[row])] += float(torch.exp(cosines[row] / 0.07))
    return max(weight, key=lambda name: weight[name])


def cloud(count, seed, spread):
    """Pictures of classes about three directions; a wide spread mixes them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(count) % 3
    return torch.eye(8)[ids] + spread * torch.randn(count, 8, generator=draw), ids


def test_shares_are_those_of_a_plain_vote():
    real, real_ids = cloud(90, 0, 0.6)
    drawn, drawn_ids = cloud(50, 1, 0.9)
    kept = (drawn_ids != 2) | (torch.arange(50) % 2 == 0)  # fewer of the last class
    drawn, drawn_ids = drawn[kept], drawn_ids[kept]
    pairs = torch.arange(90) // 6  # six pictures of a concept, which do not vote for each other
    found = vote(drawn, drawn_ids, real, real_ids, pairs, NAMES)

    right = torch.tensor([plain_vote(x, real, real_ids) for x in drawn]) == drawn_ids
    others = torch.tensor([
        plain_vote(x, real[pairs != pair], real_ids[pairs != pair]) for x, pair in zip(real, pairs)
    ]) == real_ids
    shares = [float((drawn_ids == i).double().mean()) for i in range(3)]
    by_class = [(float(right[drawn_ids == i].double().mean()), float(others[real_ids == i].double().mean()))
                for i in range(3)]
    assert 0.4 < right.double().mean() < 0.9 and others.double().mean() > right.double().mean()
    assert found.metrics == pytest.approx({
        "generation/class_accuracy": float(right.double().mean()),
        "chance/generation/class_accuracy": max(shares),
        "generation/class_accuracy_least": min(of for of, _ in by_class),
    })
    # Real classes weigh as much as those that were drawn.
    assert found.real["generation/class_accuracy"] == pytest.approx(sum(s * of for s, (_, of) in zip(shares, by_class)))
    assert found.real["generation/class_accuracy_least"] == pytest.approx(min(of for _, of in by_class))
    for i, name in enumerate(NAMES):
        assert (found.classes[name]["drawn"], found.classes[name]["real"]) == pytest.approx(by_class[i])
        assert found.classes[name]["drawn_pictures"] == int((drawn_ids == i).sum())
    ordered = [of["drawn"] for of in found.classes.values()]
    assert ordered == sorted(ordered) and f"least first: {next(iter(found.classes))} " in found.notes[0]
    assert len(found.notes) == 1


def test_a_class_that_was_not_drawn_is_not_told():
    real, real_ids = cloud(90, 0, 0.1)
    found = vote(real[real_ids < 2], real_ids[real_ids < 2], real, real_ids, torch.arange(90), NAMES)
    assert found.metrics["generation/class_accuracy"] == found.real["generation/class_accuracy_least"] == 1
    assert list(found.classes) == ["flags", "food"]


def test_few_real_pictures():
    real, real_ids = cloud(90, 0, 0.1)
    each = torch.arange(90)
    rare = (real_ids != 1) | (each < 15)  # five of the second class
    found = vote(real, real_ids, real[rare], real_ids[rare], each[rare], NAMES)
    assert "food: fewer real pictures than the 20 that vote" in found.notes[1]
    with pytest.raises(UserError, match="the reference has no picture of the class food, which was drawn"):
        vote(real, real_ids, real[real_ids != 1], real_ids[real_ids != 1], each[real_ids != 1], NAMES)
    with pytest.raises(UserError, match="20 neighbours needs more labelled real pictures than these 20"):
        vote(real, real_ids, real[:20], real_ids[:20], each[:20], NAMES)
