"""The bytes that ZeRO's stages keep on a rank and send over the data-parallel group, in DeepSpeed 0.19.8 under MegaVTP.

The whole state is float32. Counts are for this rank's tensor- and pipeline-parallel part: n is a parameter's
local numel, dp the data-parallel size. Sources: arXiv 1910.02054 for the idea; the exact paddings, buckets and the
number of gathers are DeepSpeed's, checked in ``tests/planning``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megavtp.arithmetic import ceil_div
from megavtp.errors import UserError
from megavtp.parallel.deepspeed_adapter import bucket_elements
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.reduce_in_place import LARGE

FLOAT = 4  # bytes
_ALIGN = 2  # stages 1 and 2 pad a group to a multiple of this times dp elements

Groups = Callable[[Iterable[tuple[str, nn.Parameter]]], list[dict]]


@dataclass(frozen=True)
class Piece:
    """One parameter on one rank; its optimizer ``group`` is None where it is frozen."""

    name: str
    numel: int
    group: int | None

    @property
    def trained(self) -> bool:
        return self.group is not None


class Inventory:
    """Every parameter of a model and its rank, taken from the model itself, which ``make`` makes on the meta device.

    ``groups`` groups parameters as the optimizer does, and ``towers`` is the number of towers among the groups.
    """

    def __init__(self, make: Callable[[Mesh], nn.Module], groups: Groups):
        self._make, self._groups = make, groups
        self.towers = len({group["tower"] for group in groups(self._named(Mesh()))})

    def _named(self, mesh: Mesh) -> list[tuple[str, nn.Parameter]]:
        with torch.device("meta"):
            return list(self._make(mesh).named_parameters())

    def rank(self, tp: int, pp: int, pp_rank: int, virtual_stages: int) -> list[Piece]:
        """Return what a pipeline rank holds."""
        return pieces(self._named(Mesh(tp=tp, pp=pp, pp_rank=pp_rank, virtual_stages=virtual_stages)), self._groups)


def pieces(named: Sequence[tuple[str, nn.Parameter]], groups: Groups) -> list[Piece]:
    """Return the pieces of a rank's named parameters."""
    group_of = {id(p): index for index, group in enumerate(groups(named)) for p in group["params"]}
    return [Piece(name, p.numel(), group_of.get(id(p))) for name, p in named]


_READ = {  # by each forward, beginnings of parameters' names
    "contrastive": ("trunk.", "visual_proj.", "text.", "logit_"), "student": ("trunk.", "dino_head."),
    "teacher": ("teacher.",), "reconstruction": ("trunk.", "pixel_decoder."),
    "encode": ("trunk.",), "decode": ("pixel_decoder.",), "discriminate": ("discriminator.",),
    "velocity": ("dit.",),
}

_TOWERS = ("trunk", "text", "pixel_decoder", "teacher.trunk")  # modules that are called chunk by chunk


def touched(name: str, mode: str, shared_bottleneck: bool) -> bool:
    """Tell whether the forward ``mode`` reads a parameter."""
    bottleneck_read = shared_bottleneck or mode in ("reconstruction", "encode")
    return name.startswith(_READ[mode]) and (bottleneck_read or "trunk.feature_bottleneck." not in name)


