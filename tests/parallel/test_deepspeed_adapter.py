"""Each work-around for DeepSpeed is needed: without it the numbers are wrong, or it raises.

So an upgrade of DeepSpeed that makes one superfluous is noticed. The cases run in one group of two processes; what they
found is checked test by test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from tiny_run import tiny_config
from torch.utils.hooks import RemovableHandle
from toy import ALTERNATING, CONSECUTIVE, ONLY_A, Outcome, make, optimizer_of, plain, play, run

from megavtp.errors import UserError
from megavtp.models.vtp import VTP
from megavtp.parallel import deepspeed_adapter as adapter
from megavtp.parallel import engine_state, gradient_norm
from megavtp.parallel.engine import Engine
from megavtp.parallel.mesh import Mesh, build_mesh
from megavtp.parallel.shard_matrix import gather_by_columns

EXACT = 2e-6  # float32 rounding; the faults below are of the order of 0.1
WRONG = 1e-3
STEPS = [ALTERNATING] * 3
SKIPPING = [ALTERNATING, ONLY_A, ALTERNATING]  # the second step's loss does not reach head b
CLIP = 0.5
STAGES = (0, 1, 2, 3)
SHARDED = (1, 2, 3)


def superfluous(guard: str) -> str:
    return f"{guard}: this guard is no longer needed"


@contextmanager
def without(guard: str, room: ModuleType = gradient_norm) -> Iterator[None]:
    """One of the functions made to do nothing."""
    with patch.object(room, guard, lambda *args: None):
        yield


def attempt(fn: Callable[[], Any]) -> Any:
    """The value, or what was raised, as text."""
    try:
        return fn()
    except Exception as error:  # whatever DeepSpeed raises is a finding
        return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# The cases, on two ranks


def _meshes() -> tuple[Mesh, Mesh]:
    return build_mesh(2, 1), build_mesh(1, 1)


def _runs() -> dict[str, Any]:
    tp2, dp2 = _meshes()
    found: dict[str, Any] = {}
    for zero in STAGES:
        found[f"tp {zero}"] = run(tp2, zero, STEPS, CLIP)
        found[f"dp {zero}"] = run(dp2, zero, STEPS)
        found[f"skipping {zero}"] = run(dp2, zero, SKIPPING)
        found[f"consecutive {zero}"] = run(dp2, zero, [CONSECUTIVE] * 3)
        found[f"poisoned {zero}"] = run(dp2, zero, STEPS, poisoned=1)
        found[f"one slice {zero}"] = _infinite_slice(tp2, zero)
        found[f"scalar {zero}"] = attempt(lambda z=zero: make(dp2, z, scalar=True))
    for zero in SHARDED:
        with without("own_norm_of_partitions"):
            found[f"DeepSpeed's norm {zero}"] = run(tp2, zero, STEPS, CLIP)
        with patch.object(adapter, "build_config", _config_without_clipping):
            found[f"unsaid clipping {zero}"] = run(dp2, zero, STEPS)
    with patch.object(adapter, "before_step", lambda engine: None):
        found["stale, skipping"] = run(dp2, 3, SKIPPING)
        found["stale, late"] = run(dp2, 3, STEPS)
    with without("before_backward", adapter):
        found["consecutive, unguarded"] = run(dp2, 3, [CONSECUTIVE] * 3)
    with without("own_stage0_norm"):
        found["stage 0, unguarded"] = attempt(lambda: run(dp2, 0, STEPS))
    found["persistent"] = run(dp2, 3, STEPS, extra={"zero_optimization": {"stage3_param_persistence_threshold": 10**5}})
    with patch.object(adapter, "initialize", _gathering_alone):
        found["alone"] = run(tp2, 3, STEPS, CLIP)
    found["held"] = [_held_in_second_backward(dp2, guarded) for guarded in (True, False)]
    return found


_build_config, _initialize = adapter.build_config, adapter.initialize


def _gathering_alone(module: Any, *arguments: Any, **keywords: Any) -> Any:
    """As on a GPU whose data-parallel group is itself alone."""
    engine = _initialize(module, *arguments, **keywords)
    gather_by_columns(module.parameters())
    return engine


def _config_without_clipping(*args: Any) -> dict[str, Any]:
    config = _build_config(*args)
    del config["gradient_clipping"]
    return config


def _infinite_slice(mesh: Mesh, zero: int) -> Outcome:
    """Step 1 has an infinite gradient in one tensor-parallel rank's slice only."""
    engine, module = make(mesh, zero)
    first = play(engine, module, STEPS[:1])
    handle = None
    if mesh.tp_rank == 1:
        handle = module.column.bias.register_hook(lambda gradient: gradient * float("inf"))
    second = play(engine, module, STEPS[1:2], first=1)
    if handle is not None:
        handle.remove()
    third = play(engine, module, STEPS[2:], first=2)
    engine.close()
    return Outcome(
        first.norms + second.norms + third.norms, first.applied + second.applied + third.applied, third.tensors
    )


