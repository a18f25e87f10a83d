"""Linear probes against scikit-learn, and that what picks a head has not taught it."""

import math
from dataclasses import replace

import pytest
import torch
from evaluation_fakes import FakeModel, FakeSet, FakeTokenizer
from probe_clouds import CLOUDS, PENALTIES, cloud

from megavtp.config.schema import EvaluationConfig
from megavtp.errors import UserError
from megavtp.evaluation import evaluate
from megavtp.evaluation.probes import logistic, sweep
from megavtp.evaluation.probes.labelled import probe_labels
from megavtp.evaluation.probes.linear import PROBES, extraction

# Of scikit-learn 1.9.1, with each penalty and with one that it chooses; in tests/evaluation, with it installed:
# python -c "from probe_clouds import sklearn_accuracies as s; print(s())"
SKLEARN = {
    "few classes": (0.859, 0.8697, 0.8707, 0.8703), "many classes": (0.7663, 0.7627, 0.7617, 0.7663),
    "correlated": (0.608, 0.668, 0.682, 0.6807),
}
POINT = 0.01


def tensors(name):
    x, ids, asked, truth = map(torch.from_numpy, cloud(name))
    train, test = ([{"label": int(i)} for i in classes] for classes in (ids, truth))
    return x, asked, probe_labels(train, test)[0]["label"]


@pytest.mark.parametrize("name", CLOUDS)
def test_logistic_regression_equals_sklearn(name):
    x, asked, labels = tensors(name)
    standard = logistic.Standardisation.of(x)
    for penalty, want in zip(PENALTIES, SKLEARN[name][:-1], strict=True):
        weights = logistic.fit(standard(x), labels.ids, labels.classes, penalty)
        got = labels.accuracy(logistic.scores(standard(asked), weights).argmax(1))
        assert got == pytest.approx(want, abs=0.001), penalty  # three samples
    predicted, words = logistic.probe(x, asked, labels)
    assert labels.accuracy(predicted) == pytest.approx(SKLEARN[name][-1], abs=POINT), words


@pytest.mark.parametrize("name", ["few classes", "many classes"])
def test_the_sweep_of_rates_reaches_sklearn(name):
    """Not on correlated features, which gradient descent fits in more steps than the protocol has."""
    x, asked, labels = tensors(name)
    blank = [torch.cat([y, torch.zeros_like(y)], 1) for y in (x, asked)]  # a mean patch token that tells nothing
    predicted, words = sweep.probe(*blank, 1, labels)
    assert labels.accuracy(predicted) == pytest.approx(SKLEARN[name][-1], abs=POINT), words


@pytest.mark.parametrize("probe", [logistic.probe, lambda x, y, labels: sweep.probe(x, y, 1, labels)])
def test_rounding_of_the_features_changes_nothing(probe):
    """Large features, with which the higher rates never settle."""
    x, asked, labels = tensors("few classes")
    x, asked = 10 * x[:600], 10 * asked
    labels = replace(labels, rows=labels.rows[:600], ids=labels.ids[:600], picks=labels.picks[:600])
    rounding = 1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (want, words), (got, same) = probe(x, asked, labels), probe(x * rounding, asked, labels)
    assert words == same and (got != want).double().mean() < 0.002, words


def test_a_constant_feature_counts_for_nothing():
    x, asked, labels = tensors("few classes")
    want, _ = logistic.probe(x, asked, labels)
    noise = 1e-7 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(0))
    constant = torch.full((len(asked), 1), 3.0)
    got, _ = logistic.probe(torch.cat([x, 3 + noise], 1), torch.cat([asked, constant], 1), labels)
    assert torch.equal(got, want)


def test_heads_of_one_pass_are_those_of_a_pass_each(monkeypatch):
    monkeypatch.setattr(sweep, "_LEAST_STEPS", 20)
    draw = torch.Generator().manual_seed(0)
    x, ids = torch.randn(300, 3 * 4, generator=draw), torch.randint(0, 3, (300,), generator=draw)
    heads = sweep.heads(4, 2)
    assert len(heads) == 4 * len(sweep.RATES)
    assert [head.columns for head in heads[:: len(sweep.RATES)]] == [
        slice(4, 8), slice(4, 12), slice(0, 8), slice(0, 12)
    ]
    together = sweep.train(x, ids, 3, heads)
    for number in (0, 12, 13, 51):
        alone = sweep.train(x, ids, 3, [heads[number]])[0]
        torch.testing.assert_close(together[number], alone, atol=1e-6, rtol=1e-5)