@dataclass(frozen=True)
class State:
    """Bytes on a rank between steps and, for ``gradients`` and ``buffers``, during one.

    Attributes:
        keeps: gradients and buffers stay from step to step, instead of coming with its first backward.
        optimizer: moments; the weights that it updates are those that the model reads.
        buffers: communication buckets, and in stage 3 what is gathered at one time.
        spilled: needed on top beside the activations of a backward whose gradients overflow a bucket, in the first
            backward of a step and in a later one. In stage 1 only the last backward reduces, if it does.
        lingering: buckets of one backward that a GPU still reduces from in the next one.
        end: needed on top of all others when the last bucket is reduced, without activations, in a step of one backward
            and of several. It is negative where gradients have gone from each bucket to the rank's share at once.
        update: needed during the update on top of what is there between steps.
        setup: all that is there while DeepSpeed takes over the model, which is whole then in every stage.
    """

    keeps: bool
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    buffers: int
    spilled: tuple[int, int]
    lingering: int
    end: tuple[int, int]
    update: int
    setup: int

    def at(self, moment: int) -> int:
        """Return the bytes without the activations before (0), in (1) and after (2) the first backward of a step."""
        return self.total - (0 if self.keeps else (self.gradients + self.buffers, self.gradients, 0)[moment])

    @property
    def total(self) -> int:
        """All bytes without the activations."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.buffers


def elements(pieces: Iterable[Piece], *, trained: bool) -> int:
    """Sum the elements of the parameters that are trained, or of those that are not."""
    return sum(p.numel for p in pieces if p.trained == trained)


@dataclass(frozen=True)
class Reduction:
    """How a rank reduces gradients.

    Attributes:
        overlap: stages 1 and 2 do it while the backward runs, from two buckets in turn.
        streams: on a stream of its own, which may lag behind the host.
        bucket: the user's number of elements of a bucket, if there is one.
    """

    overlap: bool
    streams: bool
    bucket: int | None

    def early(self, stage: int) -> bool:
        """Tell whether stage 1 reduces in the last backward of a step."""
        return stage == 1 and self.overlap


def reduction_of(deepspeed: Mapping[str, Any], dp: int, *, cuda: bool) -> Reduction:
    """Read the settings for DeepSpeed. UserError."""
    section = deepspeed.get("zero_optimization", {})
    overlap, bucket = section.get("overlap_comm"), section.get("reduce_bucket_size")
    if overlap is None:
        overlap = cuda and dp > 1
    try:
        return Reduction(overlap, cuda, None if bucket is None else int(bucket))
    except (TypeError, ValueError):
        raise UserError(
            f"deepspeed.zero_optimization.reduce_bucket_size: expected a number of elements, got {bucket!r}"
        ) from None


def replaces_linear(deepspeed: Mapping[str, Any], stage: int) -> bool:
    """Tell whether linear layers are DeepSpeed's, which hold no 16-bit copies of weights for the backward."""
    return stage == 3 and deepspeed.get("zero_optimization", {}).get("memory_efficient_linear", True)


def state(
    pieces: Sequence[Piece], stage: int, dp: int, *, first_mode: str, hold: bool, reduction: Reduction
) -> State:
    """Count the state on a rank.

    ``first_mode`` is the forward whose backward comes first in a step; what it does not reach is zeroed in stage 2.
    With ``hold``, stage 3 gathers everything for the whole step (``parallel.zero3_gather``).
    """
    trained, frozen = elements(pieces, trained=True), elements(pieces, trained=False)
    if stage == 0:
        joined = elements((p for p in pieces if p.numel < LARGE), trained=True) if dp > 1 else 0
        return _in_bytes(
            False, weights=trained, gradients=trained, optimizer=2 * trained, teacher=frozen, end=(joined, joined),
            setup=trained + frozen,
        )
    bucket = bucket_elements(trained) if reduction.bucket is None else reduction.bucket
    filled, spills = min(bucket, trained), trained > bucket
    if stage == 3:
        shards = [replace(p, numel=ceil_div(p.numel, dp)) for p in pieces]  # each parameter is cut on its own
        own, others = elements(shards, trained=True), elements(shards, trained=False)
        # A bucket is copied into a matrix. A larger gradient waits beside it. A rank alone has no bucket: as many wait.
        reduced = max(filled, _largest(pieces, bucket))
        amid = reduced if spills else 0
        return _in_bytes(
            True, weights=own, gradients=own, optimizer=2 * own, teacher=others,
            buffers=bucket + _gathered(pieces, hold) if dp > 1 else 0, spilled=(amid, amid), end=(reduced, reduced),
            setup=trained + frozen,
        )
    flat = flat_elements(pieces, dp)
    owned, unreached = _partition_gradients(pieces, dp, first_mode)
    # A bucket has parts of several ranks' shares, of which DeepSpeed makes one tensor to reduce.
    copied = filled if dp > 1 else 0
    kept = {
        "weights": flat, "optimizer": 2 * flat // dp, "teacher": frozen,
        "buffers": bucket * (1 + reduction.overlap), "update": owned + flat // dp, "setup": trained + flat + frozen,
    }
    # What is in a bucket is no longer elsewhere. What the rank owns of it gets a place when the first one is reduced.
    last = owned + copied if spills else max(owned, copied)
    if stage == 1:
        several = max(owned, copied) - filled
        if not reduction.overlap:
            return _in_bytes(False, **kept, gradients=trained, end=(several, several))
        spilled = (owned + copied, max(0, several)) if spills else (0, 0)
        return _in_bytes(False, **kept, gradients=trained, spilled=spilled, end=(last - trained, several))
    waiting = owned + max(copied, _largest(pieces, bucket)) if spills else 0
    # A stream that lags behind the host keeps its buckets (``record_stream``) while the next backward gets new ones.
    # That is read from DeepSpeed and not measured.
    lingering = 2 * bucket if reduction.overlap and reduction.streams else 0
    return _in_bytes(
        False, **kept, gradients=owned + unreached, spilled=(waiting, waiting), lingering=lingering,
        end=(last - owned - unreached, last),
    )


