"""The passes of the second stage: reconstruction as it trains the decoder alone, and the discriminator's own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megavtp.config.share import PassShare
from megavtp.config.sizes import ResolvedConfig
from megavtp.data.batch import Batch
from megavtp.decoder.adversary import Adversary
from megavtp.objectives.adversarial import adaptive_weight, hinge, last_layer_gradient, persuasion
from megavtp.objectives.diff_augment import augment, draw_augmentation
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.passes import Pass
from megavtp.parallel.pipeline import Runner, forward_everywhere
from megavtp.pixels import denormalise, to_uint8
from megavtp.pretraining.passes import ReconstructionPass


class DecoderPass(ReconstructionPass):
    """Reconstruction behind a frozen encoder, whose latents are made first, without graph."""

    mode = "trained_decode"

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


class AdversarialDecoderPass(DecoderPass):
    """The same, and the decoder learns to persuade a discriminator.

    With the adaptive weight, a micro-batch's gradient depends on the whole batch: the terms are then computed over the
    batch, from the images alone, and only their gradient by the images goes through the decoder.
    """

    def __init__(
        self, config: ResolvedConfig, share: PassShare, mesh: Mesh, device: torch.device,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None, adversary: Adversary,
    ):
        super().__init__(config, share, mesh, device, perceptual)
        self.adversary = adversary
        own = {"adversarial": config.objectives.adversarial.weight, "adaptive_weight": 0.0}
        self.term_weights = {**self.term_weights, **own}

    def prepare(self, run: Runner, batch: Batch) -> int:
        self.adversary.begin(run, batch.step)
        self.over_batch = self.adversary.teaches and self.adversary.settings.adaptive
        return super().prepare(run, batch)

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        return super().inputs(micro, first) | {"with_head_input": True}

    def augmented(self, pictures: Tensor, micro: int, tag: str) -> Tensor:
        """Augment a micro-batch's pictures between -1 and 1; ``tag`` tells the draws for different uses apart."""
        s = self.adversary.settings
        draws = draw_augmentation(
            seed=self.config.seed, step=self.batch.step, pictures=self.places(micro), tag=tag
        )
        return augment(
            pictures, self.to_device(draws), brightness=s.brightness, saturation=s.saturation, contrast=s.contrast,
            translation=s.translation,
        )

    def real_pixels(self, micro: int) -> Tensor:
        """Return the pictures of a micro-batch on the device, as uint8."""
        return self.to_device(self.images[self.rec_rows[self.share.rows(micro)]])

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        images, _ = outputs
        if self.adversary.learns:
            self.adversary.fakes[micro] = to_uint8(images.detach())
        if self.over_batch:
            return {}
        zero = images.new_zeros(())
        adversarial = self._adversarial(images, micro) if self.adversary.teaches else zero
        terms = super().local_terms(images, micro)
        return {**terms, "adversarial": adversarial, "adaptive_weight": zero + float(self.adversary.teaches)}

    def _adversarial(self, images: Tensor, micro: int) -> Tensor:
        seen = self.augmented(denormalise(images.float()) * 2 - 1, micro, "decoder")
        return persuasion(self.adversary.answers(seen)).sum() / self.share.local

    def global_inputs(self, outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
        return list(outputs), []

    def global_terms(self, rows: list[Tensor], shared: list[Tensor]) -> dict[str, Tensor]:
        images, head_input = rows
        values: dict[str, Tensor] = {}
        gradients: dict[str, list[Tensor]] = {}
        for micro in range(self.share.micro_batches):
            own = images[self.share.rows(micro)].detach().requires_grad_()
            with torch.enable_grad():
                terms = reconstruction_terms(
                    own, self.device_images(micro), self.perceptual, images_total_local=self.share.local
                )
                terms["adversarial"] = self._adversarial(own, micro)
            for name, value in terms.items():
                values[name] = values.get(name, 0.0) + value.detach()
                gradients.setdefault(name, []).append(torch.autograd.grad(value, own)[0])
        whole = {name: torch.cat(parts) for name, parts in gradients.items()}
        reconstruction = sum(self.term_weights[name] * whole[name] for name in whole if name != "adversarial")
        assert isinstance(reconstruction, Tensor)
        reconstructing, persuading = (
            last_layer_gradient(gradient, head_input, self.config.model.patch_size)
            for gradient in (reconstruction, whole["adversarial"])
        )
        weight = adaptive_weight(reconstructing, persuading, self.mesh)
        whole["adversarial"] *= weight
        found = {name: _WithGradient.apply(values[name], images, gradient) for name, gradient in whole.items()}
        return {**found, "adaptive_weight": weight}


class _WithGradient(torch.autograd.Function):
    """A value whose gradient by a tensor is given."""

    @staticmethod
    def forward(ctx, value, tensor, gradient):
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.gradient * upstream, None


class DiscriminatorPass(Pass):
    """The discriminator learns to tell the pictures of the decoder's pass from real ones."""

    name = "discriminator"
    mode = "discriminate"
    weight = 1.0
    term_weights = {"real": 0.0, "fake": 0.0}
    on_last_stage = True

    def __init__(self, decoder: AdversarialDecoderPass):
        self.decoder, self.adversary, self.share = decoder, decoder.adversary, decoder.share

    def prepare(self, run: Runner, batch: Batch) -> int:
        return self.share.micro_batches if self.adversary.learns else 1

    def inputs(self, micro: int, first: bool = True) -> dict[str, Any]:
        if not self.adversary.learns:
            return {}
        pixels = {"real": self.decoder.real_pixels(micro), "fake": self.adversary.fakes.pop(micro)}
        seen = [self.decoder.augmented(x / 127.5 - 1, micro, tag) for tag, x in pixels.items()]
        with torch.no_grad():
            features = self.adversary.features(torch.cat(seen))
        return {"features": features, "directions": self.adversary.directions}

    def local_terms(self, outputs: Any, micro: int) -> dict[str, Tensor]:
        if not self.adversary.learns:
            zero = outputs[0]
            return {"hinge": zero, "real": zero.detach(), "fake": zero.detach()}
        real, fake = outputs.chunk(2)
        terms = {"hinge": hinge(real, fake), "real": real.mean(1), "fake": fake.mean(1)}
        return {name: of_pictures.sum() / self.share.local for name, of_pictures in terms.items()}

    def state(self) -> dict[str, Tensor]:
        return {f"direction/{name}": left for name, left in self.adversary.left.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.adversary.left = {name: state[f"direction/{name}"] for name in self.adversary.left}
