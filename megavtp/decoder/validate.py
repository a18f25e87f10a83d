"""The rules of the decoder's training."""

from dataclasses import replace

from megavtp.config.layout import check_pipeline
from megavtp.config.ranges import need
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data.sources.named import check_source

_LAUNCHER = "launchers/train_decoder.py"


def validate_decoder(config: Config, world_size: int | None) -> ResolvedConfig:
    """As ``validate``, for a run whose encoder is frozen, and marked as one. UserError."""
    o = config.objectives
    need(
        o.contrastive.weight == 0 and o.self_distillation.weight == 0 and o.reconstruction.weight > 0,
        f"{_LAUNCHER} trains the pixel decoder alone: set objectives.contrastive.weight=0 and "
        "objectives.self_distillation.weight=0, and a weight above 0 for objectives.reconstruction",
    )
    need(
        config.model.init_from is not None,
        f"{_LAUNCHER} needs an encoder that has learnt something: name its checkpoint with model.init_from",
    )
    need(
        o.reconstruction.drop_path == 0,
        f"objectives.reconstruction.drop_path = {o.reconstruction.drop_path} drops paths of the encoder, which "
        f"{_LAUNCHER} does not train: set it to 0",
    )
    check_source(config.data.source)
    marked = replace(o, reconstruction=replace(o.reconstruction, frozen_encoder=True))
    resolved = validate(replace(config, objectives=marked), world_size)
    # Else a rank would have nothing to train.
    tower = "decoder, which alone is trained"
    check_pipeline(resolved.parallel, resolved.model.decoder.depth, "model.decoder.depth", tower)
    return resolved
