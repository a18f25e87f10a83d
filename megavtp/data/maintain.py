"""Index shards made elsewhere, and check that all samples of a data set can be used."""

from functools import partial
from itertools import islice
from pathlib import Path

from megavtp.data.captions import TRAINING_CAPTIONS, train_sentencepiece
from megavtp.data.decode import MAX_PIXELS, BadSample, decode_image
from megavtp.data.files import refuse_remote
from megavtp.data.index import build_index
from megavtp.data.report import SkipReport
from megavtp.data.shards import ShardDataset, open_dataset, split_folder, split_folders
from megavtp.data.workers import ordered_map
from megavtp.errors import UserError

_NAMED = 1000  # bad samples that a check lists
_CHECK_BLOCK = 64  # samples of one job


def index_dataset(
    folder: str | Path, vocab_size: int = 0, quiet: bool = False, max_bad: int = 1000, overwrite: bool = False
) -> SkipReport:
    """Index the shards of the data set at ``folder``; with ``vocab_size``, make ``captions.model`` in it, too, where
    ``data.captions=auto`` looks for it. ``UserError`` if there are no tars, after more than ``max_bad`` bad samples,
    and if a ``captions.model`` is there already and ``overwrite`` is off."""
    folder = refuse_remote(folder)
    model = folder / "captions.model"
    if vocab_size and model.exists() and not overwrite:
        remedy = "leave out --vocab-size, or replace it with --overwrite"
        raise UserError(f"{model} exists, and models that were trained with it need it; {remedy}")
    report = SkipReport()
    for part in _splits(folder):
        build_index(part, report, max_bad, quiet)
    if vocab_size:
        dataset = open_dataset(split_folder(folder, "train"))
        rows = ((shard, row) for shard, count in enumerate(dataset.shard_counts) for row in range(count))
        captions = (dataset.read(*place).caption for place in islice(rows, TRAINING_CAPTIONS))
        train_sentencepiece(captions, model, vocab_size)
    return report


def check_dataset(
    folder: str | Path, max_pixels: int = MAX_PIXELS, workers: int = 2, quiet: bool = False
) -> SkipReport:
    """Read and decode every sample; the report names the bad ones, with what is wrong with each."""
    report = SkipReport(named_limit=_NAMED)
    for part in _splits(refuse_remote(folder)):
        dataset = open_dataset(part)
        jobs = [
            (shard, range(first, min(first + _CHECK_BLOCK, count)))
            for shard, count in enumerate(dataset.shard_counts) for first in range(0, count, _CHECK_BLOCK)
        ]
        check = partial(_check, dataset=dataset, max_pixels=max_pixels)
        for (_, rows), bad in zip(jobs, ordered_map(check, jobs, workers, f"check {part.name}", quiet)):
            report.kept += len(rows) - len(bad)
            for sample in bad:
                report.skip("bad sample", f"{part.name}/{sample}")
    return report


def _check(job: tuple[int, range], dataset: ShardDataset, max_pixels: int) -> list[str]:
    """Return "name (reason)" of each broken sample."""
    shard, rows = job
    bad = []
    for row in rows:
        try:
            decode_image(dataset.read(shard, row).image, max_pixels)
        except BadSample as error:
            bad.append(f"{dataset.name(shard, row)} ({error})")
    return bad


def _splits(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of .tar shards, or one with train/ and test/ in it")
    return list(split_folders(folder).values()) or [split_folder(folder, "train")]
