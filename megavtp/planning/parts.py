"""The bytes that the parts of each objective hold, need and send on one rank, counted on the real modules.

A pass consists of *ends* (embeddings, norms, heads and the loss: a model of depth 0) and of stacks of blocks. Both are
rehearsed (``parallel.rehearsal``) once for each micro-batch size and tensor-parallel layout; every pipeline layout is
put together from them.

Letters: m images of a micro-batch, N patches, T packed tokens, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megavtp.config.precision import compute_dtype
from megavtp.config.share import share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig, contrastive_size, feature_width
from megavtp.models.lpips import LPIPS, PERCEPTUAL_NETS, weight_shapes
from megavtp.models.vtp import VTP
from megavtp.nn.attention_kernels import Segments
from megavtp.nn.block import Recompute, run_blocks
from megavtp.nn.drop_path import BranchDrop, DropPlan
from megavtp.objectives.centering import KEEP_ELEMENTS, sinkhorn_bias
from megavtp.objectives.contrastive import info_nce, siglip
from megavtp.objectives.koleo import koleo
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import Rehearsed, rehearsal, rehearse
from megavtp.parallel.traffic import Transfer
from megavtp.pixels import normalise
from megavtp.planning.flops import expected_masked_patches, patches_of

MODES = {"contrastive": "contrastive", "self_distillation": "student", "reconstruction": "reconstruction"}
# The kinds of blocks that the stages of a pass run through, leg by leg; kinds of one leg run side by side.
LEGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "contrastive": (("paired", "text"),), "student": (("crops",),), "teacher": (("global",),),
    "reconstruction": (("image",), ("decoder",)),
}
TOWER_OF = {
    "paired": "trunk", "image": "trunk", "crops": "trunk", "global": "trunk", "text": "text",
    "decoder": "pixel_decoder",
}

_LINEAR = (64, 128)  # with this many images in a micro-batch or more, everything grows linearly
_ENOUGH_CHUNKS = 4

T = TypeVar("T")
Sent = Counter[tuple[str, str]]  # (axis, operation) -> payload bytes of one rank


@dataclass(frozen=True)
class Cost:
    """Bytes of one micro-batch on one rank.

    Attributes:
        held: alive from the end of its forward to its backward.
        peak: the most at one time while it runs alone, ``held`` included.
        forward, backward: bytes sent in each, by (axis, operation).
    """

    held: float = 0
    peak: float = 0
    forward: Sent = field(default_factory=Sent)
    backward: Sent = field(default_factory=Sent)

    @property
    def extra(self) -> float:
        """The bytes that are needed beyond ``held`` while it runs."""
        return self.peak - self.held


def as_cost(counted: Rehearsed) -> Cost:
    return Cost(counted.held, counted.peak, _sum(counted.forward), _sum(counted.backward))


def _sum(transfers: Iterable[Transfer]) -> Sent:
    sent: Sent = Counter()
    for transfer in transfers:
        sent[transfer.axis, transfer.op] += transfer.bytes
    return sent


def _as_it_is(outputs: Any) -> Any:
    return outputs


def _line(a: Cost, b: Cost, t: float) -> Cost:
    """Return the cost at ``t`` on the straight line through ``a`` (t = 0) and ``b`` (t = 1)."""

    def at(x: float, y: float) -> float:
        return x + t * (y - x)

    def sent(x: Sent, y: Sent) -> Sent:
        return Counter({key: round(at(x[key], y[key])) for key in x.keys() | y.keys()})

    held = at(a.held, b.held)
    return Cost(held, held + at(a.extra, b.extra), sent(a.forward, b.forward), sent(a.backward, b.backward))


def _interpolated(at: Callable[[int], Cost], m: int) -> Cost:
    """Return ``at(m)``; for a large ``m`` it is extrapolated linearly."""
    if m <= _LINEAR[0]:
        return at(m)
    return _line(at(_LINEAR[0]), at(_LINEAR[1]), (m - _LINEAR[0]) / (_LINEAR[1] - _LINEAR[0]))


def _more(one: Cost, two: Cost, more: int) -> Cost:
    """Add ``more`` blocks to one: each holds and sends what the second did, and only one runs at a time."""
    line = _line(one, two, more)
    return replace(line, peak=line.held + (two.extra if more else one.extra))


@dataclass(frozen=True)
class TensorLayout:
    """The part of a layout that changes a rank's share of a block: tensor and sequence parallelism."""

    tp: int = 1
    sequence_parallel: bool = False


