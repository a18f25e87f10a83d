"""Peak memory of real passes and steps on the CPU, by the allocator's own events, against the plan."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from planned_runs import BATCH, layout, plan_of
from safetensors.torch import save_file
from timm_library import put_timm
from tiny_run import build_engine, build_model, data_of, learning_rate, merged, passes_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

from megavtp.config.precision import compute_dtype
from megavtp.config.schema import Config
from megavtp.decoder import passes as decoder_passes
from megavtp.models.lpips import empty_lpips
from megavtp.models.vtp import OBJECTIVES, VTP
from megavtp.nn import compiling
from megavtp.nn.block import run_blocks
from megavtp.nn.drop_path import BranchDrop, DropPlan
from megavtp.objectives.reconstruction import reconstruction_terms
from megavtp.parallel.mesh import SINGLE, Mesh, build_mesh
from megavtp.parallel.passes import execute
from megavtp.parallel.rehearsal import rehearsal
from megavtp.pixels import to_uint8
from megavtp.planning.cost import cost_of
from megavtp.planning.parts import Rehearsals
from megavtp.planning.zero import Inventory
from megavtp.training.optimizer import parameter_groups
from megavtp.training.step import train_step

# Large enough that activations, not parameters or single small tensors, decide.
TOWER = {"width": 96, "heads": 4}
SIZES = {
    "model": {
        "image_size": 64, "rope_dtype": "bfloat16",
        "vision": {**TOWER, "depth": 5}, "text": {**TOWER, "depth": 3}, "decoder": {**TOWER, "depth": 3},
    },
    "data": {"augment": {"global_size": 64, "local_size": 32, "local_crops": 4}},
    "objectives": {"self_distillation": {"drop_path": 0.3, "chunk": 256}},
}
SECOND_STAGE = merged(SIZES, {
    "model": {"init_from": "not read here"},
    "objectives": {
        "contrastive": {"weight": 0.0}, "self_distillation": {"weight": 0.0},
        "reconstruction": {"frozen_encoder": True},
        "adversarial": {"weight": 0.75, "discriminator_start": 0.0, "start": 0.0},
    },
})


class Allocations:
    """``peak``: most bytes allocated at one time beyond those at the start; ``left``: those that stay."""

    peak = left = 0


@contextmanager
def tracked() -> Iterator[Allocations]:
    result = Allocations()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        result.peak = max(result.peak, now)
    result.left = now


class Runner:
    """The module alone; gradients are there before anything is counted."""

    mesh = SINGLE

    def __init__(self, config: Config):
        self.module = build_model(config, SINGLE)
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, mode: str, **inputs):
        return self.module(mode, **inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize("recompute, precision, micro_batches", [
    ("none", "bf16", 2), ("selective", "bf16", 1), ("selective", "fp32", 2), ("full", "fp32", 1),
    *(pytest.param(*others, marks=pytest.mark.sweep) for others in (("none", "fp32", 1), ("full", "bf16", 2))),
])
def test_activations_of_each_pass(recompute: str, precision: str, micro_batches: int) -> None:
    config = layout(1, micro_batches, SIZES, recompute=recompute, precision=precision)
    plan = plan_of(config, 1).ranks[0]
    runner, batch = Runner(config), data_of(config, SINGLE)(0)
    for objective in passes_of(config, SINGLE):
        with tracked() as allocated:
            execute(objective, runner, batch)
        assert plan.passes[objective.name].peak == pytest.approx(allocated.peak, rel=0.1), objective.name


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recompute, precision, micro_batches", [
    ("none", "fp32", 1), ("none", "bf16", 2), ("selective", "bf16", 1), ("full", "fp32", 2),
])
def test_activations_of_each_compiled_pass(recompute: str, precision: str, micro_batches: int) -> None:
    config = layout(1, micro_batches, SIZES, recompute=recompute, precision=precision, compile="blocks")
    plan = plan_of(config, 1).ranks[0]
    runner, batch = Runner(config), data_of(config, SINGLE)(0)
    for objective in passes_of(config, SINGLE):
        execute(objective, runner, batch)  # compiles
        with tracked() as allocated:
            execute(objective, runner, batch)
        assert plan.passes[objective.name].peak == pytest.approx(allocated.peak, rel=0.1), objective.name


@pytest.mark.parametrize("recompute, precision", [("none", "bf16"), ("selective", "fp32")])
@pytest.mark.parametrize("mode, tower", [("student", "trunk"), ("reconstruction", "pixel_decoder")])
def test_what_compiled_blocks_hold(
    mode: str, tower: str, recompute: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the compiler's own choice of what the backward is left, but without its kernels."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    compiling.compiled.cache_clear()
    config = layout(1, 1, SIZES, recompute=recompute, precision=precision, compile="blocks")
    parts = Rehearsals(config, fused_norms=False)
    model, segments = build_model(config, SINGLE), parts.segments(mode, tower, BATCH)
    blocks = [(int(index), block) for index, block in getattr(model, tower).blocks.items()]
    rope = getattr(model, tower).rope_embed
    tables = [rope.tables(1, length) for _, length in segments]
    keep = [torch.arange(round(count * 0.7)) for count, _ in segments]
    branch = BranchDrop(tuple(keep), (1 / 0.7,) * len(keep))
    drop = DropPlan(((branch, branch),) * len(blocks)) if mode == "student" else None
    x = torch.randn(sum(count * length for count, length in segments), TOWER["width"], requires_grad=True)

    def forward() -> torch.Tensor:
        with model.precision():
            return run_blocks(blocks, x, segments, tables, drop, recompute)

    forward()  # compiles
    with tracked() as allocated:
        y = forward()
    planned = parts.stack(mode, tower, len(blocks), BATCH, 1, False, recompute)
    assert planned.held == pytest.approx(allocated.left, rel=0.1) and y.requires_grad
    plain = Rehearsals(replace(config, parallel=replace(config.parallel, compile="none")), fused_norms=False)
    if (mode, recompute) == ("student", "none"):  # RMS norms
        assert planned.held < 0.9 * plain.stack(mode, tower, len(blocks), BATCH, 1, False, recompute).held
    compiling.compiled.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_compiled_distances_hold(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the perceptual network; without compilation they keep float32 of 16 bits."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    compiling.compiled.cache_clear()
    settings = {"objectives": {"reconstruction": {"perceptual": "lpips-alex"}}}
    config = layout(1, 1, merged(SIZES, settings), precision=precision, compile="blocks")
    dtype, size = compute_dtype(precision), config.model.image_size
    network = empty_lpips("alex", dtype)
    compiling.compile_regions(network)
    x, y = (torch.rand(BATCH, 3, size, size) for _ in range(2))
    x.requires_grad_()

    def forward() -> dict[str, torch.Tensor]:
        return reconstruction_terms(x, y, network, images_total_local=BATCH)

    forward()  # compiles
    with tracked() as allocated:
        terms = forward()
    held = {}
    for compiled in ("blocks", "none"):
        parts = Rehearsals(replace(config, parallel=replace(config.parallel, compile=compiled)), fused_norms=False)
        with rehearsal() as mesh:
            images = torch.empty(x.shape, requires_grad=True)
            held[compiled] = cost_of(mesh, partial(parts._reconstruction_terms(BATCH), images), [], [images]).held
    assert held["blocks"] == pytest.approx(allocated.left, rel=0.1) and len(terms) == 2
    assert held["blocks"] < {"fp32": 1, "bf16": 0.9}[precision] * held["none"]
    compiling.compiled.cache_clear()


class TimmViT(nn.Module):
    """What is read of a ViT of timm's, on blocks that are no attention."""

    pretrained_cfg, embed_dim = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": (3, 64, 64)}, 64

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.norm = nn.Conv2d(3, 64, 8, 8), nn.LayerNorm(64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))

    def forward_intermediates(self, x: torch.Tensor, indices: list[int], **options: object) -> list[torch.Tensor]:
        x, found = self.patch_embed(x).flatten(2).transpose(1, 2), []
        for block in self.blocks:
            x = x + block(x)
            found.append(x)
        return [found[i] for i in indices]


