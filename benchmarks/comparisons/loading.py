"""The loader beside webdataset with torchvision's transforms, one worker each: JPEG and caption to crop and ids."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.comparisons.comparison import Pair, Setting
from benchmarks.gpu.reading import write_pairs
from megavtp.config.load import from_dict
from megavtp.config.schema import Config
from megavtp.config.sizes import ResolvedConfig
from megavtp.config.validate import validate
from megavtp.data import decode
from megavtp.data.batch import StepDataset
from megavtp.data.captions import CaptionTokenizer, load_tokenizer
from megavtp.data.loader import Loader
from megavtp.data.shards import open_dataset
from megavtp.data.sources.images import prepare_images

SIDE, BATCH = 256, 32
SCALE = (0.4, 1.0)  # of the area of a picture that a crop has
WHOLE = (2.0, 2.0)  # no box is as large, and then both take the whole picture


@contextmanager
def loading(setting: Setting, version: Literal["v1", "v2"]) -> Iterator[Pair]:
    import torchvision.transforms.v2  # noqa: F401

    steps = setting.size(1, 36, 96)  # enough that the worker's start weighs little
    with tempfile.TemporaryDirectory() as folder:
        pictures, root = Path(folder, "pictures"), Path(folder, "pairs")
        write_pairs(pictures, steps * BATCH)
        prepare_images(pictures, root, test_fraction=0.0, vocab_size=320, workers=1, quiet=True)
        tokenizer = load_tokenizer("auto", str(root), 77)
        config = loader_config(tokenizer)
        source = StepDataset(open_dataset(root / "train"), tokenizer, config)
        tars = sorted(str(path) for path in (root / "train").glob("*.tar"))

        def by_us() -> None:
            with Loader(source, 0, steps, workers=1, picture_bytes=source.picture_bytes) as batches:
                for _ in batches:
                    pass

        def by_webdataset() -> None:
            for _ in webdataset_loader(tars, tokenizer, version, SCALE):
                pass

        decoder = "simplejpeg" if decode.simplejpeg else "Pillow"
        yield Pair(
            f"{steps * BATCH} JPEG files of 400 x 320 pixels to uint8 crops of {SIDE} pixels and token ids, "
            f"decoded by {decoder} and, there, Pillow",
            by_us, by_webdataset, whole_pictures(config, tars, source, version), counts_memory=False,
        )


def loader_config(tokenizer: CaptionTokenizer) -> ResolvedConfig:
    return validate(from_dict({
        "model": {"image_size": SIDE, "text": {"vocab_size": tokenizer.vocab_size}},
        "objectives": {"self_distillation": {"weight": 0.0}, "reconstruction": {"weight": 0.0}},
        "data": {"streams": 1, "augment": {"plain_scale": list(SCALE)}}, "train": {"batch_size": BATCH},
    }, Config), 1)


def webdataset_loader(
    tars: list[str], tokenizer: CaptionTokenizer, version: str, scale: tuple[float, float], workers: int = 1
) -> DataLoader:
    """Return batches (key, image uint8, token ids) of the whole data set, shuffled as by its documentation."""
    import webdataset

    transform = crop_by_v1(scale) if version == "v1" else crop_by_v2(scale)
    samples = (
        webdataset.WebDataset(tars, shardshuffle=100, seed=0, empty_check=False).shuffle(1000).decode("pil")
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(None, transform, None).batched(BATCH).map_tuple(None, None, tokenizer.encode)
    )
    return DataLoader(samples, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)


def crop_by_v1(scale: tuple[float, float]) -> Callable[[Any], Tensor]:
    from torchvision import transforms as v1

    crop = v1.RandomResizedCrop(SIDE, scale, interpolation=v1.InterpolationMode.BICUBIC)
    return v1.Compose([crop, v1.PILToTensor()])


def crop_by_v2(scale: tuple[float, float]) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(SIDE, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([v2.PILToTensor(), crop])


def whole_pictures(config: ResolvedConfig, tars: list[str], source: StepDataset, version: str) -> float:
    """Compare a batch of crops that are whole pictures, where no chance is left: the mean difference of the pixels, as
    a part of their range. Infinite if the captions' ids differ."""
    augment = replace(config.data.augment, plain_scale=WHOLE)
    whole = replace(config, data=replace(config.data, augment=augment))
    ours = StepDataset(source.dataset, source.tokenizer, whole)[0]
    theirs: dict[str, tuple[Tensor, Tensor]] = {}
    for keys, images, tokens in webdataset_loader(tars, source.tokenizer, version, WHOLE, workers=0):
        theirs |= dict(zip(keys, zip(images, tokens)))
    pairs = [theirs[name.rpartition("/")[2]] for name in ours.ids]
    images, tokens = map(torch.stack, zip(*pairs))
    if not torch.equal(tokens, ours.tokens):
        return float("inf")
    return float((images.float() - ours.images.float()).abs().mean() / 255)
