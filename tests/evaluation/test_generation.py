"""Distances from images to numbers: any batch size, any number of processes; the tool; what is refused."""

import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_ranks
from evaluation_fakes import FakeModel, FakeSet, FakeTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from megavtp.config.schema import EvaluationConfig
from megavtp.data.index import build_index
from megavtp.dit.checkpoint import load_dit
from megavtp.dit.sampling.sampler import open_sampler
from megavtp.dit.sampling.samples import Sample, sample_noise
from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.errors import UserError
from megavtp.evaluation import evaluate
from megavtp.evaluation.distances import measure as measuring
from megavtp.evaluation.distances.feature_sets import frechet_distance, kernel_distance, precision_recall, statistics_of
from megavtp.evaluation.distances.image_sources import open_images
from megavtp.evaluation.distances.measure import Reference, measure_generation, open_reference
from megavtp.evaluation.distances.network import FeatureNetwork
from megavtp.evaluation.generation.recognition import vote
from megavtp.evaluation.generation.samples import samples_like
from megavtp.evaluation.generation.scale import Noise, blur, untrained
from megavtp.parallel.mesh import SINGLE, build_mesh
from megavtp.pixels import normalise, to_uint8

sys.path.append(str(Path(__file__).parents[1] / "sampling"))
from sampling_fakes import NAMES, STATISTICS, TOKENIZER, tokenizer_facts, write_dit  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


class Pools(FeatureNetwork):
    """Mean colours of the four quarters of the image, exact in float32."""

    name, title, dims = "pools", "pools", 12

    def _features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


