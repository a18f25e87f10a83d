"""Reconstruction as it trains the decoder alone."""

from typing import Any

from megavtp.data.batch import Batch
from megavtp.parallel.pipeline import Runner, forward_everywhere
from megavtp.pretraining.passes import ReconstructionPass


class DecoderPass(ReconstructionPass):
    """Reconstruction behind a frozen encoder, whose latents are made first, without graph."""

    mode = "decode"

    def prepare(self, run: Runner, batch: Batch) -> int:
        count = super().prepare(run, batch)
        images = self.meta_images()
        self._latents = forward_everywhere(
            run, "encode", lambda micro, first: {"images": self.device_images(micro) if first else images}, count,
            # What the decoder takes in.
            lambda: run.activation_specs("reconstruction", self.mesh.chunks, images=images)[0],
        )
        return count

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        latents = self._latents[micro]
        return {"latents": latents, "noise": self.noise(micro)} if first else {"latents": latents.to("meta")}
