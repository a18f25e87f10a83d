"""This is what `launchers/train_dit.py` starts."""

from megavtp.dit.config import DiTConfig
from megavtp.dit.recipe import DiTTraining
from megavtp.dit.summary import dit_summary
from megavtp.dit.validate import validate_dit
from megavtp.training.launcher import Launcher

DIT = Launcher(
    name="train_dit.py", description="Train a diffusion transformer on the latents of a tokenizer.",
    example="deepspeed --num_gpus 8 launchers/train_dit.py --config configs/dit/dit_xl.yaml data.root=data/latents",
    recipe_help="recipe (YAML), such as configs/dit/dit_xl.yaml",
    settings=DiTConfig, validate=validate_dit, summary=dit_summary, recipe=DiTTraining,
)
train_dit = DIT.launch
