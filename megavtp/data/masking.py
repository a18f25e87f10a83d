"""Block masks, which hide patches of global crops from the student, as in DINOv2 and iBOT (arXiv 2111.07832).

The plan covers the step's 2 * B_ssl global crops (crop number = view * B_ssl + SSL slot) and is a pure function of
(seed, step); the mask of one crop is a pure function of (seed, step, crop number). A rank draws only its own masks.
"""

import math

import numpy as np

from megavtp.data.randomness import generator

MIN_BLOCK = 4  # patches
ASPECT = (0.3, 1 / 0.3)  # height / width of a block
ATTEMPTS = 10  # boxes tried for one block


def mask_counts(
    seed: int, step: int, crops: int, patches: int, probability: float, ratio: tuple[float, float]
) -> np.ndarray:
    """Draw how many of the ``patches`` are masked in each of the step's ``crops``: int64 (crops,).

    round(probability * crops) crops are masked. Their ratios are one draw from each of as many equal strata of the
    interval ``ratio``, so the total hardly varies from step to step. No crop has all its patches masked.
    """
    rng = generator(seed, "masks", step)
    chosen = rng.permutation(crops)[: round(probability * crops)]
    low, high = ratio
    strata = (np.arange(len(chosen)) + rng.random(len(chosen))) / max(1, len(chosen))
    counts = np.zeros(crops, dtype=np.int64)
    counts[chosen] = np.minimum(((low + (high - low) * strata) * patches).astype(np.int64), patches - 1)
    return counts


def block_mask(rng: np.random.Generator, height: int, width: int, count: int) -> np.ndarray:
    """Draw bool (height, width) with exactly ``count`` True, in rectangles of random area and aspect ratio. One is
    placed if it adds patches and does not exceed what is left; when none fits any more, single patches fill up."""
    mask = np.zeros((height, width), dtype=bool)
    left = count
    while left >= MIN_BLOCK and (added := _add_block(rng, mask, left)):
        left -= added
    if left:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.permutation(free)[:left]] = True
    return mask


def _add_block(rng: np.random.Generator, mask: np.ndarray, at_most: int) -> int:
    """Mask the first of ATTEMPTS random rectangles that fits; return how many patches it adds, or 0."""
    height, width = mask.shape
    for area, aspect, top, left in rng.random((ATTEMPTS, 4)):
        area = MIN_BLOCK + (at_most - MIN_BLOCK) * area
        aspect = math.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * aspect)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= h <= height and 1 <= w <= width:
            top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
            block = mask[top : top + h, left : left + w]
            added = h * w - int(np.count_nonzero(block))
            if 0 < added <= at_most:
                block[:] = True
                return added
    return 0
