"""A small study, and a stand-in for its commands: it makes their outputs at once, with numbers of known curves."""

import json
from pathlib import Path

from megavtp.study.config import StudyConfig, load_study
from megavtp.study.links import Link

ROOT = Path(__file__).parents[2]
CURVES = {"joint": lambda steps: 4000 / steps + 20, "ae": lambda steps: 40.0}


def write_study(folder: Path, **changes: object) -> Path:
    """Write the YAML of a study of two sets of objectives at four points, with two seeds."""
    study = {
        "output_dir": str(folder / "out"),
        "launcher": "python",
        "axes": {
            "objectives": {
                "joint": {},
                "ae": {"tokenizer": ["objectives.contrastive.weight=0", "objectives.self_distillation.weight=0"]},
            }
        },
        "looks": [100, 200, 400, 800],
        "tokenizer": {"recipe": str(ROOT / "configs/demo/vtp_emoji.yaml")},
        "latents": "--data data --label group",
        "dit": {"recipe": str(ROOT / "configs/demo/dit_emoji.yaml")},
        "seeds": [0, 1],
        "measures": {"tokenizer": "--data data", "generation": "--reference data"},
        "curves": {"better": {"generation/fd": "lower"}, "held_out": 0},
        "cost": {"flops_per_second": 1.0e11, "seconds": {"evaluate": 30, "latents": 20, "generate": 60}},
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(study | changes))
    return path


def small_study(folder: Path, **changes: object) -> StudyConfig:
    return load_study(write_study(folder, **changes))


class StandIn:
    """Called in place of a command: remembers the link and makes its outputs; ``broken`` names links that fail."""

    def __init__(self, broken: str = ""):
        self.ran: list[Link] = []
        self.broken = broken

    def __call__(self, command: list[str], link: Link, lock: int) -> int:
        self.ran.append(link)
        if self.broken and self.broken in str(link.folder):
            link.log.write_text("Traceback\nRuntimeError: no room\n")
            return 1
        for path in link.outputs:
            if path.suffix == ".json":
                path.write_text(json.dumps({"metrics": metrics(link)}))
            elif path.suffix:
                path.write_bytes(b"picture")
            else:
                path.mkdir(parents=True, exist_ok=True)
        return 0


def metrics(link: Link) -> dict[str, float | None]:
    name = next(name for name in CURVES if name in link.folder.parts)
    steps = next(int(part[5:]) for part in link.folder.parts if part.startswith("step-"))
    seed = next((int(part[5:]) for part in link.folder.parts if part.startswith("seed-")), 0)
    if link.kind == "evaluate":
        return {"samples": 380.0, "knn/group_top1": steps / 1000, "reconstruction/none": None}
    repetition = 0.1 * ("b" in link.folder.parts)
    return {"samples": 2000.0, "generation/fd": CURVES[name](steps) + 0.1 * (2 * seed - 1) + repetition}