class Rehearsals:
    """Rehearsals of a configuration's parts, each made once.

    Only the precision of the ``parallel`` section counts here. ``fused_norms`` is ``rehearsal``'s, for runs on GPUs.
    """

    def __init__(self, config: ResolvedConfig, *, fused_norms: bool):
        self.config, self.fused_norms = config, fused_norms
        self.dtype = compute_dtype(config.parallel.precision)
        self.objectives = frozenset(share(config, 1).passes)
        self._known: dict[tuple, Any] = {}

    def _once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """Return ``make(*arguments)``, which is called once for the same arguments."""
        key = (make, *arguments)
        if key not in self._known:
            self._known[key] = make(*arguments)
        return self._known[key]

    # Blocks

    def stack(self, kind: str, blocks: int, m: int, layout: TensorLayout, recompute: Recompute) -> Cost:
        """Return the cost of ``blocks`` consecutive blocks of a tower on the tokens of ``m`` images, without the input.

        It is linear in ``blocks``, so two are rehearsed.
        """
        if blocks == 0:
            return Cost()
        if kind == "global":  # without a backward nothing is recomputed
            recompute = "none"
        return self._once(self._stack, kind, blocks, m, layout, recompute)

    def _stack(self, kind: str, blocks: int, m: int, layout: TensorLayout, recompute: Recompute) -> Cost:
        def at(size: int) -> Cost:
            return _more(*self._once(self._rehearse_stacks, kind, size, layout, recompute), blocks - 1)

        return _interpolated(at, m)

    def _rehearse_stacks(self, kind: str, m: int, layout: TensorLayout, recompute: Recompute) -> tuple[Cost, Cost]:
        tokens_cut, fused = layout.sequence_parallel, self.fused_norms
        with rehearsal(tp=layout.tp, sequence_parallel=tokens_cut, fused_norms=fused) as mesh:
            # These are two different blocks: the gradients of one used twice would wait for each other.
            model = self._model(mesh, depth=2)
            tower = getattr(model, TOWER_OF[kind])
            blocks = list(enumerate(tower.blocks.children()))
            segments = self.segments(kind, m)
            tokens = sum(count * length for count, length in segments)
            x = torch.empty(tokens, blocks[0][1].norm1.width, requires_grad=kind != "global")
            tables = None if kind == "text" else [self._table(tower, length) for _, length in segments]
            drop = self._drop(segments) if kind == "crops" else None
            costs = []
            for count in (1, 2):

                def forward(count: int = count) -> Tensor:
                    with model.precision(), torch.set_grad_enabled(kind != "global"):
                        return run_blocks(blocks[:count], x, segments, tables, drop, recompute)

                costs.append(as_cost(rehearse(mesh, forward, list(tower.parameters()), inputs=[x])))
        return costs[0], costs[1]

    def segments(self, kind: str, m: int) -> Segments:
        """Return (sequences, length) of each crop size in a tower, as the blocks see them."""
        model, augment = self.config.model, self.config.data.augment
        if kind == "text":
            return ((m, model.text.context_length),)
        if kind == "decoder":
            return ((m, patches_of(model, model.image_size)),)
        if kind == "paired":
            return ((m, patches_of(model, contrastive_size(self.config)) + 1),)
        if kind == "image":
            return ((m, patches_of(model, model.image_size) + 1),)
        packed = [(GLOBAL_CROPS * m, patches_of(model, augment.global_size) + 1)]
        if kind == "crops" and augment.local_crops:
            packed.append((augment.local_crops * m, patches_of(model, augment.local_size) + 1))
        return tuple(packed)

    def _table(self, tower: Any, length: int) -> tuple[Tensor, Tensor]:
        table = torch.empty(length, tower.rope_embed.head_dim, dtype=tower.rope_embed.dtype)
        return table, table

    def _drop(self, segments: Segments) -> DropPlan | None:
        """Return a plan that keeps as many sequences as are kept on average."""
        rate = self.config.objectives.self_distillation.drop_path
        if rate == 0:
            return None
        rows = tuple(torch.empty(max(round(count * (1 - rate)), 1), dtype=torch.long) for count, _ in segments)
        branch = BranchDrop(rows, (1 / (1 - rate),) * len(rows))
        return DropPlan(((branch, branch),) * 2)

    def _model(self, mesh: Mesh, depth: int) -> VTP:
        model = self.config.model
        towers = {name: replace(getattr(model, name), depth=depth) for name in ("vision", "text", "decoder")}
        return VTP(replace(model, **towers), mesh, objectives=self.objectives, compute_dtype=self.dtype)

    # Ends

    def end(self, mode: str, leg: int, is_last: bool, m: int, tp: int, *, loss: bool = True) -> Cost:
        """Return the cost of the embedding before a leg's blocks, or of what follows them; the last end has the losses.

        The input of the blocks is counted here, where it is made; their output is not.
        """
        at = partial(self._once, self._rehearse_end, mode, leg, is_last, tp, loss, True)
        chunked = mode == "student" and is_last and loss  # not linear, as its logits are made in chunks
        return at(m) if chunked else _interpolated(at, m)

    def results(self, mode: str, m: int, tp: int) -> Cost:
        """Return the cost of the last end of a forward without graph: it holds the results, and what they view."""
        last = len(LEGS[mode]) - 1
        return _interpolated(partial(self._once, self._rehearse_end, mode, last, True, tp, False, False), m)

    def _rehearse_end(self, mode: str, leg: int, is_last: bool, tp: int, loss: bool, graph: bool, m: int) -> Cost:
        stage = 2 * leg + is_last
        closes = loss and stage == 2 * len(LEGS[mode]) - 1
        with rehearsal(tp=tp, fused_norms=self.fused_norms, pp=2, pp_rank=int(is_last)) as mesh:
            model, inputs = self._model(mesh, depth=0), self._inputs(mode, m)
            specs = model.activation_specs(mode, stage, **inputs) if stage else []
            wanted = mode != "teacher"
            activations = [torch.empty(shape, dtype=dtype, requires_grad=wanted) for shape, dtype in specs]
            close = self._closing(mode, m, mesh) if closes else _as_it_is
            results: list[Any] = []  # of the pass: they live as long as its backward
            forward = partial(self._run_end, model, mode, stage, activations, inputs, close, results)
            with torch.set_grad_enabled(graph):
                return as_cost(rehearse(mesh, forward, list(model.parameters()), inputs=activations))

    @staticmethod
    def _run_end(
        model: VTP, mode: str, stage: int, activations: list[Tensor], inputs: dict[str, Tensor],
        close: Callable[[Any], Any], results: list[Any],
    ) -> Any:
        if stage == 0:  # later ones read only shapes
            inputs = {name: normalise(x) if x.dtype == torch.uint8 else x for name, x in inputs.items()}
        results.append(model(mode, stage=stage, activations=activations, **inputs))
        return close(results[0])

    def activation_bytes(self, mode: str, leg: int, is_first: bool, m: int) -> int:
        """Return the bytes that one micro-batch brings to a stage of ``leg``, the leg's first one or a later one."""
        return m * self._once(self._activation_bytes, mode, leg, is_first)

    def _activation_bytes(self, mode: str, leg: int, is_first: bool) -> int:
        if leg == 0 and is_first:
            return 0
        with torch.device("meta"):
            model = self._model(Mesh(pp=2), depth=0)
            specs = model.activation_specs(mode, 2 * leg + (not is_first), **self._inputs(mode, 1))
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)

    def _inputs(self, mode: str, m: int) -> dict[str, Tensor]:
        """Make a micro-batch as it comes from the loader."""
        model, augment = self.config.model, self.config.data.augment

        def picture(count: int, size: int) -> Tensor:
            return torch.empty(count, 3, size, size, dtype=torch.uint8)

        if mode == "contrastive":
            tokens = torch.empty(m, model.text.context_length, dtype=torch.long)
            return {"images": picture(m, contrastive_size(self.config)), "tokens": tokens}
        if mode == "reconstruction":
            return {"images": picture(m, model.image_size)}
        crops, patches = GLOBAL_CROPS * m, patches_of(model, augment.global_size)
        inputs = {
            "global_crops": picture(crops, augment.global_size),
            "masked_rows": torch.empty(self._masked(m), dtype=torch.long),
        }
        if mode == "student":
            inputs["masks"] = torch.empty(crops, patches, dtype=torch.bool)
            if augment.local_crops:
                inputs["local_crops"] = picture(augment.local_crops * m, augment.local_size)
        return inputs

    def _masked(self, m: int) -> int:
        return round(m * expected_masked_patches(self.config))

    def _closing(self, mode: str, m: int, mesh: Mesh) -> Callable[[Any], Any]:
        """Compute the loss terms of one micro-batch from a pass's outputs."""
        if mode == "reconstruction":
            size = self.config.model.image_size
            target, perceptual = torch.empty(m, 3, size, size), self._perceptual()
            return lambda outputs: list(
                reconstruction_terms(outputs, target, perceptual, images_total_local=m).values()
            )
        if mode == "student":
            return self._distillation(m, mesh)
        return _as_it_is

    def picture_bytes(self, mode: str, m: int) -> int:
        """Return the bytes of a micro-batch's normalised pixels."""
        with torch.device("meta"):
            return sum(4 * x.numel() for x in self._inputs(mode, m).values() if x.dtype == torch.uint8)

    def target_bytes(self, m: int) -> int:
        """Return the bytes of the images that a reconstruction is compared with."""
        return m * 3 * self.config.model.image_size**2 * torch.float32.itemsize

    def _perceptual(self) -> LPIPS | None:
        kind = self.config.objectives.reconstruction.perceptual
        if kind == "none":
            return None
        net = PERCEPTUAL_NETS[kind]
        return LPIPS(net, {name: torch.empty(shape) for name, shape in weight_shapes(net).items()})

    def _distillation(self, m: int, mesh: Mesh) -> Callable[[Any], Any]:
        head = self.config.model.dino_head
        local = head.prototypes // mesh.tp
        rows = [GLOBAL_CROPS * m, self._masked(m)]
        cls, patches = (torch.empty(count, head.bottleneck, dtype=self.dtype) for count in rows)
        teacher = TeacherOutput(cls, patches, torch.empty(local, head.bottleneck))
        bias, weights = TeacherBias(torch.empty(local), torch.empty(local)), torch.empty(rows[1])

        def close(outputs: Any) -> list[Tensor]:
            student = StudentOutput(*outputs)
            terms = self_distillation_loss(
                student, teacher, bias, weights, self.config.objectives.self_distillation,
                teacher_temperature=0.07, images_total_local=m, mesh=mesh,
            )
            return [*terms.values(), student.backbone_cls]

        return close

    # Terms over the whole batch

    def over_batch(self, mode: str, images: int, dp: int) -> Cost:
        """Return the cost of the terms over all ``images`` of a rank, from their features to their gradients."""
        return self._once(self._rehearse_over_batch, mode, images, dp)

    def _rehearse_over_batch(self, mode: str, images: int, dp: int) -> Cost:
        model, objectives = self.config.model, self.config.objectives
        with rehearsal(dp=dp) as mesh:
            if mode == "contrastive":
                image, text = (torch.empty(images, model.text.width, requires_grad=True) for _ in range(2))
                scale = torch.empty((), requires_grad=True)
                loss = info_nce if objectives.contrastive.loss == "infonce" else siglip
                return as_cost(rehearse(mesh, lambda: loss(image, text, scale, None, mesh), inputs=[image, text]))
            if mode == "student" and objectives.self_distillation.koleo_weight > 0:
                features = torch.empty(GLOBAL_CROPS, images, feature_width(model), requires_grad=True)
                return as_cost(rehearse(mesh, lambda: koleo(features, mesh), inputs=[features]))
        return Cost()

    def centering(self, images: int, tp: int, dp: int) -> Cost:
        """Return the cost of Sinkhorn-Knopp over the teacher's outputs for a rank's ``images``."""
        return self._once(self._rehearse_centering, images, tp, dp)

    def _rehearse_centering(self, images: int, tp: int, dp: int) -> Cost:
        settings, head = self.config.objectives.self_distillation, self.config.model.dino_head
        if settings.centering != "sinkhorn":
            return Cost()
        rows = [GLOBAL_CROPS * images, self._masked(images)]
        most = max(_ENOUGH_CHUNKS * settings.chunk, KEEP_ELEMENTS * tp // head.prototypes + settings.chunk)
        with rehearsal(tp=tp, dp=dp) as mesh:
            prototypes = torch.empty(head.prototypes // tp, head.bottleneck)
            groups = [torch.empty(min(count, most), head.bottleneck, dtype=self.dtype) for count in rows]

            def forward() -> list[Tensor]:
                return [
                    sinkhorn_bias(
                        [group], prototypes, 0.07, iterations=settings.sinkhorn_iterations, rows_at_once=settings.chunk,
                        mesh=mesh,
                    )
                    for group in groups
                ]

            cost = as_cost(rehearse(mesh, forward))
        # Further chunks need no more memory; over tp every row sends the same.
        ratio = sum(rows) / sum(len(group) for group in groups)
        sent = Counter({key: round(count * ratio) if key[0] == "tp" else count for key, count in cost.forward.items()})
        return replace(cost, forward=sent)
