import dataclasses
import math
import sys

import pytest
import torch
from distributed import run_ranks
from evaluation_fakes import FakeModel, FakeSet, FakeTokenizer

from megavtp.config.schema import EvaluationConfig
from megavtp.errors import UserError
from megavtp.evaluation import VTPEvaluated, evaluate, gathering
from megavtp.evaluation.probes.linear import PROBES
from megavtp.evaluation.tokenizer.collect import collect
from megavtp.parallel.mesh import SINGLE, build_mesh

CONFIG = EvaluationConfig(batch_size=4, knn=3, templates=("{}", "a {}"))
LPIPS = {"lpips_fake": lambda x, y: (x - y).abs().flatten(1).mean(1)}


def run(model=None, test=None, train=None, config=CONFIG, mesh=SINGLE, **options):
    test = FakeSet(19) if test is None else test
    return evaluate(model or FakeModel(), test, train, config, mesh, tokenizer=FakeTokenizer(), **options)


def run_counted(samples, train_samples, mesh=SINGLE):
    """The metrics, and the model calls that made them."""
    model = FakeModel()
    train = FakeSet(train_samples, seed=7) if train_samples else None
    return run(model, FakeSet(samples), train, mesh=mesh, perceptual=LPIPS), model.calls


CASES = {"uneven": (19, 30), "fewer samples than ranks": (1, 0), "short train set": (6, 1)}


def run_probes(mesh=SINGLE):
    details = {}
    return run(train=FakeSet(60, seed=7), mesh=mesh, probes=PROBES, details=details), details


def on_rank(rank):
    """Everything that two processes show; one start-up for all of it."""
    gathering._CHUNK_ELEMENTS = 16  # so that gathering takes many exchanges
    data_parallel, tensor_parallel = build_mesh(1, 1), build_mesh(2, 1)
    results = {name: run_counted(*sizes, data_parallel) for name, sizes in CASES.items()}
    results["tensor parallel"] = run_counted(6, 5, tensor_parallel)
    results["probes"] = run_probes(data_parallel)
    try:
        run(test=FakeSet(8, fail_on_rank=1), mesh=data_parallel)
    except Exception as error:
        results["failing"] = type(error).__name__, str(error)
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, on_rank)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value == pytest.approx(want[name], abs=1e-6), name


def test_names_and_order():
    metrics = run(train=FakeSet(30, seed=7), perceptual=LPIPS)
    assert [name for name in metrics if not name.startswith("chance/")] == [
        "samples", "zero_shot/group_top1",
        *(f"retrieval/{way}_r{k}" for k in (1, 5, 10) for way in ("image_to_text", "text_to_image")),
        "retrieval/cross_style_r1", "retrieval/cross_style_r5", "knn/group_top1", "knn/cross_style_r1",
        "knn/cross_style_r5", "latents/effective_rank", "latents/first_component", "reconstruction/psnr",
        "reconstruction/ssim", "reconstruction/lpips_fake",
    ]  # fmt: skip
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    with_chance = {name.removeprefix("chance/") for name in metrics if name.startswith("chance/")}
    assert set(metrics) - with_chance - {f"chance/{n}" for n in with_chance} == {
        "samples", "latents/effective_rank", "latents/first_component", "reconstruction/ssim",
        "reconstruction/lpips_fake",
    }


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(batch_size):
    train = FakeSet(30, seed=7)
    got = run(train=train, config=dataclasses.replace(CONFIG, batch_size=batch_size), perceptual=LPIPS)
    assert_same(got, run(train=train, perceptual=LPIPS))


@pytest.mark.parametrize("case", CASES)
def test_process_count_changes_nothing(two_ranks, case):
    want, _ = run_counted(*CASES[case])
    for rank in two_ranks:
        metrics, calls = rank[case]
        assert_same(metrics, want)
        assert calls == two_ranks[0][case][1]  # forwards that gather parameters wait for each other


def test_process_count_changes_neither_probes_nor_the_spectrum(two_ranks):
    want, details = run_probes()
    for rank in two_ranks:
        metrics, found = rank["probes"]
        assert_same(metrics, want)
        assert found.pop("latents/spectrum") == pytest.approx(details["latents/spectrum"], abs=1e-9)
        assert found == {name: words for name, words in details.items() if name.startswith("probe/")}


def test_model_parallel_ranks_see_the_same_samples(two_ranks):
    want, want_calls = run_counted(6, 5)
    for rank in two_ranks:
        metrics, calls = rank["tensor parallel"]
        assert_same(metrics, want)
        assert calls == want_calls


def test_one_rank_that_cannot_read_stops_all(two_ranks):
    healthy, broken = (rank["failing"] for rank in two_ranks)
    assert broken == ("OSError", "disk on fire")
    assert healthy[0] == "UserError" and "another process" in healthy[1]


def test_rows_are_in_sample_order_and_counted_once():
    class Shuffled(FakeSet):
        def batches(self, batch_size, rank, world):
            served = list(super().batches(batch_size, rank, world))
            yield from served[::-1]
            yield served[0]

    table = collect(
        Shuffled(9), lambda images, tokens: {"mean": images.float().mean((1, 2, 3))}, batch_size=2, mesh=SINGLE,
        device=torch.device("cpu"),
    )
    plain = FakeSet(9)
    assert table.index.tolist() == list(range(9)) and table.captions == plain.captions and table.meta == plain.meta
    torch.testing.assert_close(table.columns["mean"], plain.images.float().mean((1, 2, 3)))


@pytest.mark.parametrize("quiet, terminal", [(False, True), (True, True), (False, False)])
def test_a_bar_shows_how_far_it_is(quiet, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(quiet=quiet)
    assert ("evaluation: 100%" in capsys.readouterr().err) == (terminal and not quiet)


def test_empty_set_is_a_user_error():
    with pytest.raises(UserError, match="no samples"):
        run(test=FakeSet(0))
    with pytest.raises(UserError, match="no samples"):
        run(train=FakeSet(0))


def test_objectives_that_are_off_are_left_out_and_named():
    skipped = {}
    metrics = run(FakeModel(["self_distillation"]), skipped=skipped)
    assert {name.split("/")[0] for name in metrics} == {"samples", "knn", "chance"}
    assert set(skipped) == {"zero_shot, retrieval", "reconstruction, latents"}
    plain = FakeSet(6)
    plain.meta = [{}] * 6
    skipped = {"reconstruction/lpips": "no weights"}
    metrics = run(test=plain, skipped=skipped)
    assert set(skipped) == {"zero_shot", "knn", "reconstruction/lpips"}
    assert skipped["reconstruction/lpips"] == "no weights"
    assert {name.split("/")[0] for name in metrics} == {"samples", "retrieval", "latents", "reconstruction", "chance"}


def test_adapter_names_the_modes_and_returns_float32():
    calls = []

    def model(mode, **inputs):
        calls.append((mode, *inputs))
        out = torch.ones(2, 4, dtype=torch.bfloat16)
        if "layers" in inputs:
            return [(out, out)] * len(inputs["layers"])
        return (out, out) if mode == "features" else out

    adapter = VTPEvaluated(model, {"contrastive"}, 2)
    x = torch.zeros(2, 3, 16, 16)
    outputs = [adapter.encode_image(x), adapter.encode_text(x), adapter.features(x), adapter.encode(x)]
    outputs += [adapter.decode(x), *adapter.last_blocks(x, 2)[1]]
    assert calls == [
        ("encode_image", "images"), ("encode_text", "tokens"), ("features", "images"), ("encode", "images"),
        ("decode", "latents"), ("features", "images", "layers"),
    ]
    assert all(out.dtype == torch.float32 for out in outputs)
