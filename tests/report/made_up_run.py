"""Small output folders of runs, as the launchers and tools leave them."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from megavtp.config.load import to_dict
from megavtp.config.schema import Config
from megavtp.dit.config import DiTConfig

STARTED = {
    "command": "launchers/pretrain.py --config tiny.yaml train.steps=40",
    "layout": {"launcher": "deepspeed", "processes": 2, "machines": 1, "tp": 1, "pp": 1, "dp": 2},
    "machine": {"host": "node7", "device": "H100", "devices": 2, "cores": 64, "memory_gib": 512.0},
    "versions": {"megavtp": "0.1.0", "commit": "abc123def456", "source": "0123abcd", "python": "3.11.2"},
}
OTHER_CODE = {**STARTED, "versions": {**STARTED["versions"], "source": "4567cdef"}}
METRICS = {
    "samples": 30.0, "reconstruction/psnr": 22.5, "chance/reconstruction/psnr": 11.89, "reconstruction/lpips_vgg": 0.25,
    "knn/group_top1": 0.632, "chance/knn/group_top1": 0.205,
}
GENERATION = {
    "features": "EfficientNet", "metrics": {"samples": 16.0, "generation/fd_efficientnet": 174.5},
    "compare": {"noise": {"samples": 16.0, "generation/fd_efficientnet": 335.0}},
    "skipped": {"generation/recall": "too few"}, "notes": ["no FID"],
}


def line(step, terms, **changes):
    return {
        "kind": "step", "step": step, "time": 1.7e9 + step, "terms": terms,
        "tower_grad_norms": {"vision": 1.0, "text": 2.0},
        "grad_norm": 3.0, "grad_norm_max": 4.0, "lr": 0.001, "nonfinite_steps": 0, "bad_samples": 0,
        "images_per_second": 100.0 + step, "seconds_per_step": 0.5, "data_wait": 0.01, "mfu": 0.4, "memory_gib": 1.0,
        "eta_seconds": 9.0, **changes,
    }


def event(kind, step, **fields):
    return {"kind": kind, "step": step, "time": 1.7e9, **fields}


def picture(path: Path, seed: int = 0, size=(40, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(folder: Path, config: dict, records: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def tokenizer_run(folder: Path, **settings) -> Path:
    """A joint run of 40 steps with everything that a folder can have, and all that can go wrong."""
    config = to_dict(Config(output_dir=str(folder)))
    config["train"] |= {"steps": 40, "batch_size": 64, **settings}
    steps = [line(step, {"contrastive/loss": 5.0 / step, "reconstruction/l1": 1.0}) for step in range(10, 41, 10)]
    steps[1] |= {"nonfinite_steps": 1, "bad_samples": 2}
    records = [
        event("started", 0, **STARTED), event("initial_weights", 0, note="weights from elsewhere"), steps[0],
        event("picture", 10, name="reconstructions", path=str(folder / "pictures" / "step-000010.png")),
        event("evaluation", 10, **{**METRICS, "knn/group_top1": 0.3}),
        event("warning", 12, term="loss", message="nothing is learnt", remedy="try less"),
        event("warning", 14, term="loss", message="still nothing is learnt", remedy="try less"),
        event("skipped", 15, terms=["contrastive/loss"], replay="--replay 15", ids=["a", "b"]), steps[1],
        event("checkpoint", 20), event("stopped_by_signal", 20), event("data_changed", 20, keys=["data.root"]),
        event("resumed", 20, checkpoint="step-00000020"), event("started", 20, **OTHER_CODE), steps[2], steps[3],
        event("evaluation", 40, **METRICS), event("finished", 40),
    ]
    write(folder, config, records)
    for number in (10, 20, 30, 35, 38, 40):
        picture(folder / "pictures" / f"step-{number:06}.png", number)
    picture(folder / "loss_curves.png")
    picture(folder / "reconstructions.png", 1)
    untrained = {**METRICS, "reconstruction/psnr": 6.3}
    told = {"data": "data/emoji", "split": "test", "metrics": METRICS, "untrained": untrained}
    (folder / "evaluation.json").write_text(json.dumps(told))
    return folder


def dit_run(folder: Path) -> Path:
    """A run of a DiT that has not ended, from before starts were recorded."""
    config = to_dict(DiTConfig(output_dir=str(folder)))
    config["train"]["steps"] = 100
    write(folder, config, [line(step, {"flow_matching/loss": 1.0}, mfu=None) for step in (20, 40)])
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    picture(folder / "samples_guidance.png", 2)
    return folder
