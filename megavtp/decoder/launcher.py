"""What `launchers/train_decoder.py` starts."""

from megavtp.config.schema import Config
from megavtp.decoder.recipe import DecoderTraining
from megavtp.decoder.validate import validate_decoder
from megavtp.planning.summary import layout_summary
from megavtp.pretraining.source import make_source
from megavtp.training.launcher import Launcher

DECODER = Launcher(
    name="train_decoder.py", description="Train the pixel decoder of a tokenizer further; its encoder stays frozen.",
    example="deepspeed --num_gpus 8 launchers/train_decoder.py --config configs/decoder/vtp_l.yaml "
    "model.init_from=runs/vtp_l/checkpoints/latest",
    recipe_help="recipe (YAML), such as configs/decoder/vtp_l.yaml or configs/demo/decoder_emoji.yaml",
    settings=Config, validate=validate_decoder, summary=layout_summary, recipe=DecoderTraining, prepare=make_source,
)
train_decoder = DECODER.launch
