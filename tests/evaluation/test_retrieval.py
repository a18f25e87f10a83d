import pytest
import torch
import torch.nn.functional as F

from megavtp.evaluation.tokenizer.retrieval import caption_retrieval, cross_style_retrieval


def unit(n, seed=0, dim=16):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_perfect_retrieval():
    x = unit(40)
    metrics = caption_retrieval(x, x, [f"caption {i}" for i in range(40)])
    assert all(value == 1 for name, value in metrics.items() if not name.startswith("chance/"))
    assert metrics["chance/retrieval/image_to_text_r5"] == pytest.approx(5 / 40)
    assert metrics["chance/retrieval/text_to_image_r10"] == pytest.approx(10 / 40)


def test_images_with_the_same_caption_are_all_correct():
    texts = unit(20)
    captions = [f"caption {i % 20}" for i in range(60)]
    images = F.normalize(texts[torch.arange(60) % 20] + 0.01 * unit(60, 1), dim=-1)
    metrics = caption_retrieval(images, texts[torch.arange(60) % 20], captions)
    assert metrics["retrieval/image_to_text_r1"] == metrics["retrieval/text_to_image_r1"] == 1
    assert metrics["chance/retrieval/image_to_text_r1"] == pytest.approx(1 / 20)
    assert metrics["chance/retrieval/text_to_image_r1"] == pytest.approx(3 / 60)


def test_shuffled_pairs_miss():
    x = unit(30)
    metrics = caption_retrieval(x, x.roll(1, 0), [str(i) for i in range(30)])
    assert metrics["retrieval/image_to_text_r1"] == metrics["retrieval/text_to_image_r1"] == 0


def test_one_sample():
    metrics = caption_retrieval(unit(1), unit(1, 1), ["alone"])
    assert metrics["retrieval/image_to_text_r1"] == metrics["chance/retrieval/image_to_text_r1"] == 1


def styled(concepts, styles=("a", "b")):
    return [{"concept": c, "style": s} for c in concepts for s in styles]


def test_cross_style_ignores_the_own_style():
    concept = unit(10).repeat_interleave(2, 0)
    style = torch.eye(2).repeat(10, 1) * 5  # the style dominates the feature: the own style is always nearer
    features = torch.cat([concept, style], 1)
    metrics = cross_style_retrieval(features, styled(map(str, range(10))), "x/cross")
    assert metrics["x/cross_r1"] == 1
    assert metrics["chance/x/cross_r1"] == pytest.approx(1 / 10)
    assert metrics["chance/x/cross_r5"] == pytest.approx(5 / 10)


def test_concepts_of_one_style_are_distractors_not_queries():
    meta = styled(["p", "q"]) + [{"concept": "lonely", "style": "a"}, {"note": "no concept"}]
    x = torch.eye(16)[[0, 0, 1, 1, 2, 3]]
    metrics = cross_style_retrieval(x, meta, "x/cross")
    assert metrics["x/cross_r1"] == 1
    # two queries of style a see 2 images of style b; two of style b see 3 of style a
    assert metrics["chance/x/cross_r1"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 3) / 4)


@pytest.mark.parametrize(
    "meta", [[{}] * 4, styled(["p", "q"], ("a", "a")), [{"concept": c, "style": s} for c, s in zip("pqrs", "abab")]]
)
def test_no_pairs_no_metric(meta):
    assert cross_style_retrieval(unit(4), meta, "x/cross") == {}