def _held_in_second_backward(mesh: Mesh, guarded: bool) -> int:
    """Parameters still gathered when the second of two consecutive backwards has left all layers but the first."""
    engine, module = make(mesh, 3)
    counts: list[int] = []
    module.on_gradient = lambda: counts.append(sum(p.ds_status.name == "AVAILABLE" for p in module.parameters()))

    def flag_only(engine: Any, is_last: bool) -> None:
        engine.optimizer.clear_backward_seen_flag()

    with patch.object(adapter, "before_backward", adapter.before_backward if guarded else flag_only):
        play(engine, module, [CONSECUTIVE])
    engine.close()
    return counts[1]


def _states() -> dict[str, Any]:
    tp2, mesh = _meshes()
    found: dict[str, Any] = {}
    for zero in SHARDED:
        engine, module = make(mesh, zero)
        half = play(engine, module, STEPS[:2])
        if zero < 3:
            found[f"unlinked {zero}"] = _export_unlinked(tp2, zero)
        for shared in (False, True):
            other, other_module = make(mesh, zero)
            other.load(half.tensors.__getitem__, 2)
            steps = [state["step"] for state in engine_state.inner_optimizer(other._engine).state.values()]
            if shared:
                for state in engine_state.inner_optimizer(other._engine).state.values():
                    state["step"] = steps[0]
            else:
                found[f"steps {zero}"] = ([float(x) for x in steps], len({x.data_ptr() for x in steps}), len(steps))
            found[f"continued {zero} {shared}"] = play(other, other_module, STEPS[2:], first=2)
            other.close()
        engine.close()
    return found


def _export_unlinked(mesh: Mesh, zero: int) -> Any:
    """Moments as DeepSpeed alone links them to parameters; each rank holds all of its own, so both fail alike."""
    engine, module = make(mesh, zero)
    with without("ensure_optimizer_state", engine_state):
        return attempt(lambda: play(engine, module, STEPS[:2]).tensors)


def _stages(rank: int, guarded: bool) -> list[bool]:
    mesh = build_mesh(1, 2)
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2 + rank)))
    remove = RemovableHandle.remove if guarded else lambda handle: None
    with patch.object(RemovableHandle, "remove", remove):
        engine = Engine(module, optimizer_of(module), mesh, zero_stage=3, clip_grad=0.0)

    applied = []
    for _ in range(3):
        engine.begin_step()
        engine.backward(engine(torch.ones(2, 4)).sum())
        applied.append(engine.step().applied)
    return applied


def _uneven_groups(rank: int, guarded: bool) -> tuple[float, float]:
    """Two pipeline stages, of one parameter group and of two: the norm that a step reports, and that of the stage."""
    mesh = build_mesh(1, 2)
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(1 + rank)))
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.eye(4) * (1 + rank + index))
    groups = [{"params": [parameter]} for parameter in module.parameters()]
    with nullcontext() if guarded else without("own_norm_of_partitions"):
        engine = Engine(module, torch.optim.AdamW(groups), mesh, zero_stage=1, clip_grad=0.0)
    engine.begin_step()
    engine.backward(engine(torch.ones(2, 4)).sum())
    own = torch.cat([gradient.flatten() for gradient in _gradients(module)]).norm()
    norm = float(engine.step().grad_norm)
    if not guarded and rank == 0:  # the other stage's second group waits for somebody to add to
        torch.distributed.all_reduce(torch.zeros(1), group=mesh.mp_group)
    return norm, float(own)


