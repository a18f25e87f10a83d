"""Nearest neighbours are ranked, and vote, in blocks, so that no matrix of all pairs ever exists.

Letters: q queries, g gallery entries, E features.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_SCORES = 2**24  # similarities held at one time, 64 MiB of float32
_NEVER = torch.iinfo(torch.int64).max
_TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Divide ``rows`` into slices with small blocks of (slice, columns) scores. They depend on the sizes only."""
    step = max(1, _BLOCK_SCORES // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def match_rank(
    queries: Tensor, gallery: Tensor, query_id: Tensor, gallery_id: Tensor,
    query_group: Tensor | None = None, gallery_group: Tensor | None = None,
) -> Tensor:
    """Count the wrong gallery entries at least as similar to each query as its best match: (q,), 0 = found first.

    A gallery entry (g, E) matches a query (q, E) if the ids agree. With groups, entries of the query's own group are no
    candidates. A tie counts against the query, as does a NaN, so a collapsed or diverged model scores zero rather than
    full marks. A query without a match never ranks below any k.
    """
    ranks = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    for rows in row_blocks(len(queries), len(gallery)):
        scores = queries[rows].float() @ gallery.float().T
        match = query_id[rows, None] == gallery_id
        wrong = ~match
        if query_group is not None:
            candidate = query_group[rows, None] != gallery_group
            match &= candidate
            wrong &= candidate
        best = scores.masked_fill(~match, -math.inf).amax(1, keepdim=True)
        ahead = (wrong & ~(scores < best)).sum(1)
        ranks[rows] = ahead.masked_fill(~match.any(1), _NEVER)
    return ranks


def recall(ranks: Tensor, k: int) -> float:
    """Return the share of queries whose match is among the first k."""
    return (ranks < k).double().mean().item()


def chance_recall(matches: Tensor, candidates: Tensor, k: int) -> float:
    """Return the expected recall at k of a random order, if ``matches[i]`` of ``candidates[i]`` match query i.

    This is 1 - C(n - m, k) / C(n, k), averaged over the queries.
    """
    n, m = candidates.double(), matches.double()
    miss = torch.ones_like(n)
    for i in range(k):
        miss *= ((n - m - i) / (n - i).clamp_min(1)).clamp_min(0)
    return (1 - miss).mean().item()


def knn_predict(
    queries: Tensor, bank: Tensor, bank_ids: Tensor, classes: int, k: int,
    query_group: Tensor | None = None, bank_group: Tensor | None = None,
) -> Tensor:
    """Predict classes (q,) of ``queries`` (q, D) by a vote of the k nearest of ``bank`` (g, D), as DINO does (arXiv
    2104.14294, section 4.1).

    This normalises the features; a neighbour's vote has the weight exp(cosine / 0.07). With groups, entries of the
    query's own group have no vote. The class is -1 where nobody votes (or the features are not finite).
    """
    queries, bank = F.normalize(queries.float(), dim=-1), F.normalize(bank.float(), dim=-1)
    k = min(k, len(bank))
    predicted = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    for rows in row_blocks(len(queries), len(bank)):
        scores = queries[rows] @ bank.T
        if query_group is not None and bank_group is not None:
            scores.masked_fill_(query_group[rows, None] == bank_group, -math.inf)
        near, who = scores.topk(k, dim=1)
        weights = torch.exp((near - 1.0) / _TEMPERATURE)  # the constant shift changes no majority, and avoids overflow
        votes = torch.zeros(len(scores), classes, device=scores.device).scatter_add_(1, bank_ids[who], weights)
        most, winner = votes.max(1)
        predicted[rows] = torch.where(most > 0, winner, -1)  # NaN > 0 is false
    return predicted
