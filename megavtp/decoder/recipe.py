"""The recipe of the second stage: reconstruction alone, which moves the decoder alone."""

from megavtp.decoder.passes import DecoderPass
from megavtp.parallel.passes import Pass
from megavtp.pretraining.recipe import Pretraining


class DecoderTraining(Pretraining):
    """The pixel decoder on the latents of a frozen encoder, over pre-training's data."""

    def passes(self) -> list[Pass]:
        part = self.share.passes["reconstruction"]
        return [DecoderPass(self.config, part, self.mesh, self.device, self.perceptual)]
