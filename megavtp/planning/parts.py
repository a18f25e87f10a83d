"""The bytes that the parts of each objective hold, need and send on one rank, counted on the real modules.

A pass consists of *ends* (embeddings, norms, heads and the loss: a model of depth 0) and of stacks of blocks. Both are
rehearsed (``parallel.rehearsal``) once for each micro-batch size and tensor-parallel layout; every pipeline layout is
put together from them.

Letters: m images of a micro-batch, N patches, T packed tokens, D width.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from megavtp.config.precision import compute_dtype
from megavtp.config.share import PassShare, share
from megavtp.config.sizes import GLOBAL_CROPS, ResolvedConfig, contrastive_size, feature_width
from megavtp.models.lpips import PERCEPTUAL_NETS, empty_lpips
from megavtp.models.vtp import VTP
from megavtp.nn.attention_kernels import Segments
from megavtp.nn.block import Recompute, run_blocks
from megavtp.nn.drop_path import BranchDrop, DropPlan
from megavtp.objectives.centering import KEEP_ELEMENTS, sinkhorn_biases
from megavtp.objectives.contrastive import info_nce, siglip
from megavtp.objectives.koleo import koleo
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.objectives.self_distillation import StudentOutput, TeacherBias, TeacherOutput, self_distillation_loss
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.rehearsal import rehearsal
from megavtp.pixels import normalise
from megavtp.planning.cost import Cost, cost_of, line
from megavtp.planning.flops import expected_masked_patches, patches_of
from megavtp.planning.regions import count_regions
from megavtp.planning.second_stage import Judge, balanced_cost, copied_weights, discriminator_cost, features_of

MODES = {"contrastive": "contrastive", "self_distillation": "student", "reconstruction": "reconstruction"}
# The towers that the stages of a pass run through, leg by leg; those of one leg run side by side.
LEGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "contrastive": (("text", "trunk"),), "student": (("trunk",),), "teacher": (("trunk",),),
    "reconstruction": (("trunk",), ("pixel_decoder",)),
    # Behind a frozen encoder.
    "encode": (("trunk",),), "decode": (("pixel_decoder",),),
}
SILENT = ("teacher", "encode")  # without a backward

_LINEAR = (64, 128)  # with this many images in a micro-batch or more, everything grows linearly
_ENOUGH_CHUNKS = 4
_TEMPERATURE = 0.07  # of the teacher: any will do

Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """Run a method once for the same arguments; its object keeps what it returned."""

    @wraps(method)
    def known_or_made(self: Any, *arguments: Any) -> Any:
        known = vars(self).setdefault("_known", {})
        key = (method.__name__, *arguments)
        if key not in known:
            known[key] = method(self, *arguments)
        return known[key]

    return cast(Method, known_or_made)


def _interpolated(at: Callable[[int], Cost], m: int) -> Cost:
    """Return ``at(m)``; for a large ``m`` it is extrapolated linearly."""
    if m <= _LINEAR[0]:
        return at(m)
    return line(at(_LINEAR[0]), at(_LINEAR[1]), (m - _LINEAR[0]) / (_LINEAR[1] - _LINEAR[0]))


class Rehearsals:
    """Rehearsals of a configuration's parts, each made once.

    Of the ``parallel`` section only the precision and ``compile`` count here. ``fused_norms``, for runs on GPUs, and
    ``zero3`` are ``rehearsal``'s.
    """

    def __init__(self, config: ResolvedConfig, *, fused_norms: bool, zero3: bool = False):
        self.config, self._kept = config, {"fused_norms": fused_norms, "zero3": zero3}
        self.dtype = compute_dtype(config.parallel.precision)
        self._count_regions = partial(count_regions, config.parallel.compile, fused_norms)
        self.objectives = frozenset(share(config, 1).passes)
        self.features = features_of(config, self.dtype)

    @once
    def stack(
        self, mode: str, tower: str, blocks: int, m: int, tp: int, sequence_parallel: bool, recompute: Recompute
    ) -> Cost:
        """Return the cost of ``blocks`` consecutive blocks of a tower on the tokens of ``m`` images, without the input.

        It is linear in ``blocks``, so two are rehearsed.
        """
        if blocks == 0:
            return Cost()
        if mode in SILENT:  # nothing is recomputed
            recompute = "none"

        def at(size: int) -> Cost:
            one, two = self._one_and_two_blocks(mode, tower, size, tp, sequence_parallel, recompute)
            whole = line(one, two, blocks - 1)  # each further block holds and sends what the second did
            return replace(whole, peak=whole.held + (one if blocks == 1 else two).extra)  # one runs at a time

        return _interpolated(at, m)

    @once
    def _one_and_two_blocks(
        self, mode: str, name: str, m: int, tp: int, sequence_parallel: bool, recompute: Recompute
    ) -> tuple[Cost, ...]:
        trained = mode not in SILENT
        with rehearsal(tp=tp, sequence_parallel=sequence_parallel, **self._kept) as mesh:
            # These are two different blocks: the gradients of one used twice would wait for each other.
            model = self._model(mesh, depth=2)
            tower = getattr(model, name)
            blocks = list(enumerate(tower.blocks.children()))
            segments = self.segments(mode, name, m)
            tokens = sum(count * length for count, length in segments)
            x = torch.empty(tokens, blocks[0][1].norm1.width, requires_grad=trained)
            tables = None
            if name != "text":
                rope = tower.rope_embed
                tables = [(torch.empty(length, rope.head_dim, dtype=rope.dtype),) * 2 for _, length in segments]
            drop = self._drop(segments) if mode == "student" else None

            def forward(count: int) -> Tensor:
                with model.precision(), torch.set_grad_enabled(trained):
                    return run_blocks(blocks[:count], x, segments, tables, drop, recompute)

            parameters = list(tower.parameters())
            return tuple(cost_of(mesh, partial(forward, count), parameters, [x]) for count in (1, 2))

    def segments(self, mode: str, tower: str, m: int) -> Segments:
        """Return (sequences, length) of each crop size in a tower, as the blocks see them."""
        if tower == "text":
            return ((m, self.config.model.text.context_length),)
        class_token = tower == "trunk"
        pictures = self._pictures(mode, m).values()
        return tuple((count, patches_of(self.config.model, size) + class_token) for count, size in pictures)

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
        vtp = VTP(replace(model, **towers), mesh, objectives=self.objectives, compute_dtype=self.dtype)
        self._count_regions(vtp)
        return vtp

    def end(self, mode: str, leg: int, is_last: bool, m: int, tp: int, *, loss: bool = True) -> Cost:
        """Return the cost of the embedding before a leg's blocks, or of what follows them; the last end has the losses.

        The input of the blocks is counted here, where it is made; their output is not. Without ``loss`` it is that of
        a forward without graph, of which the last end holds the results, and what they view.
        """
        at = partial(self._end, mode, leg, is_last, tp, loss)
        chunked = mode == "student" and is_last and loss  # not linear, as its logits are made in chunks
        return at(m) if chunked else _interpolated(at, m)

    @once
    def _end(self, mode: str, leg: int, is_last: bool, tp: int, loss: bool, m: int) -> Cost:
        stage = 2 * leg + is_last
        with rehearsal(tp=tp, pp=2, pp_rank=int(is_last), **self._kept) as mesh:
            model, inputs = self._model(mesh, depth=0), self._inputs(mode, m)
            specs = model.activation_specs(mode, stage, **inputs) if stage else []
            trained = mode not in SILENT
            activations = [torch.empty(shape, dtype=dtype, requires_grad=trained) for shape, dtype in specs]
            close = self._closing(mode, m, mesh) if loss and stage == 2 * len(LEGS[mode]) - 1 else None
            results: list[Any] = []  # of the pass: they live as long as its backward

            def forward() -> Any:
                pixels = {}
                if stage == 0:  # later ones read only shapes
                    pixels = {name: normalise(x) for name, x in inputs.items() if name in self._pictures(mode, m)}
                results.append(model(mode, stage=stage, activations=activations, **(inputs | pixels)))
                return close(results[0]) if close else results[0]

            with torch.set_grad_enabled(loss):
                return cost_of(mesh, forward, list(model.parameters()), activations)

    @once
    def activation_bytes(self, mode: str, leg: int, is_first: bool, m: int) -> int:
        """Return the bytes that one micro-batch brings to a stage of ``leg``, the leg's first one or a later one."""
        with torch.device("meta"):
            model = self._model(Mesh(pp=2), depth=0)
            specs = model.activation_specs(mode, 2 * leg + (not is_first), **self._inputs(mode, m))
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs)

    def _pictures(self, mode: str, m: int) -> dict[str, tuple[int, int]]:
        """Return number and size in pixels of the pictures in a micro-batch, by the name of the input."""
        augment = self.config.data.augment
        if mode == "contrastive":
            return {"images": (m, contrastive_size(self.config))}
        if mode in ("reconstruction", "encode", "decode"):
            return {"images": (m, self.config.model.image_size)}
        crops = {"global_crops": (GLOBAL_CROPS * m, augment.global_size)}
        if mode == "student" and augment.local_crops:
            crops["local_crops"] = (augment.local_crops * m, augment.local_size)
        return crops

    def picture_bytes(self, mode: str, m: int) -> int:
        """Return the bytes of a micro-batch's normalised pixels."""
        return sum(torch.float32.itemsize * count * 3 * size**2 for count, size in self._pictures(mode, m).values())

    def _inputs(self, mode: str, m: int) -> dict[str, Any]:
        """Make a micro-batch as it comes from the loader, or for a decoder alone the latents."""
        if mode == "decode":
            side = self.config.model.image_size // self.config.model.patch_size
            latents = torch.empty(m, self.config.model.bottleneck, side, side, dtype=self.dtype)
            return {"latents": latents, "with_head_input": self.config.objectives.adversarial.weight > 0}
        inputs: dict[str, Any] = {
            name: torch.empty(count, 3, size, size, dtype=torch.uint8)
            for name, (count, size) in self._pictures(mode, m).items()
        }
        if mode == "contrastive":
            inputs["tokens"] = torch.empty(m, self.config.model.text.context_length, dtype=torch.long)
        if mode in ("student", "teacher"):
            inputs["masked_rows"] = torch.empty(self._masked(m), dtype=torch.long)
        if mode == "student":
            patches = patches_of(self.config.model, self.config.data.augment.global_size)
            inputs["masks"] = torch.empty(GLOBAL_CROPS * m, patches, dtype=torch.bool)
        return inputs

    def _masked(self, m: int) -> int:
        return round(m * expected_masked_patches(self.config))

    def _closing(self, mode: str, m: int, mesh: Mesh) -> Callable[[Any], Any] | None:
        """Return what computes the loss terms of one micro-batch from a pass's outputs, if it has any."""
        if mode == "reconstruction":
            return self._reconstruction_terms(m)
        if mode == "decode":
            return self._decoder_terms(m)
        if mode != "student":
            return None
        teacher = self._teacher(m, mesh.tp)
        bias = TeacherBias(torch.empty(len(teacher.W)), torch.empty(len(teacher.W)))
        weights = torch.empty(len(teacher.patches))

        def close(outputs: Any) -> tuple[dict[str, Tensor], Tensor]:
            student = StudentOutput(*outputs)
            terms = self_distillation_loss(
                student, teacher, bias, weights, self.config.objectives.self_distillation,
                teacher_temperature=_TEMPERATURE, images_total_local=m, mesh=mesh,
            )
            return terms, student.backbone_cls

        return close

    def _reconstruction_terms(self, m: int) -> Callable[[Tensor], dict[str, Tensor]]:
        net = PERCEPTUAL_NETS.get(self.config.objectives.reconstruction.perceptual)
        perceptual = net and empty_lpips(net, self.dtype)
        self._count_regions(perceptual)
        target = torch.empty(m, 3, self.config.model.image_size, self.config.model.image_size)
        return partial(reconstruction_terms, target=target, perceptual=perceptual, images_total_local=m)

    def _decoder_terms(self, m: int) -> Callable[[Any], Any] | None:
        """Return what computes the terms of a decoder behind a frozen encoder; the adaptive weight leaves them to
        ``balanced``."""
        adversarial, terms = self.config.objectives.adversarial, self._reconstruction_terms(m)
        if adversarial.weight == 0:
            return terms
        if adversarial.adaptive:
            return None
        judge = self._judge()
        return lambda outputs: (terms(outputs[0]), judge.persuaded(outputs[0]))

    @once
    def balanced(self, part: PassShare, dp: int) -> Cost:
        """Return the cost of a decoder's terms over a rank's batch, which the adaptive weight balances."""

        def terms_of(images: Tensor, judge: Judge) -> dict[str, Tensor]:
            terms = self._reconstruction_terms(len(images))(images)
            return terms | {"adversarial": judge.persuaded(images)}

        return balanced_cost(self.config.model, self._judge, terms_of, part, dp)

    def _judge(self) -> Judge:
        assert self.features is not None, "there is no adversarial term"
        judge = Judge(self.config, self.features, self.dtype)
        self._count_regions(judge.features)
        return judge

    def adversary_bytes(self, part: PassShare) -> int:
        """Return the bytes that live through both passes of the second stage: a copy of the discriminator's weights,
        and the decoded pictures as uint8."""
        if self.features is None:
            return 0
        return copied_weights(self.features.widths) + part.local * 3 * self.config.model.image_size**2

    @once
    def discriminator(self, m: int) -> Cost:
        """Return the cost of a micro-batch of the discriminator's own pass."""
        return _interpolated(partial(discriminator_cost, self._judge, self.config.model.image_size), m)

    def _teacher(self, images: int, tp: int) -> TeacherOutput:
        head = self.config.model.dino_head
        rows = (GLOBAL_CROPS * images, self._masked(images))
        cls, patches = (torch.empty(count, head.bottleneck, dtype=self.dtype) for count in rows)
        return TeacherOutput(cls, patches, torch.empty(head.prototypes // tp, head.bottleneck))

    @once
    def over_batch(self, mode: str, images: int, dp: int) -> Cost:
        """Return the cost of a pass's terms over all ``images`` of a rank, from their features to their gradients."""
        model = self.config.model
        with rehearsal(dp=dp) as mesh:
            if mode == "contrastive":
                image, text = (torch.empty(images, model.text.width, requires_grad=True) for _ in range(2))
                scale = torch.empty((), requires_grad=True)
                loss = info_nce if self.config.objectives.contrastive.loss == "infonce" else siglip
                return cost_of(mesh, lambda: loss(image, text, scale, None, mesh), inputs=[image, text])
            features = torch.empty(GLOBAL_CROPS, images, feature_width(model), requires_grad=True)
            return cost_of(mesh, lambda: koleo(features, mesh), inputs=[features])

    @once
    def centering(self, images: int, tp: int, dp: int) -> Cost:
        """Return the cost of Sinkhorn-Knopp over the teacher's outputs for a rank's ``images``."""
        settings, head = self.config.objectives.self_distillation, self.config.model.dino_head
        if settings.centering != "sinkhorn":
            return Cost()
        most = max(_ENOUGH_CHUNKS * settings.chunk, KEEP_ELEMENTS * tp // head.prototypes + settings.chunk)
        with rehearsal(tp=tp, dp=dp) as mesh:
            *rows, prototypes = self._teacher(images, tp)
            groups = [features[:most] for features in rows]
            biases = partial(
                sinkhorn_biases, [[group] for group in groups], prototypes, _TEMPERATURE,
                iterations=settings.sinkhorn_iterations, rows_at_once=settings.chunk, mesh=mesh,
            )
            cost = cost_of(mesh, biases)
        # Further chunks need no more memory; over tp every row sends the same.
        ratio = sum(map(len, rows)) / sum(map(len, groups))
        sent = Counter({key: round(count * ratio) if key[0] == "tp" else count for key, count in cost.forward.items()})
        return replace(cost, forward=sent)