def _in_bytes(keeps: bool, **counts: Any) -> State:
    """Return the state of these numbers of elements, which are 0 where none is given."""
    fields: dict[str, Any] = {"buffers": 0, "spilled": (0, 0), "lingering": 0, "end": (0, 0), "update": 0} | counts
    for name, count in fields.items():
        fields[name] = tuple(FLOAT * n for n in count) if isinstance(count, tuple) else FLOAT * count
    return State(keeps, **fields)


def _largest(pieces: Iterable[Piece], bucket: int) -> int:
    """Return the elements of the largest gradient that is reduced without a bucket, as it does not fit into one."""
    return max((p.numel for p in pieces if p.trained and p.numel > bucket), default=0)


def updated(pieces: Sequence[Piece], stage: int, dp: int) -> tuple[int, int]:
    """Return how many trained elements a rank's optimizer updates, and how many of the frozen average it moves."""
    trained, frozen = elements(pieces, trained=True), elements(pieces, trained=False)
    return trained // (dp if stage > 0 else 1), frozen // (dp if stage == 3 else 1)


def _group_sizes(pieces: Iterable[Piece]) -> Counter[int]:
    sizes: Counter[int] = Counter()
    for piece in pieces:
        if piece.group is not None:
            sizes[piece.group] += piece.numel
    return sizes


def flat_elements(pieces: Sequence[Piece], dp: int) -> int:
    """Return the elements of all groups in stages 1 and 2, which flatten and pad each group."""
    align = _ALIGN * dp
    return sum(ceil_div(size, align) * align for size in _group_sizes(pieces).values())


