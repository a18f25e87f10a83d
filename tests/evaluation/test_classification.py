import math

import pytest
import torch
import torch.nn.functional as F
from evaluation_fakes import FakeTokenizer

from megavtp.errors import UserError
from megavtp.evaluation import ranking
from megavtp.evaluation.ranking import knn_predict
from megavtp.evaluation.tokenizer.classification import class_embeddings, knn_accuracy, zero_shot
from megavtp.evaluation.tokenizer.labels import blind_accuracy, read_labels, readable
from megavtp.parallel.mesh import SINGLE

OPTIONS = {"batch_size": 3, "mesh": SINGLE, "device": torch.device("cpu")}


def brute_knn(q, bank, ids, k, classes, group=None):
    out = []
    q, bank = F.normalize(q, dim=-1), F.normalize(bank, dim=-1)
    for i in range(len(q)):
        near = sorted(
            ((q[i] @ bank[j]).item(), ids[j].item()) for j in range(len(bank)) if group is None or group[i] != group[j]
        )
        votes = [0.0] * classes
        for cosine, c in near[::-1][:k]:
            votes[c] += math.exp(cosine / 0.07)
        out.append(max(range(classes), key=votes.__getitem__))
    return out


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("block", [1, 2**24])
def test_knn_equals_brute_force(monkeypatch, k, block):
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", block)
    draw = torch.Generator().manual_seed(0)
    q, bank = torch.randn(25, 4, generator=draw), torch.randn(60, 4, generator=draw)
    ids = torch.randint(0, 5, (60,), generator=draw)
    assert knn_predict(q, bank, ids, 5, k).tolist() == brute_knn(q, bank, ids, k, 5)
    group = torch.arange(60) % 3
    assert knn_predict(bank, bank, ids, 5, k, group, group).tolist() == brute_knn(bank, bank, ids, k, 5, group)


def test_knn_leave_one_out_does_not_see_itself():
    x = torch.eye(6)  # all others are equally far: with the own vote, every answer would be right
    meta = [{"group": g} for g in "aaaabb"]
    assert knn_accuracy(x, meta, "group", 100) == {
        "knn/group_top1": pytest.approx(4 / 6), "chance/knn/group_top1": pytest.approx(4 / 6)
    }


def test_knn_asks_the_other_style():
    twin = 3 * torch.eye(4).repeat_interleave(2, 0)  # inside a style, the nearest is of the other group
    features = torch.cat([twin, torch.eye(2).repeat(4, 1)], 1)
    meta = [{"group": g, "style": s} for s in "xy" for g in "abab"]
    assert knn_accuracy(features, meta, "group", 1)["knn/group_top1"] == 1
    assert knn_accuracy(features, [{"group": m["group"]} for m in meta], "group", 1)["knn/group_top1"] == 0


def test_knn_class_missing_from_train_is_missed():
    x = torch.eye(3)
    meta = [{"group": g} for g in ("a", "b", "new")]
    train = (torch.eye(3), [{"group": g} for g in ("a", "b", "elsewhere")])
    assert knn_accuracy(x, meta, "group", 1, train)["knn/group_top1"] == pytest.approx(2 / 3)
    assert knn_accuracy(x, meta, "group", 1, (torch.eye(3), [{}] * 3)) == {}
    assert knn_accuracy(x, meta, "subgroup", 1, train) == {}


def test_knn_of_a_diverged_model_is_wrong():
    x = torch.full((4, 2), math.nan)
    assert knn_accuracy(x, [{"group": g} for g in "aabb"], "group", 2)["knn/group_top1"] == 0


def test_labels():
    labels = read_labels([{"g": "b"}, {}, {"g": "a"}, {"g": ""}, {"g": None}, {"g": ["x"]}, {"g": "b"}], "g")
    assert labels.names == ["a", "b"] and labels.rows.tolist() == [0, 2, 6] and labels.ids.tolist() == [1, 0, 1]
    assert read_labels([{"g": "only"}] * 3, "g") is None
    assert readable("face-smiling_big") == "face smiling big"
    assert blind_accuracy(torch.tensor([0, 0, 0, 1, 2]), 1) == pytest.approx(3 / 5)
    assert blind_accuracy(torch.tensor([0, 0, 0, 1, 2]), 5) == 1


class Bag:
    """Text features as counts of letters; so a prompt's feature is known."""

    def __init__(self):
        self.batches = []

    def encode_text(self, tokens):
        self.batches.append(len(tokens))
        return F.one_hot(tokens % 128, 128).sum(1).float()


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts():
    model, names, templates = Bag(), ["red", "blue-green"], ["{}", "a {}", "{}!"]
    got = class_embeddings(model, FakeTokenizer(), names, templates, **OPTIONS)
    for row, name in zip(got, names):
        prompts = FakeTokenizer().encode([t.format(readable(name)) for t in templates])
        each = F.normalize(F.one_hot(prompts % 128, 128).sum(1).float(), dim=-1)
        torch.testing.assert_close(row, F.normalize(each.mean(0), dim=-1))
    assert model.batches == [3, 3]


@pytest.mark.parametrize("templates", [(), ("{}", "a photo")])
def test_template_without_a_place_is_refused(templates):
    with pytest.raises(UserError, match="evaluation.templates"):
        class_embeddings(Bag(), FakeTokenizer(), ["a", "b"], templates, **OPTIONS)


def test_zero_shot_on_known_features():
    names = ["alpha", "bravo", "carol", "delta", "echo", "fox", "golf"]
    truth = class_embeddings(Bag(), FakeTokenizer(), names, ["{}"], **OPTIONS)
    meta = [{"group": name} for name in names for _ in range(2)] + [{}]
    images = torch.cat([truth.repeat_interleave(2, 0), torch.zeros(1, 128)])
    run = lambda x: zero_shot(Bag(), FakeTokenizer(), x, meta, "group", ("{}",), **OPTIONS)  # noqa: E731
    assert run(images)["zero_shot/group_top1"] == run(images)["zero_shot/group_top5"] == 1
    assert run(images)["chance/zero_shot/group_top1"] == pytest.approx(1 / 7)
    assert run(images)["chance/zero_shot/group_top5"] == pytest.approx(5 / 7)
    images[0] = images[2]
    assert run(images)["zero_shot/group_top1"] == pytest.approx(13 / 14)
    assert run(torch.zeros_like(images))["zero_shot/group_top1"] == 0  # a tie of all classes is no hit


def test_zero_shot_only_over_classes_that_occur_and_have_names():
    run = lambda values: zero_shot(  # noqa: E731
        Bag(), FakeTokenizer(), torch.zeros(3, 128), [{"group": v} for v in values], "group", ("{}",), **OPTIONS
    )
    assert run(["a", "a", "a"]) == {} and run(["0", "1", "2"]) == {}
    assert set(run(["a", "b", "b"])) == {"zero_shot/group_top1", "chance/zero_shot/group_top1"}
