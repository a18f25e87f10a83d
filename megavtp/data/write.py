"""Write a data set: shuffled shards, their index, the caption tokenizer and a description."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavtp.data.captions import TRAINING_CAPTIONS, train_sentencepiece
from megavtp.data.files import refuse_remote, write_json
from megavtp.data.index import build_index
from megavtp.data.new_sample import NewSample, Skipped
from megavtp.data.report import SkipReport
from megavtp.data.sample_text import pack_text
from megavtp.errors import UserError

_SHARD_BYTES = 1_000_000_000
_CONTENT = ("train", "test", "captions.model", "dataset.json")  # of a data set's folder


@contextmanager
def staged_folder(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside ``out`` that takes its place only if the block ends without an exception. ``UserError``
    if ``out`` exists and ``overwrite`` is off, or if it is no data set (then it is never deleted)."""
    out = refuse_remote(out)
    if out.exists():
        if not overwrite:
            raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite")
        if not out.is_dir() or (any(out.iterdir()) and not (out / "dataset.json").exists()):
            raise UserError(f"{out} holds no dataset.json, so it is not replaced; move it away")
    partial = out.with_name(out.name + ".partial")
    if partial.is_dir() and any(path.name.removesuffix(".partial") not in _CONTENT for path in partial.iterdir()):
        raise UserError(f"{partial} is in the way and not left by a command that was killed; move it away")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {partial} ({error.strerror}); choose another --out") from None
    try:
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:  # sources handle their own errors; this is a full or failing disk
        raise UserError(f"cannot write {out} ({error.strerror or error}); make room or choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_dataset(
    root: Path, splits: Mapping[str, Iterable[NewSample | Skipped]], info: dict[str, Any], report: SkipReport, *,
    label_fields: tuple[str, ...] = (), vocab_size: int = 8192, shard_size: int = 1000, max_bad: int = 1000,
) -> dict[str, Any]:
    """Write indexed shards in ``root/train`` and so on, ``captions.model`` from the training captions, and
    ``dataset.json``, which is returned. The same samples give the same bytes.

    ``label_fields``: metadata keys whose values are class names; ``dataset.json`` lists them under "labels". Raises
    ``UserError`` after more than ``max_bad`` skipped samples, and if nothing of the training split is usable.
    """
    import webdataset  # the processes that prepare samples need none of it

    captions: list[str] = []
    counts = dict.fromkeys(splits, 0)
    labels: dict[str, set[str]] = {name: set() for name in label_fields}
    for split, samples in splits.items():
        (root / split).mkdir()
        with webdataset.ShardWriter(
            str(root / split / "shard-%06d.tar"), maxcount=shard_size, maxsize=_SHARD_BYTES, verbose=0, encoder=False,
            mtime=0,
        ) as writer:
            for sample in samples:
                if isinstance(sample, Skipped):
                    report.skip(sample.reason, sample.name)
                    report.limit(max_bad)
                    continue
                caption, meta = pack_text(sample.caption, sample.meta)
                writer.write({"__key__": sample.key, sample.extension: sample.image, "txt": caption, "json": meta})
                counts[split] += 1
                if split == "train" and len(captions) < TRAINING_CAPTIONS:
                    captions.append(sample.caption)
                for name in label_fields:
                    if isinstance(sample.meta.get(name), str):
                        labels[name].add(sample.meta[name])
        if counts[split]:
            build_index(root / split, report)
        else:
            shutil.rmtree(root / split)
    if not captions:
        raise UserError(f"no usable image with a caption; {'; '.join(report.lines()) or 'the source is empty'}")
    tokenizer = train_sentencepiece(captions, root / "captions.model", vocab_size)
    info = {
        "version": 1, **info, "counts": counts, "skipped": report.skipped, "caption_vocab_size": tokenizer.vocab_size,
        "labels": {name: sorted(values) for name, values in labels.items() if values},
    }
    write_json(root / "dataset.json", info, indent=1)
    return info
