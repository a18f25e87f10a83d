"""The rules of the decoder's training."""

from dataclasses import replace

from megavtp.config.layout import check_pipeline
from megavtp.config.ranges import divides, need
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data.sources.named import check_source
from megavtp.models.feature_networks import TIMM

_LAUNCHER = "launchers/train_decoder.py"


def asks_for_second_stage(config: Config) -> bool:
    """Tell whether a configuration has what only the second stage has: a discriminator, or a decoder's average."""
    return config.objectives.adversarial.weight > 0 or config.objectives.reconstruction.decoder_momentum > 0


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
    if o.adversarial.weight > 0:
        _adversarial(config)
    marked = replace(o, reconstruction=replace(o.reconstruction, frozen_encoder=True))
    resolved = validate(replace(config, objectives=marked), world_size)
    # Else a rank would have nothing to train.
    tower = "decoder, which alone is trained"
    check_pipeline(resolved.parallel, resolved.model.decoder.depth, "model.decoder.depth", tower)
    return resolved


def _adversarial(config: Config) -> None:
    a, model, prefix = config.objectives.adversarial, config.model, "objectives.adversarial"
    is_timm = a.features.startswith(TIMM) and a.features != TIMM
    need(
        a.features in ("own", "pixels") or is_timm,
        f"{prefix}.features = {a.features}: must be own, pixels, or {TIMM}NAME with the name of a ViT of timm",
    )
    need(
        is_timm == (a.features_weights is not None),
        f"{prefix}.features_weights is the file of a timm ViT's weights: "
        + (f"name it for features = {a.features}" if is_timm else f"leave it out with features = {a.features}"),
    )
    need(
        a.start >= a.discriminator_start,
        f"{prefix}.start = {a.start} is before {prefix}.discriminator_start = {a.discriminator_start}: a discriminator "
        "that has not learnt anything teaches nothing",
    )
    if a.features == "pixels":
        need(a.features_size is None, f"{prefix}.features_size is not for features = pixels, which resizes nothing")
        need(model.image_size >= 16, f"{prefix}.features = pixels needs model.image_size >= 16: use another network")
    if a.features == "own":
        size = a.features_size or model.image_size
        crop = "choose a size in whole patches"
        divides(model.patch_size, size, "model.patch_size", f"{prefix}.features_size", crop)
        need(
            (size // model.patch_size) ** 2 >= 4,
            f"{prefix}.features = own needs at least four patches, not those of {size} px: enlarge features_size",
        )
