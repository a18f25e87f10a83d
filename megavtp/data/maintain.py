"""Index shards made elsewhere, and check that all samples of a data set can be used."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

from megavtp.data.captions import train_sentencepiece
from megavtp.data.decode import BadSample, decode_image
from megavtp.data.files import refuse_remote
from megavtp.data.index import build_index
from megavtp.data.report import SkipReport
from megavtp.data.shards import ShardDataset, open_dataset
from megavtp.data.workers import ordered_map
from megavtp.errors import UserError

_SPLITS = ("train", "test")
_TOKENIZER_CAPTIONS = 1_000_000
_NAMED = 1000  # bad samples that a check lists
_CHECK_BLOCK = 64  # samples of one job


def index_dataset(
    folder: str | Path, vocab_size: int = 0, quiet: bool = False, max_bad: int = 1000
) -> SkipReport:
    """Index a folder of tars, or the train/ and test/ of one; with ``vocab_size``, make ``captions.model`` too.

    The model lies where ``data.captions=auto`` looks for it: beside train/. Raises ``UserError`` if there are no tars,
    and after more than ``max_bad`` bad samples.
    """
    folder = refuse_remote(folder)
    report = SkipReport()
    folders = _split_folders(folder)
    for part in folders:
        build_index(part, report, max_bad, quiet)
    if vocab_size:
        root = folder.parent if folders[0] == folder else folder
        dataset = open_dataset(folders[0])
        rows = ((shard, row) for shard, count in enumerate(dataset.shard_counts) for row in range(count))
        captions = (dataset.read(*place).caption for place in islice(rows, _TOKENIZER_CAPTIONS))
        train_sentencepiece(captions, root / "captions.model", vocab_size)
    return report


def check_dataset(
    folder: str | Path, max_pixels: int = 64_000_000, workers: int = 2, quiet: bool = False
) -> SkipReport:
    """Read and decode every sample; the report names the bad ones, with what is wrong with each."""
    report = SkipReport(named_limit=_NAMED)
    for part in _split_folders(refuse_remote(folder)):
        dataset = open_dataset(part)
        jobs = [
            (shard, range(first, min(first + _CHECK_BLOCK, count)))
            for shard, count in enumerate(dataset.shard_counts) for first in range(0, count, _CHECK_BLOCK)
        ]
        check = partial(_check, dataset=dataset, max_pixels=max_pixels)
        for good, bad in ordered_map(check, jobs, workers, f"check {part.name}", quiet):
            report.kept += good
            for name, reason in bad:
                report.skip("bad sample", f"{part.name}/{name} ({reason})")
    return report


def _check(job: tuple[int, range], dataset: ShardDataset, max_pixels: int) -> tuple[int, list[tuple[str, str]]]:
    shard, rows = job
    bad = []
    for row in rows:
        name = dataset.name(shard, row)
        try:
            sample = dataset.read(shard, row)
            decode_image(sample.image, max_pixels)
        except BadSample as error:
            bad.append((name, str(error)))
    return len(rows) - len(bad), bad


def _split_folders(folder: Path) -> list[Path]:
    """The folders of shards that ``folder`` stands for: itself, or its train/ and test/."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of .tar shards, or one with train/ and test/ in it")
    if any(folder.glob("*.tar")):
        return [folder]
    return [folder / split for split in _SPLITS if (folder / split).is_dir()] or [folder]
