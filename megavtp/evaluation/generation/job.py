"""This does what the options of `tools/evaluate.py generation` ask for."""

import argparse
from typing import Any

import torch

from megavtp.config.precision import resolved
from megavtp.dit.sampling.sampler import GeneratedImages, sampler_of
from megavtp.dit.sampling.settings import settings_of
from megavtp.errors import UserError
from megavtp.evaluation.distances.image_sources import ImageSource, ShardImages, open_images
from megavtp.evaluation.distances.measure import (
    GenerationResult,
    Reference,
    load_network,
    measure_generation,
    open_reference,
)
from megavtp.evaluation.distances.npz_file import write_statistics
from megavtp.evaluation.generation.recognition import METRIC, recognise
from megavtp.evaluation.generation.samples import Label, samples_like
from megavtp.evaluation.generation.scale import BLURS, Blurred, Noise, untrained
from megavtp.evaluation.report import format_table, write_metrics
from megavtp.launch.tool import join_others
from megavtp.parallel.collectives import together
from megavtp.parallel.looking import from_first

_DRAWN = 10_000  # samples that a DiT draws by default, for FID-10k as in the paper's studies


def run_generation(options: argparse.Namespace) -> None:
    """Measure, write the files that are asked for, and print a table. Raises ``UserError`` on every rank."""
    device, mesh = join_others(options.device)
    network = together(lambda: load_network(options.inception, device, options.timm))
    samples, shown = _samples(options, device)
    reference = together(lambda: open_reference(options.reference, network, samples.size, options.reference_samples))
    compare = together(lambda: _scale(options, samples, reference)) if options.scale else {}
    result = measure_generation(
        samples, reference, network, batch_size=options.batch_size, seed=options.seed, mesh=mesh, device=device,
        compare=compare, kept=options.reference_features,
    )
    if mesh.rank:
        return
    classes = _recognise(shown, reference, result, options.label)
    if options.save_reference:
        write_statistics(options.save_reference, result.reference, network.made_by)
    if options.out:
        names = ("samples_from", "dit", "tokenizer", "reference", "size", "label", "weights")
        told = {name: str(value) for name in names if (value := getattr(options, name)) is not None}
        drawn: dict[str, Any] = {}
        if options.dit is not None:
            drawn = {"sampling": vars(settings_of(options)), "precision": resolved(options.precision)}
        found = {name: getattr(result, name) for name in ("metrics", "compare", "skipped", "notes")}
        write_metrics(options.out, {**told, **drawn, "features": network.title, **found, "classes": classes})
    print(format_table(result.metrics, result.compare))
    for name, reason in result.skipped.items():
        print(f"left out: {name}: {reason}")
    for note in result.notes:
        print(f"note: {note}")


def _samples(options: argparse.Namespace, device: torch.device) -> tuple[ImageSource, list[Label] | None]:
    """Return the samples, and the value of the label that each is to show if there is a label."""
    if options.equal_classes and options.label is None:
        raise UserError("--equal-classes belongs to --label; without that, all classes have equally many samples")
    if options.dit is None:
        for name in ("tokenizer", "label"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} belongs to --dit; leave it out, the samples are there already")
        return together(lambda: open_images(options.samples_from, options.size, options.samples)), None
    if options.tokenizer is None:
        raise UserError("--dit needs --tokenizer, the folder of the tokenizer whose latents it makes")
    if options.size is not None:
        raise UserError("--size is for --samples-from; a DiT draws images of one size")
    sampler = sampler_of(options, device)
    count = _DRAWN if options.samples is None else options.samples
    wanted = from_first(
        lambda: samples_like(options.reference, sampler.dit, count, options.label, options.equal_classes)
    )
    return GeneratedImages(sampler, wanted.samples), wanted.shown


def _recognise(
    shown: list[Label] | None, reference: Reference, result: GenerationResult, label: str
) -> dict[str, dict[str, float]]:
    """Add the share of recognised samples to ``result`` if their classes are known; return the shares by class."""
    if shown is None:
        return {}
    assert isinstance(reference.images, ShardImages) and result.real
    try:
        found = recognise(shown, result.made, reference.images, result.real, label)
    except UserError as error:
        result.skipped[METRIC] = str(error)
        return {}
    result.metrics.update(found.metrics)
    result.compare["real"] = found.real
    result.notes.extend(found.notes)
    return found.classes


def _scale(options: argparse.Namespace, samples: ImageSource, reference: Reference) -> dict[str, ImageSource]:
    """Return sets of bad images, as many as there are samples."""
    found: dict[str, ImageSource] = {}
    if reference.images is not None:
        images = open_images(options.reference, samples.size, len(samples))
        found = {f"blurred {side} px": Blurred(images, side) for side in BLURS}
    if isinstance(samples, GeneratedImages):
        found["untrained"] = GeneratedImages(untrained(samples.sampler), samples.samples)
    return found | {"noise": Noise(len(samples), samples.size, options.seed)}