def pictures(count: int, seed: int, size: int = 8) -> np.ndarray:
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 200, (count, 2, 2, 3))
    noise = draw.integers(0, 40 + 10 * seed, (count, size, size, 3))
    return (base.repeat(size // 2, 1).repeat(size // 2, 2) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    np.savez(root / "samples.npz", pictures(53, 1))
    (root / "reference").mkdir()
    for i, image in enumerate(pictures(38, 2)):
        Image.fromarray(image).save(root / "reference" / f"{i:03d}.png")
    return root


def measure(folders, batch_size=16, **options):
    samples = open_images(folders / "samples.npz")
    reference = open_reference(folders / "reference", Pools(), samples.size)
    return measure_generation(samples, reference, Pools(), batch_size=batch_size, **options).metrics


def plain(folders) -> dict[str, float]:
    """In numpy, from all images at once."""
    rows = [pictures(53, 1), pictures(38, 2)]
    x, y = (
        z.reshape(len(z), 2, 4, 2, 4, 3).astype(np.float64).mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(z), 12)
        for z in rows
    )
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    made, real = (torch.from_numpy(z) for z in (x, y))
    mean, std = kernel_distance(made, real)
    precision, recall = precision_recall(real, made)
    return {
        "samples": 53, "reference_samples": 38,
        "generation/fd_pools": ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root,
        "generation/kd_pools": mean, "generation/kd_std_pools": std,
        "generation/precision_pools": precision, "generation/recall_pools": recall,
    }  # fmt: skip


class Shorter:
    """Ends before its last image on one process."""

    size = 8

    def __len__(self):
        return 16

    def batches(self, batch_size, rank, world):
        yield torch.arange(rank, 8, world), torch.zeros(8 // world, 3, 8, 8, dtype=torch.uint8)
        if rank == 1:
            raise UserError("the archive ends")


def on_rank(rank: int, folders: Path) -> tuple[list[dict[str, float]], str]:
    mesh = build_mesh(1, 1)
    kept = folders / "kept.safetensors"
    found = [measure(folders, size, mesh=mesh) for size in (1, 7, 64)]
    found += [measure(folders, 7, mesh=mesh, kept=kept) for _ in range(2)]
    try:
        measuring.summarise(Shorter(), Pools(), batch_size=8, mesh=mesh, device=torch.device("cpu"))
    except UserError as error:
        return found, str(error)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_batch_size_gives_the_reference(folders, batch_size):
    assert measure(folders, batch_size) == pytest.approx(plain(folders), rel=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_every_process_count_gives_the_reference(folders, world):
    want = plain(folders)
    for found, error in run_ranks(world, on_rank, folders):
        assert found == [pytest.approx(want, rel=1e-6)] * 5
        assert error == "the archive ends"  # on all, instead of a wait for the one that failed


def test_only_some_features_are_kept(folders, monkeypatch):
    """The Frechet distance is of all images, the others of every third."""
    monkeypatch.setattr(measuring, "MAX_KEPT", 20)
    samples = open_images(folders / "samples.npz")
    summary = measuring.summarise(samples, Pools(), batch_size=5, mesh=SINGLE, device=torch.device("cpu"))
    images = torch.from_numpy(pictures(53, 1)).permute(0, 3, 1, 2)
    assert torch.equal(summary.features, Pools()(images[::3])) and summary.statistics.count == 53


@pytest.mark.parametrize("world", [1, 3])
def test_noise_is_the_same_in_any_batches_on_any_number_of_processes(world):
    def images(batch_size, world):
        parts = [part for rank in range(world) for part in Noise(150, 8, seed=1).batches(batch_size, rank, world)]
        numbers = torch.cat([n for n, _ in parts])
        assert sorted(numbers.tolist()) == list(range(150))
        return torch.cat([i for _, i in parts])[torch.argsort(numbers)]

    whole = images(150, 1)
    assert torch.equal(images(7, world), whole) and not torch.equal(whole[:64], whole[64:128])
    assert not torch.equal(next(Noise(150, 8, seed=2).batches(150, 0, 1))[1], whole[:64])
    assert whole.float().mean() == pytest.approx(127.5, abs=2) and whole.min() == 0 and whole.max() == 255


@pytest.mark.parametrize("side", [8, 16])
def test_blur_takes_means_of_squares(side):
    image = torch.from_numpy(pictures(2, 1, 20)).permute(0, 3, 1, 2).contiguous()
    blurred = blur(image, side)
    assert blurred.shape == image.shape and blurred.dtype == torch.uint8
    squares = [slice(start, start + side) for start in range(0, 20, side)]
    for rows in squares:
        for columns in squares:
            mean = image[..., rows, columns].double().mean((2, 3), keepdim=True)
            assert ((blurred[..., rows, columns] - mean).abs() <= 0.51).all()


def test_references_in_files(folders, tmp_path):
    """ADM's: images, and statistics of another, larger set."""
    samples = open_images(folders / "samples.npz")
    images = pictures(38, 2)
    of_all = statistics_of(Pools()(torch.from_numpy(pictures(500, 2)).permute(0, 3, 1, 2)))
    both = {"arr_0": images, "mu": of_all.mean.numpy(), "sigma": of_all.covariance.numpy()}
    np.savez(tmp_path / "both.npz", **both, network="pools")
    found = measure_generation(samples, open_reference(tmp_path / "both.npz", Pools(), 8), Pools())
    assert found.metrics["generation/fd_pools"] != pytest.approx(plain(folders)["generation/fd_pools"], rel=0.01)
    assert found.metrics["generation/kd_pools"] == pytest.approx(plain(folders)["generation/kd_pools"])
    assert "reference_samples" not in found.metrics  # the file does not tell

    np.savez(tmp_path / "inception.npz", **both)  # as ADM writes them: of Inception's features
    found = measure_generation(samples, open_reference(tmp_path / "inception.npz", Pools(), 8), Pools())
    assert found.metrics == pytest.approx(plain(folders))
    assert any("statistics in the reference are not used" in note for note in found.notes)

    del both["arr_0"]
    np.savez(tmp_path / "statistics.npz", **both, network="pools")
    found = measure_generation(samples, open_reference(tmp_path / "statistics.npz", Pools(), 8), Pools())
    assert set(found.skipped) == {f"generation/{kind}_pools" for kind in ("kd", "precision", "recall")}
    np.savez(tmp_path / "strange.npz", **both)
    with pytest.raises(UserError, match="of inception features"):
        open_reference(tmp_path / "strange.npz", Pools(), 8)
    np.savez(tmp_path / "neither.npz", x=images)
    with pytest.raises(UserError, match="neither images"):
        open_reference(tmp_path / "neither.npz", Pools(), 8)


def test_few_images_are_noted_and_left_out(tmp_path):
    np.savez(tmp_path / "three.npz", pictures(3, 1))
    source = open_images(tmp_path / "three.npz")
    found = measure_generation(source, open_reference(tmp_path / "three.npz", Pools(), 8), Pools())
    assert found.metrics["generation/fd_pools"] == pytest.approx(0, abs=1e-9)
    assert sum("3 samples are too few" in n or "3 reference images are too few" in n for n in found.notes) == 2
    assert any("no FID" in note for note in found.notes)
    assert "more than 3" in found.skipped["generation/precision_pools"]
    with pytest.raises(UserError, match="1 image cannot"):
        measure_generation(open_images(tmp_path / "three.npz", limit=1), Reference(source), Pools())


class Counted(Pools):
    """Counts the images that it has seen."""

    seen = 0

    def _features(self, images):
        self.seen += len(images)
        return super()._features(images)


def test_kept_features_of_a_reference_serve_again(folders, tmp_path):
    """The numbers are equal to the last bit, and the network sees the samples alone."""
    samples, kept, network = open_images(folders / "samples.npz"), tmp_path / "kept.safetensors", Counted()
    reference = open_reference(folders / "reference", network, samples.size)
    plain = measure_generation(samples, reference, network)
    found = [measure_generation(samples, reference, network, kept=kept) for _ in range(2)]
    assert network.seen == 3 * 53 + 2 * 38
    for result in found:
        assert result.metrics == plain.metrics
        assert torch.equal(result.real.features, plain.real.features)
        assert torch.equal(result.real.numbers, plain.real.numbers)


def test_kept_features_of_another_reference(folders, tmp_path):
    kept, pools = tmp_path / "kept.safetensors", Pools()

    def measured(folder, limit=None, network=pools):
        samples = open_images(folders / "samples.npz")
        reference = open_reference(folder, network, samples.size, limit)
        return measure_generation(samples, reference, network, kept=kept).metrics["generation/fd_pools"]

    measured(folders / "reference")
    with pytest.raises(UserError, match="another reference \\(images: 38, not 20\\); name another file, or remove it"):
        measured(folders / "reference", limit=20)
    network = Pools()
    network.name = "others"
    with pytest.raises(UserError, match="network: pools, not others"):
        measured(folders / "reference", network=network)
    copy = shutil.copytree(folders / "reference", tmp_path / "copy")
    measured(copy)
    Image.fromarray(pictures(1, 2, size=16)[0]).save(copy / "000.png")
    with pytest.raises(UserError, match="another reference \\(files: "):
        measured(copy)
    kept.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="holds no reference's features"):
        measured(folders / "reference")
    save_file({"mean": torch.zeros(3)}, kept)
    with pytest.raises(UserError, match="network: not told"):
        measured(folders / "reference")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12), network="pools")
    with pytest.raises(UserError, match="the reference holds statistics alone"):
        measured(tmp_path / "statistics.npz")


