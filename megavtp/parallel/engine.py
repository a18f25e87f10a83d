"""The engine that a trainer sees: forward, backward, update and whole-tensor state, on any ZeRO stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from megavtp.config.run import RunConfig
from megavtp.parallel import deepspeed_adapter as adapter
from megavtp.parallel import engine_state, gradient_norm, pipeline
from megavtp.parallel.collectives import gather_pieces
from megavtp.parallel.mesh import Mesh
from megavtp.parallel.messages import connect
from megavtp.parallel.orders import Schedule
from megavtp.parallel.sharding import cut, merge, shard_of, whole_shape
from megavtp.parallel.striping import ActivationSpec

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StepResult:
    applied: bool  # False when the gradient norm was not finite, and nothing moved
    grad_norm: Tensor | float  # over all parameters, before clipping
    tower_norms: dict[str, Tensor]  # the same norm over the parameter groups of each ``tower``


class Engine(Generic[M]):
    """One DeepSpeed engine around everything this rank owns.

    Args:
        module: its root forward runs every pass; parameters that do not train (the teacher) are frozen in it. Under
            pipeline parallelism it is ``pipeline.Striped``, and its forward takes ``stage`` and ``activations``.
        optimizer: over the trainable parameters; its groups may carry ``lr_scale`` and ``tower``.
        clip_grad: global-norm ceiling, 0 = none.
        extra: further DeepSpeed keys of the user.
        leaf_classes: modules whose parameters ZeRO-3 gathers together (transformer blocks).
        schedule: order of the pipeline's work.
        hold: ZeRO-3 keeps all parameters of the rank gathered for a step.
    """

    def __init__(
        self, module: M, optimizer: torch.optim.Optimizer, mesh: Mesh, *, zero_stage: int,
        clip_grad: float, extra: Mapping[str, Any] | None = None, leaf_classes: tuple[type[nn.Module], ...] = (),
        schedule: Schedule = "1f1b", hold: bool = False,
    ):
        self.mesh, self.schedule = mesh, schedule
        self.module = module
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        numel = sum(p.numel() for p in module.parameters() if p.requires_grad)
        ds_config = adapter.build_config(zero_stage, clip_grad, numel, mesh.dp, extra or {})
        self._engine = adapter.initialize(module, optimizer, ds_config, mesh, leaf_classes, hold)
        self._engine.megavtp_clip_grad = clip_grad
        self._last_follows = False
        self._known: set[tuple[str, bool]] = set()  # passes that have run, see ``may_wait``
        self.device = self._engine.device
        connect(mesh, self.device)

    @classmethod
    def of_run(
        cls, module: M, optimizer: torch.optim.Optimizer, mesh: Mesh, config: RunConfig,
        leaf_classes: tuple[type[nn.Module], ...],
    ) -> "Engine[M]":
        p = config.parallel
        return cls(
            module, optimizer, mesh, zero_stage=p.zero_on(mesh.dp), clip_grad=config.train.optimizer.clip_grad,
            extra=config.deepspeed, leaf_classes=leaf_classes, schedule=p.schedule, hold=p.zero3_gather == "step",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def infer(self, mode: str, **inputs: Any) -> Any:
        """Return the result of a forward without gradient, on every rank of any layout."""
        return pipeline.infer(self, mode, **inputs)

    def legs(self, mode: str) -> int:
        return cast(pipeline.Striped, self.module).legs(mode)

    def activation_specs(self, mode: str, stage: int, **inputs: Any) -> list[ActivationSpec]:
        return cast(pipeline.Striped, self.module).activation_specs(mode, stage, **inputs)

    def begin_step(self) -> None:
        """Prepare for an optimizer step; this is called before its first backward."""
        self._last_follows = False
        adapter.before_step(self._engine)

    def announce_last_backward(self) -> None:
        """Say that the next backward is the last one of the step, which may reduce each gradient as it comes."""
        self._last_follows = True

    def may_wait(self, mode: str, with_graph: bool) -> bool:
        """Say of a pass whether it is new to a GPU: its kernels are then loaded, and those of compiled regions timed,
        for which the host waits for the device."""
        return self.device.type == "cuda" and (mode, with_graph) not in self._known

    def has_run(self, mode: str, with_graph: bool) -> None:
        """Note that a pass has run, so that its kernels are there."""
        self._known.add((mode, with_graph))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar; over dp, gradients are averaged."""
        adapter.before_backward(self._engine, self._last_follows)
        self._engine.backward(loss)

    def step(self) -> StepResult:
        """Clip by the global norm and update, or skip on every rank when that norm is not finite."""
        self._engine.step()
        return StepResult(*gradient_norm.of_step(self._engine))

    def set_lr(self, lr_of: Callable[[dict[str, Any]], float]) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr_of(group)

    def lerp(self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], weight: float) -> None:
        """Move each first parameter towards the second by ``weight``, on the shards, without communication."""
        if pairs:
            targets, sources = ([engine_state.stored(p) for p in side] for side in zip(*pairs))
            torch._foreach_lerp_(targets, sources, weight)

    def export(self, wanted: Callable[[int], bool]) -> dict[str, Tensor]:
        """Return whole tensors by logical name: ``model/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``.

        This is collective over the world. A pipeline rank has the names of its own stages; of these, only tensors whose
        running number is ``wanted`` are kept, so that its tp x dp writers share the memory and the work.
        """
        engine_state.ensure_optimizer_state(self._engine)
        kept: dict[str, Tensor] = {}
        for number, (name, kind, parameter) in enumerate(self._tensors()):
            whole = self._whole(parameter, kind)
            if wanted(number):
                kept[f"{kind}/{name}"] = whole
        return kept

    def _tensors(self) -> list[tuple[str, str, nn.Parameter]]:
        return [(name, kind, p) for p, name in self.names.items() for kind in engine_state.kinds(p)]

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        piece, shard = engine_state.read(self._engine, parameter, kind), shard_of(parameter)
        if shard is None or self.mesh.tp == 1:
            return piece
        return merge(gather_pieces(piece, self.mesh.tp_group), shard)

    def load(self, tensor: Callable[[str], Tensor], optimizer_steps: int) -> None:
        """Fill parameters and moments; ``tensor(name)`` gives the whole tensors that ``export`` names."""
        pieces = (
            (parameter, kind, cut(tensor(f"{kind}/{name}"), shard_of(parameter), self.mesh.tp_rank, self.mesh.tp))
            for name, kind, parameter in self._tensors()
        )
        engine_state.write_state(self._engine, pieces, optimizer_steps)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: whole_shape(engine_state.gathered_shape(parameter), shard_of(parameter), self.mesh.tp)
            for parameter, name in self.names.items()
        }

    @property
    def optimizer_steps(self) -> int:
        return engine_state.optimizer_steps(self._engine)

    def close(self) -> None:
        self._engine.destroy()
