"""A study runs its links once each, goes on after a kill with the same results, and names what fails."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from stand_in import ROOT, StandIn, small_study, write_study

from megavtp.errors import UserError
from megavtp.study import locks, pages, runner
from megavtp.study.answers import curves_page
from megavtp.study.cells import cells_of, links_of
from megavtp.study.config import load_study
from megavtp.study.costs import devices_of, rates_of
from megavtp.study.curves import fit_results
from megavtp.study.links import Link
from megavtp.study.locks import alone
from megavtp.study.record import read_record, write_record
from megavtp.study.report import render_study
from megavtp.study.results import rows_of
from megavtp.study.runner import run_study

TABLES = ("results.csv", "results.json")


def tables(study) -> list[bytes]:
    return [(Path(study.output_dir) / name).read_bytes() for name in TABLES]


def quiet(line: str) -> None:
    pass


def test_each_link_runs_once_after_what_it_needs(tmp_path):
    study, stand_in = small_study(tmp_path), StandIn()
    assert run_study(study, stand_in, quiet) == 0
    folders = [link.folder for link in stand_in.ran]
    assert len(folders) == len(set(folders)) == 4 * 2 * (1 + 1 + 1 + 2 * 2)
    assert all(folders.index(before.folder) < i for i, link in enumerate(stand_in.ran) for before in link.after)
    before = tables(study)
    again = StandIn()
    assert run_study(study, again, quiet) == 0
    assert not again.ran and tables(study) == before


def test_the_table_has_a_row_for_each_cell_and_the_curves_are_those_of_the_numbers(tmp_path):
    study = small_study(tmp_path)
    run_study(study, StandIn(), quiet)
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    first = rows[0]
    assert first["cell"] == "joint/step-00000100/seed-0" and first["objectives"] == "joint" and first["seed"] == "0"
    assert float(first["generation/fd"]) == pytest.approx(59.9) and first["knn/group_top1"] == "0.1"
    assert first["samples"] == "12800" and "reconstruction/none" not in first
    found = json.loads((tmp_path / "out" / "results.json").read_text())["curves"]
    noise = found["noise"]["generation/fd"]
    assert noise["deviation"] == pytest.approx(0.2 / 2**0.5) and noise["freedom"] == 8
    (pair,) = [pair for pair in found["pairs"] if pair["line"] == "objectives=joint"]
    per_step = float(rows[0]["flops"]) / 100
    assert pair["crossing"]["at"] == pytest.approx(200 * per_step, rel=0.05)  # 4000 / 200 + 20 = 40
    line = next(line for line in found["lines"] if line["line"] == "objectives=joint")
    assert [len(point["values"]) for point in line["points"]] == [2] * 4 and not line["left_out"]
    assert line["fit"]["parameters"]["c"] == pytest.approx(1, rel=1e-3)


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


class Fate:
    """Counts the steps of a run, and kills it at step ``end``."""

    def __init__(self, end: int | None = None):
        self.steps, self.end = 0, end

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.end:
            raise Killed


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Before and after each command, and before and after each file is put in its place."""
    study = small_study(tmp_path, looks=[100], curves={}, axes={"objectives": {"joint": {"tokenizer": ["seed=1"]}}})
    real = os.replace

    def run(fate: Fate) -> int:
        class Mortal(StandIn):
            def __call__(self, command, link, lock):
                fate.step()
                status = super().__call__(command, link, lock)
                fate.step()
                return status

        def replace(source, target):
            fate.step()
            real(source, target)
            fate.step()

        monkeypatch.setattr(os, "replace", replace)
        return run_study(study, Mortal(), quiet)

    whole = Fate()
    run(whole)
    right = tables(study)
    assert whole.steps > 50
    for end in range(1, whole.steps + 1):
        shutil.rmtree(study.output_dir)
        with pytest.raises(Killed):
            run(Fate(end))
        assert run(Fate()) == 0 and tables(study) == right
        assert not list(Path(study.output_dir).rglob("*.partial"))


def test_a_failed_link_is_named_with_its_log_and_the_other_cells_go_on(tmp_path):
    study, told = small_study(tmp_path), []
    broken = "ae/step-00000200/latents"
    assert run_study(study, StandIn(broken), told.append) == 1
    out = tmp_path / "out"
    assert told[-1] == (
        f"failed: latents in {out}/{broken} (exit status 1: RuntimeError: no room); its log is "
        f"{out}/{broken}/log.txt; cells without a result: 2"
    )
    assert (out / "results.csv").read_text().count("\n") == 1 + 14
    page = pages.status_page(cells := cells_of(study), rates_of(links_of(cells), study.cost))
    assert f"latents failed, see {out}/{broken}/log.txt" in page and page.endswith("16 cells: 14 finished, 2 failed")
    again = StandIn()
    assert run_study(study, again, quiet) == 0
    assert [link.kind for link in again.ran] == ["latents", "dit", "generate", "dit", "generate"]