def _gradients(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(module(torch.ones(2, 4)).sum(), list(module.parameters()))


def _backward_without_parameters(rank: int, zero: int) -> str | None:
    """What the engine says of a backward through nothing that it holds."""
    module = torch.nn.Linear(4, 4)
    engine = Engine(module, optimizer_of(module), build_mesh(1, 2), zero_stage=zero, clip_grad=0.0)
    engine.begin_step()
    found = attempt(lambda: engine.backward((torch.ones(2, 4, requires_grad=True) * 2).sum()))
    return found if isinstance(found, str) else None


def _everything(rank: int) -> dict[str, Any]:
    return _runs() | _states() | {
        "stages": _stages(rank, guarded=True),
        "uneven groups": [_uneven_groups(rank, guarded) for guarded in (True, False)],
        "no parameters": [_backward_without_parameters(rank, zero) for zero in STAGES],
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    results = run_ranks(2, _everything, timeout=240)
    by_stage = ("stages", "uneven groups", "no parameters")
    return results[0] | {name: [result[name] for result in results] for name in by_stage}


@pytest.fixture(scope="module")
def expected() -> dict[str, Outcome]:
    return {
        "steps": plain(STEPS), "clipped": plain(STEPS, CLIP), "skipping": plain(SKIPPING), "less": plain(STEPS, skip=1),
    }


# ---------------------------------------------------------------------------------------------------------------------


def test_stages_with_different_parameter_groups_have_one_norm(found: dict) -> None:
    """DeepSpeed sums the norms over the pipeline group by group: one stage's meets another group's, or nobody's."""
    (first, first_unguarded), (second, second_unguarded) = found["uneven groups"]
    whole = (first[1] ** 2 + second[1] ** 2) ** 0.5
    assert first[0] == pytest.approx(whole, rel=1e-6) and second[0] == pytest.approx(whole, rel=1e-6)
    assert abs(first_unguarded[0] / whole - 1) > WRONG, superfluous("own_norm_of_partitions")


def test_a_backward_needs_a_parameter(found: dict) -> None:
    """A chunk without blocks passes gradients on by itself, as ``pipeline._Trip.backward`` does."""
    for said in found["no parameters"]:
        assert said[2] and "IndexError" in said[2], superfluous("the way around an empty chunk in pipeline.py")


@pytest.mark.parametrize("zero", STAGES)
def test_guarded_engine_is_exact(zero: int, found: dict, expected: dict) -> None:
    """Weights and norms equal plain torch: clipped under tp, two backwards per step, a loss that is not there."""
    assert found[f"tp {zero}"].difference(expected["clipped"]) < EXACT
    assert found[f"dp {zero}"].difference(expected["steps"]) < EXACT
    assert found[f"skipping {zero}"].difference(expected["skipping"]) < EXACT
    assert found[f"consecutive {zero}"].difference(expected["steps"]) < EXACT


def test_a_rank_alone_gathers_by_columns_too(found, expected):
    assert found["alone"].difference(expected["clipped"]) < EXACT


@pytest.mark.parametrize("zero", SHARDED)
def test_tensor_parallel_slices_count_in_the_norm(zero: int, found: dict, expected: dict) -> None:
    """DeepSpeed counts those of the first rank only, unless a parameter bears a mark of Megatron's."""
    theirs = found[f"DeepSpeed's norm {zero}"]
    assert abs(theirs.norms[0] / expected["clipped"].norms[0] - 1) > WRONG, superfluous("own_norm_of_partitions")
    assert theirs.difference(expected["clipped"]) > WRONG


def test_stale_gradients(found: dict, expected: dict) -> None:
    """ZeRO-3 applies the last step's gradient again: of a loss that is skipped, or that comes second in each step."""
    assert found["stale, skipping"].difference(expected["skipping"]) > WRONG, superfluous("before_step")
    assert found["stale, late"].difference(expected["steps"]) > WRONG, superfluous("before_step")


def test_consecutive_backwards(found: dict, expected: dict) -> None:
    """Two forwards, then two backwards: ZeRO-3's second backward overwrites the first one's gradient.

    The passes alternate forward and backward, where the engine's own forward resets the flag; a schedule of pipeline
    stages does not.
    """
    assert found["consecutive, unguarded"].difference(expected["steps"]) > WRONG, superfluous("before_backward (flag)")


def test_parameters_are_released_in_the_second_of_two_backwards(found: dict) -> None:
    guarded, unguarded = found["held"]
    assert guarded <= 4, f"{guarded} parameters are held"  # the layer at hand, and the head not yet visited
    assert unguarded > guarded, superfluous("before_backward (counter)")


@pytest.mark.parametrize("zero", SHARDED)
def test_clipping_is_said_explicitly(zero: int, found: dict, expected: dict) -> None:
    """Without the key DeepSpeed clips at 1.0; the norms of this run are above. (Stage 0 calls our own clipping.)"""
    assert min(expected["steps"].norms) > 1
    assert found[f"unsaid clipping {zero}"].difference(expected["steps"]) > WRONG, superfluous("gradient_clipping")


def test_stage_0_reports_no_norm_of_its_own(found: dict) -> None:
    outcome = found["stage 0, unguarded"]
    assert isinstance(outcome, str) and "_global_grad_norm" in outcome, superfluous("own_stage0_norm")


def test_persistence_threshold(found: dict, expected: dict) -> None:
    """A parameter below the threshold stays gathered, so the forward does not see the update of its shard."""
    teacher = [outcome.teacher for outcome in (expected["steps"], found["dp 3"], found["persistent"])]
    right, persistent = (max(float((a - b).abs().max()) for a, b in zip(teacher[0], t)) for t in teacher[1:])
    assert right < EXACT
    assert persistent > WRONG, superfluous("stage3_param_persistence_threshold")


def test_user_cannot_set_the_guarded_keys() -> None:
    keys = ({"gradient_clipping": 1.0}, {"zero_optimization": {"stage3_param_persistence_threshold": 10}})
    for deepspeed in keys:
        with pytest.raises(UserError, match=next(iter(deepspeed))):
            tiny_config({"deepspeed": deepspeed})


@pytest.mark.parametrize("zero", STAGES)
def test_no_parameter_without_dimensions(zero: int, found: dict) -> None:
    """DeepSpeed cannot start with one, whatever the stage, so the logit scale has the shape (1,)."""
    assert isinstance(found[f"scalar {zero}"], str), superfluous("the shape of logit_scale")
    with torch.device("meta"):
        assert all(p.ndim > 0 for p in VTP(tiny_config().model).parameters())


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("case", ["poisoned", "one slice"])
def test_non_finite_step_is_skipped_everywhere(case: str, zero: int, found: dict, expected: dict) -> None:
    """NaN in one data-parallel rank's rows, or infinity in one tensor-parallel rank's slice: weights and moments are
    as if the step had not been, on all ranks, and the next step is exact."""
    outcome, less = found[f"{case} {zero}"], expected["less"]
    assert outcome.applied == [True, False, True]
    assert not abs(outcome.norms[1]) < float("inf")
    assert outcome.tensors.keys() == less.tensors.keys()
    for name, value in less.tensors.items():
        if "teacher" not in name or case == "poisoned":
            assert (outcome.tensors[name] - value).abs().max() < EXACT, name


@pytest.mark.parametrize("zero", SHARDED)
def test_loaded_states_have_step_counters_of_their_own(zero: int, found: dict, expected: dict) -> None:
    """Adam counts in place: a counter that groups share would advance several times a step."""
    values, distinct, count = found[f"steps {zero}"]
    assert count == distinct == 2 and values == [2.0, 2.0]
    for name, value in expected["steps"].tensors.items():
        assert (found[f"continued {zero} False"].tensors[name] - value).abs().max() < EXACT, name
    wrong = found[f"continued {zero} True"]
    worst = max(float((wrong.tensors[n] - v).abs().max()) for n, v in expected["steps"].tensors.items())
    assert worst > 1e-4, superfluous("own step tensors")


@pytest.mark.parametrize("zero", [1, 2])
def test_moments_are_linked_in_every_group(zero: int, found: dict) -> None:
    """DeepSpeed links the states after the first group's first step, so it cannot find those of later groups."""
    outcome = found[f"unlinked {zero}"]
    assert isinstance(outcome, str) and "exp_avg" in outcome, superfluous("ensure_optimizer_state")


def test_stages_of_different_depth_do_not_compare_their_traces(found: dict) -> None:
    """Two pipeline stages in one world: ZeRO-3 compares its traces over the world, not over a stage's ranks. With one
    stage all traces agree, so the hook does no harm that could be seen. Both stages run equally many forwards here:
    with fewer, the one would wait for the other for ever."""
    assert found["stages"] == [[True] * 3] * 2
    try:
        run_ranks(2, _stages, False, timeout=60)
    except AssertionError as failure:
        assert "disagreement" in str(failure)
    else:
        pytest.fail(superfluous("fwd_pre_hook.remove"))


# ---------------------------------------------------------------------------------------------------------------------


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = adapter.import_deepspeed()
    monkeypatch.setattr(deepspeed, "__version__", "0.19.7")
    with pytest.raises(UserError, match=f"0.19.7.*pip install deepspeed=={adapter.SUPPORTED_VERSION}"):
        adapter.import_deepspeed()
    monkeypatch.setattr(deepspeed, "__version__", f"{adapter.SUPPORTED_VERSION}+local")
    assert adapter.import_deepspeed() is deepspeed
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install"):
        adapter.import_deepspeed()


IMPORTS = """
import importlib, sys
from megavtp.parallel.deepspeed_adapter import import_deepspeed
import_deepspeed()
muon = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # as each of its ZeRO engines does
print("torch._inductor.compile_fx" in sys.modules)
importlib.reload(sys.modules["deepspeed.runtime.zero.muon.original_muon"])
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_an_engine_loads_no_compiler() -> None:
    told = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=True)
    guarded, unguarded = told.stdout.split()[-2:]
    assert guarded == "False"
    assert unguarded == "True", superfluous("import_muon")