@pytest.mark.parametrize("features, adaptive, precision, micro_batches", [
    ("own", True, "fp32", 1), ("own", True, "bf16", 2), ("own", False, "fp32", 2), ("pixels", True, "fp32", 4),
    ("pixels", False, "bf16", 1), ("timm:vit", True, "fp32", 2),
])
def test_activations_of_the_second_stage(
    features: str, adaptive: bool, precision: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pass of the decoder, whose encoder is frozen, and one of the discriminator, which finds what it has left."""
    if (features, precision) == ("pixels", "bf16") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("for a convolution in bfloat16 this CPU unfolds the picture, into nine times as much memory")
    monkeypatch.setattr(decoder_passes, "to_uint8", to_uint8)
    put_timm(monkeypatch, {"vit": TimmViT()})
    save_file(TimmViT().state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors") if features == "timm:vit" else None
    chosen = {"features": features, "features_weights": weights, "adaptive": adaptive}
    sizes = merged(SECOND_STAGE, {"objectives": {"adversarial": chosen}})
    config = layout(1, micro_batches, sizes, precision=precision)
    plan = plan_of(config, 1).ranks[0]
    runner, batch, left = Runner(config), data_of(config, SINGLE)(0), 0
    for objective in passes_of(config, SINGLE):
        with tracked() as allocated:
            execute(objective, runner, batch)
        assert plan.passes[objective.name].peak == pytest.approx(left + allocated.peak, rel=0.1), objective.name
        left += allocated.left


OVERLAPPING = merged(SIZES, {"deepspeed": {"zero_optimization": {"overlap_comm": True}}})
INTERLEAVED = {"pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}
STEPS = {  # by the ranks of the world and which of them is here
    (1, 0): [layout(1, 1, SIZES, zero_stage=zero_stage) for zero_stage in (0, 1, 2, 3)],
    (2, 0): [
        layout(2, 1, SIZES, tp=2), layout(2, 1, SIZES, tp=2, sequence_parallel=True),
        layout(2, 1, SIZES, tp=2, sequence_parallel=True, recompute="selective"), layout(2, 1, SIZES, zero_stage=3),
        layout(2, 1, OVERLAPPING, zero_stage=1), layout(2, 1, OVERLAPPING, zero_stage=2),
        layout(2, 4, SIZES, pp=2), layout(2, 4, SIZES, pp=2, schedule="gpipe"), layout(2, 4, SIZES, **INTERLEAVED),
    ],
    (2, 1): [layout(2, 4, SIZES, pp=2), layout(2, 4, SIZES, **INTERLEAVED)],
    (4, 0): [
        layout(4, 4, SIZES, **INTERLEAVED, zero_stage=3),
        layout(4, 2, SIZES, tp=2, pp=2, sequence_parallel=True, recompute="full"),
    ],
}


def pretend(world: int, rank: int) -> None:
    """One rank of a world whose other ranks are not there: what they would send is left as it was, but what a pipeline
    stage would send is zeros, for gradients must be finite. Real transports hold what is sent for a time that differs
    from run to run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    dist.broadcast_object_list = lambda *args, **kwargs: None  # it would read a length that nobody sent
    receive = dist.irecv
    dist.irecv = lambda tensor, **source: receive(tensor.zero_(), **source)
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank))


