"""All processes together encode a data set. They can resume, and their number does not change a byte of the result.

The data set is cut into shards of consecutive samples, whose number depends on its size alone, and each shard into
batches. A process takes every n-th of the missing shards, and computes the same of each whoever takes the others.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megavtp.arithmetic import ceil_div
from megavtp.checkpoint.background import BackgroundTask
from megavtp.data.batch import one_thread
from megavtp.data.loader import Loader
from megavtp.data.shards import ShardDataset, open_dataset
from megavtp.errors import UserError
from megavtp.extraction.folder import UnfinishedLatents
from megavtp.extraction.images import ImageBatch, ImageBatches
from megavtp.extraction.labels import Labelling, find_labels
from megavtp.extraction.moments import Moments, channel_moments
from megavtp.latents.artifact import TokenizerArtifact
from megavtp.launch import phase
from megavtp.parallel.collectives import all_gather_object
from megavtp.parallel.looking import from_first, look_once
from megavtp.parallel.mesh import SINGLE, Mesh
from megavtp.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SHARDS = 512  # enough to be shared out evenly among many processes
_SHARD_IMAGES = 128, 4096  # least and most of one shard: a kill may cost one, and the host's memory must hold it
_TIMEOUT = 600  # seconds that a batch may take to decode


@dataclass(frozen=True)
class ExtractionSettings:
    """The settings that decide the latents, besides data set and tokenizer."""

    label: str | None = None  # key of the samples' metadata with their class; None = all labels are 0
    flip: bool = True  # also the latents of the mirrored images
    captions: bool = False  # also the tokenizer's caption features
    batch_size: int = 32  # images at a time; it may change the last bits
    precision: str = "fp32"  # of the tokenizer's matrix products, see ``load_tokenizer``


class Extraction:
    """The work of one process in an extraction.

    Args:
        tokenizer: computes in ``settings.precision``.
        data: a folder of indexed shards.
        out: folder to make, or to go on with.
        max_bad: how many unreadable samples a process may leave out.
        on_shard: called with a shard's number after it has been written.

    Raises ``UserError``: see ``labels``, ``folder``; ``settings.captions`` without a text encoder.
    """

    def __init__(
        self, tokenizer: Tokenizer, data: str | Path, out: str | Path, settings: ExtractionSettings,
        mesh: Mesh = SINGLE, *, workers: int = 0, max_bad: int = 1000, quiet: bool = True,
        on_shard: Callable[[int], None] = lambda shard: None,
    ):
        self.tokenizer, self.settings, self.mesh = tokenizer, settings, mesh
        self.workers, self.max_bad, self.quiet, self.on_shard = workers, max_bad, quiet, on_shard
        if settings.captions and "contrastive" not in tokenizer.model.objectives:
            raise UserError(f"--captions: {tokenizer.path} has no text encoder")
        self.data: ShardDataset = look_once(lambda: open_dataset(data))
        self.images_per_shard = shard_size(len(self.data), settings.batch_size)
        index = hashlib.sha256((self.data.folder / "index.json").read_bytes()).hexdigest()
        decisive = {"data": index, "images_per_shard": self.images_per_shard, **asdict(settings)}
        count = ceil_div(len(self.data), self.images_per_shard)
        self.folder = UnfinishedLatents(out, tokenizer.artifact, decisive, count)
        self.left_out = 0

    def run(self) -> tuple[TokenizerArtifact, int]:
        """Do what is missing in a collective call; return the tokenizer's facts with statistics, and how many samples
        were left out since this start."""
        phase.enter("preparing the extraction", slow=True)
        from_first(self.folder.check)  # before all metadata are read
        labels = find_labels(self.data, self.settings.label, self.mesh)  # a wrong key leaves nothing behind
        try:
            from_first(self.folder.claim)
            return self._fill(labels)
        finally:
            self.folder.release()

    def _fill(self, labels: Labelling) -> tuple[TokenizerArtifact, int]:
        # One process looks: on a network file system others may see an older state of the folder.
        own = from_first(self.folder.missing)[self.mesh.dp_rank :: self.mesh.dp]
        phase.enter("extracting latents", slow=True)
        # On a CPU the last bits of a product depend on the number of threads, and that on the number of processes.
        with torch.no_grad(), one_thread() if self.tokenizer.device.type == "cpu" else nullcontext():
            self._extract(own, labels)
        phase.enter("finishing the latents", slow=True)
        left_out = sum(all_gather_object(self.left_out))
        return from_first(lambda: self.folder.finish(labels.names)), left_out

    def _extract(self, shards: list[int], labels: Labelling) -> None:
        ranges = [self._batches(shard) for shard in shards]
        source = ImageBatches(self.data, list(chain(*ranges)), self.tokenizer.artifact.image_size, labels)
        background = BackgroundTask()
        loader = Loader(
            source, 0, len(source.ranges), workers=self.workers, timeout=_TIMEOUT,
            pin=self.tokenizer.device.type == "cuda",
        )
        images = sum(map(len, source.ranges))
        with loader as batches, tqdm(total=images, desc="images", disable=self.quiet) as bar:
            for shard, parts in zip(shards, ranges, strict=True):
                encoded = [self._encode(next(batches), len(part), bar) for part in parts]
                background.start(partial(self._write, shard, *self._whole(shard, encoded)), "latents")
            background.wait()

    def _batches(self, shard: int) -> list[range]:
        start, size = shard * self.images_per_shard, self.settings.batch_size
        end = min(start + self.images_per_shard, len(self.data))
        return [range(first, min(first + size, end)) for first in range(start, end, size)]

    def _encode(self, batch: ImageBatch, samples: int, bar: tqdm) -> dict[str, Tensor] | None:
        """Encode a batch. Latents and moments stay on the device, so nothing waits before the shard is complete."""
        for entry in batch.left_out:
            log.warning("left out: %s", entry)
            self.left_out += 1
            if self.left_out > self.max_bad:
                raise UserError(
                    f"{self.left_out} samples cannot be read, last: {entry}; list them with `python "
                    "tools/prepare_data.py check FOLDER`, or allow more with --max-bad"
                )
        bar.update(samples)
        if not len(batch.images):
            return None
        images = batch.images.to(self.tokenizer.device, non_blocking=True)
        latents = self.tokenizer.encode(images)
        tensors = {"latents": latents, "moments": channel_moments(latents), "labels": batch.labels}
        if self.settings.flip:
            tensors["latents_flip"] = self.tokenizer.encode(images.flip(-1))
        if self.settings.captions:
            tensors["captions"] = self.tokenizer.encode_text(batch.captions)
        return tensors

    def _whole(self, shard: int, encoded: list[dict[str, Tensor] | None]) -> tuple[dict[str, Tensor], Moments | None]:
        """Return a shard's tensors on the host, and its moments."""
        parts = [part for part in encoded if part is not None]
        if not parts:
            return {}, None
        own = (Moments.of(part["latents"].shape, part.pop("moments").cpu()) for part in parts)
        moments = reduce(Moments.joined, own)
        whole = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        if not all(bool(tensor.isfinite().all()) for tensor in whole.values()):
            first = shard * self.images_per_shard
            raise UserError(
                f"{self.tokenizer.path} makes latents that are not finite of the samples {first} to "
                f"{first + self.images_per_shard - 1}; use --precision fp32, or another checkpoint"
            )
        return whole, moments

    def _write(self, shard: int, tensors: dict[str, Tensor], moments: Moments | None) -> None:
        self.folder.write(shard, tensors, moments)
        self.on_shard(shard)


def shard_size(samples: int, batch_size: int) -> int:
    """Return the images of one shard: whole batches, which depend on the size of the data set alone."""
    low, high = _SHARD_IMAGES
    wanted = min(max(ceil_div(samples, _SHARDS), low), high)
    return ceil_div(wanted, batch_size) * batch_size
