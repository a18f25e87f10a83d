"""One process plays a rank of 1,024 in layouts of VTP-g and DiT-1p6B, and is compared with the plan. Minutes each.

    python -m pytest -s -m sweep tests/planning/test_thousand_ranks.py

Columns of a row: recipe, tp x pp x dp, ZeRO stage, rank, seconds to set up and for a step, messages, GiB sent, GiB held
at most, as planned.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megavtp.config.load import load_config
from megavtp.config.schema import Config
from megavtp.dit.config import DiTConfig
from megavtp.dit.rehearsal import rehearse_dit
from megavtp.planning.plan import GIB
from megavtp.pretraining.rehearsal import rehearse_pretraining

CONFIGS = Path(__file__).parents[2] / "configs"
WORLD, STREAMS = 1024, "data.streams=1024"
PLAIN = "parallel.schedule=1f1b parallel.virtual_stages=1"
STRIPED = "parallel.schedule=interleaved_1f1b parallel.virtual_stages=2"
SHARED = "parallel.sequence_parallel=true parallel.recompute=selective"


def micro_batches(pairs: int, views: int, images: int) -> str:
    sizes = {"contrastive": pairs, "self_distillation": views, "reconstruction": images}
    return " ".join(f"objectives.{name}.micro_batch={size}" for name, size in sizes.items())


# tp, pp, ZeRO stage, the rank that is played, settings. What 8 ranks share must divide by 8.
VTP_G = [
    (8, 4, 1, 1005, f"model.text.heads=16 {STRIPED} {micro_batches(128, 32, 16)}"),
    (1, 1, 3, 700, f"{STREAMS} {PLAIN} {micro_batches(16, 4, 2)}"),
    (4, 8, 1, 37, f"{STRIPED} {micro_batches(128, 32, 16)}"),
    (8, 1, 2, 513, f"model.text.heads=16 {PLAIN} {SHARED} {micro_batches(64, 16, 16)}"),
]
DIT_1P6B = [
    (8, 4, 1, 1005, "model.width=1920 model.heads=24 flow_matching.micro_batch=8"),
    (1, 1, 3, 700, f"{STREAMS} flow_matching.micro_batch=1"),
    (2, 8, 1, 37, f"{STRIPED} flow_matching.micro_batch=2"),
    (2, 1, 2, 513, f"{STREAMS} {SHARED} flow_matching.micro_batch=1"),
]
ROWS = [("pretrain/vtp_g", row) for row in VTP_G] + [("dit/dit_1p6b", row) for row in DIT_1P6B]


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe, row", ROWS)
def test_a_rank_of_a_thousand(recipe: str, row: tuple[int, int, int, int, str]) -> None:
    tp, pp, zero_stage, rank, settings = row
    layout = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.zero_stage={zero_stage}", *settings.split()]
    is_dit = recipe.startswith("dit/")
    given = load_config(CONFIGS / f"{recipe}.yaml", DiTConfig if is_dit else Config, layout)
    found = (rehearse_dit if is_dit else rehearse_pretraining)(given, WORLD, rank)
    assert found.agrees(), found.page()
    played, dp = found.played, WORLD // (tp * pp)
    within, of_dp = rank % (tp * pp), rank // (tp * pp)
    assert played.groups["tp"] == list(range(rank - rank % tp, rank - rank % tp + tp))
    assert played.groups["pp"] == [of_dp * tp * pp + stage * tp + within % tp for stage in range(pp)]
    assert played.groups["dp"] == list(range(within, WORLD, tp * pp))
    setup = played.seconds["groups"] + played.seconds["model and engine"]
    print(
        f"\n| {recipe.split('/')[1]} | {tp} x {pp} x {dp} | {zero_stage} | {rank} | {setup:.0f} | "
        f"{played.seconds['step']:.0f} | {sum(played.traffic.messages.values()):,} | "
        f"{played.traffic.bytes / GIB:.2f} | {played.peak / GIB:.2f} | {found.memory / GIB:.2f} |"
    )