def test_a_command_that_leaves_no_output_has_failed(tmp_path):
    study = small_study(tmp_path, looks=[100], seeds=[0])
    assert run_study(study, lambda command, link, lock: 0, quiet) == 1


def test_a_changed_setting_is_told_and_nothing_runs(tmp_path):
    run_study(small_study(tmp_path), StandIn(), quiet)
    changes = {
        "dit": {"recipe": str(ROOT / "configs/demo/dit_emoji.yaml"), "settings": ["train.steps=50"]},
        "measures": {"tokenizer": "--data other", "generation": "--reference data"},
    }
    said = {
        "dit": "seed-0/dit was begun with train.steps = 4000, not 50; set another output_dir, or remove",
        "measures": "evaluate was begun with the options data, and not other",
    }
    for key, value in changes.items():
        stand_in = StandIn()
        with pytest.raises(UserError, match=said[key]):
            run_study(small_study(tmp_path, **{key: value}), stand_in, quiet)
        assert not stand_in.ran
    layout = {"recipe": str(ROOT / "configs/demo/vtp_emoji.yaml"), "settings": ["parallel.zero_stage=1"]}
    stand_in = StandIn()
    assert run_study(small_study(tmp_path, tokenizer=layout), stand_in, quiet) == 0 and not stand_in.ran


def test_results_are_those_of_the_study_that_is_asked(tmp_path):
    run_study(small_study(tmp_path), StandIn(), quiet)
    tokenizer = {"recipe": str(ROOT / "configs/demo/vtp_emoji.yaml"), "settings": ["train.batch_size=64"]}
    path = write_study(tmp_path, tokenizer=tokenizer)
    for ask in (lambda: rows_of(cells_of(load_study(path))), lambda: render_study(path)):
        with pytest.raises(UserError, match="pretrain was begun with train.batch_size = 128, not 64"):
            ask()


def test_what_was_made_from_something_that_is_gone_is_named(tmp_path):
    study = small_study(tmp_path, looks=[100], seeds=[0])
    run_study(study, StandIn(), quiet)
    links = [link for link in links_of(cells_of(study)) if "joint" in link.folder.parts]
    shutil.rmtree(links[0].folder)
    gone = f"{links[0].folder} is not there any more, but what was made from it is"
    with pytest.raises(UserError, match=gone) as told:
        run_study(study, StandIn(), quiet)
    assert [str(link.folder) for link in links[1:]] == str(told.value).partition("remove it, too: ")[2].split(", ")
    for link in links[1:]:
        shutil.rmtree(link.folder)
    stand_in = StandIn()
    assert run_study(study, stand_in, quiet) == 0 and stand_in.ran == links


def test_a_look_that_a_run_is_past_is_told(tmp_path):
    one = {"looks_at": "checkpoints", "looks": [200, 400]}
    run_study(small_study(tmp_path, **one), StandIn(), quiet)
    later = StandIn()
    assert run_study(small_study(tmp_path, **one | {"looks": [200, 400, 600]}), later, quiet) == 0
    assert later.ran[0].kind == "pretrain"  # goes on
    with pytest.raises(UserError, match="step-00000100 was not kept by this training, which is past it"):
        run_study(small_study(tmp_path, **one | {"looks": [100, 200, 400]}), StandIn(), quiet)


def test_a_measure_that_some_cells_lack_is_told(tmp_path):
    class Diverged(StandIn):
        def __call__(self, command, link, lock):
            status = super().__call__(command, link, lock)
            if str(link.folder).endswith("ae/step-00000200/seed-1/generate"):
                link.outputs[0].write_text(json.dumps({"metrics": {"generation/fd": None}}))
            return status

    study = small_study(tmp_path)
    assert run_study(study, Diverged(), quiet) == 0
    told = curves_page(study, fit_results(study, rows_of(cells_of(study))), 16, 16)
    assert "generation/fd: no number from ae/step-00000200/seed-1, which finished without one; their metrics" in told
    assert "generation/fd of objectives=joint: y = a x^-c + d through 4 points has c = " in told


def test_seeds_that_draw_equally_well_by_chance_are_two(tmp_path):
    study = small_study(tmp_path)
    rows = [
        {"cell": f"{seed}", "objectives": "joint", "seed": seed, "flops": 1e12, "steps": 100,
         "generation/fd": 40.0, "knn/group_top1": 0.5}
        for seed in (0, 1)
    ]
    better = {"generation/fd": "lower", "knn/group_top1": "higher"}
    fits = fit_results(replace(study, curves=replace(study.curves, better=better)), rows)
    counts = {line.measure: len(line.points[0].values) for line in fits.lines}
    assert counts == {"generation/fd": 2, "knn/group_top1": 1}


def test_a_second_point_or_seed_adds_to_what_is_there(tmp_path):
    run_study(small_study(tmp_path, seeds=[0]), StandIn(), quiet)
    stand_in = StandIn()
    run_study(small_study(tmp_path), stand_in, quiet)
    assert {link.kind for link in stand_in.ran} == {"dit", "generate"}
    assert all("seed-1" in link.folder.parts for link in stand_in.ran)