def run_tool(monkeypatch, *arguments) -> int:
    """Run the script as __main__ in this process: a new one would spend its time on importing torch."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--local_rank=0", "generation", *map(str, arguments)])  # as deepspeed
    with pytest.raises(SystemExit) as stopped:
        run_path(str(TOOL), run_name="__main__")
    return stopped.value.code


@pytest.fixture
def pools(monkeypatch):
    from megavtp.evaluation.generation import job

    monkeypatch.setattr(job, "load_network", lambda inception, device, timm: Pools())


def test_tool_on_files(folders, tmp_path, pools, monkeypatch, capsys):
    out, saved = tmp_path / "metrics.json", tmp_path / "reference.npz"
    options = ["--samples-from", folders / "samples.npz", "--out", out, "--batch-size", 9, "--device", "cpu"]
    kept = ["--reference-features", tmp_path / "kept.safetensors"]
    assert run_tool(monkeypatch, *options, "--reference", folders / "reference", "--save-reference", saved) == 0
    printed = capsys.readouterr().out
    rows = dict(line.split()[:2] for line in printed.splitlines() if line.startswith(("generation/", "samples", "ref")))
    content = json.loads(out.read_text())
    assert content["metrics"] == pytest.approx(plain(folders), rel=1e-6) and content["features"] == "pools"
    assert content["compare"] == {}
    assert rows.keys() == content["metrics"].keys() and rows["samples"] == "53"
    assert float(rows["generation/fd_pools"]) == pytest.approx(content["metrics"]["generation/fd_pools"], abs=1e-4)
    assert "note: generation/fd_pools is a distance of pools features, no FID" in printed

    first = out.read_bytes()
    for _ in range(2):
        assert run_tool(monkeypatch, *options, "--reference", folders / "reference", *kept) == 0
        assert out.read_bytes() == first

    assert run_tool(monkeypatch, *options, "--reference", saved) == 0  # the statistics serve again
    again = json.loads(out.read_text())
    assert again["metrics"]["generation/fd_pools"] == pytest.approx(content["metrics"]["generation/fd_pools"])
    assert again["metrics"]["reference_samples"] == 38 and again["skipped"]

    assert run_tool(monkeypatch, *options, "--reference", folders / "reference", "--scale") == 0
    content = json.loads(out.read_text())
    assert content["metrics"] == pytest.approx(plain(folders), rel=1e-6)
    real = open_images(folders / "reference")
    images = next(real.batches(38, 0, 1))[1]
    bad = {"blurred 8 px": blur(images, 8), "blurred 16 px": blur(images, 16)}
    for name, others in (bad | {"noise": next(Noise(53, 8).batches(53, 0, 1))[1]}).items():
        want = frechet_distance(statistics_of(Pools()(others)), statistics_of(Pools()(images)))
        assert content["compare"][name]["generation/fd_pools"] == pytest.approx(want, rel=1e-6)
    assert content["compare"]["noise"]["samples"] == 53


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("dit") / "ckpt", replace(tokenizer_facts(), statistics=STATISTICS))


def write_shards(folder: Path, count: int, meta) -> Path:
    """A data set of ``count`` pictures with the metadata ``meta(i)``; a caption in two has a number."""
    (folder / "train").mkdir()
    with tarfile.open(folder / "train" / "shard-000000.tar", "w") as tar:
        for i, pixels in enumerate(pictures(count, 3)):
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            members = {"png": image.getvalue(), "txt": f"thing {i // 2}".encode(), "json": json.dumps(meta(i)).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(folder / "train")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three of four are of the first class, none is of the second."""
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, 12, lambda i: {"kind": NAMES[0 if i % 4 else 2], "number": i % 3})


