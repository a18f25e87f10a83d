"""A rank of a world that is not there plays whole steps: it sends and needs what the plan says and a real rank does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from dit_cells import Cell, CellRun
from latent_folder import random_latents
from planned_runs import by_kind, layout, plan_of
from test_planned_memory import SECOND_STAGE, SIZES

from megavtp.config.schema import Config
from megavtp.decoder.rehearsal import play_decoder
from megavtp.dit.config import DiTConfig, complete_config
from megavtp.dit.plan import planned
from megavtp.dit.rehearsal import play_dit, rehearse_dit
from megavtp.dit.validate import with_latents
from megavtp.errors import UserError
from megavtp.latents.folder import LatentFolder
from megavtp.parallel.traffic import count_traffic
from megavtp.planning.plan import most_bytes
from megavtp.planning.zero import State, reduction_of
from megavtp.pretraining.rehearsal import beside_the_plan, play_pretraining
from megavtp.training.rehearsal import Rehearsed
from megavtp.training.step import train_step

ROOT = Path(__file__).parents[2]
OF_16 = {  # by the rank that is played
    5: layout(16, 1, SIZES, tp=2, pp=2, zero_stage=1, sequence_parallel=True, recompute="selective"),
    7: layout(16, 2, SIZES, pp=4, zero_stage=2),
    12: layout(16, 1, SIZES, tp=2, pp=2, zero_stage=3, zero3_gather="step"),
    15: layout(16, 1, SIZES, tp=4, pp=2, zero_stage=0, schedule="gpipe", precision="bf16"),
}


def all_but(rank: int, given: dict[int, Config]) -> list:
    """The cases, of which that one is left to the sweeps: each takes half a minute."""
    return [pytest.param(*case, marks=[pytest.mark.sweep] if case[0] == rank else []) for case in given.items()]


@pytest.mark.parametrize("rank, config", all_but(15, OF_16))
def test_a_rank_of_sixteen(rank: int, config: Config) -> None:
    played = play_pretraining(config, 16, rank, fused_norms=False)
    plan = plan_of(config, 16).ranks[played.mesh.pp_rank]
    assert played.traffic.sent == plan.sent
    assert plan.memory == pytest.approx(played.peak, rel=0.1)
    assert Rehearsed(played, plan.sent, plan.memory).agrees()
    assert not Rehearsed(played, plan.sent, plan.memory * 1.2).agrees()
    assert not Rehearsed(played, plan.sent + plan.sent, plan.memory).agrees()


DECODERS_OF_16 = {
    6: layout(16, 2, SECOND_STAGE, tp=2, pp=2, zero_stage=1, sequence_parallel=True),
    9: layout(16, 1, SECOND_STAGE, tp=2, pp=2, zero_stage=2, precision="bf16"),
    15: layout(16, 1, SECOND_STAGE, tp=4, zero_stage=3),
}


@pytest.mark.parametrize("rank, config", all_but(6, DECODERS_OF_16))
def test_a_rank_of_sixteen_in_the_second_stage(rank: int, config: Config) -> None:
    played = play_decoder(config, 16, rank, fused_norms=False)
    found = beside_the_plan(config, 16, played, cuda=False)
    assert found.agrees(), found.page()


SIZES_OF_LATENTS = {"latent_size": 16, "latent_channels": 8, "num_classes": 10}
DITS_OF_16 = {
    3: Cell(2, 2, 4, 1, 2, "1f1b", "selective", sequence_parallel=True),
    7: Cell(1, 4, 4, 2, 4, "gpipe", "full", precision="bf16"),
}


@pytest.mark.parametrize("rank, cell", DITS_OF_16.items())
def test_a_rank_of_sixteen_of_a_dit(rank: int, cell: Cell, tmp_path: Path) -> None:
    config = complete_config(cell.config(tmp_path, model={"width": 96, "depth": 8, "heads": 4, **SIZES_OF_LATENTS}))
    played = play_dit(config, 16, rank, fused_norms=False)
    plan = planned(config, played.mesh, cuda=False)
    found = Rehearsed(played, plan.sent, plan.memory)
    assert found.agrees(), found.page()


def test_what_linear_layers_hold_under_zero_3(tmp_path: Path) -> None:
    sizes = {"width": 384, "depth": 6, "heads": 4, "latent_size": 2, "latent_channels": 8, "num_classes": 10}
    peaks, plans = [], []
    for lean in (True, False):
        deepspeed = {"zero_optimization": {"memory_efficient_linear": lean, "reduce_bucket_size": 1_000_000}}
        config = complete_config(Cell(1, 1, 2, 3, precision="bf16").config(tmp_path, model=sizes, deepspeed=deepspeed))
        played = play_dit(config, 2, 1, fused_norms=False)
        assert F.linear is torch._C._nn.linear  # a run's ZeRO 3 replaces it for good
        peaks.append(played.peak)
        plans.append(planned(config, played.mesh, cuda=False).memory)
    assert peaks[0] < 0.9 * peaks[1]
    assert plans[1] - plans[0] == pytest.approx(peaks[1] - peaks[0], rel=0.25)


@pytest.mark.parametrize("zero_stage, overlap, micro_batches, bucket", [
    (1, False, 1, 6_000_000), (1, True, 1, 600_000), (1, True, 2, 600_000), (2, False, 2, 10_000),
    (2, False, 2, 600_000), (2, True, 1, 6_000_000), (3, False, 1, 10_000), (3, False, 2, 600_000),
])
def test_what_reducing_gradients_needs(
    zero_stage: int, overlap: bool, micro_batches: int, bucket: int, tmp_path: Path
) -> None:
    """Of a model that holds more in weights than in activations, beside a bucket for none, some or all gradients."""
    sizes = {"width": 256, "depth": 2, "heads": 4, "latent_size": 2, "latent_channels": 8, "num_classes": 10}
    deepspeed = {"zero_optimization": {"overlap_comm": overlap, "reduce_bucket_size": bucket}}
    cell = Cell(1, 1, 2, zero_stage, micro_batches)
    config = complete_config(cell.config(tmp_path, model=sizes, deepspeed=deepspeed))
    played = play_dit(config, 2, 1, fused_norms=False)  # which owns more of the gradients than the first one
    assert planned(config, played.mesh, cuda=False).memory == pytest.approx(played.peak, rel=0.1)


def test_a_bucket_is_a_number_of_elements() -> None:
    assert reduction_of({"zero_optimization": {"reduce_bucket_size": 2e7}}, 2, cuda=True).bucket == 20_000_000
    with pytest.raises(UserError, match="reduce_bucket_size: expected a number of elements, got 'many'"):
        reduction_of({"zero_optimization": {"reduce_bucket_size": "many"}}, 2, cuda=True)


def test_what_is_there_in_which_backward() -> None:
    state = State(
        False, weights=100, gradients=50, optimizer=20, teacher=0, buffers=8, spilled=(5, 3), lingering=16,
        end=(-40, 2), update=30, setup=0,
    )
    one, two = [(0.0, 60.0, 0.0)], [(0.0, 60.0, 30.0), (0.0, 40.0, 0.0)]
    assert most_bytes(state, one, early=False) == most_bytes(state, one, early=True) == 100 + 20 + 8 + 60 + 5
    assert most_bytes(state, two, early=False) == state.total + 40 + 3 + 16
    # Only the last backward reduces.
    assert most_bytes(replace(state, lingering=0), [(0.0, 99.0, 30.0)], early=True) == 100 + 20 + 8 + 99
    assert most_bytes(replace(state, lingering=0), two, early=True) == state.total + 40 + 3
    assert most_bytes(state, [(0.0, 1.0, 1.0)], early=False) == state.total + 1 + 3 + 16
    assert most_bytes(state, [(0.0, 1.0, 0.0)], early=False) == 100 + 20 + 30
    assert most_bytes(replace(state, setup=300), two, early=True) == 300


def dit_on_a_real_rank(rank: int, config: DiTConfig) -> tuple[dict, dict]:
    run = CellRun(config)
    for step in range(2):
        with count_traffic(run.mesh) as traffic:
            train_step(run.engine, run.passes, run.data[step], lr_of=lambda group: 0.01)
    run.engine.close()
    return by_kind(traffic)


def test_a_dit_sends_what_a_real_one_does(tmp_path: Path) -> None:
    root = random_latents(tmp_path / "latents", shape=(4, 6, 6), captions=6)
    config = Cell(1, 2, 2, 3, micro_batches=2, schedule="interleaved_1f1b").config(root)
    real = run_ranks(4, dit_on_a_real_rank, config)
    complete = with_latents(config, LatentFolder(root))
    for rank in (0, 3):
        played = play_dit(complete, 4, rank, fused_norms=False)
        assert (played.traffic.sent, played.traffic.messages) == real[rank]
        assert played.traffic.sent == planned(complete, played.mesh).sent
        assert played.blocks["dit"] == played.blocks["ema"] == [[0, 2, 3], [1, 4]][played.mesh.pp_rank]


def test_latents_that_are_not_there() -> None:
    with pytest.raises(UserError, match="model.latent_size = null is that of data.root"):
        rehearse_dit(DiTConfig(), 1, 0)


def test_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    settings = ["parallel.pp=2", "objectives.self_distillation.weight=0"]
    monkeypatch.setattr(sys, "argv", ["plan.py", "--gpus", "4", "--rehearse", "3", *settings])
    with pytest.raises(SystemExit) as ended:
        run_path(str(ROOT / "tools" / "plan.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 0, said
    lines = said.out.splitlines()
    assert lines[0] == "rank        3 of 4: tp 0 of 1, pp 1 of 2, dp 1 of 2"
    assert lines[1] == "groups      pp 2-3; dp 1 3; mp 2-3"
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert rows[0] == ["axis", "operation", "messages", "bytes", "planned"]
    assert {row[0] for row in rows[1:]} == {"pp", "dp", "mp"} and all(row[3] == row[4] for row in rows[1:])
