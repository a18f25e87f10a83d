"""The launcher of pre-training, which `launchers/pretrain.py` starts."""

from megavtp.config.schema import DEMO_CONFIG, Config
from megavtp.planning.summary import layout_summary
from megavtp.pretraining.recipe import Pretraining
from megavtp.pretraining.source import make_source
from megavtp.pretraining.validate import validate_pretraining
from megavtp.training.launcher import Launcher

PRETRAINING = Launcher(
    name="pretrain.py", description="Pre-train a visual tokenizer.",
    example="deepspeed --num_accelerators 2 launchers/pretrain.py parallel.zero_stage=3 train.steps=200",
    recipe_help="recipe (YAML); default: the demo's", default=DEMO_CONFIG,
    settings=Config, validate=validate_pretraining, summary=layout_summary, recipe=Pretraining, prepare=make_source,
)
pretrain = PRETRAINING.launch
