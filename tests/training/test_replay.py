"""A recorded step once more: what in it was not finite is found on the rank where it arose, and nothing is written."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from launched import Ranks, events, steps_done, succeed

from megavtp.checkpoint.store import CheckpointStore
from megavtp.config.schema import Config
from megavtp.errors import UserError
from megavtp.parallel.mesh import SINGLE
from megavtp.training.replay import NOT_FINITE, Unrecorded, check_replayed
from megavtp.training.trainer import Trainer, _newest

STEPS, SPOILT = 6, 5  # counted from 1
LAYOUT = ["parallel.tp=2", "parallel.pp=2", "parallel.zero_stage=3", "objectives.contrastive.micro_batch=4"]
MODULE = "trunk.blocks.1.attn.qkv"


def spoil(one_rank: bool, rank: int) -> None:
    """In one step ``MODULE`` gives out a NaN and an infinity; on many ranks, on one of the second replica's alone. The
    names of the samples of each step are printed."""
    compute = Trainer.do_step

    def step(self, batch):
        print(json.dumps({"seen": batch.step + 1, "dp": self.engine.mesh.dp_rank, "ids": batch.ids}), flush=True)
        module = dict(self.engine.module.named_modules()).get(MODULE)  # on one stage only
        chosen = not one_rank or (self.engine.mesh.dp_rank, self.engine.mesh.tp_rank) == (1, 1)
        if batch.step + 1 != SPOILT or module is None or not chosen:
            return compute(self, batch)
        with module.register_forward_hook(_spoilt, prepend=True):
            return compute(self, batch)

    Trainer.do_step = step


def _spoilt(module, args, output: torch.Tensor) -> torch.Tensor:
    output = output.clone()
    output[0, 0], output[1, 1] = torch.nan, torch.inf
    return output


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def command(recipe, tmp_path_factory) -> list[str]:
    """Of the run whose fifth step was skipped: it has checkpoints of the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("recorded")
    command = ["--config", recipe, f"output_dir={folder / 'run'}", f"train.steps={STEPS}"]
    succeed(command, 1, folder, partial(spoil, False))
    return command


def output_of(command: list[str]) -> Path:
    return Path(command[2].removeprefix("output_dir="))


def test_where_it_arose(command, tmp_path):
    output = output_of(command)
    before = content(output)
    (skipped,) = events(output, "skipped")
    assert skipped["replay"] == f"--replay {SPOILT}"
    with Ranks([*command, *LAYOUT, "--replay", str(SPOILT)], 8, tmp_path, partial(spoil, True)) as ranks:
        assert ranks.wait() == [NOT_FINITE] * 8, ranks.output
    assert content(output) == before
    seen = [json.loads(line) for line in ranks.output.splitlines() if line.startswith('{"seen"')]
    assert {record["seen"] for record in seen} == {4, 5}  # the steps after the checkpoint
    of_replicas = {record["dp"]: record["ids"] for record in seen if record["seen"] == SPOILT}
    assert of_replicas[0] + of_replicas[1] == skipped["ids"]

    lines = [line.removeprefix("step 5: ") for line in ranks.output.splitlines() if line.startswith("step 5: ")]
    assert any(re.fullmatch(r"contrastive/loss \d\.\d+", line) for line in lines)
    assert "reconstruction/l1 nan, not finite on rank 4, 5, 6, 7" in lines
    assert any(line.startswith("gradient norm inf (") for line in lines)
    found = [re.fullmatch(r"rank (\d) \((.*)\), pass (\w+): (output|gradient) of (\S+), (.*)", line) for line in lines]
    outputs = {(m[1], m[2], m[5]): m[6] for m in found if m and m[4] == "output"}
    where = "7", "dp 1, pp 1, tp 1", MODULE
    assert re.fullmatch(r"2 of \d+ numbers in \(\d+, 48\); what it was given is finite", outputs[where]), outputs
    # Its tensor-parallel peer meets it in the sum over both, the decoder's first stage in what is sent back.
    assert "given is finite" in outputs["6", "dp 1, pp 1, tp 0", "trunk.blocks.1.attn.proj"]
    assert "given is finite" not in outputs["5", "dp 1, pp 0, tp 1", "pixel_decoder.proj_in"]
    towers = {(int(m[1]), m[5].partition(".")[0]) for m in found if m and m[4] == "gradient"}
    assert towers == {(rank, tower) for rank in range(4, 8) for tower in ("trunk", "pixel_decoder")}


def test_a_finite_step_after_a_skipped_one(command, tmp_path):
    output = output_of(command)
    before = content(output)
    with Ranks([*command, "--replay", str(STEPS)], 1, tmp_path, partial(spoil, False)) as ranks:
        assert ranks.wait() == [0], ranks.output
    assert content(output) == before
    lines = [line.removeprefix("step 6: ") for line in ranks.output.splitlines() if line.startswith("step 6: ")]
    expected = steps_done(output)[STEPS]
    terms = {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if "/" in name}
    assert terms == pytest.approx(expected["terms"], rel=1e-7)
    assert lines[-1] == "all terms, outputs of modules and gradients are finite"


def test_a_step_that_the_run_does_not_have():
    for step in (1, STEPS, None):
        check_replayed(step, STEPS)
    for step in (0, STEPS + 1, -1):
        with pytest.raises(UserError, match=f"--replay {step}: the run has the steps 1 to {STEPS}"):
            check_replayed(step, STEPS)


def test_telemetry_that_records_nothing(tmp_path, capsys):
    telemetry = Unrecorded(Config(output_dir=str(tmp_path / "run")), SINGLE, 0.0)
    telemetry.event("skipped", step=3, terms=["a"])
    with telemetry.paused():
        telemetry.picture(3, "grid", tmp_path / "grid.png")
    telemetry.step(0, {"a/loss": torch.ones(())}, 1.0, 0.1, 0.0)
    telemetry.close()
    assert capsys.readouterr().out.startswith("step 3: skipped terms=['a']\nstep 3: picture name=grid")
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_before_the_step(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=5)
    for step in (4, 6):
        store.save(step, {"x": torch.zeros(1)}, {})
        store.wait()
    assert [_newest(tmp_path, last).step for last in (4, 5, 6, 7, None)] == [4, 4, 6, 6, 6]
    with pytest.raises(UserError, match="from before step 4: .*train.resume=never"):
        _newest(tmp_path, 3)
