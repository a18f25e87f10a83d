"""This draws images with a trained DiT and the tokenizer whose latents it generates."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megavtp.checkpoint.once import opened_once
from megavtp.checkpoint.reading import Checkpoint
from megavtp.config.precision import compute_dtype
from megavtp.config.sizes import known
from megavtp.dit.checkpoint import StoredDiT, load_dit
from megavtp.dit.sampling.guidance import guided_field
from megavtp.dit.sampling.samples import Sample, sample_noise
from megavtp.dit.sampling.settings import SamplingSettings, settings_of
from megavtp.dit.sampling.solvers import dopri5, euler, euler_maruyama, heun
from megavtp.errors import UserError
from megavtp.parallel.collectives import all_gather, together
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.tokenizer import Tokenizer, load_tokenizer


class Sampler:
    """Draws images; the same (seed, condition, index) and settings give the same image.

    The noise is equal bit for bit whatever else is drawn, in batches of any size, on any number of processes. What is
    computed from it differs by the rounding of the matrix products, which may depend on the batch's size (and on the
    number of threads of a CPU): latents by some 1e-6 of their size, a few pixels by 1 of 255. Rarely, rounding changes
    a decision of dopri5; such a sample differs by a part of the tolerance.

    Args:
        dit: a DiT that knows the tokenizer of its latents. where: its path, for messages.
        tokenizer: that tokenizer; it takes over the DiT's latent statistics.
        dtype: dtype of the DiT's matrix products.

    Attributes:
        size: pixels of an image's side. shape: (C, h, w) of its latents.

    Raises:
        UserError: the tokenizer is not the DiT's, or there are no latent statistics or no pixel decoder.
    """

    def __init__(
        self, dit: StoredDiT, where: str, tokenizer: Tokenizer, settings: SamplingSettings,
        dtype: torch.dtype = torch.float32,
    ):
        if dit.artifact is None:
            raise UserError(
                f"{where} does not say which tokenizer it belongs to, nor its latent statistics; convert it again with "
                "tools/convert_checkpoint.py --tokenizer LATENTS, the folder of the latents it was trained on"
            )
        tokenizer.take_statistics(dit.artifact, where)
        if "reconstruction" not in tokenizer.model.objectives:
            raise UserError(f"{tokenizer.path} has no pixel decoder; use a tokenizer with the reconstruction objective")
        config = dit.config.model
        channels = config.latent_channels
        if settings.guided_channels is not None and settings.guided_channels > channels:
            raise UserError(f"sampling: guided channels {settings.guided_channels}: the latents have {channels}")
        self.dit, self.tokenizer, self.settings, self.dtype = dit, tokenizer, settings, dtype
        self.shape = (channels, config.latent_size, config.latent_size)
        self.size = config.latent_size * tokenizer.artifact.patch_size
        self.device = tokenizer.device
        self.field = guided_field(dit.model, settings.guidance, settings.interval, settings.guided_channels, dtype)

    @torch.no_grad()
    def latents(self, samples: Sequence[Sample]) -> Tensor:
        """Draw normalised latents (b, C, h, w), float32 on the device."""
        noise = sample_noise(self.settings.seed, samples, self.shape, self.device)
        x, y, settings = noise(), self._conditions(samples), self.settings
        if settings.method == "dopri5":
            return dopri5(self.field, x, y, settings.rtol, settings.atol)
        times = settings.times()
        if settings.method == "sde":
            return euler_maruyama(self.field, x, y, times, settings.diffusion, noise)
        return (heun if settings.method == "heun" else euler)(self.field, x, y, times)

    def images(self, samples: Sequence[Sample]) -> Tensor:
        """Draw images (b, 3, H, W), uint8 on the device."""
        return self.tokenizer.decode(self.latents(samples), normalised=True).mul_(255).round_().to(torch.uint8)

    def _conditions(self, samples: Sequence[Sample]) -> Tensor:
        model = self.dit.config.model
        labels = [sample.condition for sample in samples if isinstance(sample.condition, int)]
        captions = [sample.condition for sample in samples if isinstance(sample.condition, str)]
        wanted, kind = (labels, "labels") if model.condition == "class" else (captions, "captions")
        if len(wanted) < len(samples):
            raise UserError(f"this DiT was trained with model.condition={model.condition}: give its samples {kind}")
        if model.condition == "caption":
            return self.tokenizer.encode_text(captions)
        classes = known(model.num_classes, "model.num_classes")
        if not 0 <= min(labels) <= max(labels) < classes:
            raise UserError(f"label {max(labels)}: this DiT has {classes} classes, from 0")
        return torch.tensor(labels, device=self.device)


def open_sampler(
    dit: str | Path, tokenizer: str | Path, settings: SamplingSettings, device: torch.device | str = "cpu", *,
    average: bool = True, dtype: torch.dtype = torch.float32,
    opened: tuple[Checkpoint | None, Checkpoint | None] = (None, None),
) -> Sampler:
    """Load a checkpoint's DiT, by default its averaged weights, and a tokenizer's folder; ``opened`` are both
    checkpoints if they are open already. Raises UserError."""
    stored = load_dit(dit, device, average=average, opened=opened[0])
    return Sampler(stored, str(dit), load_tokenizer(tokenizer, device, opened=opened[1]), settings, dtype)


def sampler_of(options: argparse.Namespace, device: torch.device) -> Sampler:
    """Open the DiT and the tokenizer that ``settings.add_sampling_options`` and the tools' options name.

    All ranks do so together, and rank 0 alone verifies checkpoints. UserError on all ranks.
    """
    with opened_once(options.dit) as dit, opened_once(options.tokenizer) as tokenizer:
        return together(lambda: open_sampler(
            options.dit, options.tokenizer, settings_of(options), device, average=options.weights == "average",
            dtype=compute_dtype(options.precision), opened=(dit, tokenizer),
        ))


class GeneratedImages:
    """The images of ``samples`` as an ``evaluation.distances.image_sources.ImageSource``, which are drawn when they are
    asked for:

        source = GeneratedImages(open_sampler(dit, tokenizer, settings), in_proportion([1.0] * num_classes, 10_000))

    Attributes:
        size: pixels of a side.
    """

    def __init__(self, sampler: Sampler, samples: Sequence[Sample], quiet: bool = True):
        self.sampler, self.samples, self.quiet = sampler, samples, quiet
        self.size = sampler.size

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, batch_size: int, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw this process's share: numbers (b,) int64 on the CPU and images (b, 3, size, size) uint8 on the device.

        All samples are divided into batches that go to the processes in turn, so each image is in the same batch for
        every number of processes. Shares may differ by one batch; no process waits for another.
        """
        starts = range(rank * batch_size, len(self.samples), world * batch_size)
        for start in tqdm(starts, "sampling", disable=self.quiet, unit="batch"):
            batch = self.samples[start : start + batch_size]
            yield torch.arange(start, start + len(batch)), self.sampler.images(batch)


def all_images(
    sampler: Sampler, samples: Sequence[Sample], batch_size: int, mesh: Mesh = SINGLE, quiet: bool = True
) -> Iterator[Tensor]:
    """Draw the images of all ``samples`` in order as uint8 batches (b, 3, H, W) on the CPU of every process.

    This is a collective call: each batch of the result joins one of every process.
    """
    batches = GeneratedImages(sampler, samples, quiet).batches(batch_size, mesh.dp_rank, mesh.dp)
    for start in range(0, len(samples), batch_size * mesh.dp):
        own = torch.zeros(batch_size, 3, sampler.size, sampler.size, dtype=torch.uint8, device=sampler.device)
        for _, images in islice(batches, 1):  # none at the end, if fewer batches than processes are left
            own[: len(images)] = images
        # Only the very last batch may be short, so padding is at the end.
        yield all_gather(own, mesh, "dp")[: len(samples) - start].cpu()
