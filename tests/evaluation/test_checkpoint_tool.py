import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import torch
from distributed import run_ranks
from PIL import Image
from safetensors.torch import load_file, save_file

from megavtp.checkpoint.formats.hf_vtp import save_folder
from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.load import from_dict, to_dict
from megavtp.config.schema import Config, DataConfig, DecoderConfig, ModelConfig, TextConfig, VisionConfig
from megavtp.conversion import convert
from megavtp.data.captions import train_sentencepiece
from megavtp.data.index import build_index
from megavtp.errors import UserError
from megavtp.evaluation.tokenizer.checkpoint import CheckpointEvaluation, find_perceptual, open_model
from megavtp.evaluation.tokenizer.classification import read_templates
from megavtp.launch.tool import choose_device
from megavtp.models.build import build_vtp
from megavtp.parallel.mesh import build_mesh

sys.path.append(str(Path(__file__).parents[1] / "sampling"))
sys.path.append(str(Path(__file__).parents[1] / "extraction"))
from picture_shards import write_shards  # noqa: E402
from sampling_fakes import write_dit  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
CPU = torch.device("cpu")
NAMES = ["red apple", "green pear", "blue plum", "grey stone", "black coal", "white snow"]


def write_split(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for i in range(count):
            name = NAMES[i % len(NAMES)]
            picture = io.BytesIO()
            pixels = torch.randint(0, 256, (40, 40, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(picture, "PNG")
            group = "stone" if name.split()[1] in ("stone", "coal", "snow") else "fruit"
            meta = {"group": group, "concept": name, "style": "ab"[i // 6 % 2]}
            members = {"png": picture.getvalue(), "txt": name.encode(), "json": json.dumps(meta).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_split(root / "test", 12, 0)
    write_split(root / "train", 18, 1)
    train_sentencepiece(NAMES * 4, root / "captions.model", 320)
    return root


@pytest.fixture(scope="module")
def model_config(data):
    from megavtp.data.captions import load_tokenizer

    tower = {"width": 32, "depth": 1, "heads": 2}
    return ModelConfig(
        image_size=32, bottleneck=8, vision=VisionConfig(**tower), decoder=DecoderConfig(**tower),
        text=TextConfig(**tower, context_length=8, vocab_size=load_tokenizer("auto", data, 8).vocab_size),
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory, model_config):
    """A folder in the released models' format, of a model with both towers."""
    folder = tmp_path_factory.mktemp("released")
    model = build_vtp(model_config, objectives={"contrastive", "reconstruction"}, seed=3)
    save_folder(folder, model_config, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("dit") / "ckpt", None)


def job(released, data, **options):
    return CheckpointEvaluation(released, data, captions=str(data / "captions.model"), **options)


def run_tool(monkeypatch, *arguments) -> int:
    """Run the script as __main__ in this process: a new one would spend its time on importing torch."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_path(str(TOOL), run_name="__main__")
    return stopped.value.code


def test_tool_end_to_end(released, data, tmp_path, monkeypatch, capsys):
    out, grid = tmp_path / "metrics.json", tmp_path / "grid.png"
    status = run_tool(
        monkeypatch, "--local_rank=0", "--checkpoint", released, "--data", data, "--captions", data / "captions.model",
        "--untrained", "--out", out, "--pictures", grid, "--device", "cpu",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0].split() == ["metric", "value", "untrained", "chance"]
    names = [line.split()[0] for line in lines[2:]]
    assert {"samples", "zero_shot/group_top1", "retrieval/cross_style_r1", "knn/group_top1"} < set(names)
    content = json.loads(out.read_text())
    assert content["metrics"]["samples"] == 12 and content["metrics"].keys() == content["untrained"].keys()
    assert content["metrics"] != content["untrained"]
    assert Image.open(grid).size[0] > 100


def test_tool_probes_and_tells_the_spectrum(model_config, tmp_path, monkeypatch, capsys):
    model = build_vtp(model_config, objectives={"reconstruction"}, seed=3)
    save_folder(tmp_path / "model", model_config, model.state_dict())
    write_shards(tmp_path / "data/train", [30])
    write_shards(tmp_path / "data/test", [9])
    status = run_tool(
        monkeypatch, "--checkpoint", tmp_path / "model", "--data", tmp_path / "data", "--probe", "latents",
        "--probe", "features", "--untrained", "--out", tmp_path / "metrics.json", "--device", "cpu",
    )  # fmt: skip
    table = capsys.readouterr().out
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert status == 0 and "probe/features/group_top1" in table and "latents/effective_rank" in table
    for name in ("latents", "latents_mean", "features"):
        assert content["metrics"][f"chance/probe/{name}/group_top1"] == pytest.approx(1 / 3)
        assert all(f"probe/{name}/group" in content["details"][model] for model in ("metrics", "untrained"))
    spectrum = content["details"]["metrics"]["latents/spectrum"]
    assert len(spectrum) == 8 and sum(spectrum) == pytest.approx(1) and spectrum == sorted(spectrum, reverse=True)
    assert content["metrics"]["latents/first_component"] == pytest.approx(spectrum[0])


def test_probing_latents_needs_a_pixel_decoder(data, model_config, tmp_path):
    model = build_vtp(model_config, objectives={"contrastive"}, seed=3)
    save_folder(tmp_path, model_config, model.state_dict())
    with pytest.raises(UserError, match="--probe latents: .* has no latents"):
        job(tmp_path, data, probes=["latents"])


def test_the_checkpoints_weights_are_used(released, data, model_config):
    checkpoint = job(released, data)
    again = build_vtp(model_config, objectives={"contrastive", "reconstruction"}, seed=3)
    got, want = checkpoint.metrics(checkpoint.model), checkpoint.metrics(again)
    assert got == pytest.approx(want, abs=1e-6)
    inputs, outputs = checkpoint.reconstructions(5)
    assert inputs.shape == outputs.shape == (5, 3, 32, 32) and inputs.dtype == outputs.dtype == torch.uint8


def on_rank(rank, released, data):
    own = job(released, data, mesh=build_mesh(1, 1), max_samples=7, batch_size=2)
    return own.metrics(own.model)


def test_every_process_count_gives_the_same_metrics(released, data):
    alone = job(released, data, max_samples=7)
    want = alone.metrics(alone.model)
    assert want["samples"] == 7
    for found in run_ranks(2, on_rank, released, data):
        assert found == pytest.approx(want, abs=1e-5)


def test_other_weights_than_those_of_the_facts_beside_them_are_refused(released, data, tmp_path):
    convert(released, "hf-vtp", tmp_path / "hf")
    assert CheckpointEvaluation(tmp_path / "hf", data, captions=str(data / "captions.model")).model
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["trunk.norm.weight"] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="belongs to other weights"):
        job(tmp_path / "hf", data)


def test_model_without_a_text_tower_needs_no_tokenizer(data, model_config, tmp_path):
    model = build_vtp(model_config, objectives={"reconstruction"}, seed=3)
    save_folder(tmp_path, model_config, model.state_dict())
    checkpoint = CheckpointEvaluation(tmp_path, data, max_samples=4, batch_size=3)
    metrics = checkpoint.metrics(checkpoint.model)
    assert metrics["samples"] == 4 and "reconstruction/psnr" in metrics and "retrieval/image_to_text_r1" not in metrics
    assert "zero_shot, retrieval" in checkpoint.skipped


def test_measuring_on_train_lets_the_others_vote(released, data):
    assert job(released, data, split="train").train_set is None
    assert len(job(released, data).train_set) == 18


@pytest.mark.parametrize("options, message", [
    (["--checkpoint", "{tmp}"], "is no tokenizer"),
    (["--checkpoint", "{dit}"], "holds a DiT, no tokenizer"),
    (["--data", "{tmp}/none"], "none"),
    (["--split", "validation"], "validation"),
    (["--device", "warp"], "no such device"),
    (["--max-samples", "0"], "--max-samples: must be a whole number"),
    (["--captions", "{tmp}/absent.model"], "absent.model"),
    (["--templates", "{tmp}/absent.txt"], "absent.txt"),
    (["--templates", "{tmp}"], "cannot read templates"),
    (["--templates", "{tmp}/bad.txt"], "bad.txt: 'a photo' has no {}, the place of the class name"),
    (["--templates", "{tmp}/empty.txt"], "empty.txt: is empty; give one sentence a line"),
])  # fmt: skip
def test_mistakes_end_in_one_line(released, data, dit, tmp_path, options, message, monkeypatch, capsys):
    given = [o.format(tmp=tmp_path, dit=dit) for o in options]
    (tmp_path / "bad.txt").write_text("a {}\n\na photo\n")
    (tmp_path / "empty.txt").write_text("\n")
    status = run_tool(monkeypatch, "--checkpoint", released, "--data", data, *given)
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert errors[-1].startswith("error: ") and message in errors[-1] and len(errors) == 1


def test_templates_of_a_file(released, data, tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n\n{}, drawn by a child\n")
    templates = read_templates(path)
    assert templates == ("a photo of a {}.", "{}, drawn by a child")
    assert job(released, data, templates=templates).settings.templates == templates
    assert job(released, data).settings.templates == ("{}",)


def test_wrong_vocabulary_is_named(released, data, tmp_path):
    train_sentencepiece([" ".join(NAMES)], tmp_path / "other.model", 288)
    with pytest.raises(UserError, match="--captions"):
        CheckpointEvaluation(released, data, captions=str(tmp_path / "other.model"))


def test_run_checkpoint_brings_its_config_and_tokenizer(data, model_config, tmp_path):
    elsewhere = tmp_path / "elsewhere"  # a data set without the tokenizer of the run
    write_split(elsewhere / "test", 6, 5)
    model = build_vtp(model_config, objectives={"contrastive"}, seed=3)
    off = {"self_distillation": {"weight": 0}, "reconstruction": {"weight": 0}}
    config = from_dict({"model": to_dict(model_config), "data": {"root": str(data)}, "objectives": off}, Config)
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    weights = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    store.save(7, weights, {"config": to_dict(config)})
    store.wait()
    checkpoint = CheckpointEvaluation(tmp_path / "checkpoints" / "latest", elsewhere)
    assert to_dict(checkpoint.config) == to_dict(config) and checkpoint.settings == config.evaluation
    loaded = dict(checkpoint.model.named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in model.named_parameters())
    assert checkpoint.metrics(checkpoint.model)["samples"] == 6
    assert checkpoint.untrained().objectives == {"contrastive"}
    with pytest.raises(UserError, match="--pictures"):
        checkpoint.reconstructions(2)


def test_missing_perceptual_weights_are_a_reason_not_an_error(model_config):
    config = Config(model=model_config)
    loss = replace(config.objectives.reconstruction, perceptual="lpips-alex", perceptual_weights="/none.safetensors")
    config = replace(config, objectives=replace(config.objectives, reconstruction=loss))
    skipped = {}
    assert find_perceptual(config, CPU, skipped) == {}
    assert "/none.safetensors" in skipped["reconstruction/lpips_alex"]


def test_device():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="no such device"):
        choose_device("meta-physical")


def test_released_model_reads_clip_captions(released):
    _, config = open_model(released, CPU)
    assert config.data == DataConfig(captions="clip")
