"""The launcher of pre-training, which `launchers/pretrain.py` starts."""

from __future__ import annotations

from pathlib import Path

from megavtp.config.load import load_config
from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data.sources.emoji import prepare_emoji
from megavtp.errors import UserError
from megavtp.parallel.collectives import together
from megavtp.planning.summary import layout_summary
from megavtp.pretraining.recipe import Pretraining
from megavtp.training.launcher import Launcher


def _prepare(config: ResolvedConfig, recipe: Path, rank: int) -> None:
    """Draw the demo's data in its default folder. The user fills any other ``data.root``: a mistyped one must not
    become a run on emoji."""
    root = Path(config.data.root)
    if recipe.resolve() != DEMO_CONFIG.resolve() or root != Path(load_config(recipe, Config).data.root):
        return

    def prepare() -> None:
        if rank == 0 and not root.exists():
            # Skin tones are more than half of the set and nearly alike: a run of minutes learns more without them.
            prepare_emoji(root, skin_tones=False)

    together(prepare)
    if not root.exists():
        raise UserError(f"{root} is not visible on this machine: data.root must be on a shared file system")


PRETRAINING = Launcher(
    name="pretrain.py", description="Pre-train a visual tokenizer.",
    example="deepspeed --num_accelerators 2 launchers/pretrain.py parallel.zero_stage=3 train.steps=200",
    recipe_help="recipe (YAML); default: the demo's", default=DEMO_CONFIG,
    settings=Config, validate=validate, summary=layout_summary, recipe=Pretraining, prepare=_prepare,
)
pretrain = PRETRAINING.launch