def test_tool_with_a_dit(dit, shards, tmp_path, pools, monkeypatch, capsys):
    out = tmp_path / "metrics.json"
    options = ["--dit", dit, "--tokenizer", TOKENIZER, "--reference", shards, "--steps", 2, "--out", out]
    assert run_tool(monkeypatch, *options, "--samples", 10, "--label", "kind", "--device", "cpu") == 0
    content = json.loads(out.read_text())
    assert content["metrics"]["samples"] == 10 and content["metrics"]["reference_samples"] == 12
    assert content["sampling"]["steps"] == 2 and content["label"] == "kind" and content["precision"] == "fp32"
    assert "than these 12" in content["skipped"]["generation/class_accuracy"] and content["classes"] == {}
    # the same images from the sampler, in other batches
    sampler = open_sampler(dit, TOKENIZER, SamplingSettings(steps=2))
    samples = [Sample(0, i) for i in range(7)] + [Sample(2, i) for i in range(3)]  # 7.5 and 2.5 of 10
    statistics = statistics_of(Pools()(sampler.images(samples)))
    real = open_reference(shards, Pools(), sampler.size).images
    want = frechet_distance(statistics, statistics_of(Pools()(next(real.batches(12, 0, 1))[1])))
    assert content["metrics"]["generation/fd_pools"] == pytest.approx(want, rel=1e-3)  # images differ by rounding

    # an untrained one draws what its noise decodes to
    assert run_tool(monkeypatch, *options, "--samples", 10, "--device", "cpu", "--scale") == 0
    compare = json.loads(out.read_text())["compare"]
    assert list(compare) == ["blurred 8 px", "blurred 16 px", "untrained", "noise"]
    assert compare["blurred 8 px"]["samples"] == 10
    blank = untrained(sampler)
    assert torch.equal(blank.latents(samples), sample_noise(0, samples, sampler.shape, "cpu")())
    assert "untrained" in capsys.readouterr().out
    assert run_tool(monkeypatch, *options, "--label", "captions") == 2
    assert "the value None of 12 samples" in capsys.readouterr().err


