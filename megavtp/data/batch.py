"""One rank's share of one training step, assembled from the data set as a pure function of (seed, step).

Shape letters: b samples of the share, v rows of an objective's subset, N patches of a global crop, M masked patches.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig
from megavtp.data.augment import random_view
from megavtp.data.captions import CaptionTokenizer
from megavtp.data.decode import decode_image
from megavtp.data.handover import LoadedBatch, new_pictures
from megavtp.data.masking import block_mask, mask_counts
from megavtp.data.order import SampleOrder, StepOrder
from megavtp.data.randomness import generator
from megavtp.data.shards import ShardDataset


@dataclass(frozen=True)
class Batch(LoadedBatch):
    """A rank's share of a step. Fields that only an inactive objective reads are ``None``.

    With dp ranks in order, concatenating along the sample dimension (dim 1 where crops come first) gives the batch of
    a single process; row numbers then count from each rank's first row.
    """

    step: int
    ids: list[str]  # b names; "" where no active objective reads the sample
    positions: Tensor  # (b,) int64, place in the global batch
    images: Tensor | None  # (b, 3, H, W) uint8, plain view; black where no active objective reads it
    tokens: Tensor | None  # (b, T) int64
    ssl_rows: Tensor | None  # (v_ssl,) int64, rows of the share
    rec_rows: Tensor | None  # (v_rec,) int64
    global_crops: Tensor | None  # (2, v_ssl, 3, g, g) uint8
    local_crops: Tensor | None  # (L, v_ssl, 3, l, l) uint8
    masks: Tensor | None  # (2, v_ssl, N) bool, True = the student does not see the patch


def masked_rows(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (M,) of the True entries of ``masks.flatten()``, and their weights (M,), 1 / number masked in
    the crop. ``masks`` (..., N) bool must lie on the CPU: on a device this would wait."""
    rows = masks.flatten().nonzero().squeeze(1)
    counts = masks.sum(-1).flatten()
    return rows, counts[rows // masks.shape[-1]].float().reciprocal_()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: how a sum is rounded must not depend on how many cores the process may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def copy_planes(view: Tensor, out: Tensor) -> None:
    """Copy a view, whose channels usually lie last, to ``out``, whose planes do: NumPy takes half of torch's time."""
    out.numpy()[...] = view.numpy()


class StepDataset:
    """``self[step]`` is the share of data-parallel rank ``dp_rank`` of ``dp_size`` in that step.

    What a position gets depends neither on the ranks, nor on the worker that runs this, nor on other objectives. Raises
    ``UserError`` as ``StepOrder`` does.
    """

    def __init__(
        self, dataset: ShardDataset, tokenizer: CaptionTokenizer, config: ResolvedConfig, dp_rank: int = 0,
        dp_size: int = 1,
    ):
        self.dataset, self.tokenizer, self.config, self.dp_rank = dataset, tokenizer, config, dp_rank
        order = SampleOrder(dataset.shard_counts, config.data.streams, config.data.shuffle_block, config.seed)
        self.order = StepOrder(order, config.train.batch_size, dp_rank, dp_size)
        # _subset refuses sizes that do not divide: now rather than in a worker
        samples, ssl, rec = len(self.order.positions), len(self._subset(0, "ssl")), len(self._subset(0, "rec"))
        size, a = config.model.image_size, config.data.augment
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the pictures of a batch
        if config.objectives.contrastive.weight or rec:
            self._shapes["images"] = (samples, 3, size, size)
        if ssl:
            self._shapes["global_crops"] = (GLOBAL_CROPS, ssl, 3, a.global_size, a.global_size)
            self._shapes["local_crops"] = (a.local_crops, ssl, 3, a.local_size, a.local_size)

    @property
    def picture_bytes(self) -> int:
        """The bytes of the pictures of a batch."""
        return sum(map(math.prod, self._shapes.values()))

    @one_thread()
    def __getitem__(self, step: int) -> Batch:
        positions = self.order.positions
        ssl_rows, rec_rows = self._subset(step, "ssl"), self._subset(step, "rec")
        contrastive = self.config.objectives.contrastive.weight != 0
        plain = np.full(len(positions), contrastive)
        plain[rec_rows] = True
        slots = {row: slot for slot, row in enumerate(ssl_rows.tolist())}
        # all at once: after a picture, the little that makes a generator has left the processor's caches
        rows, seed = np.flatnonzero(plain).tolist(), self.config.seed
        rngs = {row: generator(seed, "plain", step, positions[row]) for row in rows}

        size, a = self.config.model.image_size, self.config.data.augment
        pictures = dict(zip(self._shapes, new_pictures(list(self._shapes.values()))))
        images = pictures.get("images")
        crops = [pictures[name] for name in ("global_crops", "local_crops") if name in pictures]
        if images is not None:
            images.numpy()[~plain] = 0
        ids, captions = [""] * len(plain), [""] * len(plain)
        bad: list[str] = []
        for row, position in enumerate(positions.tolist()):
            if row not in slots and row not in rngs:
                continue
            image, ids[row], captions[row] = self._sample(step, position, bad)
            if images is not None and row in rngs:
                view = random_view(
                    image, size, a.plain_scale, rngs[row], flip=a.plain_flip, color_jitter=a.plain_color_jitter,
                    grayscale=a.plain_grayscale,
                )
                copy_planes(view, images[row])
            if row in slots:
                self._crops(image, step, position, *(views[:, slots[row]] for views in crops))
        return Batch(
            step, ids, torch.tensor(positions), images,
            self.tokenizer.encode(captions) if contrastive else None,
            torch.from_numpy(ssl_rows) if slots else None,
            torch.from_numpy(rec_rows) if len(rec_rows) else None,
            pictures.get("global_crops"), pictures.get("local_crops"),
            self._masks(step, len(slots)) if slots else None, bad=bad,
        )

    def _subset(self, step: int, purpose: str) -> np.ndarray:
        """Return the rows of this share, ascending, that an objective takes; none if it is off."""
        objectives = self.config.objectives
        objective = objectives.self_distillation if purpose == "ssl" else objectives.reconstruction
        if objective.weight == 0:
            return np.zeros(0, dtype=np.int64)
        return self.order.subset(step, purpose, objective.batch)

    def _sample(self, step: int, position: int, bad: list[str]) -> tuple[Tensor, str, str]:
        """Return (image, name, caption) of the sample at a position, or of one in its place."""

        def read(shard: int, row: int) -> tuple[Tensor, str, str]:
            raw = self.dataset.read(shard, row)
            return decode_image(raw.image, self.config.data.max_pixels), raw.id, raw.caption

        remedy = "find them with `python tools/prepare_data.py check FOLDER` and prepare the data again without them"
        return self.order.read(step, position, read, self.dataset, bad, remedy)

    def _crops(self, image: Tensor, step: int, position: int, global_out: Tensor, local_out: Tensor) -> None:
        """Write the DINO views of one image: global_out (2, 3, g, g), local_out (L, 3, l, l)."""
        a, seed = self.config.data.augment, self.config.seed
        common = dict(flip=a.flip, color_jitter=a.color_jitter, grayscale=a.grayscale)
        for i, out in enumerate(global_out):
            rng = generator(seed, "global crop", step, position, i)
            own = dict(blur=a.blur[i], solarize=a.solarize if i == 1 else 0.0)
            copy_planes(random_view(image, a.global_size, a.global_scale, rng, **common, **own), out)
        for i, out in enumerate(local_out):
            rng = generator(seed, "local crop", step, position, i)
            copy_planes(random_view(image, a.local_size, a.local_scale, rng, blur=a.blur[2], **common), out)

    def _masks(self, step: int, share: int) -> Tensor:
        """Draw masks (2, share, N) bool. Crops are numbered over the whole step, so no mask depends on the layout."""
        ssl, seed = self.config.objectives.self_distillation, self.config.seed
        side = self.config.data.augment.global_size // self.config.model.patch_size
        counts = mask_counts(seed, step, GLOBAL_CROPS * ssl.batch, side * side, ssl.mask_probability, ssl.mask_ratio)
        masks = np.zeros((GLOBAL_CROPS, share, side, side), dtype=bool)
        for view in range(GLOBAL_CROPS):
            first = view * ssl.batch + self.dp_rank * share
            for slot in np.flatnonzero(counts[first : first + share]).tolist():
                crop = first + slot
                masks[view, slot] = block_mask(generator(seed, "mask", step, crop), side, side, int(counts[crop]))
        return torch.from_numpy(masks.reshape(GLOBAL_CROPS, share, side * side))