def test_the_time_of_a_broken_link_is_not_taken_for_a_rate(tmp_path):
    study = small_study(tmp_path, looks=[100], seeds=[0])

    class Broken(StandIn):
        def __call__(self, command, link, lock):
            raise Killed

    with pytest.raises(Killed):
        run_study(study, Broken(), quiet)
    assert run_study(study, StandIn(), quiet) == 0
    joint, ae = (link for link in links_of(cells_of(study)) if link.kind == "pretrain")
    assert not read_record(joint).whole and read_record(ae).whole
    rate = ae.flops / read_record(ae).seconds
    assert rates_of([joint, ae], study.cost).flops_per_second["pretrain"] == pytest.approx(rate)


@pytest.mark.parametrize("launcher, devices", [
    ("deepspeed --num_gpus 8", 8), ("deepspeed --num_accelerators=2 --master_port 29600", 2), ("python", 1),
    ("torchrun --nnodes 3 --nproc_per_node 4", 12), ("srun --ntasks=16 --wait=120 python -u", 16), ("deepspeed", None),
    ("deepspeed --hostfile hosts", None),
])
def test_device_hours_count_the_processes_that_the_launcher_names(launcher, devices, tmp_path):
    study = small_study(tmp_path, launcher=launcher, looks=[100], seeds=[0])
    run_study(study, StandIn(), quiet)
    assert devices_of(read_record(links_of(cells_of(study))[0]).command) == devices


def test_device_hours_stand_beside_the_hours(tmp_path):
    study = small_study(tmp_path, launcher="deepspeed --num_gpus 8", looks=[100], seeds=[0])
    run_study(study, StandIn(), quiet)
    for link in (links := links_of(cells := cells_of(study))):
        write_record(link, replace(read_record(link), seconds=1800.0))
    page = pages.status_page(cells, rates_of(links, study.cost))
    assert [line.split()[3:5] for line in page.splitlines()[1:3]] == [["2.50", "20.00"]] * 2
    total = sum(link.flops for link in links)
    told = f"The links that were run took 5.00 hours, 40.00 device-hours, for {pages.flops_text(total)} of training."
    assert pages.cost_text(cells) == told and told in render_study(tmp_path / "study.yaml")
    assert b"hours" not in b"".join(tables(study))


def test_a_study_that_is_told_to_stop_tells_its_command_and_waits_for_it(tmp_path):
    (link,) = [link for link in links_of(cells_of(small_study(tmp_path, looks=[100]))) if link.kind == "pretrain"][:1]
    link.folder.mkdir(parents=True)
    code = (
        "import signal, sys, time\n"
        "def save(*_):\n time.sleep(0.2)\n print('saved', flush=True)\n sys.exit(143)\n"
        "signal.signal(signal.SIGINT, save)\nprint('ready', flush=True)\ntime.sleep(60)"
    )

    def stop() -> None:
        while not (link.log.exists() and "ready\n" in link.log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with alone(link.folder / runner._RUNNING, "busy") as lock, pytest.raises(KeyboardInterrupt):
        runner.run_command([sys.executable, "-c", code], link, lock)
    assert link.log.read_text().endswith("saved\n")


def test_the_time_of_a_link_that_was_interrupted_counts(tmp_path):
    study = small_study(tmp_path, looks=[100])
    first = links_of(cells_of(study))[0]

    def interrupted(command: list[str], link: Link, lock: int) -> int:
        time.sleep(0.1)
        raise KeyboardInterrupt

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_study(study, interrupted, quiet)
        record = read_record(first)
        assert record.state == "begun" and record.seconds >= 0.1 * times
    assert run_study(study, StandIn(), quiet) == 0
    assert read_record(first).state == "finished" and read_record(first).seconds >= 0.2


def test_a_command_writes_to_the_log_and_its_lock_outlives_a_killed_study(tmp_path):
    (link,) = [link for link in links_of(cells_of(small_study(tmp_path, looks=[100]))) if link.kind == "pretrain"][:1]
    link.folder.mkdir(parents=True)
    with alone(link.folder / runner._RUNNING, "busy") as lock:
        status = runner.run_command([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], link, lock)
    assert status == 3 and link.log.read_text().splitlines()[-1] == "hello"
    with alone(link.folder / runner._RUNNING, "busy") as lock:  # as if the study ended here, and its command did not
        command = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.7)"], pass_fds=(lock,))
    begin, locks._POLL = time.monotonic(), 0.05
    with alone(link.folder / runner._RUNNING, "busy"):
        waited = time.monotonic() - begin
    command.wait()
    assert waited > 0.2
    said = "no-such-launcher cannot be started"
    with pytest.raises(UserError, match=said), alone(link.folder / runner._RUNNING, "busy") as lock:
        runner.run_command(["no-such-launcher"], link, lock)