def test_tool_tells_which_classes_are_recognised(dit, tmp_path, pools, monkeypatch, capsys):
    """Two pictures of a concept follow each other; four of each class are drawn, however rare it is."""
    data = write_shards(tmp_path, 40, lambda i: {"kind": NAMES[min(i % 8, 2)], "concept": f"thing {i // 2}"})
    out = tmp_path / "metrics.json"
    options = ["--dit", dit, "--tokenizer", TOKENIZER, "--reference", data, "--steps", 2, "--out", out]
    options += ["--samples", 12, "--label", "kind", "--equal-classes", "--device", "cpu"]
    assert run_tool(monkeypatch, *options, "--batch-size", 5) == 0
    content, printed = json.loads(out.read_text()), capsys.readouterr().out

    sampler = open_sampler(dit, TOKENIZER, SamplingSettings(steps=2))
    drawn = Pools()(sampler.images([Sample(label, i) for label in range(3) for i in range(4)]))
    real = Pools()(next(open_images(data, sampler.size).batches(40, 0, 1))[1])
    each = torch.arange(40)
    found = vote(drawn, torch.arange(12) // 4, real, (each % 8).clamp_max(2), each // 2, NAMES)
    assert {name: content["metrics"][name] for name in found.metrics} == pytest.approx(found.metrics)
    assert content["metrics"]["chance/generation/class_accuracy"] == pytest.approx(1 / 3)
    assert content["compare"] == {"real": pytest.approx(found.real)} and content["classes"].keys() == set(NAMES)
    assert content["classes"]["Flags"] == {**found.classes["Flags"], "drawn_pictures": 4, "real_pictures": 5}
    assert "note: generation/class_accuracy by class, the least first" in printed
    assert "Animals, Flags: fewer real pictures" in printed or "Flags, Animals: fewer real pictures" in printed


def test_the_same_latents_through_another_decoder(dit, shards, tmp_path, pools, monkeypatch, capsys):
    """A second stage changes the decoder only: the DiT fits both tokenizers, and no tokenizer of another encoder."""
    weights = load_file(TOKENIZER / "model.safetensors")
    towers = {"decoder": "pixel_decoder.proj_out.bias", "encoder": "trunk.blocks.0.", "bottleneck": "bottleneck"}
    for tower, part in towers.items():
        folder = tmp_path / tower
        folder.mkdir()
        (folder / "config.json").write_bytes((TOKENIZER / "config.json").read_bytes())
        changed = [name for name in weights if part in name and weights[name].is_floating_point()]
        assert changed, sorted(weights)
        save_file(weights | {name: weights[name] + 0.1 for name in changed}, folder / "model.safetensors")
    samples = [Sample(label, 0) for label in range(3)]
    first, second = (
        open_sampler(dit, path, SamplingSettings(steps=2)) for path in (TOKENIZER, tmp_path / "decoder")
    )
    assert torch.equal(first.latents(samples), second.latents(samples))

    out = tmp_path / "metrics.json"
    options = ["--dit", dit, "--reference", shards, "--steps", 2, "--samples", 10, "--out", out, "--device", "cpu"]
    distances = []
    for tokenizer in (TOKENIZER, tmp_path / "decoder"):
        assert run_tool(monkeypatch, *options, "--tokenizer", tokenizer) == 0
        distances.append(json.loads(out.read_text())["metrics"]["generation/fd_pools"])
    assert abs(distances[1] - distances[0]) > 1e-3 * distances[0]
    for tower in ("encoder", "bottleneck"):
        assert run_tool(monkeypatch, *options, "--tokenizer", tmp_path / tower) == 2
        assert "belong to different tokenizers" in capsys.readouterr().err.splitlines()[-1]


def test_which_samples_are_drawn(dit, shards, tmp_path):
    stored = load_dit(dit, "cpu")
    count = lambda *given: Counter(s.condition for s in samples_like(*given).samples)  # noqa: E731
    assert count("absent", stored, 7, None) == {0: 3, 1: 2, 2: 2}
    assert count(shards, stored, 8, "kind") == {0: 6, 2: 2}
    assert count(shards, stored, 9, "kind", True) == {0: 3, 1: 3, 2: 3}
    numbered = replace(stored, classes=None)
    assert count(shards, numbered, 9, "number") == {0: 3, 1: 3, 2: 3}
    captioned = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(condition="caption")))
    drawn = samples_like(shards, captioned, 12, None).samples
    assert drawn == [Sample(f"thing {i // 2}", i % 2) for i in range(12)]
    assert samples_like(shards, captioned, 3, None).samples == [Sample(f"thing {i}", 0) for i in (0, 2, 4)]
    # Of each kind in its proportion, or equally many, spread over the pictures of that kind.
    labelled = samples_like(shards, captioned, 8, "kind")
    assert labelled.shown == [NAMES[2]] * 2 + [NAMES[0]] * 6
    assert [s.condition for s in labelled.samples[:2]] == ["thing 0", "thing 2"]
    equal = samples_like(shards, captioned, 8, "kind", True)
    assert equal.shown == [NAMES[2]] * 4 + [NAMES[0]] * 4
    assert equal.samples[:4] == [Sample("thing 0", 0), Sample("thing 0", 1), Sample("thing 2", 0), Sample("thing 4", 0)]
    for given, message in (
        ((tmp_path, stored, 7, "kind"), "no folder of shards"), ((tmp_path, captioned, 7, None), "no folder of shards"),
        ((shards, captioned, 7, "colour"), "no sample in .* has it"), ((shards, stored, 1, None), "--samples 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            samples_like(*given)


@pytest.mark.parametrize("options, message", [
    ([], "--samples-from"),
    (["--samples-from", "{sets}/samples.npz", "--tokenizer", "x"], "--tokenizer belongs to --dit"),
    (["--samples-from", "{sets}/samples.npz", "--label", "x"], "--label belongs to --dit"),
    (["--samples-from", "{sets}/samples.npz", "--equal-classes"], "--equal-classes belongs to --label"),
    (["--samples-from", "{sets}/none.npz"], "none.npz does not exist"),
    (["--samples-from", "{sets}/samples.npz", "--batch-size", "0"], "--batch-size: must be a whole number"),
    (["--dit", "{sets}"], "--dit needs --tokenizer"),
    (["--dit", "{sets}", "--tokenizer", "{sets}", "--size", "8"], "--size is for --samples-from"),
    (["--dit", "{sets}", "--tokenizer", "{sets}"], "no checkpoint"),
])  # fmt: skip
def test_mistakes_end_in_one_line(folders, options, message, pools, monkeypatch, capsys):
    given = [option.format(sets=folders) for option in options]
    assert run_tool(monkeypatch, "--reference", folders / "reference", *given) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_distance_of_reconstructions(batch_size, caplog):
    test, model = FakeSet(31), FakeModel()
    config = EvaluationConfig(batch_size=batch_size, knn=3)
    options = {"tokenizer": FakeTokenizer(), "frechet": Pools()}
    metrics = evaluate(model, test, None, config, **options)
    shown = to_uint8(normalise(test.images) * 0.9)
    want = frechet_distance(*(statistics_of(Pools()(images)) for images in (shown, test.images)))
    assert metrics["reconstruction/fd_pools"] == pytest.approx(want, rel=1e-6) and want > 1
    assert not caplog.records
    skipped = {}
    assert "reconstruction/fd_pools" not in evaluate(model, FakeSet(1), None, config, skipped=skipped, **options)
    assert "reconstruction/fd_pools" in skipped
    evaluate(model, FakeSet(12), None, config, **options)
    assert "12 images are too few" in caplog.text
    without = (evaluate(FakeModel(("contrastive",)), test, None, config, **options),
               evaluate(model, test, None, config, tokenizer=FakeTokenizer()))
    assert not any("fd_" in name for metrics in without for name in metrics)