def test_the_head_of_the_lowest_cross_entropy_is_picked():
    heads = sweep.heads(1, 1)[:4]
    x, ids = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, 0])
    wrong, unsure, sure, lost = (torch.tensor([[-k, k], [0, 0]]) for k in (-3.0, 1.0, 2.0, math.nan))
    assert sweep.pick(x, ids, [lost, wrong, unsure, sure], heads) == heads[3]
    assert sweep.pick(x, ids, [sure, unsure, wrong, lost], heads) == heads[0]


def test_a_fifth_of_each_class_picks_and_copies_of_a_concept_stay_together():
    meta = [{"group": "ab"[i % 2], "concept": f"c{i // 4}"} for i in range(44)]  # 11 concepts with both classes twice
    labels = probe_labels(meta, meta)[0]["group"]
    picked = {m["concept"] for m, pick in zip(meta, labels.picks.tolist()) if pick}
    assert picked == {"c4", "c9"} and int(labels.picks.sum()) == 8
    plain = probe_labels([{"group": m["group"]} for m in meta], meta)[0]["group"]
    assert [int(plain.picks[plain.ids == i].sum()) for i in (0, 1)] == [4, 4]


def test_a_class_that_training_lacks_is_missed():
    train = [{"label": "ab"[i % 2]} for i in range(10)]
    labels = probe_labels(train, [{"label": "a"}, {}, {"label": "new"}, {"label": "b"}])[0]["label"]
    assert labels.test_rows.tolist() == [0, 2, 3] and labels.test_ids.tolist() == [0, -1, 1]
    assert labels.accuracy(torch.tensor([0, 0, 1])) == pytest.approx(2 / 3)
    assert labels.accuracy(torch.tensor([0, -1, 1])) == pytest.approx(2 / 3)


def test_labels_that_are_missing_or_too_few():
    few = [{"group": i % 3, "label": i % 2} for i in range(12)]
    found, reasons = probe_labels(few, few)
    assert set(found) == {"label"} and "too few training samples a class: 12 of 3 classes" in reasons["group"]
    with pytest.raises(UserError, match="group: too few training samples a class"):
        probe_labels([{"group": m["group"]} for m in few], few)
    for train, test in (([{}] * 9, few), (few, [{}] * 9), ([{"label": 1}] * 9, few)):
        with pytest.raises(UserError, match="no label / subgroup / group with two or more classes"):
            probe_labels(train, test)


def run(batch_size=4, model=None):
    details = {}
    metrics = evaluate(
        model or FakeModel(), FakeSet(19), FakeSet(60, seed=7), EvaluationConfig(batch_size=batch_size, knn=3),
        tokenizer=FakeTokenizer(), probes=PROBES, details=details,
    )
    return metrics, details


def test_metrics_and_details_of_an_evaluation(monkeypatch):
    monkeypatch.setattr(sweep, "_LEAST_STEPS", 20)
    metrics, details = run()
    names = [f"probe/{name}/group_top1" for name in ("latents", "latents_mean", "features")]
    assert [name for name in metrics if name.startswith("probe/")] == names
    assert all(metrics[f"chance/{name}"] == metrics["chance/knn/group_top1"] for name in names)
    assert details["probe/latents/group"].startswith("penalty ") and "learning rate" in details["probe/features/group"]
    assert len(details["latents/spectrum"]) == 12
    again, same = run(batch_size=7)
    assert again == pytest.approx(metrics, abs=1e-6) and same["probe/features/group"] == details["probe/features/group"]


def test_a_diverged_model_names_no_class():
    class Diverged(FakeModel):
        def encode(self, images):
            return super().encode(images) * math.nan

        def last_blocks(self, images, blocks):
            return [(x * math.nan, y) for x, y in super().last_blocks(images, blocks)]

    metrics, details = run(model=Diverged())
    assert all(value == 0 for name, value in metrics.items() if name.startswith("probe/"))
    assert set(details) == {"latents/spectrum"}


def test_columns_are_of_the_last_blocks_and_all_positions():
    model, images = FakeModel(), FakeSet(3).images.float()
    values = extraction(model, PROBES, images)
    blocks = model.last_blocks(images, 3)
    want = torch.cat([blocks[0][0], blocks[1][0], blocks[2][0], blocks[2][1].mean(1)], 1)
    assert torch.equal(values["probe/features"], want) and torch.equal(values["features"], blocks[2][0])
    assert torch.equal(values["probe/latents"].unflatten(2, (8, 8)), model.encode(images))
    assert set(extraction(model, (), images)) == {"features"}


