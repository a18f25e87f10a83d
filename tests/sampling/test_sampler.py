"""The same image whatever is drawn beside it; what is refused."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from sampling_fakes import NAMES, STATISTICS, TOKENIZER, tokenizer_facts, write_dit

from megavtp.data.randomness import generator
from megavtp.dit.checkpoint import load_dit
from megavtp.dit.sampling.sampler import GeneratedImages, all_images, open_sampler
from megavtp.dit.sampling.samples import (
    Sample,
    each,
    in_proportion,
    names_of,
    parse_classes,
    sample_noise,
    samples_of,
)
from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.errors import UserError
from megavtp.evaluation.generation.samples import samples_like
from megavtp.parallel.mesh import build_mesh

SAMPLES = each([2, 0, 1], 3)
SETTINGS = {
    "euler": SamplingSettings(steps=4, guidance=2.0, interval=(0.2, 1.0)),
    "heun": SamplingSettings(method="heun", steps=3, seed=5),
    "dopri5": SamplingSettings(method="dopri5", guidance=1.5),
    "sde": SamplingSettings(method="sde", steps=4),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("dit") / "ckpt", replace(tokenizer_facts(), statistics=STATISTICS))


def images(checkpoint, settings, samples, batch_size):
    return torch.cat(list(all_images(open_sampler(checkpoint, TOKENIZER, settings), samples, batch_size)))


def differ_by_rounding(one, other):
    """At most one level of 255, and hardly anywhere."""
    apart = (one.int() - other.int()).abs()
    return apart.max() <= 1 and (apart > 0).float().mean() < 0.02


def test_noise_is_a_function_of_seed_condition_and_number():
    shape = (4, 3, 3)
    samples = [Sample(3, 0), Sample(3, 1), Sample(4, 0), Sample("a cat", 0)]
    together = sample_noise(0, samples, shape, "cpu")
    first, second = together(), together()
    for row, sample in enumerate(samples):
        alone = sample_noise(0, [sample], shape, "cpu")
        assert torch.equal(alone()[0], first[row]) and torch.equal(alone()[0], second[row])
        draws = generator(0, "sample", sample.condition, sample.index).standard_normal(shape, dtype="float32")
        assert torch.equal(first[row], torch.from_numpy(draws))
    rows = [*first, *second, *sample_noise(1, samples, shape, "cpu")()]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert abs(torch.cat(rows).mean()) < 0.2 and abs(torch.cat(rows).std() - 1) < 0.15


@pytest.mark.parametrize("method", SETTINGS)
def test_the_same_images_in_batches_of_any_size(checkpoint, method):
    settings = SETTINGS[method]
    whole = images(checkpoint, settings, SAMPLES, 9)
    assert whole.shape == (9, 3, 64, 64) and whole.dtype == torch.uint8
    assert differ_by_rounding(images(checkpoint, settings, SAMPLES, 2), whole)
    alone = images(checkpoint, settings, [Sample(0, 1)], 4)
    assert differ_by_rounding(alone[0], whole[4])
    other_seed = images(checkpoint, replace(settings, seed=9), SAMPLES, 9)
    assert all((a.int() - b.int()).abs().float().mean() > 1 for a, b in zip(whole, other_seed))


@pytest.mark.parametrize("method", SETTINGS)
def test_latents_differ_by_rounding_only(checkpoint, method):
    sampler = open_sampler(checkpoint, TOKENIZER, SETTINGS[method])
    whole = sampler.latents(SAMPLES)
    alone = torch.cat([sampler.latents([sample]) for sample in SAMPLES])
    apart = (alone - whole).abs().flatten(1).amax(1) / whole.abs().max()
    assert apart.median() < 2e-6
    assert apart.max() < (1e-3 if method == "dopri5" else 1e-5)  # a step of dopri5 may tip


def _draw(rank, checkpoint, batch_size):
    mesh = build_mesh(1, 1)
    sampler = open_sampler(checkpoint, TOKENIZER, SETTINGS["euler"])
    own = list(GeneratedImages(sampler, SAMPLES).batches(batch_size, rank, mesh.dp))
    return torch.cat(list(all_images(sampler, SAMPLES, batch_size, mesh))), own


@pytest.mark.parametrize("world, batch_size", [(2, 2), (3, 4)])
def test_the_same_bits_on_any_number_of_processes(checkpoint, world, batch_size):
    """For one batch size; with 3 processes and 4, the last has 1 image and no process is without a batch; with 2 and 2
    the last round has a process without one."""
    expected = images(checkpoint, SETTINGS["euler"], SAMPLES, batch_size)
    results = run_ranks(world, _draw, str(checkpoint), batch_size)
    assert all(torch.equal(everything, expected) for everything, _ in results)
    shares = sorted((batch for _, own in results for batch in own), key=lambda batch: int(batch[0][0]))
    assert torch.cat([numbers for numbers, _ in shares]).tolist() == list(range(9))
    assert torch.equal(torch.cat([drawn for _, drawn in shares]), expected)


def test_a_source_for_an_evaluation(checkpoint):
    source = GeneratedImages(open_sampler(checkpoint, TOKENIZER, SETTINGS["heun"]), SAMPLES)
    assert source.size == 64 and len(source) == 9
    (numbers, drawn), = source.batches(20, 0, 1)
    assert torch.equal(drawn, images(checkpoint, SETTINGS["heun"], SAMPLES, 20)) and numbers.tolist() == list(range(9))


def test_averaged_weights_unless_told_otherwise(checkpoint):
    settings = SamplingSettings(steps=2)
    default, average, trained = (
        open_sampler(checkpoint, TOKENIZER, settings, **options).latents([Sample(1, 0)])
        for options in ({}, {"average": True}, {"average": False})
    )
    assert torch.equal(default, average) and not torch.allclose(default, trained, atol=0.01)


def test_images_are_decoded_with_the_statistics_of_the_dit(checkpoint):
    sampler = open_sampler(checkpoint, TOKENIZER, SamplingSettings(steps=2))
    latents = sampler.latents(SAMPLES[:2])
    mean = torch.tensor(STATISTICS.mean)[:, None, None]
    pixels = sampler.tokenizer.decode(latents * 0.5 + mean)
    assert torch.equal(sampler.images(SAMPLES[:2]), (pixels * 255).round().to(torch.uint8))


def test_half_precision_is_near(checkpoint):
    exact, half = (
        open_sampler(checkpoint, TOKENIZER, SamplingSettings(steps=4), dtype=dtype).latents(SAMPLES)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_captions(tmp_path, monkeypatch):
    facts = replace(tokenizer_facts(), statistics=STATISTICS)
    width = 32
    checkpoint = write_dit(
        tmp_path / "ckpt", facts, names=None, condition="caption", caption_width=width, num_classes=None
    )
    sampler = open_sampler(checkpoint, TOKENIZER, SamplingSettings(steps=3, guidance=2.0))

    def features(texts):
        rows = [torch.randn(width, generator=torch.Generator().manual_seed(len(text))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    monkeypatch.setattr(sampler.tokenizer, "encode_text", features)
    samples = samples_of(sampler.dit, None, ["a red cat", "sea"], 2)
    assert names_of(sampler.dit, samples) == ["a red cat", "a red cat", "sea", "sea"]
    whole = torch.cat(list(all_images(sampler, samples, 4)))
    assert differ_by_rounding(torch.cat(list(all_images(sampler, samples, 1))), whole)
    with pytest.raises(UserError, match="conditioned on captions: give --caption"):
        samples_of(sampler.dit, "3", None, 1)
    with pytest.raises(UserError, match="condition=caption: give its samples captions"):
        sampler.images([Sample(1, 0)])


def test_mixes_are_refused(checkpoint, tmp_path):
    facts, settings = tokenizer_facts(), SamplingSettings()
    for name, artifact, text in (
        ("unknown", None, "does not say which tokenizer"),
        ("bare", facts, "has no latent statistics"),
        ("other", replace(facts, fingerprint="0" * 64, statistics=STATISTICS), "belong to different tokenizers"),
    ):
        with pytest.raises(UserError, match=text):
            open_sampler(write_dit(tmp_path / name, artifact), TOKENIZER, settings)
    with pytest.raises(UserError, match="is no tokenizer"):
        open_sampler(checkpoint, tmp_path, settings)
    with pytest.raises(UserError, match="holds no DiT|no checkpoint"):
        open_sampler(TOKENIZER, TOKENIZER, settings)
    with pytest.raises(UserError, match="guided channels 17: the latents have 16"):
        open_sampler(checkpoint, TOKENIZER, SamplingSettings(guided_channels=17))
    with pytest.raises(UserError, match="label 3: this DiT has 3 classes"):
        open_sampler(checkpoint, TOKENIZER, settings).images([Sample(3, 0)])


def test_classes_by_number_and_name(checkpoint):
    dit = open_sampler(checkpoint, TOKENIZER, SamplingSettings()).dit
    assert parse_classes("2, 0,food & drink", 3, NAMES) == [2, 0, 2]
    samples = samples_of(dit, "Flags,0", None, 2)
    assert samples == [Sample(1, 0), Sample(1, 1), Sample(0, 0), Sample(0, 1)]
    assert names_of(dit, samples) == ["Flags", "Flags", "Animals", "Animals"]
    assert names_of(replace(dit, classes=None), samples[:1]) == ["class 1"]
    for classes, caption, per_class, text in (
        ("3", None, 1, "--classes 3: the DiT has 3, 0 to 2: Animals, Flags, Food & Drink"),
        ("flag", None, 1, "the nearest is 'Flags'"), ("", None, 1, "no class of that name: Animals"),
        (None, None, 1, "conditioned on classes: give --classes"), ("1", ["x"], 1, "no --caption"),
    ):
        with pytest.raises(UserError, match=text):
            samples_of(dit, classes, caption, per_class)
    with pytest.raises(UserError, match="does not know its classes' names"):
        parse_classes("Flags", 3, None)


def test_a_model_with_room_for_more_classes_than_it_was_trained_on(tmp_path):
    """As with ImageNet's thousand rows for a small data set: nobody wants to see the others, unless by number."""
    path = write_dit(tmp_path / "ckpt", replace(tokenizer_facts(), statistics=STATISTICS), num_classes=10)
    dit = load_dit(path)
    assert samples_of(dit, "all", None, 1) == each([0, 1, 2], 1)
    assert names_of(dit, samples_of(dit, "9,1", None, 1)) == ["class 9", "Flags"]
    assert samples_like("absent", dit, 7, None).samples == in_proportion([1, 1, 1], 7)
    numbered = replace(dit, classes=None)
    assert samples_of(numbered, "all", None, 1) == each(range(10), 1)


def test_samples_in_proportion():
    assert in_proportion([1, 1, 1], 7) == [Sample(0, 0), Sample(0, 1), Sample(0, 2), Sample(1, 0), Sample(1, 1),
                                           Sample(2, 0), Sample(2, 1)]
    counts = torch.bincount(torch.tensor([s.condition for s in in_proportion([500, 0, 300, 5], 100)]))
    assert counts.tolist() == [62, 0, 37, 1] and len(in_proportion([0.2, 0.7], 1000)) == 1000
