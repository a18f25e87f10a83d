"""This translates the options of ``tools/sample.py`` and ``tools/evaluate.py generation`` for a DiT."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from megavtp.config.precision import compute_dtype
from megavtp.config.sizes import known
from megavtp.dit.checkpoint import StoredDiT
from megavtp.dit.sampling.sampler import Sampler, open_sampler
from megavtp.dit.sampling.samples import Sample, each, parse_classes
from megavtp.dit.sampling.settings import SamplingSettings
from megavtp.errors import UserError


def settings_of(options: argparse.Namespace) -> SamplingSettings:
    """Return the settings that the options of ``options.add_sampling_options`` ask for."""
    return SamplingSettings(
        options.method, options.steps, options.shift, options.guidance, options.interval,
        options.guided_channels, options.diffusion, seed=options.seed,
    )


def sampler_of(options: argparse.Namespace, device: torch.device) -> Sampler:
    """Open the DiT and the tokenizer that the options name, with these settings. Raises ``UserError``."""
    return open_sampler(
        options.dit, options.tokenizer, settings_of(options), device, average=options.weights == "average",
        dtype=compute_dtype(options.precision),
    )


def samples_of(
    dit: StoredDiT, classes: str | None, captions: list[str] | None, per_class: int
) -> list[Sample]:
    """Return the samples to draw. UserError for options that do not fit the DiT."""
    model = dit.config.model
    if model.condition == "caption":
        if captions is None or classes is not None:
            raise UserError('this DiT is conditioned on captions: give --caption "..." and no --classes')
        return each(captions, per_class)
    num_classes = known(model.num_classes, "model.num_classes")
    if classes is None or captions is not None:
        raise UserError(
            f"this DiT is conditioned on classes: give --classes, some of 0 to {num_classes - 1} or all, and no "
            "--caption"
        )
    if classes.strip() == "all":
        return each(range(dit.trained_classes), per_class)
    return each(parse_classes(classes, num_classes, dit.classes), per_class)


def names_of(dit: StoredDiT, samples: Sequence[Sample]) -> list[str]:
    """Return what a sheet writes beside each sample."""
    conditions = [sample.condition for sample in samples]
    return [value if isinstance(value, str) else dit.class_name(value) for value in conditions]