def _partition_gradients(pieces: Sequence[Piece], dp: int, first_mode: str) -> tuple[int, int]:
    """Sum the elements of the parameters that reach into a rank's partition, on the rank that has the most of them.

    The second number is of those that the first pass of a step does not reach.
    """
    owned, unreached = [0] * dp, [0] * dp
    for group, size in _group_sizes(pieces).items():
        partition, start = ceil_div(size, _ALIGN * dp) * _ALIGN, 0
        for piece in (p for p in pieces if p.group == group):
            for rank in range(start // partition, (start + piece.numel - 1) // partition + 1):
                owned[rank] += piece.numel
                if not touched(piece.name, first_mode, False):
                    unreached[rank] += piece.numel
            start += piece.numel
    most = max(range(dp), key=lambda rank: owned[rank] + unreached[rank])
    return owned[most], unreached[most]


def _gathered(pieces: Sequence[Piece], hold: bool) -> int:
    """Return the most elements that stage 3 has gathered at one time."""
    sizes: Counter[tuple[str, int | None]] = Counter()  # of what is gathered together: a block, or elsewhere a module
    for piece in pieces:
        head, found, rest = piece.name.partition("blocks.")
        sizes[(head, int(rest.split(".")[0])) if found else (piece.name.rpartition(".")[0], None)] += piece.numel
    if hold:
        return sizes.total()
    # While a block computes, the next one of its tower is on its way.
    both = [size + sizes[head, number + 1] for (head, number), size in sizes.items() if number is not None]
    return max([*both, *sizes.values()], default=0)


@dataclass(frozen=True)
class Calls:
    """How often a rank runs a pass in a step.

    Attributes:
        forward_only, trained: micro-batches without and with a backward.
        stages: how many stages of the pass are on this rank; each is a call of the model.
        chunks: how many of them are of the same tower.
        embeddings: how many crop sizes the trunk embeds one by one.
    """

    mode: str
    forward_only: int
    trained: int
    stages: int = 1
    chunks: int = 1
    embeddings: int = 1

    def backwards(self, name: str) -> int:
        """Return how often a parameter's gradient is reduced. Where the contrastive loss is computed from all features
        first, the temperature's gradient comes with the first micro-batch."""
        return min(self.trained, 1) if self.forward_only and name.startswith("logit_") else self.trained

    def times(self, name: str) -> int:
        """Return how often the module that gathers a parameter runs for one micro-batch."""
        owner = name.rpartition(".")[0]
        # The decoder reads the dtype of that weight, so that stage 3 gathers it with the decoder's own.
        by_tower = owner in _TOWERS or name == "pixel_decoder.proj_in.weight"
        return self.chunks if by_tower else 1 if owner else self.stages


def traffic(
    pieces: Sequence[Piece], stage: int, dp: int, calls: Sequence[Calls], shared_bottleneck: bool, *, hold: bool = False
) -> Counter[tuple[str, str]]:
    """Return a rank's payload bytes over dp in one step, by ("dp", operation), without those of the gradient norm."""
    sent: Counter[tuple[str, str]] = Counter()
    if dp == 1:
        return sent

    def padded(these: Iterable[Piece]) -> int:
        return FLOAT * dp * sum(ceil_div(p.numel, dp) for p in these)

    if stage in (0, 1):
        sent["dp", "all_reduce"] += FLOAT * elements(pieces, trained=True)
    if stage in (1, 2):
        sent["dp", "all_gather"] += FLOAT * flat_elements(pieces, dp)
    if stage == 3 and hold:
        sent["dp", "all_gather"] += padded(pieces)
    for call in calls:
        reached = [p for p in pieces if touched(p.name, call.mode, shared_bottleneck)]
        trained = [p for p in reached if p.trained]
        if stage == 2:
            sent["dp", "all_reduce"] += FLOAT * sum(call.backwards(p.name) * p.numel for p in trained)
        if stage == 3:
            sent["dp", "reduce_scatter"] += sum(call.backwards(p.name) * padded([p]) for p in trained)
            if not hold:
                # Every call of the model gathers its own parameters, read or not.
                gathered = reached + [p for p in pieces if "." not in p.name and p not in reached]
                own = sum(call.times(p.name) * padded([p]) for p in gathered)
                again = padded([p for p in reached if "patch_embed" in p.name]) * (call.embeddings - 1)
                sent["dp", "all_gather"] += (call.forward_only + call.trained) * (own + again) + call.trained * own
    return sent


def norm_traffic(stage: int, dp: int, model_parallel: int, towers: int) -> Counter[tuple[str, str]]:
    """Return the gradient norm's bytes: a number for each of the model's ``towers``, and one for groups of none, over
    tp x pp, and where gradients are shared over dp, too."""
    axes = {"dp": dp if stage > 0 else 1, "mp": model_parallel}
    return Counter({(axis, "all_reduce"): FLOAT * (towers + 1) for axis, size in axes.items() if size > 1})