def peaks_of_steps(_: int, world: int, rank: int) -> list[tuple[int, int]]:
    """Pipeline rank and peak of each layout: from before the model is built to the end of the second step,
    everything that is allocated at one time."""
    pretend(world, rank)
    peaks = []
    for config in STEPS[world, rank]:
        parallel = config.parallel
        mesh = build_mesh(parallel.tp, parallel.pp, parallel.virtual_stages, parallel.sequence_parallel)
        data = data_of(config, mesh)
        batches = [data(step) for step in range(2)]
        with tracked() as allocated:
            engine, _ = build_engine(config, mesh)
            passes = passes_of(config, mesh)
            for step, batch in enumerate(batches):
                assert train_step(engine, passes, batch, lr_of=learning_rate(config, step))[1].applied
        engine.close()
        peaks.append((mesh.pp_rank, allocated.peak))
    return peaks


@pytest.mark.parametrize("world, rank", STEPS)
def test_peaks_of_steps(world: int, rank: int) -> None:
    (found,) = run_ranks(1, peaks_of_steps, world, rank)
    places, measured = zip(*found)
    planned = [plan_of(config, world).ranks[place].memory for config, place in zip(STEPS[world, rank], places)]
    assert planned == pytest.approx(list(measured), rel=0.1)


@pytest.mark.parametrize("tp, pp, virtual_stages", [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_parameters_are_those_of_each_rank(tp: int, pp: int, virtual_stages: int) -> None:
    """Names and sizes, against models built for the place on the meta device."""
    config = layout(1)
    make = partial(VTP, config.model, objectives=OBJECTIVES)
    inventory = Inventory(make, lambda named: parameter_groups(named, config.train.optimizer))
    for pp_rank in range(pp):
        mesh = Mesh(tp=tp, pp=pp, pp_rank=pp_rank, virtual_stages=virtual_stages)
        with torch.device("meta"):
            model = VTP(config.model, mesh, objectives=OBJECTIVES)
        found = {(p.name, p.numel, p.trained) for p in inventory.rank(tp, pp, pp_rank, virtual_stages)}
        assert found == {(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()}
