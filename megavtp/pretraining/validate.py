"""The rules of pre-training's launcher."""

from megavtp.config.ranges import need
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data.sources.named import check_source


def validate_pretraining(config: Config, world_size: int | None) -> ResolvedConfig:
    """As ``validate``; and the run is not one of the decoder alone. UserError."""
    need(
        not config.objectives.reconstruction.frozen_encoder,
        "objectives.reconstruction.frozen_encoder = true: the decoder alone is trained by launchers/train_decoder.py; "
        "start that with the same arguments",
    )
    need(
        config.objectives.adversarial.weight == 0 and config.objectives.reconstruction.decoder_momentum == 0,
        "objectives.adversarial and objectives.reconstruction.decoder_momentum are of the decoder's own training: set "
        "their weight and momentum to 0, and start launchers/train_decoder.py when this run is done",
    )
    check_source(config.data.source)
    return validate(config, world_size)
