"""Linear heads on frozen features, trained as DINOv2 does it (arXiv 2304.07193, appendix B.3): SGD without decay, a
cosine schedule, and for every choice of features a head at each of many learning rates, all trained in one pass.

Letters: n samples, b of a batch, D features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megavtp.arithmetic import ceil_div
from megavtp.evaluation.probes.labelled import ProbeLabels

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # for a batch of 256
_BATCH, _EPOCHS, _MOMENTUM, _SEED = 256, 10, 0.9, 0
_LEAST_STEPS = 500  # ten epochs of some thousand samples would be too few steps to learn at any rate


@dataclass(frozen=True)
class Head:
    """A linear classifier on the features ``columns``, trained at ``rate``; ``name`` is for the reader."""

    name: str
    columns: slice
    rate: float


def heads(width: int, blocks: int) -> list[Head]:
    """Return every head on features (n, (blocks + 1) * width), which are the class tokens of the last ``blocks`` blocks
    and then the mean patch token of the last one: on one class token or all, with the mean patch token or without."""
    end = blocks * width
    choices = {}
    for count in sorted({1, blocks}):
        choices[f"{count} class token{'s' * (count > 1)}"] = slice(end - count * width, end)
        choices[f"{count} class token{'s' * (count > 1)} + mean patch token"] = slice(end - count * width, end + width)
    return [Head(name, columns, rate) for name, columns in choices.items() for rate in RATES]


def train(x: Tensor, ids: Tensor, classes: int, chosen: Sequence[Head]) -> list[Tensor]:
    """Train the heads on features (n, D) and classes (n,); return weights (columns + 1, C), the last row is the bias.

    Every batch serves all heads. The order of the samples depends on nothing but their number, and the heads begin at
    zero, so the result is the same each time.
    """
    starts = [x.new_zeros(len(range(x.shape[1])[head.columns]) + 1, classes, requires_grad=True) for head in chosen]
    rates = [{"params": [start], "lr": head.rate} for start, head in zip(starts, chosen, strict=True)]
    optimizer = torch.optim.SGD(rates, momentum=_MOMENTUM)
    batch = min(_BATCH, len(x))
    steps = max(_LEAST_STEPS, _EPOCHS * len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(_SEED)
    epochs = (torch.randperm(len(x), generator=draw)[: len(x) // batch * batch] for _ in range(steps))
    batches = (rows for epoch in epochs for rows in epoch.split(batch))
    with torch.enable_grad():
        for _, rows in zip(range(steps), batches):
            rows = rows.to(x.device)
            optimizer.zero_grad()
            # Heads share no weight, so each one's gradient is that of its own mean over the batch.
            _losses(_scores(x[rows], starts, chosen), ids[rows]).mean(0).sum().backward()
            optimizer.step()
            schedule.step()
    return [start.detach() for start in starts]


def _scores(x: Tensor, weights: Sequence[Tensor], chosen: Sequence[Head]) -> Tensor:
    """Return logits (b, heads, C) of features (b, D). Heads on the same columns are one matrix product."""
    parts, first = [], 0
    while first < len(chosen):
        columns = chosen[first].columns
        same = [w for w, head in zip(weights, chosen, strict=True) if head.columns == columns]
        product = torch.cat(same, 1)
        parts.append(torch.addmm(product[-1], x[:, columns], product[:-1]).unflatten(1, (len(same), -1)))
        first += len(same)
    return torch.cat(parts, 1)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the cross entropies (b, heads) of logits (b, heads, C) and classes (b,)."""
    truth = ids[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none").view_as(truth)


def pick(x: Tensor, ids: Tensor, weights: Sequence[Tensor], chosen: Sequence[Head]) -> Head:
    """Return the head with the lowest cross entropy on features (n, D) and classes (n,).

    The accuracy, by which DINOv2 picks, may fall for a head whose rate was too high to settle. What such a head ends
    with depends on the last bits of the features, and so on how they were computed; its cross entropy is high.
    """
    loss = torch.zeros(len(chosen), dtype=torch.float64)
    for rows in range(0, len(x), _BATCH):
        part = slice(rows, rows + _BATCH)
        loss += _losses(_scores(x[part], weights, chosen), ids[part]).double().sum(0).cpu()
    return chosen[int(loss.nan_to_num(torch.inf).argmin())]


def probe(train_features: Tensor, test_features: Tensor, blocks: int, labels: ProbeLabels) -> tuple[Tensor, str]:
    """Return the classes of the test samples that are asked about (m,), and the head that was picked, in words.

    The features (samples, (blocks + 1) * width) are those of ``heads``. Unlike DINOv2, which reports the best head on
    the samples that it measures, a part of the training samples picks it; it is trained again on all of them.
    """
    x, ids = train_features[labels.rows.to(train_features.device)], labels.ids.to(train_features.device)
    picks = labels.picks.to(x.device)
    chosen = heads(ceil_div(x.shape[1], blocks + 1), blocks)
    taught = train(x[~picks], ids[~picks], labels.classes, chosen)
    best = pick(x[picks], ids[picks], taught, chosen)
    weights = train(x, ids, labels.classes, [best])
    asked = test_features[labels.test_rows.to(test_features.device)]
    return _scores(asked, weights, [best])[:, 0].argmax(1), f"{best.name}, learning rate {best.rate:g}"
